#include "shadow.h"

#include <algorithm>

namespace emu {

AccessSet& AccessSet::operator=(const AccessSet& other) {
  count_ = other.count_;
  std::copy(other.inline_, other.inline_ + kInline, inline_);
  spill_.reset(other.spill_ ? new std::vector<Access>(*other.spill_) : nullptr);
  return *this;
}

void AccessSet::add(const Access& access, const Actor& actor) {
  Access* accesses = data();
  u32 kept = 0;
  for (u32 i = 0; i < count_; i++) {
    const Access& old = accesses[i];
    // Whoever is ordered after the new access is ordered after these too. A strong access stands in only for strong ones
    // (another strong one need not be ordered after it), and only a write for a write (a read need not be after a read).
    bool stands_in = (access.scope == kWeak || old.scope != kWeak) && (access.writes || !old.writes);
    bool earlier =
        old.owner == access.owner ? old.time != kInFlight && old.scope <= access.scope : actor.ordered(old.owner, old.time);
    if (!stands_in || !earlier) accesses[kept++] = old;
  }
  count_ = kept;
  if (!spill_ && count_ == kInline) {
    spill_.reset(new std::vector<Access>(inline_, inline_ + kInline));
  }
  if (spill_) {
    spill_->resize(count_);
    spill_->push_back(access);
  } else {
    inline_[count_] = access;
  }
  count_++;
}

void AccessSet::complete(Owner owner, Time time) {
  for (u32 i = 0; i < count_; i++)
    if (Access& access = data()[i]; access.owner == owner && access.time == kInFlight) access.time = time;
}

void Shadow::enable(u32 buffer, u64 bytes, bool initialised, FenceSpace space, const ShadowOptions& options) {
  buffer_ = buffer;
  space_ = space;
  options_ = options;
  lines_.resize(bytes / kLine + 1);
  for (Line& line : lines_) line.whole.initialised = initialised;
}

void Shadow::split(Line& line, u32 cell_bytes) {
  std::unique_ptr<Cell[]> finer(new Cell[kLine / cell_bytes]);
  for (u32 i = 0; i < kLine / cell_bytes; i++)
    finer[i] = line.cells ? line.cells[i * cell_bytes / line.cell_bytes] : line.whole;
  line.cells = std::move(finer);
  line.cell_bytes = cell_bytes;
}

template <class F> void Shadow::for_cells(u64 offset, u64 bytes, bool unify, F f) {
  u64 end = offset + bytes;
  for (u64 i = offset / kLine; i * kLine < end; i++) {
    Line& line = lines_[i];
    const u64 start = i * kLine, first = std::max(offset, start), last = std::min(end, start + kLine);
    const bool covers = last - first == kLine;
    if (covers && !line.cells) {
      f(line.whole, start);
      continue;
    }
    // The largest cells that the access covers completely.
    const u32 fit = u32((first | last) & -(first | last)) & (kLine - 1);
    if (fit && fit < line.cell_bytes) split(line, fit);
    for (u64 at = first; at < last; at += line.cell_bytes) f(line.cells[(at - start) / line.cell_bytes], at);
    if (covers && unify) {
      line.whole = line.cells[0];
      line.cells.reset();
      line.cell_bytes = kLine;
    }
  }
}

static const char* name(Proxy proxy) { return proxy == Proxy::kGeneric ? "" : "asynchronous "; }

void Shadow::race(const char* action, u64 at, const char* other_action, const Access& other, const Access& by) const {
  char who[96];
  u32 index = other.owner & ((1u << options_.shift) - 1);
  snprintf(who, sizeof who, "<agent:%u:%u>", other.owner >> options_.shift, index);
  fault(ErrorKind::kRace, "%s%s of <at:%u:%llu> is not ordered after the %s%s by %s at <pc:%u>%s", name(by.proxy), action,
        buffer_, at, name(other.proxy), other_action, who, other.pc,
        other.time == kInFlight ? ", which is still in flight" : "");
}

bool Shadow::morally_strong(const Access& a, const Access& b, const Actor& actor) const {
  Scope narrower = std::min(a.scope, b.scope);
  if (narrower == kWeak) return false;
  if (narrower == kScopeGpu) return true;
  u32 other = b.owner >> options_.shift;
  return narrower == kScopeCta ? other == actor.cta
                               : other / options_.ctas_per_cluster == actor.cta / options_.ctas_per_cluster;
}

// The access `by` meets an earlier one: unless both are reads, or both strong, the earlier must have happened before.
void Shadow::check_order(const Access& earlier, u64 at, const Actor& actor, const Access& by, bool writes) const {
  if (!(writes || earlier.writes) || actor.ordered(earlier.owner, earlier.time) || morally_strong(by, earlier, actor)) return;
  // A write cannot meet what is over: earlier reads, and copies that somebody has seen completed. An ordinary write may
  // still be on its way, unless a fence has made it wait for shared memory.
  const bool fenced = space_ == kFenceShared && actor.knows->fenced[kFenceShared].at(earlier.owner) >= earlier.time;
  const bool lands_late = earlier.writes && earlier.proxy == Proxy::kGeneric && !earlier.counted && !fenced;
  if (writes && !lands_late && actor.over(earlier.owner, earlier.time)) return;
  race(writes ? "write" : "read", at, earlier.writes ? "write" : "read", earlier, by);
}

void Shadow::check_proxy(const Cell& cell, u64 at, const Actor& actor, bool reads) const {
  const Access& write = cell.write;
  if (write.owner == kNobody || write.proxy != Proxy::kGeneric) return;
  bool fenced = write.owner == actor.owner ? actor.fenced_now[space_] >= write.time
                                           : actor.knows->fenced[space_].at(write.owner) >= write.time;
  bool foreign = write.owner >> options_.shift != actor.cta;
  if (fenced && reads && options_.fence_by_reader && foreign && actor.reader_fenced)
    fenced = actor.reader_fenced[space_].at(write.owner) >= write.time;
  if (fenced) return;
  fault(ErrorKind::kProxy,
        "asynchronous %s of <at:%u:%llu>: the generic write by <agent:%u:%u> at <pc:%u> has no fence.proxy.async for %s memory "
        "in between",
        reads ? "read" : "write", buffer_, at, write.owner >> options_.shift, write.owner & ((1u << options_.shift) - 1), write.pc,
        space_ == kFenceShared ? "shared" : "global");
}

// No order helps: such a read may come from a cache that nothing keeps coherent, filled at any time of the launch.
void Shadow::check_constant(const Cell& cell, u64 at, const Access& by, bool writes) const {
  if (by.constant && cell.written_at)
    fault(ErrorKind::kReadOnly, "<at:%u:%llu> is read as constant memory, but the launch writes it at <pc:%u>", buffer_, at,
          cell.written_at - 1);
  if (writes && cell.constant_at)
    fault(ErrorKind::kReadOnly, "write of <at:%u:%llu>, which the launch reads as constant memory at <pc:%u>", buffer_, at,
          cell.constant_at - 1);
}

void Shadow::read_cell(Cell& cell, u64 at, const Actor& actor, const Access& by) const {
  if (!cell.initialised) fault(ErrorKind::kUninitialised, "read of uninitialised <at:%u:%llu>", buffer_, at);
  check_constant(cell, at, by, false);
  if (cell.write.owner != kNobody) check_order(cell.write, at, actor, by, false);
  for (const Access& access : cell.since) check_order(access, at, actor, by, false);
  if (by.proxy == Proxy::kAsync) check_proxy(cell, at, actor, true);
  if (by.constant) cell.constant_at = by.pc + 1;
  cell.since.add(by, actor);
}

// Where a value is replicated over threads, compilers have each of them store it to shared memory, from one instruction:
// no order among these stores could change what is there.
static bool replicated(const Access& a, const Access& b, u32 shift) {
  return b.repeats && a.pc == b.pc && a.owner >> shift == b.owner >> shift && a.proxy == Proxy::kGeneric;
}

void Shadow::check_write(const Cell& cell, u64 at, const Actor& actor, const Access& by) const {
  check_constant(cell, at, by, true);
  if (cell.write.owner != kNobody && !replicated(cell.write, by, options_.shift)) check_order(cell.write, at, actor, by, true);
  for (const Access& access : cell.since) check_order(access, at, actor, by, true);
  if (by.proxy == Proxy::kAsync) check_proxy(cell, at, actor, false);
}

void Shadow::read(u64 offset, u64 bytes, const Actor& actor, const Access& by) {
  if (!enabled()) return;
  for_cells(offset, bytes, false, [&](Cell& cell, u64 at) { read_cell(cell, at, actor, by); });
}

void Shadow::write(u64 offset, u64 bytes, const Actor& actor, Access by) {
  if (!enabled()) return;
  by.writes = true;
  for_cells(offset, bytes, true, [&](Cell& cell, u64 at) {
    check_write(cell, at, actor, by);
    cell.initialised = true;
    cell.written_at = by.pc + 1;
    if (by.scope != kWeak) {
      cell.since.add(by, actor);
    } else {
      cell.write = by;
      cell.since.clear();
    }
  });
}

void Shadow::hand_over(u64 offset, u64 bytes, Owner from, Owner to) {
  if (!enabled()) return;
  for_cells(offset, bytes, false, [&](Cell& cell, u64) {
    if (cell.write.owner == from && cell.write.time == kInFlight) cell.write.owner = to;
  });
}

void Shadow::complete_write(u64 offset, u64 bytes, Owner owner, Time time) {
  if (!enabled()) return;
  for_cells(offset, bytes, false, [&](Cell& cell, u64) {
    if (cell.write.owner == owner && cell.write.time == kInFlight) cell.write.time = time;
    cell.since.complete(owner, time);
  });
}

void Shadow::forget(u64 offset, u64 bytes) {
  if (!enabled()) return;
  for_cells(offset, bytes, true, [](Cell& cell, u64) { cell = Cell{}; });
}

void TouchMap::touch(u64 offset, u64 bytes) {
  u64 first = offset / 2, end = (offset + bytes + 1) / 2;
  while (first < end) {
    u64 bit = first % 64, n = std::min<u64>(64 - bit, end - first);
    u64 mask = (n == 64 ? ~0ull : (1ull << n) - 1) << bit, &word = words_[first / 64];
    touched_ += u64(std::popcount(mask & ~word));
    word |= mask;
    first += n;
  }
}

}  // namespace emu
