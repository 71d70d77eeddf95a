// The C interface that launch.py and program.py call through ctypes.
#include "engine.h"

namespace emu {

void OpTable::add(const std::string& name, Handler handler) {
  names_.push_back(name);
  handlers_.push_back(handler);
}

const OpTable& OpTable::get() {
  static const OpTable table = [] {
    OpTable t;
    for (auto add :
         {add_integer_ops, add_float_ops, add_convert_ops, add_control_ops, add_warp_ops, add_memory_ops, add_atomic_ops,
          add_barrier_ops, add_mbarrier_ops, add_matrix_ops, add_wgmma_ops, add_cp_async_ops, add_tma_ops,
          add_print_ops})
      add(t);
    return t;
  }();
  return table;
}

}  // namespace emu

using namespace emu;

extern "C" {

// program.py mirrors this structure.
struct ProgramSpec {
  // Per instruction: op, guard or -1, guard negated, destinations, registers, immediates, holds wgmma registers; then both
  // lists.
  const i64* code;
  u64 n_instructions;
  u32 n_32, n_64, n_pred, local_bytes, uses_wgmma;
  const u64* constants;  // pairs of register and value
  u64 n_constants;
  const u32* specials;  // pairs of kind and register
  u64 n_specials;
};

// launch.py mirrors this one.
struct BufferSpec {
  char* host;
  u64 bytes, address, row_bytes, row_stride;
  u32 writable, initialised;
  u64 bytes_read, bytes_written, first_touch_read, first_touch_written;  // results
};

u64 emu_op_count() { return OpTable::get().names().size(); }
const char* emu_op_name(u64 i) { return OpTable::get().names()[i].c_str(); }

Program* emu_program(const ProgramSpec* spec) {
  auto* program = new Program;
  program->n_32 = spec->n_32;
  program->n_64 = spec->n_64;
  program->n_pred = spec->n_pred;
  program->local_bytes = spec->local_bytes;
  program->uses_wgmma = spec->uses_wgmma;
  const i64* next = spec->code;
  std::vector<size_t> first_operand, first_immediate;
  for (u64 i = 0; i < spec->n_instructions; i++) {
    const i64 *head = next, *registers = head + 7, *immediates = registers + head[4];
    Handler handler = OpTable::get().handler(size_t(head[0]));
    Instruction in{head[6] ? check_held_registers : handler,
                   handler,
                   u32(i),
                   head[1] < 0 ? kNoGuard : u32(head[1]),
                   head[2] != 0,
                   u32(head[3]),
                   u32(head[4]),
                   nullptr,
                   nullptr};
    first_operand.push_back(program->operands.size());
    first_immediate.push_back(program->immediates.size());
    program->operands.insert(program->operands.end(), registers, immediates);
    next = immediates + head[5];
    program->immediates.insert(program->immediates.end(), immediates, next);
    program->code.push_back(in);
  }
  for (u64 i = 0; i < spec->n_instructions; i++) {
    program->code[i].reg = program->operands.data() + first_operand[i];
    program->code[i].imm = program->immediates.data() + first_immediate[i];
  }
  for (u64 i = 0; i < spec->n_constants; i++)
    program->constants.push_back({Operand(spec->constants[2 * i]), spec->constants[2 * i + 1]});
  for (u64 i = 0; i < spec->n_specials; i++)
    program->specials.push_back({Special(spec->specials[2 * i]), spec->specials[2 * i + 1]});
  return program;
}

void emu_free(Program* program) { delete program; }

// Runs a launch. Returns an ErrorKind; the message goes to `text`, or where there is none what the kernel has printed.
int emu_launch(const Program* program, const LaunchShape* shape, const Options* options, BufferSpec* buffers, u64 n_buffers,
               const char* params, u64 param_bytes, Stats* stats, u32* agent_shift, char* text, u64 text_bytes) {
  std::vector<Region> regions(n_buffers);
  for (u64 i = 0; i < n_buffers; i++) {
    const BufferSpec& spec = buffers[i];
    Region& region = regions[i];
    region.id = u32(i);
    region.host = spec.host;
    region.bytes = spec.bytes;
    region.address = spec.address;
    region.row_bytes = spec.row_bytes;
    region.row_stride = spec.row_stride;
    region.writable = spec.writable;
    region.initialised = spec.initialised;
    region.read_map.resize(spec.bytes);
    region.write_map.resize(spec.bytes);
  }
  Engine engine(*program, *shape, *options, regions, params, param_bytes);
  *agent_shift = engine.agent_shift;
  int result = int(ErrorKind::kNone);
  try {
    engine.run();
    snprintf(text, text_bytes, "%s", engine.printed.c_str());
  } catch (const Fault& found) {
    result = int(found.kind);
    snprintf(text, text_bytes, "%s", found.text.c_str());
  }
  *stats = engine.stats;
  for (u64 i = 0; i < n_buffers; i++) {
    buffers[i].bytes_read = regions[i].bytes_read;
    buffers[i].bytes_written = regions[i].bytes_written;
    buffers[i].first_touch_read = regions[i].read_map.bytes();
    buffers[i].first_touch_written = regions[i].write_map.bytes();
  }
  return result;
}

}  // extern "C"
