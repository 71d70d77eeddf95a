// The running grid: warps, CTAs, clusters and what they synchronise through.
#pragma once
#include <array>
#include <deque>
#include <map>
#include <memory>
#include <unordered_map>

#include "memory.h"
#include "program.h"

namespace emu {

struct Cta;
struct Engine;

// kConverging: until other lanes of the warp arrive. kBlocked: runs its instruction again when woken.
// kHeld: has run its instruction and goes on when released.
enum class GroupState : u8 { kReady, kConverging, kBlocked, kHeld };

// Lanes of a warp that are at the same instruction.
struct Group {
  u32 pc = 0, mask = 0;
  GroupState state = GroupState::kReady;
  const char* waits_for = "";
  u32 waits_at = 0;
  u64 poll_seen = 0, poll_actions = 0;  // what the last strong load saw, and the warp's actions until then
  u32 tried_at = 0;                     // 1 + the last mbarrier wait that gave up
  bool expired = false;                 // the mbarrier wait that it blocks in gives up, as the hardware's time limit makes it
  u64 yielded = 0;                      // when it last polled in vain, so that other lanes of the warp go first; 0: it did not
};

// One cp.async of one lane.
struct CpAsync {
  u32 lane, group, pc, bytes, valid;  // valid: bytes copied, the rest is zero fill
  Place shared;
  const char* source;
  bool copied;
  void copy();
};

// A register handed to wgmma, as one warp sees it.
struct HeldRegister {
  u32 group = 0;             // the last wgmma group that uses it; 0: none
  bool accumulator = false;  // in that group: then even reading it is an error before the wait
  u32 n = 0;                 // N of the wgmma that last accumulated into it
  u32 touched = 0;           // 1 + the warp's fence count when the thread last read or wrote it
  u32 pc = 0;                // of that wgmma
};

// What fences add to relaxed accesses.
struct ThreadFences {
  Knowledge release;     // known at the last fence: relaxed writes after it hand this on
  Scope scope = kWeak;   // of that fence
  Knowledge acquire[2];  // brought by relaxed reads, from the own CTA and from others: the next fence takes it in
};

struct Warp {
  Engine* engine;
  Cta* cta;
  u32 index;  // in the CTA
  u32 live;   // lanes that have not exited
  std::vector<Group> groups;
  size_t current = 0;
  bool queued = false;  // in the run queue
  bool stop = false;    // leave the instruction loop after this instruction
  u64 actions = 0;      // stores and synchronisation other than polls

  std::vector<u32> r32, pred;
  std::vector<u64> r64;
  std::vector<char> local;

  std::array<Knowledge, kWarpSize> knows;
  std::array<Time, kWarpSize> now;
  std::array<std::array<Time, kFenceSpaces>, kWarpSize> fenced_now;
  std::array<std::array<ClockRef, kFenceSpaces>, kWarpSize> reader_fenced;
  std::array<ThreadFences, kWarpSize> fences;

  std::deque<CpAsync> cp_async;
  std::array<u32, kWarpSize> cp_groups;  // groups committed per lane
  std::vector<HeldRegister> held;        // per 32-bit register; empty if the program has no wgmma
  u32 wgmma_ops = 0, wgmma_groups = 0;   // issued and committed by this warp
  u32 wgmma_waited = 0;                  // groups that this warp has waited for
  u32 wgmma_fences = 0;
  std::array<u32, kWarpSize> cluster_phase;  // 1 + the phase of the cluster barrier each lane has arrived at; 0: none
  u32 registers = 0;                         // per thread, for setmaxnreg

  u32* lanes32(Operand o) { return &r32[(o >> 2) * kWarpSize]; }
  u64* lanes64(Operand o) { return &r64[(o >> 2) * kWarpSize]; }
  u32& predicate(Operand o) { return pred[o >> 2]; }
  u64 get(Operand o, u32 lane) {
    return (o & 3) == k64 ? lanes64(o)[lane] : (o & 3) == k32 ? lanes32(o)[lane] : predicate(o) >> lane & 1;
  }
  void set(Operand o, u32 lane, u64 value) {
    if ((o & 3) == k64)
      lanes64(o)[lane] = value;
    else if ((o & 3) == k32)
      lanes32(o)[lane] = u32(value);
    else
      predicate(o) = (predicate(o) & ~(1u << lane)) | u32(value & 1) << lane;
  }
  u64 uniform(Operand o, u32 mask, const char* what);  // the same in all lanes, or a DivergenceError

