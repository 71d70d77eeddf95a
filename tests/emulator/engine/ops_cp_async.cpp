// cp.async: copies of single threads from global to shared memory, in groups.
#include <algorithm>

#include "lanes.h"

namespace emu {

void CpAsync::copy() {
  if (copied) return;
  memcpy(shared.host(), source, valid);
  memset(shared.host() + valid, 0, bytes - valid);
  copied = true;
}

namespace {

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
    if (engine.early()) op.copy();
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
    op.copy();
    op.shared.region->shadow.complete_write(op.shared.offset, op.bytes, warp.owner(op.lane), warp.now[op.lane]);
    return true;
  };
  warp.cp_async.erase(std::remove_if(warp.cp_async.begin(), warp.cp_async.end(), finished), warp.cp_async.end());
  warp.actions++;
}

void wait_group(Warp& warp, const Instruction& in, u32 mask) { wait(warp, mask, u32(in.imm[0]), false); }
void wait_all(Warp& warp, const Instruction&, u32 mask) { wait(warp, mask, 0, true); }

// cp.async.mbarrier.arrive: what the thread has in flight becomes the mbarrier's, and its completion an arrival.
// imm: offset, noinc (the arrival is one of those that the mbarrier expects).
void arrive(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  for_lanes(mask, [&](u32 l) {
    engine.lane = int(l);
    const u64 address = warp.address(in.reg[0], l, in.imm[0]) & ~kSharedWindow;
    const u32 offset = u32(engine.shared_place(*warp.cta, address, 8, 8, true).offset);
    MBarrier& barrier = use_mbarrier(warp, in.pc, l, *warp.cta, offset);
    if (!in.imm[1]) barrier.pending++;
    auto copies = std::make_shared<BulkCopy>();
    copies->pc = in.pc;
    copies->cta = warp.cta;
    copies->thread = warp.thread(l);
    copies->load = true;
    copies->targets = {{warp.cta, offset}};
    std::erase_if(warp.cp_async, [&](const CpAsync& op) {
      if (op.lane != l) return false;
      op.shared.region->shadow.hand_over(op.shared.offset, op.bytes, warp.owner(l), barrier.slot);
      copies->copies.push_back(op);
      return true;
    });
    if (engine.policy() == AsyncPolicy::kEarly)
      run_bulk(engine, *copies);
    else
      engine.bulk.push_back(copies);
  });
  engine.lane = -1;
  engine.progress++;
  warp.actions++;
  engine.maybe_preempt(warp);
}

}  // namespace

void add_cp_async_ops(OpTable& t) {
  t.add("cp.async", issue);
  t.add("cp.async.commit_group", commit);
  t.add("cp.async.wait_group", wait_group);
  t.add("cp.async.wait_all", wait_all);
  t.add("cp.async.mbarrier.arrive", arrive);
}

}  // namespace emu
