// cp.async: copies of single threads from global to shared memory, in groups.
#include <algorithm>

#include "lanes.h"

namespace emu {
namespace {

void copy(CpAsync& op) {
  memcpy(op.shared.host(), op.source, op.valid);
  memset(op.shared.host() + op.valid, 0, op.bytes - op.valid);
  op.copied = true;
}

// imm: shared offset, global offset, bytes, third operand (0 none, 1 bytes to copy, 2 predicate that ignores the source).
void issue(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  const u32 bytes = u32(in.imm[2]);
  for_lanes(mask, [&](u32 l) {
    engine.stats.cp_async++;
    u32 valid = bytes;
    if (in.imm[3] == 1) valid = u32(warp.get(in.reg[2], l));
    if (in.imm[3] == 2 && warp.get(in.reg[2], l)) valid = 0;
    if (valid > bytes) fault(ErrorKind::kAsyncCopy, "cp.async copies %u of %u bytes", valid, bytes);
    Place shared = engine.place(warp, l, warp.address(in.reg[0], l, in.imm[0]), Space::kShared, bytes, bytes, true);
    Actor actor = warp.actor(l);
    CpAsync op{l, warp.cp_groups[l] + 1, in.pc, bytes, valid, shared, nullptr, false};
    if (valid) {
      Place global = engine.place(warp, l, warp.address(in.reg[1], l, in.imm[1]), Space::kGlobal, valid, 1, false);
      if ((global.region->address + global.offset) % bytes)
        fault(ErrorKind::kAlignment, "the source of cp.async is not aligned to %u bytes", bytes);
      global.region->shadow.read(global.offset, valid, actor, {actor.owner, actor.now, in.pc});
      global.region->bytes_read += valid;
      global.region->read_map.touch(global.offset, valid);
      op.source = global.host();
    }
    // Compilers and libraries rely on wgmma and TMA seeing what cp.async wrote without a proxy fence: none is asked for.
    shared.region->shadow.write(shared.offset, bytes, actor, {actor.owner, kInFlight, in.pc, kWeak, Proxy::kNeutral});
    if (engine.early()) copy(op);
    warp.cp_async.push_back(op);
  });
  engine.lane = -1;
  engine.progress++;
  warp.actions++;
  engine.maybe_preempt(warp);
}

void commit(Warp& warp, const Instruction&, u32 mask) {
  for_lanes(mask, [&](u32 l) { warp.cp_groups[l]++; });
}

void wait(Warp& warp, u32 mask, u32 pending, bool uncommitted_too) {
  auto finished = [&](CpAsync& op) {
    if (!(mask >> op.lane & 1)) return false;
    if (!uncommitted_too && i64(op.group) > i64(warp.cp_groups[op.lane]) - i64(pending)) return false;
    if (!op.copied) copy(op);
    op.shared.region->shadow.complete_write(op.shared.offset, op.bytes, warp.owner(op.lane), warp.now[op.lane]);
    return true;
  };
  warp.cp_async.erase(std::remove_if(warp.cp_async.begin(), warp.cp_async.end(), finished), warp.cp_async.end());
  warp.actions++;
}

void wait_group(Warp& warp, const Instruction& in, u32 mask) { wait(warp, mask, u32(in.imm[0]), false); }
void wait_all(Warp& warp, const Instruction&, u32 mask) { wait(warp, mask, 0, true); }

}  // namespace

void add_cp_async_ops(OpTable& t) {
  t.add("cp.async", issue);
  t.add("cp.async.commit_group", commit);
  t.add("cp.async.wait_group", wait_group);
  t.add("cp.async.wait_all", wait_all);
}

}  // namespace emu
