// Shadow memory: who last wrote and who has since read every byte, and whether a new access is ordered after them.
//
// State is kept per 16-byte line while accesses cover whole lines, and in cells of 8, 4, 2 or 1 bytes where they do not.
#pragma once
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "clock.h"

namespace emu {

// Memory-order scope of an access. Two accesses that are both strong, in scopes that include each other, do not race.
enum Scope : u8 { kWeak, kScopeCta, kScopeCluster, kScopeGpu };
// kNeutral: neither proxy asks for a fence after or before it.
enum class Proxy : u8 { kGeneric, kAsync, kNeutral };

struct Access {
  Owner owner = kNobody;
  Time time = 0;
  u32 pc = 0;
  Scope scope = kWeak;
  Proxy proxy = Proxy::kGeneric;
  bool repeats = false;  // a store of the bytes that are there already
  bool writes = false;   // among the accesses since the last ordinary write: a strong write
  bool counted = false;   // a generic write whose completion an mbarrier counts: once over, it has landed
  bool constant = false;  // a read that takes the memory to be read-only for the whole launch
};

// The accesses since the last ordinary write that no later one stands in for: reads, and strong writes.
class AccessSet {
 public:
  void add(const Access& access, const Actor& actor);
  void clear() { count_ = 0; }
  void complete(Owner owner, Time time);  // asynchronous accesses that were in flight
  const Access* begin() const { return spill_ ? spill_->data() : inline_; }
  const Access* end() const { return begin() + count_; }
  AccessSet() = default;
  AccessSet(const AccessSet& other) { *this = other; }
  AccessSet& operator=(const AccessSet& other);

 private:
  static constexpr u32 kInline = 2;
  Access* data() { return spill_ ? spill_->data() : inline_; }
  u32 count_ = 0;
  Access inline_[kInline];
  std::unique_ptr<std::vector<Access>> spill_;
};

struct Cell {
  Access write;  // the last ordinary one
  AccessSet since;
  bool initialised = false;
  u32 written_at = 0, constant_at = 0;  // 1 + pc of the last write of the launch, and of the last constant read
};

struct ShadowOptions {
  bool fence_by_writer = false;  // the writing thread itself must fence
  bool fence_by_reader = false;  // and, for data of another CTA, the reading thread too
  u32 shift = 0;                 // log2 of the agents of a CTA
  u32 ctas_per_cluster = 1;
};

class Shadow {
 public:
  Shadow() = default;
  // buffer: number that messages name the memory by.
  void enable(u32 buffer, u64 bytes, bool initialised, FenceSpace space, const ShadowOptions& options);
  bool enabled() const { return !lines_.empty(); }

  // `by` is recorded as the reader or writer: the actor itself, or an asynchronous agent that it starts.
  void read(u64 offset, u64 bytes, const Actor& actor, const Access& by);
  void write(u64 offset, u64 bytes, const Actor& actor, Access by);
  // An asynchronous write recorded with time kInFlight goes on in another's name.
  void hand_over(u64 offset, u64 bytes, Owner from, Owner to);
  // It has completed.
  void complete_write(u64 offset, u64 bytes, Owner owner, Time time);
  // Fresh contents, as after an mbarrier's storage is given back.
  void forget(u64 offset, u64 bytes);

 private:
  static constexpr u32 kLine = 16;
  struct Line {
    Cell whole;
    std::unique_ptr<Cell[]> cells;  // while the line is split
    u32 cell_bytes = kLine;
  };
  static void split(Line& line, u32 cell_bytes);
  template <class F> void for_cells(u64 offset, u64 bytes, bool unify, F f);
  void check_constant(const Cell& cell, u64 at, const Access& by, bool writes) const;
  void check_proxy(const Cell& cell, u64 at, const Actor& actor, bool reads) const;
  void read_cell(Cell& cell, u64 at, const Actor& actor, const Access& by) const;
  void check_write(const Cell& cell, u64 at, const Actor& actor, const Access& by) const;
  void check_order(const Access& earlier, u64 at, const Actor& actor, const Access& by, bool writes) const;
  bool morally_strong(const Access& a, const Access& b, const Actor& actor) const;
  [[noreturn]] void race(const char* action, u64 at, const char* other_action, const Access& other, const Access& by) const;

  u32 buffer_ = 0;
  FenceSpace space_ = kFenceShared;
  ShadowOptions options_;
  std::vector<Line> lines_;
};

// Distinct bytes touched, in steps of two.
class TouchMap {
 public:
  // Memory that the system zeroes page by page, as it is touched: a buffer may be large and next to nothing of it used.
  void resize(u64 bytes) { words_.reset(static_cast<u64*>(calloc(bytes / 128 + 2, sizeof(u64)))); }
  void touch(u64 offset, u64 bytes);
  u64 bytes() const { return touched_ * 2; }

 private:
  struct Free {
    void operator()(u64* words) const { free(words); }
  };
  std::unique_ptr<u64[], Free> words_;
  u64 touched_ = 0;
};

}  // namespace emu
