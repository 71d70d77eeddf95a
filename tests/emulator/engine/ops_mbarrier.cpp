// mbarrier: arrivals and transaction counts that complete phases.
#include "lanes.h"

namespace emu {
namespace {

constexpr i64 kMaxTx = (1 << 20) - 1;

struct Target {
  Cta* cta;
  u32 offset;
};

// The CTA and the offset that a shared::cta or shared::cluster address names.
Target target_of(Warp& warp, u32 l, u64 address) {
  Engine& engine = *warp.engine;
  engine.lane = int(l);
  engine.shared_place(*warp.cta, address & ~kSharedWindow, 8, 8, true);
  u64 rank = (address & ~kSharedWindow) >> kClusterRankShift;
  return {rank ? warp.cta->cluster->ctas[rank - 1].get() : warp.cta, u32(address) & ((1u << kClusterRankShift) - 1)};
}

MBarrier& find(Cta& cta, u32 offset) {
  auto found = cta.mbarriers.find(offset);
  if (found == cta.mbarriers.end() || !found->second.valid)
    fault(ErrorKind::kBarrier, "no mbarrier has been initialised at <at:%u:%u>", kSharedRegion, offset);
  return found->second;
}

void finish_phase(Engine& engine, MBarrier& barrier) {
  if (barrier.pending || barrier.tx) return;
  barrier.phase++;
  barrier.ever++;
  barrier.pending = barrier.count;
  engine.stats.mbarrier_phases++;
  engine.progress++;
  if (engine.racing()) {
    barrier.gathering[0].add_component(barrier.slot, barrier.ever);
    for (int foreign : {0, 1}) barrier.released[foreign] = barrier.gathering[foreign].finish(engine.clocks);
  }
  engine.wake_all(barrier.waiters);
}

void expect_arrivals(const MBarrier& barrier, u32 count, u32 offset) {
  if (count > barrier.pending)
    fault(ErrorKind::kBarrier, "more arrivals than the %u that the mbarrier at <at:%u:%u> expects", barrier.count, kSharedRegion,
          offset);
}

void add_tx(MBarrier& barrier, i64 bytes) {
  barrier.tx += bytes;
  if (barrier.tx > kMaxTx || barrier.tx < -kMaxTx)
    fault(ErrorKind::kBarrier, "the transaction count of an mbarrier leaves its range");
}

// The storage changes owner: nobody may still use it, as data or as the old barrier.
void claim(Warp& warp, const Instruction& in, u32 l, Cta& cta, u32 offset) {
  Engine& engine = *warp.engine;
  if (!engine.racing()) return;
  Actor actor = warp.actor(l);
  Access access{actor.owner, actor.now, in.pc, kWeak, Proxy::kNeutral};
  for (const auto& [owner, user] : cta.mbarriers[offset].users)
    if (!actor.ordered(user.owner, user.time))
      fault(ErrorKind::kRace,
            "the mbarrier at <at:%u:%u> is initialised or invalidated without being ordered after its use at <pc:%u>",
            kSharedRegion, offset, user.pc);
  cta.shared.shadow.write(offset, 8, actor, access);
  cta.shared.shadow.forget(offset, 8);
}

// imm: offset. Registers: address, count.
void init(Warp& warp, const Instruction& in, u32 mask) {
  for_lanes(mask, [&](u32 l) {
    Target target = target_of(warp, l, warp.address(in.reg[0], l, in.imm[0]));
    u64 count = warp.get(in.reg[1], l);
    if (count == 0 || count > u64(kMaxTx)) fault(ErrorKind::kBarrier, "mbarrier.init with count %llu", count);
    claim(warp, in, l, *target.cta, target.offset);
    MBarrier& barrier = target.cta->mbarriers[target.offset];
    if (barrier.valid)
      fault(ErrorKind::kBarrier, "the mbarrier at <at:%u:%u> is initialised again without mbarrier.inval", kSharedRegion,
            target.offset);
    Owner slot = barrier.slot == kNobody ? target.cta->new_agent() : barrier.slot;
    u32 ever = barrier.ever;
    barrier = MBarrier{};
    barrier.valid = true;
    barrier.count = barrier.pending = u32(count);
    barrier.ever = ever;
    barrier.slot = slot;
    barrier.init = {warp.owner(l), warp.now[l], in.pc};
  });
  warp.engine->lane = -1;
  warp.actions++;
}

void invalidate(Warp& warp, const Instruction& in, u32 mask) {
  for_lanes(mask, [&](u32 l) {
    Target target = target_of(warp, l, warp.address(in.reg[0], l, in.imm[0]));
    MBarrier& barrier = use_mbarrier(warp, in.pc, l, *target.cta, target.offset);
    if (!barrier.waiters.empty()) fault(ErrorKind::kBarrier, "mbarrier.inval while threads wait for it");
    if (barrier.tx) fault(ErrorKind::kBarrier, "mbarrier.inval while %lld bytes are outstanding", barrier.tx);
    claim(warp, in, l, *target.cta, target.offset);
    barrier.valid = false;
    barrier.users.clear();
  });
  warp.engine->lane = -1;
  warp.actions++;
}

// imm: offset, has tx, has count, counts as an arrival, releases, scope. Registers: [state], address, [tx], [count].
void arrive(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  for_lanes(mask, [&](u32 l) {
    const Operand* operand = in.reg + in.n_dst;
    Target target = target_of(warp, l, warp.address(operand[0], l, in.imm[0]));
    MBarrier& barrier = use_mbarrier(warp, in.pc, l, *target.cta, target.offset);
    u32 tx = in.imm[1] ? u32(warp.get(operand[1], l)) : 0;
    u32 count = in.imm[2] ? u32(warp.get(operand[1 + in.imm[1]], l)) : in.imm[3] ? 1 : 0;
    if (in.n_dst) warp.set(in.reg[0], l, u64(barrier.phase));
    expect_arrivals(barrier, count, target.offset);
    const bool foreign = target.cta != warp.cta, releases = in.imm[4] && (!foreign || in.imm[5] > kScopeCta);
    if (count && engine.racing()) {
      Gathering& gathering = barrier.gathering[foreign];
      releases ? gathering.add(engine.clocks, warp.actor(l)) : gathering.add_over(engine.clocks, warp.actor(l));
    }
    if (count) warp.now[l]++;
    add_tx(barrier, tx);
    barrier.pending -= count;
    finish_phase(engine, barrier);
  });
  engine.lane = -1;
  warp.actions++;
  engine.maybe_preempt(warp);
}

// try_wait and test_wait; imm: offset, may wait, by parity, acquires, scope. Registers: p, address, parity or state.
void wait(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  const bool may_wait = in.imm[1];
  u32 done = 0;
  for_lanes(mask, [&](u32 l) {
    Target target = target_of(warp, l, warp.address(in.reg[1], l, in.imm[0]));
    if (target.cta != warp.cta) fault(ErrorKind::kBarrier, "an mbarrier of another CTA cannot be waited for");
    MBarrier& barrier = use_mbarrier(warp, in.pc, l, *target.cta, target.offset);
    u64 operand = warp.get(in.reg[2], l);
    bool complete = in.imm[2] ? (barrier.phase & 1) != (operand & 1) : barrier.phase != u32(operand);
    done |= u32(complete) << l;
  });
  engine.lane = -1;
  // The first try gives up, as the hardware may: who does not try again is found out.
  Group& group = warp.group();
  if (std::exchange(group.expired, false) && done != mask) {
    write_predicate(warp, in.reg[0], mask, done);
    return warp.yield();
  }
  bool tried = group.tried_at == in.pc + 1 && group.poll_actions == warp.actions;
  group.tried_at = in.pc + 1;
  group.poll_actions = warp.actions;
  if (done != mask && may_wait && tried && !engine.chance(4)) {
    for_lanes(mask & ~done, [&](u32 l) {
      std::vector<Warp*>& waiters = find(*warp.cta, target_of(warp, l, warp.address(in.reg[1], l, in.imm[0])).offset).waiters;
      if (waiters.empty() || waiters.back() != &warp) waiters.push_back(&warp);
    });
    engine.lane = -1;
    return warp.block("mbarrier.try_wait");
  }
  write_predicate(warp, in.reg[0], mask, done);
  if (done != mask) return engine.polled(warp);
  warp.actions++;
  for_lanes(mask, [&](u32 l) {
    const MBarrier& barrier = find(*warp.cta, target_of(warp, l, warp.address(in.reg[1], l, in.imm[0])).offset);
    for (int foreign : {0, 1}) {
      const bool acquires = in.imm[3] && (!foreign || in.imm[4] > kScopeCta);
      acquires ? warp.learn(1u << l, barrier.released[foreign]) : warp.learn_over(1u << l, barrier.released[foreign]);
    }
  });
  engine.lane = -1;
}

// fence.mbarrier_init: what this thread has initialised, asynchronous copies may signal from now on.
void fence_init(Warp& warp, const Instruction&, u32 mask) {
  for_lanes(mask, [&](u32 l) {
    for (auto& [offset, barrier] : warp.cta->mbarriers)
      if (barrier.init.owner == warp.owner(l) && barrier.fenced == kInFlight) barrier.fenced = warp.now[l];
  });
  warp.tick(mask);
}

}  // namespace

// A thread uses the barrier: it must see its initialisation, and whoever invalidates it later must be ordered after this.
MBarrier& use_mbarrier(Warp& warp, u32 pc, u32 lane, Cta& cta, u32 offset) {
  MBarrier& barrier = find(cta, offset);
  if (!warp.engine->racing()) return barrier;
  Actor actor = warp.actor(lane);
  if (!actor.ordered(barrier.init.owner, barrier.init.time))
    fault(ErrorKind::kRace, "the mbarrier at <at:%u:%u> is used without being ordered after its initialisation at <pc:%u>",
          kSharedRegion, offset, barrier.init.pc);
  barrier.users[actor.owner] = {actor.owner, actor.now, pc};
  return barrier;
}

// A copy is to signal another CTA's barrier: like an ordinary store that a copy reads, the initialisation wants a fence on
// the way. (For the own CTA's, compilers rely on none.)
void check_signalled(Warp& warp, u32 lane, const Cta& cta, const MBarrier& barrier, u32 offset) {
  if (!warp.engine->racing() || &cta == warp.cta) return;
  Actor actor = warp.actor(lane);
  const Access& init = barrier.init;
  const Time proxy_fenced =
      init.owner == actor.owner ? actor.fenced_now[kFenceShared] : actor.knows->fenced[kFenceShared].at(init.owner);
  if (proxy_fenced >= init.time || actor.ordered(init.owner, barrier.fenced)) return;
  fault(ErrorKind::kProxy,
        "an asynchronous copy signals the mbarrier at <at:%u:%u>, whose initialisation at <pc:%u> has neither "
        "fence.mbarrier_init nor fence.proxy.async in between",
        kSharedRegion, offset, init.pc);
}

void arrive_tx(Engine& engine, Cta& cta, u32 mbarrier, i64 bytes) {
  MBarrier& barrier = find(cta, mbarrier);
  add_tx(barrier, -bytes);
  finish_phase(engine, barrier);
}

void arrive_copied(Engine& engine, BulkCopy& copy) {
  const BulkCopy::Target& target = copy.targets[0];
  MBarrier& barrier = find(*target.cta, target.mbarrier);
  for (CpAsync& each : copy.copies) {
    each.copy();
    each.shared.region->shadow.complete_write(each.shared.offset, each.bytes, barrier.slot, barrier.ever + 1);
  }
  expect_arrivals(barrier, 1, target.mbarrier);
  barrier.pending--;
  finish_phase(engine, barrier);
}

void add_mbarrier_ops(OpTable& t) {
  t.add("mbarrier.init", init);
  t.add("mbarrier.inval", invalidate);
  t.add("mbarrier.arrive", arrive);
  t.add("mbarrier.wait", wait);
  t.add("fence.mbarrier_init", fence_init);
}

}  // namespace emu
