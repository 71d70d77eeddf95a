// CTA, named and cluster barriers.
#include "lanes.h"

namespace emu {
namespace {

enum class Mode : i64 { kSync, kArrive, kRedPopc, kRedAnd, kRedOr };

u32 live_threads(const Cta& cta) {
  u32 warps = 0;
  for (const Warp& warp : cta.warps) warps += warp.live != 0;
  return warps * kWarpSize;
}

void complete(Engine& engine, NamedBarrier& barrier) {
  engine.stats.barriers++;
  Knowledge knowledge = barrier.gathering.finish(engine.clocks);
  for (const NamedBarrier::Waiter& waiter : std::exchange(barrier.waiters, {})) {
    waiter.warp->learn(waiter.mask, knowledge);
    waiter.warp->tick(waiter.mask);
    const Mode mode = Mode(waiter.in->imm[0]);
    if (waiter.in->n_dst) {
      u64 result = mode == Mode::kRedPopc  ? barrier.yes
                   : mode == Mode::kRedAnd ? barrier.yes == barrier.voters
                                           : barrier.yes != 0;
      for_lanes(waiter.mask, [&](u32 l) { waiter.warp->set(waiter.in->reg[0], l, result); });
    }
    engine.release(waiter.warp, waiter.mask);
  }
  barrier.arrived = barrier.yes = barrier.voters = 0;
}

// bar and barrier.cta; imm: mode, aligned, has a thread count. Registers: [d], id, [count], [p].
void barrier(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  Cta& cta = *warp.cta;
  const Mode mode = Mode(in.imm[0]);
  const bool aligned = in.imm[1], counted = in.imm[2];
  if (aligned && !warp.converged(mask, warp.live, "bar.sync (all lanes of the warp)")) return;
  const Operand* operand = in.reg + in.n_dst;
  u64 id = warp.uniform(operand[0], mask, "barrier number"),
      count = counted ? warp.uniform(operand[1], mask, "barrier thread count") : 0;
  if (id > 15) fault(ErrorKind::kBarrier, "barrier number %llu", id);
  if (counted && (count == 0 || count % kWarpSize || count > cta.warps.size() * kWarpSize))
    fault(ErrorKind::kBarrier, "barrier %llu for %llu threads in a CTA of %u", id, count, engine.n_threads);
  NamedBarrier& bar = cta.barriers[id];
  if (bar.arrived == 0)
    bar.expected = u32(count);
  else if (bar.expected != count)
    fault(ErrorKind::kBarrier, "barrier %llu is used with %u and with %llu threads", id, bar.expected, count);
  u32 expected = counted ? u32(count) : live_threads(cta);
  bar.arrived += aligned ? kWarpSize : u32(std::popcount(mask));
  if (bar.arrived > expected) fault(ErrorKind::kBarrier, "more than %u threads arrive at barrier %llu", expected, id);
  if (mode >= Mode::kRedPopc) {
    bar.voters += u32(std::popcount(mask));
    bar.yes += u32(std::popcount(warp.predicate(in.reg[in.n_reg - 1]) & mask));
  }
  if (engine.racing()) for_lanes(mask, [&](u32 l) { bar.gathering.add(engine.clocks, warp.actor(l)); });
  warp.actions++;
  if (mode == Mode::kArrive) {
    warp.tick(mask);
  } else {
    bar.waiters.push_back({&warp, mask, &in});
    warp.hold(id == 0 ? "bar.sync 0 (__syncthreads)" : "bar.sync (named)");
  }
  if (bar.arrived == expected) complete(engine, bar);
}

void complete_cluster(Engine& engine, Cluster& cluster) {
  engine.stats.barriers++;
  cluster.released = cluster.gathering.finish(engine.clocks);
  cluster.arrived = 0;
  cluster.phase++;
  engine.wake_all(cluster.waiters);
}

// barrier.cluster.arrive; imm: aligned, release.
void cluster_arrive(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  Cluster& cluster = *warp.cta->cluster;
  if (in.imm[0] && !warp.converged(mask, warp.live, "barrier.cluster.arrive")) return;
  for_lanes(mask, [&](u32 l) {
    if (warp.cluster_phase[l]) fault(ErrorKind::kBarrier, "barrier.cluster.arrive twice without a wait");
    warp.cluster_phase[l] = cluster.phase + 1;
    if (engine.racing() && in.imm[1]) cluster.gathering.add(engine.clocks, warp.actor(l));
  });
  warp.tick(mask);
  warp.actions++;
  cluster.arrived += u32(std::popcount(mask));
  if (cluster.arrived == cluster.live_threads) complete_cluster(engine, cluster);
}

// barrier.cluster.wait; imm: aligned.
void cluster_wait(Warp& warp, const Instruction& in, u32 mask) {
  Cluster& cluster = *warp.cta->cluster;
  if (in.imm[0] && !warp.converged(mask, warp.live, "barrier.cluster.wait")) return;
  bool waiting = false;
  for_lanes(mask, [&](u32 l) {
    if (!warp.cluster_phase[l]) fault(ErrorKind::kBarrier, "barrier.cluster.wait without an arrive");
    waiting |= warp.cluster_phase[l] > cluster.phase;
  });
  if (waiting) {
    cluster.waiters.push_back(&warp);
    return warp.block("barrier.cluster.wait");
  }
  warp.learn(mask, cluster.released);
  for_lanes(mask, [&](u32 l) { warp.cluster_phase[l] = 0; });
}

}  // namespace

void check_barriers_after_exit(Engine& engine, Cta& cta) {
  for (NamedBarrier& bar : cta.barriers)
    if (bar.arrived && !bar.expected && bar.arrived >= live_threads(cta)) complete(engine, bar);
  Cluster& cluster = *cta.cluster;
  if (cluster.arrived && cluster.arrived >= cluster.live_threads) complete_cluster(engine, cluster);
}

void add_barrier_ops(OpTable& t) {
  t.add("bar", barrier);
  t.add("cluster.arrive", cluster_arrive);
  t.add("cluster.wait", cluster_wait);
}

}  // namespace emu
