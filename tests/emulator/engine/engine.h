// One launch: its options, buffers, scheduler, and the asynchronous operations in flight.
#pragma once
#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace emu {

enum class AsyncPolicy : i32 { kLate, kEarly, kRandom };

struct Options {
  u64 seed;
  i32 resident, race, async_policy, fence_by_writer, fence_by_reader, shuffle_ctas;
  double timeout_s;
};

// The layout is part of the C interface: launch.py mirrors it.
struct Stats {
  u64 instructions, switches, barriers, mbarrier_phases, atomics, mma, wgmma, macs, ldmatrix, stmatrix, cp_async, tma_loads,
      tma_stores, tma_bytes, threads;
  double seconds;
};

struct LaunchShape {
  u32 grid[3], block[3], cluster[3];
  u32 shared_bytes, dynamic_shared_bytes;
};

// What a flag in memory hands from releasing to acquiring threads.
struct Release {
  Scope scope;
  u32 cta;
  Knowledge knowledge;
};
struct Flag {
  std::vector<Release> releases;
  ClockRef sc;  // the writers' Knowledge::sc
  std::vector<Warp*> pollers;
};

// A bulk copy (TMA), an st.async, or the cp.async of a thread that an mbarrier waits for. A store reads and writes apart:
// wait_group.read waits for its reading half only.
struct BulkCopy {
  u32 pc;
  Cta* cta;  // that issued it
  u32 thread;
  u32 group = 0;  // bulk group of a store; a load completes on an mbarrier instead
  bool load;
  i64 reduction = 0;  // of a store: 0 copies, else adds elements of a type
  bool was_read = false, was_written = false, read_waited = false;
  // bytes of shared memory, of which `valid` after the first `lead` lie inside the tensor
  struct Part {
    u32 shared;
    u32 bytes, lead, valid;
    Place global;
  };
  std::vector<Part> parts;
  struct Target {
    Cta* cta;
    u32 mbarrier;
  };
  std::vector<Target> targets;  // of a load: one per destination CTA
  std::vector<char> staged;     // of a store, between its halves; of st.async, its bytes
  std::vector<CpAsync> copies;  // instead of parts; their completion is an arrival
};

struct Engine {
  Engine(const Program& program, const LaunchShape& shape, const Options& options, std::vector<Region>& buffers,
         const char* params, u64 param_bytes);
  void run();

  const Program& program;
  LaunchShape shape;
  Options options;
  std::vector<Region>& buffers;
  const char* params;
  u64 param_bytes;
  Stats stats{};

  u32 n_threads, n_cta, cluster_size, agent_shift;
  ClockSpace clocks;
  ShadowOptions shadow_options;
  std::unordered_map<u64, Flag> flags;         // by Place::key
  std::deque<std::shared_ptr<BulkCopy>> bulk;  // in flight
  int lane = -1;                               // the lane being served, for messages
  u64 progress = 0;                            // counts everything that polling loops do not do
  std::string printed;                         // by the kernel

  bool racing() const { return options.race; }
  u64 random() {
    rng_ ^= rng_ << 13;
    rng_ ^= rng_ >> 7;
    return rng_ ^= rng_ << 17;
  }
  bool chance(u32 one_in) { return options.seed && random() % one_in == 0; }
  bool early() { return policy() == AsyncPolicy::kEarly || (policy() == AsyncPolicy::kRandom && random() & 1); }
  AsyncPolicy policy() const { return AsyncPolicy(options.async_policy); }

  void wake(Warp* warp);                     // its blocked groups run their instruction again
  void wake_all(std::vector<Warp*>& warps);  // and forget them
  void release(Warp* warp, u32 mask);        // its held groups with lanes in the mask go on
  void polled(Warp& warp);                   // a poll found nothing new
  void maybe_preempt(Warp& warp) {
    if (options.seed && (random() & 7) == 0) warp.stop = true;
  }
  Place place(Warp& warp, u32 lane, u64 address, Space space, u64 bytes, u64 align, bool write);
  Place shared_place(Cta& cta, u64 address, u64 bytes, u64 align, bool write);
  Place global_place(u64 address, u64 bytes, bool write);
  void add_poller(u64 key, Warp* warp);
  void wake_pollers(u64 key);
  void stored(const Place& at, u64 bytes);  // an ordinary store: wakes who polls it

 private:
  void start_cluster(u32 id);
  void start_warp(Cta& cta, u32 index);
  void fill_specials(Warp& warp);
  void run_warp(Warp& warp);
  bool pick_group(Warp& warp);
  bool merge(Warp& warp);
  void enqueue(Warp* warp);
  void complete_some_bulk(bool idle);
  bool retry_pollers();
  [[noreturn]] void deadlock();
  void check_timeout() const;
  void bury();  // frees what finished clusters held
  std::string where() const;

  std::vector<std::unique_ptr<Cluster>> clusters_, finished_;
  std::vector<Warp*> queue_, batch_;
  Warp* running_ = nullptr;
  u64 rng_;
  double start_ = 0;  // of cpu_seconds()
  u32 current_pc_ = 0;
  u64 polls_ = 0, idle_polls_ = 0, seen_progress_ = 0, retries_ = 0;
  friend struct Warp;
};

void read_generic(Warp& warp, u32 lane, u64 address, char* into, u64 bytes);  // of any space, as ld would
char* local_memory(Warp& warp, u32 lane, u64 offset, u64 bytes);
void read_bulk(Engine& engine, BulkCopy& copy);  // the reading half of a store
void run_bulk(Engine& engine, BulkCopy& copy);   // completes a copy
MBarrier& use_mbarrier(Warp& warp, u32 pc, u32 lane, Cta& cta, u32 offset);
void check_signalled(Warp& warp, u32 lane, const Cta& cta, const MBarrier& barrier, u32 offset);
void arrive_tx(Engine& engine, Cta& cta, u32 mbarrier, i64 bytes);
void arrive_copied(Engine& engine, BulkCopy& copy);  // completes the cp.async that an mbarrier waits for
void check_barriers_after_exit(Engine& engine, Cta& cta);  // fewer threads to wait for

}  // namespace emu
