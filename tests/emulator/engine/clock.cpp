#include "clock.h"

#include <algorithm>

namespace emu {

static Chunk* new_chunk(u32 shift) {
  auto* chunk = static_cast<Chunk*>(malloc(sizeof(u32) + (sizeof(Time) << shift)));
  chunk->refs = 1;
  return chunk;
}

static Chunk* share(Chunk* chunk) {
  if (chunk) chunk->refs++;
  return chunk;
}

void ClockRef::destroy() {
  for (u32 i = 0; i < clock_->n_cta; i++) {
    Chunk* chunk = clock_->chunk[i];
    if (chunk && --chunk->refs == 0) free(chunk);
  }
  free(clock_);
}

Clock* ClockSpace::empty() const {
  auto* clock = static_cast<Clock*>(calloc(1, sizeof(Clock) + sizeof(Chunk*) * n_cta_));
  clock->refs = 1;
  clock->shift = shift_;
  clock->n_cta = n_cta_;
  return clock;
}

Chunk* ClockSpace::join_chunks(Chunk* a, Chunk* b) const {
  if (a == b || !b) return share(a);
  if (!a) return share(b);
  Chunk* joined = new_chunk(shift_);
  bool from_a = true, from_b = true;
  for (u32 i = 0; i < (1u << shift_); i++) {
    joined->time[i] = std::max(a->time[i], b->time[i]);
    from_a &= joined->time[i] == a->time[i];
    from_b &= joined->time[i] == b->time[i];
  }
  if (!from_a && !from_b) return joined;
  free(joined);
  return share(from_a ? a : b);
}

ClockRef ClockSpace::join(const ClockRef& a, const ClockRef& b) {
  if (a == b || !b.get()) return a;
  if (!a.get()) return b;
  u64 hash = (reinterpret_cast<uintptr_t>(a.get()) * 31 + reinterpret_cast<uintptr_t>(b.get())) >> 4;
  Memo& memo = memo_[(hash ^ hash >> 8) % kMemo];
  if (memo.a == a && memo.b == b) return memo.result;
  Clock* joined = empty();
  bool from_a = true, from_b = true;
  for (u32 i = 0; i < n_cta_; i++) {
    Chunk* chunk = joined->chunk[i] = join_chunks(a.get()->chunk[i], b.get()->chunk[i]);
    from_a &= chunk == a.get()->chunk[i];
    from_b &= chunk == b.get()->chunk[i];
  }
  ClockRef result(joined);
  if (from_a)
    result = a;
  else if (from_b)
    result = b;
  memo = {a, b, result};
  return result;
}

ClockRef ClockSpace::with(const ClockRef& clock, const std::vector<Stamp>& stamps) {
  if (stamps.empty()) return clock;
  Clock* changed = empty();
  if (clock.get())
    for (u32 i = 0; i < n_cta_; i++) changed->chunk[i] = share(clock.get()->chunk[i]);
  for (const Stamp& stamp : stamps) {
    Chunk*& chunk = changed->chunk[stamp.owner >> shift_];
    Chunk* shared = clock.get() ? clock.get()->chunk[stamp.owner >> shift_] : nullptr;
    if (chunk == shared) {  // first change of this chunk: copy it
      chunk = new_chunk(shift_);
      if (shared)
        memcpy(chunk->time, shared->time, sizeof(Time) << shift_), shared->refs--;
      else
        memset(chunk->time, 0, sizeof(Time) << shift_);
    }
    Time& time = chunk->time[stamp.owner & ((1u << shift_) - 1)];
    time = std::max(time, stamp.time);
  }
  return ClockRef(changed);
}

void join_into(ClockSpace& space, Knowledge& into, const Knowledge& from) {
  into.happened = space.join(into.happened, from.happened);
  for (int s = 0; s < kFenceSpaces; s++) into.fenced[s] = space.join(into.fenced[s], from.fenced[s]);
  into.over = space.join(into.over, from.over);
  into.sc = space.join(into.sc, from.sc);
  into.sc_due = space.join(into.sc_due, from.sc_due);
}

void join_over(ClockSpace& space, Knowledge& into, const Knowledge& from) {
  into.over = space.join(into.over, space.join(from.over, from.happened));
  for (int s = 0; s < kFenceSpaces; s++) into.fenced[s] = space.join(into.fenced[s], from.fenced[s]);
}

void Gathering::add(ClockSpace& space, const Knowledge& knowledge) {
  any_ = true;
  const ClockRef* from[] = {&knowledge.happened, &knowledge.fenced[0], &knowledge.fenced[1],
                            &knowledge.over,     &knowledge.sc,        &knowledge.sc_due};
  ClockRef* into[] = {&sum_.happened, &sum_.fenced[0], &sum_.fenced[1], &sum_.over, &sum_.sc, &sum_.sc_due};
  for (size_t i = 0; i < std::size(into); i++) {
    if (*from[i] == last_[i]) continue;  // the neighbouring lane brought the same clock
    *into[i] = space.join(*into[i], *from[i]);
    last_[i] = *from[i];
  }
}

void Gathering::add(ClockSpace& space, const Actor& actor) {
  add(space, *actor.knows);
  own_.push_back({actor.owner, actor.now});
  add_own_fences(actor);
}

void Gathering::add_own_fences(const Actor& actor) {
  for (int s = 0; s < kFenceSpaces; s++)
    if (actor.fenced_now[s]) own_fenced_[s].push_back({actor.owner, actor.fenced_now[s]});
}

void Gathering::add_over(ClockSpace& space, const Actor& actor) {
  any_ = true;
  join_over(space, sum_, *actor.knows);
  own_over_.push_back({actor.owner, actor.now});
  add_own_fences(actor);
}

Knowledge Gathering::finish(ClockSpace& space) {
  Knowledge result{space.with(sum_.happened, own_),
                   {space.with(sum_.fenced[0], own_fenced_[0]), space.with(sum_.fenced[1], own_fenced_[1])},
                   space.with(sum_.over, own_over_),
                   sum_.sc,
                   sum_.sc_due};
  *this = {};
  return result;
}

}  // namespace emu
