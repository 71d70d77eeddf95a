// A decoded kernel: instructions that point at their handlers, and the registers they need.
#pragma once
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "common.h"

namespace emu {

struct Warp;
struct Instruction;
using Handler = void (*)(Warp& warp, const Instruction& in, u32 mask);

// A register operand: index << 2 | file.
enum File : u32 { k32 = 0, k64 = 1, kPred = 2 };
using Operand = u32;

struct Instruction {
  Handler run;
  Handler unchecked;  // the handler proper, where `run` first checks registers that wgmma may hold
  u32 pc;
  u32 guard;  // predicate register, or kNoGuard
  bool guard_negated;
  u32 n_dst, n_reg;  // destinations come first among the operands
  const Operand* reg;
  const i64* imm;
};
constexpr u32 kNoGuard = ~0u;

// Registers whose value depends on the thread, filled in when a warp starts.
enum class Special : u32 {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaidX,
  kCtaidY,
  kCtaidZ,
  kNctaidX,
  kNctaidY,
  kNctaidZ,
  kLaneid,
  kWarpid,
  kNwarpid,
  kClusterCtaidX,
  kClusterCtaidY,
  kClusterCtaidZ,
  kClusterNctaidX,
  kClusterNctaidY,
  kClusterNctaidZ,
  kClusterCtarank,
  kClusterNctarank,
  kClusteridX,
  kClusteridY,
  kClusteridZ,
  kNclusteridX,
  kNclusteridY,
  kNclusteridZ,
  kLanemaskEq,
  kLanemaskLt,
  kLanemaskLe,
  kLanemaskGt,
  kLanemaskGe,
  kSmid,
  kNsmid,
  kDynamicSmemSize,
  kTotalSmemSize
};

struct SpecialRegister {
  Special kind;
  Operand reg;
};
struct Constant {
  Operand reg;
  u64 value;
};

struct Program {
  std::vector<Instruction> code;
  std::vector<Operand> operands;
  std::vector<i64> immediates;
  u32 n_32 = 0, n_64 = 0, n_pred = 0;
  std::vector<SpecialRegister> specials;
  std::vector<Constant> constants;
  u32 local_bytes = 0;
  bool uses_wgmma = false;
};

// The engine's instruction set: what the translator may emit, by name.
class OpTable {
 public:
  void add(const std::string& name, Handler handler);
  static const OpTable& get();
  const std::vector<std::string>& names() const { return names_; }
  Handler handler(size_t op) const { return handlers_[op]; }

 private:
  std::vector<std::string> names_;
  std::vector<Handler> handlers_;
};

// Runs in front of instructions that name registers of wgmma.
void check_held_registers(Warp& warp, const Instruction& in, u32 mask);

// One per ops_*.cpp.
void add_integer_ops(OpTable&);
void add_float_ops(OpTable&);
void add_convert_ops(OpTable&);
void add_control_ops(OpTable&);
void add_warp_ops(OpTable&);
void add_memory_ops(OpTable&);
void add_atomic_ops(OpTable&);
void add_barrier_ops(OpTable&);
void add_mbarrier_ops(OpTable&);
void add_matrix_ops(OpTable&);
void add_wgmma_ops(OpTable&);
void add_cp_async_ops(OpTable&);
void add_tma_ops(OpTable&);
void add_print_ops(OpTable&);

}  // namespace emu