  // A base register of 32 bits gives an address of 32 bits.
  u64 address(Operand base, u32 lane, i64 offset) {
    u64 sum = get(base, lane) + u64(offset);
    return (base & 3) == k32 ? u32(sum) : sum;
  }

  Group& group() { return groups[current]; }
  Owner owner(u32 lane) const;
  Actor actor(u32 lane) const;
  u32 thread(u32 lane) const { return index * kWarpSize + lane; }
  void learn(u32 mask, const Knowledge& knowledge);
  void learn_over(u32 mask, const Knowledge& knowledge);  // only that it is over
  void tick(u32 mask) {
    for_lanes(mask, [&](u32 l) { now[l]++; });
  }

  // Aligned instructions: true if exactly the lanes of `need` are here; else wait for the others and run again.
  bool converged(u32 mask, u32 need, const char* what);
  void block(const char* what);  // runs this instruction again when woken
  void hold(const char* what);   // until released
  void yield() { stop = true; }
  void exit(u32 mask);
};

struct NamedBarrier {
  u32 expected = 0, arrived = 0;  // threads; expected 0: all that have not exited
  u32 yes = 0, voters = 0;        // for bar.red
  Gathering gathering;
  struct Waiter {
    Warp* warp;
    u32 mask;
    const Instruction* in;
  };
  std::vector<Waiter> waiters;
};

struct MBarrier {
  bool valid = false;
  u32 count = 0, pending = 0;
  i64 tx = 0;
  u32 phase = 0, ever = 0;  // phases completed since init, and ever at this address
  Owner slot = kNobody;     // the agent that performs the copies it counts
  Access init;
  Time fenced = kInFlight;  // when the thread that initialised it made that visible to asynchronous copies
  std::unordered_map<Owner, Access> users;  // the last arrival or wait of each thread
  // From threads of the own CTA, and from others: who acquires at CTA scope learns only the first.
  Gathering gathering[2];
  Knowledge released[2];  // what waiters of the last completed phase learn
  std::vector<Warp*> waiters;
};

struct WgmmaOp {
  const Instruction* in;
  u32 group;
  u64 desc_a, desc_b;
  bool accumulate;
  u32 warps = 0;  // of the warpgroup, that have issued it
};

struct Warpgroup {
  Owner agent = kNobody;    // that reads shared memory for wgmma; its time counts groups
  std::deque<WgmmaOp> ops;  // issued by some warp and not yet executed by all
  u32 first_op = 0;         // number of ops.front()
  u32 waited = 0;           // the group that `learned` is about
  Knowledge learned;
  std::vector<Warp*> waiters;
};

struct BulkCopy;

// The bulk stores of a thread.
struct BulkGroups {
  Owner agent = kNobody;  // that reads shared memory for them; its time counts groups
  u32 committed = 0;
  std::vector<std::shared_ptr<BulkCopy>> copies;  // not yet waited for
};

struct Cta {
  Engine* engine;
  u32 id, rank;  // number in the grid (clusters contiguous), rank in the cluster
  u32 index[3];  // blockIdx
  struct Cluster* cluster;
  std::vector<Warp> warps;
  std::vector<char> shared_bytes;
  Region shared;
  NamedBarrier barriers[16];
  std::map<u32, MBarrier> mbarriers;  // by shared-memory offset
  std::vector<Warpgroup> warpgroups;
  i64 free_registers = 0;  // given up with setmaxnreg.dec
  std::vector<Warp*> register_waiters;
  u32 live_threads = 0;
  u32 agents = 0;                         // owner indices handed out
  std::map<u32, BulkGroups> bulk_groups;  // by thread

  Owner new_agent();
  Owner first_owner() const;
};

struct Cluster {
  u32 id;
  std::vector<std::unique_ptr<Cta>> ctas;
  u32 live_ctas = 0, live_threads = 0;
  u32 phase = 0, arrived = 0;  // of the cluster barrier
  Gathering gathering;
  Knowledge released;
  std::vector<Warp*> waiters;
};

}  // namespace emu
