// Starting and ending CTAs, and what a warp can do to itself: wait, learn, exit.
#include <algorithm>

#include "engine.h"

namespace emu {

static void unravel(u32 linear, const u32 (&extent)[3], u32 (&index)[3]) {
  index[0] = linear % extent[0];
  index[1] = linear / extent[0] % extent[1];
  index[2] = linear / extent[0] / extent[1];
}

void Engine::start_cluster(u32 id) {
  auto cluster = std::make_unique<Cluster>();
  cluster->id = id;
  cluster->live_ctas = cluster_size;
  cluster->live_threads = cluster_size * n_threads;
  u32 clusters[3], at[3];
  for (int i = 0; i < 3; i++) clusters[i] = shape.grid[i] / shape.cluster[i];
  unravel(id, clusters, at);
  for (u32 rank = 0; rank < cluster_size; rank++) {
    auto cta = std::make_unique<Cta>();
    cta->engine = this;
    cta->cluster = cluster.get();
    cta->rank = rank;
    cta->id = id * cluster_size + rank;
    u32 within[3];
    unravel(rank, shape.cluster, within);
    for (int i = 0; i < 3; i++) cta->index[i] = at[i] * shape.cluster[i] + within[i];
    cta->shared_bytes.assign(shape.shared_bytes + kSharedBase, char(0xff));
    cta->shared.id = kSharedRegion;
    cta->shared.host = cta->shared_bytes.data();
    cta->shared.bytes = cta->shared_bytes.size();
    if (racing()) cta->shared.shadow.enable(kSharedRegion, cta->shared.bytes, false, kFenceShared, shadow_options);
    u32 n_warps = (n_threads + kWarpSize - 1) / kWarpSize;
    cta->live_threads = n_threads;
    cta->agents = n_warps * kWarpSize;
    cta->warpgroups.resize((n_warps + 3) / 4);
    for (Warpgroup& warpgroup : cta->warpgroups) warpgroup.agent = cta->new_agent();
    cta->warps.resize(n_warps);
    for (u32 w = 0; w < n_warps; w++) start_warp(*cta, w);
    cluster->ctas.push_back(std::move(cta));
  }
  clusters_.push_back(std::move(cluster));
}

void Engine::start_warp(Cta& cta, u32 index) {
  Warp& warp = cta.warps[index];
  warp.engine = this;
  warp.cta = &cta;
  warp.index = index;
  u32 lanes = std::min(n_threads - index * kWarpSize, kWarpSize);
  warp.live = lanes == kWarpSize ? kAllLanes : (1u << lanes) - 1;
  warp.groups.push_back({0, warp.live});
  warp.r32.assign(size_t(program.n_32) * kWarpSize, ~0u);  // a NaN in every format
  warp.r64.assign(size_t(program.n_64) * kWarpSize, ~0ull);
  warp.pred.assign(program.n_pred, 0);
  warp.local.assign(size_t(program.local_bytes) * kWarpSize, char(0xff));
  if (program.uses_wgmma) warp.held.resize(program.n_32);
  warp.now.fill(1);
  for (auto& fenced : warp.fenced_now) fenced.fill(0);
  warp.cp_groups.fill(0);
  warp.cluster_phase.fill(0);
  warp.registers = std::min(65536 / u32(cta.warps.size() * kWarpSize) / 8 * 8, 255u);
  for (const Constant& constant : program.constants)
    for_lanes(kAllLanes, [&](u32 l) { warp.set(constant.reg, l, constant.value); });
  fill_specials(warp);
  stats.threads += lanes;
  enqueue(&warp);
}

void Engine::fill_specials(Warp& warp) {
  Cta& cta = *warp.cta;
  u32 cluster[3], within[3], clusters[3], tid[3];
  for (int i = 0; i < 3; i++) {
    cluster[i] = cta.index[i] / shape.cluster[i];
    within[i] = cta.index[i] % shape.cluster[i];
    clusters[i] = shape.grid[i] / shape.cluster[i];
  }
  for (const SpecialRegister& special : program.specials)
    for_lanes(kAllLanes, [&](u32 l) {
      unravel(warp.thread(l), shape.block, tid);
      const u32 by_kind[] = {tid[0],
                             tid[1],
                             tid[2],
                             shape.block[0],
                             shape.block[1],
                             shape.block[2],
                             cta.index[0],
                             cta.index[1],
                             cta.index[2],
                             shape.grid[0],
                             shape.grid[1],
                             shape.grid[2],
                             l,
                             warp.index,
                             u32(cta.warps.size()),
                             within[0],
                             within[1],
                             within[2],
                             shape.cluster[0],
                             shape.cluster[1],
                             shape.cluster[2],
                             cta.rank,
                             cluster_size,
                             cluster[0],
                             cluster[1],
                             cluster[2],
                             clusters[0],
                             clusters[1],
                             clusters[2],
                             1u << l,
                             (1u << l) - 1,
                             (2u << l) - 1,
                             ~((2u << l) - 1),
                             ~((1u << l) - 1),
                             cta.id,
                             n_cta,
                             shape.dynamic_shared_bytes,
                             shape.shared_bytes};
      static_assert(std::size(by_kind) == size_t(Special::kTotalSmemSize) + 1);
      warp.set(special.reg, l, by_kind[size_t(special.kind)]);
    });
}

Owner Cta::first_owner() const { return id << engine->agent_shift; }

Owner Cta::new_agent() {
  if (agents >> engine->agent_shift)
    fault(ErrorKind::kLaunch, "more asynchronous agents in a CTA than the emulator provides for");
  return first_owner() + agents++;
}

Owner Warp::owner(u32 lane) const { return cta->first_owner() + thread(lane); }

Actor Warp::actor(u32 lane) const {
  return {owner(lane), now[lane], {fenced_now[lane][0], fenced_now[lane][1]}, &knows[lane], reader_fenced[lane].data(),
          cta->id};
}

void Warp::learn(u32 mask, const Knowledge& knowledge) {
  if (engine->racing()) for_lanes(mask, [&](u32 l) { join_into(engine->clocks, knows[l], knowledge); });
}

void Warp::learn_over(u32 mask, const Knowledge& knowledge) {
  if (engine->racing()) for_lanes(mask, [&](u32 l) { join_over(engine->clocks, knows[l], knowledge); });
}

u64 Warp::uniform(Operand o, u32 mask, const char* what) {
  u64 first = get(o, lowest_lane(mask));
  for_lanes(mask, [&](u32 l) {
    if (get(o, l) != first) fault(ErrorKind::kDivergence, "%s differs between the lanes of a warp", what);
  });
  return first;
}

bool Warp::converged(u32 mask, u32 need, const char* what) {
  u32 here = group().mask;
  if (need & ~live) fault(ErrorKind::kDivergence, "%s: lanes %08x have exited", what, need & ~live);
  if ((mask & need) == need) return true;
  if ((here & need) == need)
    fault(ErrorKind::kDivergence, "%s is predicated off in lanes %08x of the warp", what, need & ~mask);
  group().state = GroupState::kConverging;
  group().waits_for = what;
  group().waits_at = --group().pc;
  stop = true;
  return false;
}

void Warp::block(const char* what) {
  group().state = GroupState::kBlocked;
  group().waits_for = what;
  group().waits_at = --group().pc;
  stop = true;
}

void Warp::hold(const char* what) {
  group().state = GroupState::kHeld;
  group().waits_for = what;
  group().waits_at = group().pc - 1;
  stop = true;
}

void Warp::exit(u32 mask) {
  for (const CpAsync& copy : cp_async)
    if (mask >> copy.lane & 1)
      fault(ErrorKind::kAsyncCopy, "a thread exits while its cp.async of <pc:%u> is in flight", copy.pc);
  if (wgmma_waited < wgmma_groups) fault(ErrorKind::kWgmma, "a warp exits while its wgmma are in flight");
  for (const auto& [thread, groups] : cta->bulk_groups)
    for (const auto& copy : groups.copies)
      if (thread / kWarpSize == index && mask >> thread % kWarpSize & 1 && !copy->read_waited)
        fault(ErrorKind::kAsyncCopy, "a thread exits while its bulk store of <pc:%u> may still read shared memory", copy->pc);
  live &= ~mask;
  engine->progress++;
  cta->live_threads -= u32(std::popcount(mask));
  cta->cluster->live_threads -= u32(std::popcount(mask));
  group().mask &= ~mask;
  if (!group().mask) groups.erase(groups.begin() + long(current));
  for (Group& other : groups)
    if (other.state == GroupState::kConverging) other.state = GroupState::kReady;  // fewer lanes to wait for
  stop = true;
  check_barriers_after_exit(*engine, *cta);
  if (cta->live_threads) return;
  for (const auto& copy : engine->bulk)
    for (const BulkCopy::Target& target : copy->targets)
      if (target.cta == cta)
        fault(ErrorKind::kAsyncCopy, "a CTA exits while the copy of <pc:%u> into its shared memory is in flight",
              copy->pc);
  cta->cluster->live_ctas--;
}

}  // namespace emu
