// Vector clocks that share structure.
//
// A clock maps every agent of the grid (threads, and the asynchronous agents of each CTA) to the time up to which its
// actions are known to have happened. Clocks are immutable and reference counted, cut into one chunk per CTA: threads that
// leave a barrier together hold the same clock, and joining clocks compares pointers long before it compares numbers.
#pragma once
#include <cstdlib>
#include <utility>
#include <vector>

#include "common.h"

namespace emu {

using Owner = u32;  // agent: CTA number << shift | index in the CTA
using Time = u32;

constexpr Time kInFlight = ~0u;  // the time of an access that is not yet ordered before anything
constexpr Owner kNobody = ~0u;

struct Stamp {
  Owner owner;
  Time time;
};

struct Chunk {
  u32 refs;
  Time time[1];  // as many as a CTA has agents
};

struct Clock {
  u32 refs, shift, n_cta;
  Chunk* chunk[1];  // one per CTA; null means all zero
};

class ClockRef {
 public:
  ClockRef() = default;
  explicit ClockRef(Clock* adopted) : clock_(adopted) {}
  ClockRef(const ClockRef& other) : clock_(other.clock_) {
    if (clock_) clock_->refs++;
  }
  ClockRef(ClockRef&& other) noexcept : clock_(std::exchange(other.clock_, nullptr)) {}
  ClockRef& operator=(ClockRef other) noexcept {
    std::swap(clock_, other.clock_);
    return *this;
  }
  ~ClockRef() {
    if (clock_ && --clock_->refs == 0) destroy();
  }

  Time at(Owner owner) const {
    if (!clock_) return 0;
    const Chunk* chunk = clock_->chunk[owner >> clock_->shift];
    return chunk ? chunk->time[owner & ((1u << clock_->shift) - 1)] : 0;
  }
  Clock* get() const { return clock_; }
  bool operator==(const ClockRef& other) const { return clock_ == other.clock_; }

 private:
  void destroy();
  Clock* clock_ = nullptr;
};

// Makes the clocks of one launch. Joins are remembered, so that equal inputs give the same object again.
class ClockSpace {
 public:
  ClockSpace(u32 n_cta, u32 shift) : n_cta_(n_cta), shift_(shift), memo_(kMemo) {}
  ClockRef join(const ClockRef& a, const ClockRef& b);
  ClockRef with(const ClockRef& clock, const std::vector<Stamp>& stamps);  // clock, with these components raised

 private:
  struct Memo {
    ClockRef a, b, result;
  };
  static constexpr size_t kMemo = 256;
  Clock* empty() const;
  Chunk* join_chunks(Chunk* a, Chunk* b) const;
  u32 n_cta_, shift_;
  std::vector<Memo> memo_;
};

// The address space a proxy fence covers.
enum FenceSpace : u8 { kFenceShared, kFenceGlobal, kFenceSpaces };

// What a thread knows: what happened before it, which of it is ordered for the asynchronous proxy too, and what else is
// over without having been published to it: a later write cannot meet reads and finished copies of that time.
// Fences that are sequentially consistent have one order for all threads. So where one of them happened before a write, the
// write was read, and the read happened before another of them, the first comes before the second, whoever wrote and read:
// `sc` is what was known at such fences that happened before, `sc_due` what the thread's next one will take in.
struct Knowledge {
  ClockRef happened;
  ClockRef fenced[kFenceSpaces];
  ClockRef over;
  ClockRef sc, sc_due;
};

// The agent that performs or vouches for an access.
struct Actor {
  Owner owner;
  Time now;
  Time fenced_now[kFenceSpaces];  // own actions up to this time are fenced
  const Knowledge* knows;
  const ClockRef* reader_fenced;  // what this thread itself fenced, per FenceSpace; null where it does not matter
  u32 cta;

  bool ordered(Owner by, Time time) const {
    if (time == kInFlight) return false;
    return by == owner || knows->happened.at(by) >= time;
  }
  bool over(Owner by, Time time) const { return time != kInFlight && knows->over.at(by) >= time; }
};

// Collects what arriving threads know, to hand it to whoever leaves (barriers, mbarriers, flags).
class Gathering {
 public:
  void add(ClockSpace& space, const Actor& actor);
  void add(ClockSpace& space, const Knowledge& knowledge);
  void add_over(ClockSpace& space, const Actor& actor);  // that it is over, no more
  void add_component(Owner owner, Time time) { own_.push_back({owner, time}); }
  Knowledge finish(ClockSpace& space);  // and start over
  bool empty() const { return !any_ && own_.empty(); }

 private:
  void add_own_fences(const Actor& actor);
  Knowledge sum_;
  ClockRef last_[4 + kFenceSpaces];
  std::vector<Stamp> own_, own_fenced_[kFenceSpaces], own_over_;
  bool any_ = false;
};

void join_into(ClockSpace& space, Knowledge& into, const Knowledge& from);
void join_over(ClockSpace& space, Knowledge& into, const Knowledge& from);  // all that `from` knows is over

}  // namespace emu
