// The scheduler: which warp runs next, which lanes of it, and when nothing can run any more.
#include "engine.h"

#include <time.h>

#include <algorithm>
#include <map>

namespace emu {

constexpr u64 kRetries = 1000;

// Time on a processor, which a busy machine or a stopped process does not add to. A launch runs in one thread.
static double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

static u32 volume(const u32 (&extent)[3]) { return extent[0] * extent[1] * extent[2]; }

Engine::Engine(const Program& program, const LaunchShape& shape, const Options& options, std::vector<Region>& buffers,
               const char* params, u64 param_bytes)
    : program(program),
      shape(shape),
      options(options),
      buffers(buffers),
      params(params),
      param_bytes(param_bytes),
      n_threads(volume(shape.block)),
      n_cta(volume(shape.grid)),
      cluster_size(volume(shape.cluster)),
      agent_shift(u32(std::bit_width(n_threads + 255))),
      clocks(n_cta, agent_shift),
      rng_(options.seed * 0x9E3779B97F4A7C15ull + 88172645463325252ull) {
  shadow_options = {bool(options.fence_by_writer), bool(options.fence_by_reader), agent_shift, cluster_size};
  if (!options.race) return;
  for (Region& buffer : buffers)
    if (buffer.writable) buffer.shadow.enable(buffer.id, buffer.bytes, buffer.initialised, kFenceGlobal, shadow_options);
}

void Engine::run() {
  start_ = cpu_seconds();
  u32 n_clusters = n_cta / cluster_size,
      resident = options.resident ? (u32(options.resident) + cluster_size - 1) / cluster_size : n_clusters;
  std::vector<u32> order(n_clusters);
  for (u32 i = 0; i < n_clusters; i++) order[i] = i;
  if (options.shuffle_ctas)
    for (u32 i = n_clusters; i > 1; i--) std::swap(order[i - 1], order[random() % i]);
  size_t next = 0, in_batch = 0;
  try {
    for (;;) {
      bury();
      while (next < order.size() && clusters_.size() < resident) start_cluster(order[next++]);
      complete_some_bulk(false);
      Warp* warp = nullptr;
      if (options.seed && !queue_.empty()) {
        size_t i = random() % queue_.size();
        warp = std::exchange(queue_[i], queue_.back());
        queue_.pop_back();
      } else if (!options.seed) {  // round robin: everybody queued now, then everybody queued meanwhile
        if (in_batch == batch_.size()) {
          batch_.clear();
          batch_.swap(queue_);
          in_batch = 0;
        }
        if (in_batch < batch_.size()) warp = batch_[in_batch++];
      }
      if (warp) {
        warp->queued = false;
        run_warp(*warp);
      } else if (!bulk.empty()) {
        complete_some_bulk(true);
      } else if (clusters_.empty() && next == order.size()) {
        break;
      } else {
        if (!retry_pollers()) deadlock();
      }
    }
  } catch (Fault& found) {
    found.text += where();
    throw;
  }
  stats.seconds = cpu_seconds() - start_;
}

void Engine::bury() {
  for (auto& cluster : clusters_) {
    if (cluster->live_ctas) continue;
    for (auto& cta : cluster->ctas) {
      cta->shared.shadow = {};
      cta->shared_bytes = {};
      for (Warp& warp : cta->warps) warp.r32 = {}, warp.r64 = {}, warp.local = {}, warp.held = {};
    }
    finished_.push_back(std::move(cluster));  // the run queue and the pollers of a flag may still name its warps
  }
  std::erase(clusters_, nullptr);
}

std::string Engine::where() const {
  if (!running_) return "";
  char text[160];
  const Cta& cta = *running_->cta;
  int n = snprintf(text, sizeof text, "\n  at <pc:%u> in CTA (%u, %u, %u), ", current_pc_, cta.index[0], cta.index[1],
                   cta.index[2]);
  if (lane >= 0)
    snprintf(text + n, sizeof text - n, "thread %u", running_->thread(u32(lane)));
  else
    snprintf(text + n, sizeof text - n, "warp %u", running_->index);
  return text;
}

void Engine::check_timeout() const {
  if (cpu_seconds() - start_ > options.timeout_s)
    fault(ErrorKind::kTimeout, "the launch ran for more than %g s", options.timeout_s);
}

void Engine::enqueue(Warp* warp) {
  if (warp->queued) return;
  warp->queued = true;
  queue_.push_back(warp);
}

void Engine::wake(Warp* warp) {
  for (Group& group : warp->groups)
    if (group.state == GroupState::kBlocked) {
      group.state = GroupState::kReady;
      enqueue(warp);
    }
}

void Engine::wake_all(std::vector<Warp*>& warps) {
  for (Warp* warp : std::exchange(warps, {})) wake(warp);
}

void Engine::release(Warp* warp, u32 mask) {
  for (Group& group : warp->groups)
    if (group.state == GroupState::kHeld && group.mask & mask) {
      group.state = GroupState::kReady;
      enqueue(warp);
    }
}

void Engine::polled(Warp& warp) {
  if (progress != seen_progress_) {
    seen_progress_ = progress;
    idle_polls_ = 0;
  }
  if (++idle_polls_ > 20000 + 1000 * clusters_.size() && bulk.empty())
    fault(ErrorKind::kLivelock, "everybody polls and nothing changes");
  warp.group().yielded = ++polls_;
  warp.yield();
}

void Engine::complete_some_bulk(bool idle) {
  if (bulk.empty()) return;
  bool stalled = idle || idle_polls_ > 1000;  // those who poll instead of waiting must see late copies too
  if (!stalled && !(policy() == AsyncPolicy::kRandom && random() % 16 == 0)) return;
  size_t i = policy() == AsyncPolicy::kRandom ? random() % bulk.size() : 0;
  auto copy = bulk[i];
  bulk.erase(bulk.begin() + long(i));
  Warp* was = std::exchange(running_, nullptr);
  run_bulk(*this, *copy);
  running_ = was;
  progress++;
}

// Nothing else can run: those who seem to spin on a flag get another try, since a loop may read a flag twice and go on. Waits
// for an mbarrier give up once, since the hardware's end after a time and a loop may count them.
bool Engine::retry_pollers() {
  if (progress != seen_progress_) retries_ = 0;
  seen_progress_ = progress;
  if (retries_++ > kRetries) return false;
  bool any = false;
  for (auto& [key, flag] : flags)
    for (Warp* warp : std::exchange(flag.pollers, {})) {
      for (Group& group : warp->groups) group.poll_seen = 0;
      wake(warp);
      any = true;
    }
  for (auto& cluster : clusters_)
    for (auto& cta : cluster->ctas)
      for (auto& [offset, barrier] : cta->mbarriers)
        for (Warp* warp : std::exchange(barrier.waiters, {})) {
          for (Group& group : warp->groups) group.expired |= group.state == GroupState::kBlocked;
          wake(warp);
          any = true;
        }
  return any;
}

bool Engine::pick_group(Warp& warp) {
  // The lowest address first: lanes that left a loop early wait for the others where the paths join. But those who poll let
  // everybody else go first, and each other in turn: they may be waiting for a lane of their own warp.
  Group* best = nullptr;
  auto before = [](const Group& a, const Group& b) { return a.yielded != b.yielded ? a.yielded < b.yielded : a.pc < b.pc; };
  for (Group& group : warp.groups)
    if (group.state == GroupState::kReady && (!best || before(group, *best))) best = &group;
  if (!best) return false;
  best->yielded = 0;
  warp.current = size_t(best - warp.groups.data());
  return true;
}

bool Engine::merge(Warp& warp) {
  Group& here = warp.group();
  for (size_t i = 0; i < warp.groups.size();) {
    Group& other = warp.groups[i];
    bool joins = i != warp.current && other.pc == here.pc &&
                 (other.state == GroupState::kReady || other.state == GroupState::kConverging);
    if (!joins) {
      i++;
      continue;
    }
    warp.groups[warp.current].mask |= other.mask;
    warp.groups.erase(warp.groups.begin() + long(i));
    if (i < warp.current) warp.current--;
    return merge(warp), true;
  }
  return false;
}

void Engine::run_warp(Warp& warp) {
  if (!pick_group(warp)) return;
  running_ = &warp;
  lane = -1;
  stats.switches++;
  warp.stop = false;
  const Instruction* code = program.code.data();
  if (warp.groups.size() > 1) merge(warp);
  do {
    Group& group = warp.group();
    const Instruction& in = code[group.pc];
    u32 mask = group.mask;
    if (in.guard != kNoGuard) mask &= in.guard_negated ? ~warp.pred[in.guard] : warp.pred[in.guard];
    current_pc_ = in.pc;
    group.pc++;
    if (mask) in.run(warp, in, mask);
    if ((++stats.instructions & 0xffff) == 0) check_timeout();
    if (warp.groups.size() > 1 && !warp.stop) {
      merge(warp);
      pick_group(warp);
    }
  } while (!warp.stop);
  if (std::any_of(warp.groups.begin(), warp.groups.end(), [](const Group& g) { return g.state == GroupState::kReady; }))
    enqueue(&warp);
  running_ = nullptr;
}

void Engine::deadlock() {
  std::map<std::string, u32> waits;
  bool diverged = false;
  for (auto& cluster : clusters_)
    for (auto& cta : cluster->ctas)
      for (Warp& warp : cta->warps) {
        // Lanes that wait for lanes which themselves wait for something else are not at fault.
        diverged |= !warp.groups.empty() && std::all_of(warp.groups.begin(), warp.groups.end(), [](const Group& group) {
          return group.state == GroupState::kConverging;
        });
        for (Group& group : warp.groups) {
          char text[160];
          snprintf(text, sizeof text, "CTA (%u, %u, %u): %s at <pc:%u>", cta->index[0], cta->index[1], cta->index[2],
                   group.waits_for, group.waits_at);
          waits[text] += u32(std::popcount(group.mask));
        }
      }
  std::string text = diverged ? "lanes of a warp wait for each other at different instructions" : "nothing can run any more";
  if (u32 waiting = n_cta - u32(clusters_.size()) * cluster_size; options.resident && waiting)
    text += "; not all CTAs were resident";
  size_t shown = 0;
  for (auto& [wait, lanes] : waits) {
    if (shown++ == 12) {
      text += "\n  ...";
      break;
    }
    text += "\n  " + std::to_string(lanes) + " threads of " + wait;
  }
  throw Fault{diverged ? ErrorKind::kDivergence : ErrorKind::kDeadlock, text};
}

}  // namespace emu
