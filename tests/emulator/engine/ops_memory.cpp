// Ordinary loads and stores of every space.
#include "lanes.h"

namespace emu {
namespace {

constexpr u32 kMaxBytes = 32;

// imm of ld and st: space, bytes of an element, offset; of ld also sign extension, and whether it reads constant memory.
struct Layout {
  Space space;
  u32 bytes;
  i64 offset;
  explicit Layout(const Instruction& in) : space(Space(in.imm[0])), bytes(u32(in.imm[1])), offset(in.imm[2]) {}
};

u64 extend(u64 value, u32 bytes, bool sign) {
  if (!sign || bytes == 8) return value;
  u32 up = 64 - 8 * bytes;
  return u64(i64(value << up) >> up);
}

const char* param_address(const Engine& engine, u64 offset, u64 bytes) {
  if (offset + bytes > engine.param_bytes || offset + bytes < bytes)
    fault(ErrorKind::kBounds, "kernel parameter access of %llu bytes at %llu of %llu", bytes, offset, engine.param_bytes);
  return engine.params + offset;
}

Space resolve(Space space, u64& address) {
  if (space != Space::kGeneric) return space;
  if (address & kLocalWindow) return address &= ~kLocalWindow, Space::kLocal;
  if (address & kParamWindow) return address &= ~kParamWindow, Space::kParam;
  return space;
}

// Lanes that ask for bytes another lane of the instruction has asked for already cause no traffic of their own.
class Coalescer {
 public:
  bool first(u64 address) {
    for (u32 i = 0; i < n_; i++)
      if (seen_[i] == address) return false;
    seen_[n_++] = address;
    return true;
  }

 private:
  u64 seen_[kWarpSize];
  u32 n_ = 0;
};

void load(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  const Layout layout(in);
  const u32 n = in.n_dst, total = layout.bytes * n;
  const bool sign = in.imm[3], constant = in.imm[4];
  Coalescer coalescer;
  for_lanes(mask, [&](u32 l) {
    u64 address = warp.address(in.reg[n], l, layout.offset);
    char bytes[kMaxBytes];
    Space space = resolve(layout.space, address);
    if (space == Space::kLocal) {
      memcpy(bytes, local_memory(warp, l, address, total), total);
    } else if (space == Space::kParam) {
      memcpy(bytes, param_address(engine, address, total), total);
    } else {
      Place at = engine.place(warp, l, address, space, total, total, false);
      Actor actor = warp.actor(l);
      at.region->shadow.read(at.offset, total, actor, {.owner = actor.owner, .time = actor.now, .pc = in.pc, .constant = constant});
      if (at.space == kFenceGlobal && coalescer.first(address)) {
        at.region->bytes_read += total;
        at.region->read_map.touch(at.offset, total);
        engine.progress++;
      }
      memcpy(bytes, at.host(), total);
    }
    for (u32 i = 0; i < n; i++) {
      u64 value = 0;
      memcpy(&value, bytes + i * layout.bytes, layout.bytes);
      warp.set(in.reg[i], l, extend(value, layout.bytes, sign));
    }
  });
  engine.lane = -1;
}

void store(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  const Layout layout(in);
  const u32 n = in.n_reg - 1, total = layout.bytes * n;
  Coalescer coalescer;
  for_lanes(mask, [&](u32 l) {
    u64 address = warp.address(in.reg[0], l, layout.offset);
    char bytes[kMaxBytes];
    for (u32 i = 0; i < n; i++) {
      u64 value = warp.get(in.reg[1 + i], l);
      memcpy(bytes + i * layout.bytes, &value, layout.bytes);
    }
    Space space = resolve(layout.space, address);
    if (space == Space::kLocal) {
      memcpy(local_memory(warp, l, address, total), bytes, total);
      return;
    }
    Place at = engine.place(warp, l, address, space, total, total, true);
    Actor actor = warp.actor(l);
    bool repeats = at.space != kFenceGlobal && memcmp(at.host(), bytes, total) == 0;
    at.region->shadow.write(at.offset, total, actor, {actor.owner, actor.now, in.pc, kWeak, Proxy::kGeneric, repeats});
    memcpy(at.host(), bytes, total);
    engine.stored(at, total);
    if (at.space != kFenceGlobal) return;
    if (coalescer.first(address)) at.region->bytes_written += total;
    at.region->write_map.touch(at.offset, total);
    engine.progress++;
  });
  engine.lane = -1;
  warp.actions++;
  engine.maybe_preempt(warp);
}

void nothing(Warp&, const Instruction&, u32) {}

}  // namespace

char* local_memory(Warp& warp, u32 lane, u64 offset, u64 bytes) {
  u64 size = warp.engine->program.local_bytes;
  if (offset + bytes > size || offset + bytes < bytes)
    fault(ErrorKind::kBounds, "local access of %llu bytes at %llu of %llu", bytes, offset, size);
  return warp.local.data() + u64(lane) * size + offset;
}

void read_generic(Warp& warp, u32 lane, u64 address, char* into, u64 bytes) {
  Space space = resolve(Space::kGeneric, address);
  if (space == Space::kLocal) {
    memcpy(into, local_memory(warp, lane, address, bytes), bytes);
  } else if (space == Space::kParam) {
    memcpy(into, param_address(*warp.engine, address, bytes), bytes);
  } else {
    memcpy(into, warp.engine->place(warp, lane, address, space, bytes, 1, false).host(), bytes);
  }
}

void add_memory_ops(OpTable& t) {
  t.add("ld", load);
  t.add("st", store);
  t.add("nop", nothing);
}

}  // namespace emu
