// Bulk asynchronous copies, by tensor descriptor (TMA) and linear, in both directions; and asynchronous stores.
#include <algorithm>

#include "half.h"
#include "lanes.h"
#include "tensor_map.h"

namespace emu {
namespace {

enum class ReductionType : i64 { kNone, kF32, kF16, kBf16, kU32, kS32, kF64, kU64 };

Cta& cta_at(Warp& warp, u64 address) {
  u64 rank = (address & ~kSharedWindow) >> kClusterRankShift;
  if (rank > warp.cta->cluster->ctas.size())
    fault(ErrorKind::kBounds, "shared address 0x%llx is of no CTA in the cluster", address);
  return rank ? *warp.cta->cluster->ctas[rank - 1] : *warp.cta;
}

u32 offset_of(u64 address) { return u32(address) & ((1u << kClusterRankShift) - 1); }

TensorMap fetch_map(Engine& engine, u64 address) {
  TensorMap map;
  if (address % 64) fault(ErrorKind::kAlignment, "tensor map at 0x%llx is not aligned to 64 bytes", address);
  if (address & kParamWindow) {
    u64 offset = address & ~kParamWindow;
    if (offset + sizeof map > engine.param_bytes) fault(ErrorKind::kBounds, "tensor map beyond the kernel parameters");
    memcpy(&map, engine.params + offset, sizeof map);
  } else {
    memcpy(&map, engine.global_place(address, sizeof map, false).host(), sizeof map);
  }
  if (map.magic != kTensorMapMagic) fault(ErrorKind::kAsyncCopy, "no tensor map at 0x%llx", address);
  return map;
}

// Cuts the box at these coordinates into runs that are contiguous on both sides. Elements outside the tensor are not valid.
void tile_parts(Engine& engine, const TensorMap& map, const i64* at, u32 shared, bool write,
                std::vector<BulkCopy::Part>& parts) {
  const u32 row_bytes = map.box[0] * map.element_bytes, step = map.swizzle ? 16 : row_bytes;
  u32 rows = 1;
  for (u32 d = 1; d < map.rank; d++) rows *= map.box[d];
  if (row_bytes % 16)
    fault(ErrorKind::kAsyncCopy, "the inner box of a tensor map has %u bytes, not a multiple of 16", row_bytes);
  if (map.swizzle && row_bytes > map.swizzle)
    fault(ErrorKind::kAsyncCopy, "the inner box of %u bytes exceeds the %u-byte swizzle", row_bytes, map.swizzle);
  u32 align = map.swizzle == 128 ? 1024 : map.swizzle ? map.swizzle * 8 : 128;
  if (shared % align)
    fault(ErrorKind::kAlignment, "a tile with %u-byte swizzle at shared address %u is not aligned to %u bytes", map.swizzle,
          shared, align);
  for (u32 row = 0; row < rows; row++) {
    bool inside = true;
    u64 address = map.address;
    for (u32 d = 1, rest = row; d < map.rank; rest /= map.box[d], d++) {
      i64 index = at[d] + i64(rest % map.box[d]);
      inside &= index >= 0 && index < i64(map.size[d]);
      address += u64(index) * map.stride[d - 1];
    }
    for (u32 start = 0; start < row_bytes; start += step) {
      i64 first = at[0] + i64(start / map.element_bytes), last = first + i64(step / map.element_bytes);
      i64 low = std::clamp<i64>(first, 0, i64(map.size[0])), high = std::clamp<i64>(last, 0, i64(map.size[0]));
      BulkCopy::Part part{swizzled(shared + row * row_bytes + start, map.swizzle), step, 0, 0, {}};
      if (inside && high > low) {
        part.lead = u32(low - first) * map.element_bytes;
        part.valid = u32(high - low) * map.element_bytes;
        part.global = engine.global_place(address + u64(low) * map.element_bytes, part.valid, write);
      }
      parts.push_back(part);
    }
  }
}

u32 total_bytes(const BulkCopy& copy) {
  u32 bytes = 0;
  for (const BulkCopy::Part& part : copy.parts) bytes += part.bytes;
  return bytes;
}

void count_traffic(const BulkCopy& copy, bool read, bool write) {
  for (const BulkCopy::Part& part : copy.parts) {
    if (!part.valid) continue;
    Region& region = *part.global.region;
    if (read) region.bytes_read += part.valid, region.read_map.touch(part.global.offset, part.valid);
    if (write) region.bytes_written += part.valid, region.write_map.touch(part.global.offset, part.valid);
  }
}

void issue(Warp& warp, std::shared_ptr<BulkCopy> copy) {
  Engine& engine = *warp.engine;
  engine.progress++;
  warp.actions++;
  if (engine.policy() == AsyncPolicy::kEarly)
    run_bulk(engine, *copy);
  else
    engine.bulk.push_back(copy);
  engine.maybe_preempt(warp);
}

void begin(Warp& warp, std::shared_ptr<BulkCopy> copy) {
  Stats& stats = warp.engine->stats;
  (copy->load ? stats.tma_loads : stats.tma_stores)++;
  stats.tma_bytes += total_bytes(*copy);
  issue(warp, std::move(copy));
}

// Registers a load into every target CTA: the bytes are in flight until the copy has run.
void start_load(Warp& warp, u32 pc, u32 l, std::shared_ptr<BulkCopy> copy) {
  Actor actor = warp.actor(l);
  for (size_t t = 0; t < copy->targets.size(); t++) {
    const BulkCopy::Target& target = copy->targets[t];
    MBarrier& barrier = use_mbarrier(warp, pc, l, *target.cta, target.mbarrier);
    check_signalled(warp, l, *target.cta, barrier, target.mbarrier);
    if (!target.cta->live_threads) fault(ErrorKind::kBounds, "bulk copy into a CTA of the cluster that has exited");
    for (const BulkCopy::Part& part : copy->parts) {
      target.cta->shared.check(part.shared, part.bytes, true);
      target.cta->shared.shadow.write(part.shared, part.bytes, actor, {barrier.slot, kInFlight, pc, kWeak, Proxy::kAsync});
      if (t == 0 && part.valid)
        part.global.region->shadow.read(part.global.offset, part.valid, actor,
                                        {barrier.slot, barrier.ever + 1, pc, kWeak, Proxy::kAsync});
    }
  }
  count_traffic(*copy, true, false);
  begin(warp, std::move(copy));
}

void start_store(Warp& warp, u32 pc, u32 l, std::shared_ptr<BulkCopy> copy) {
  Actor actor = warp.actor(l);
  BulkGroups& groups = warp.cta->bulk_groups[warp.thread(l)];
  if (groups.agent == kNobody) groups.agent = warp.cta->new_agent();
  copy->group = groups.committed + 1;
  groups.copies.push_back(copy);
  for (const BulkCopy::Part& part : copy->parts) {
    copy->cta->shared.check(part.shared, part.bytes, false);
    copy->cta->shared.shadow.read(part.shared, part.bytes, actor, {groups.agent, copy->group, pc, kWeak, Proxy::kAsync});
    // Reductions of several CTAs may meet in one place: they are atomic.
    Access write{actor.owner, kInFlight, pc, copy->reduction ? kScopeGpu : kWeak, Proxy::kAsync};
    if (part.valid) part.global.region->shadow.write(part.global.offset, part.valid, actor, write);
  }
  count_traffic(*copy, copy->reduction, true);
  begin(warp, std::move(copy));
}

std::shared_ptr<BulkCopy> new_copy(Warp& warp, const Instruction& in, u32 l, bool load) {
  auto copy = std::make_shared<BulkCopy>();
  copy->pc = in.pc;
  copy->cta = warp.cta;
  copy->thread = warp.thread(l);
  copy->load = load;
  warp.engine->lane = int(l);
  return copy;
}

void set_targets(Warp& warp, BulkCopy& copy, u64 shared, u64 mbarrier, u32 multicast) {
  if (!multicast) {
    if (&cta_at(warp, shared) != &cta_at(warp, mbarrier))
      fault(ErrorKind::kAsyncCopy, "a copy and the mbarrier that counts its bytes are in different CTAs");
    copy.targets.push_back({&cta_at(warp, shared), offset_of(mbarrier)});
    return;
  }
  auto& ctas = warp.cta->cluster->ctas;
  for_lanes(multicast, [&](u32 rank) {
    if (rank >= ctas.size()) fault(ErrorKind::kAsyncCopy, "multicast to CTA %u of a cluster of %zu", rank, ctas.size());
    copy.targets.push_back({ctas[rank].get(), offset_of(mbarrier)});
  });
}

void shared_alignment(u64 shared, u64 mbarrier) {
  if (shared % 16) fault(ErrorKind::kAlignment, "bulk copy at shared address %u is not aligned to 16 bytes", offset_of(shared));
  if (mbarrier % 8) fault(ErrorKind::kAlignment, "mbarrier address %u is not aligned to 8 bytes", offset_of(mbarrier));
}

// cp.async.bulk.tensor into shared memory; imm: rank, multicast. Registers: shared, map, coordinates, mbarrier, [mask].
void load_tensor(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  const u32 rank = u32(in.imm[0]);
  for_lanes(mask, [&](u32 l) {
    auto copy = new_copy(warp, in, l, true);
    TensorMap map = fetch_map(engine, warp.get(in.reg[1], l));
    if (map.rank != rank) fault(ErrorKind::kAsyncCopy, "a %u-D copy with a %u-D tensor map", rank, map.rank);
    i64 at[kMaxRank];
    for (u32 d = 0; d < rank; d++) at[d] = i32(warp.get(in.reg[2 + d], l));
    u64 shared = warp.get(in.reg[0], l), mbarrier = warp.get(in.reg[2 + rank], l);
    shared_alignment(shared, mbarrier);
    set_targets(warp, *copy, shared, mbarrier, in.imm[1] ? u32(warp.get(in.reg[3 + rank], l)) & 0xffff : 0);
    tile_parts(engine, map, at, offset_of(shared), false, copy->parts);
    start_load(warp, in.pc, l, copy);
  });
  engine.lane = -1;
}

// cp.async.bulk.tensor and cp.reduce.async.bulk.tensor out of shared memory; imm: rank, reduce. Registers: shared, map,
// coordinates.
void store_tensor(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  const u32 rank = u32(in.imm[0]);
  for_lanes(mask, [&](u32 l) {
    auto copy = new_copy(warp, in, l, false);
    TensorMap map = fetch_map(engine, warp.get(in.reg[1], l));
    if (map.rank != rank) fault(ErrorKind::kAsyncCopy, "a %u-D copy with a %u-D tensor map", rank, map.rank);
    i64 at[kMaxRank];
    for (u32 d = 0; d < rank; d++) at[d] = i32(warp.get(in.reg[2 + d], l));
    if (in.imm[1]) copy->reduction = map.element_type;
    tile_parts(engine, map, at, offset_of(warp.get(in.reg[0], l)), true, copy->parts);
    start_store(warp, in.pc, l, copy);
  });
  engine.lane = -1;
}

// cp.async.bulk (linear); imm: multicast. Registers: shared, global, bytes, mbarrier, [mask].
void load_linear(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  for_lanes(mask, [&](u32 l) {
    auto copy = new_copy(warp, in, l, true);
    u64 shared = warp.get(in.reg[0], l), global = warp.get(in.reg[1], l), bytes = warp.get(in.reg[2], l),
        mbarrier = warp.get(in.reg[3], l);
    shared_alignment(shared, mbarrier);
    if (bytes % 16 || global % 16)
      fault(ErrorKind::kAlignment, "bulk copy of %llu bytes from 0x%llx: both must be multiples of 16", bytes, global);
    set_targets(warp, *copy, shared, mbarrier, in.imm[0] ? u32(warp.get(in.reg[4], l)) & 0xffff : 0);
    copy->parts.push_back({offset_of(shared), u32(bytes), 0, u32(bytes), engine.global_place(global, bytes, false)});
    start_load(warp, in.pc, l, copy);
  });
  engine.lane = -1;
}

// imm: reduction type or 0. Registers: global, shared, bytes.
void store_linear(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  for_lanes(mask, [&](u32 l) {
    auto copy = new_copy(warp, in, l, false);
    u64 global = warp.get(in.reg[0], l), shared = warp.get(in.reg[1], l), bytes = warp.get(in.reg[2], l);
    shared_alignment(shared, 0);
    if (bytes % 16 || global % 16)
      fault(ErrorKind::kAlignment, "bulk copy of %llu bytes to 0x%llx: both must be multiples of 16", bytes, global);
    copy->reduction = in.imm[0];
    copy->parts.push_back({offset_of(shared), u32(bytes), 0, u32(bytes), engine.global_place(global, bytes, true)});
    start_store(warp, in.pc, l, copy);
  });
  engine.lane = -1;
}

// st.async: a store of the generic proxy into a CTA of the cluster, which completes its bytes on an mbarrier there. Nothing
// else orders it, neither with what its thread does nor with another such store. imm: bytes of an element, offset.
// Registers: address, mbarrier, values.
void store_async(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  const u32 element = u32(in.imm[0]), n = in.n_reg - 2, bytes = element * n;
  if (engine.cluster_size == 1) fault(ErrorKind::kAsyncCopy, "st.async wants a cluster of more than one CTA");
  for_lanes(mask, [&](u32 l) {
    auto copy = new_copy(warp, in, l, true);
    const u64 address = warp.address(in.reg[0], l, in.imm[1]) & ~kSharedWindow, mbarrier = warp.get(in.reg[1], l);
    engine.shared_place(*warp.cta, address, bytes, bytes, true);
    engine.shared_place(*warp.cta, mbarrier & ~kSharedWindow, 8, 8, true);
    set_targets(warp, *copy, address, mbarrier, 0);
    for (u32 i = 0; i < n; i++) {
      u64 value = warp.get(in.reg[2 + i], l);
      copy->staged.insert(copy->staged.end(), reinterpret_cast<char*>(&value), reinterpret_cast<char*>(&value) + element);
    }
    copy->parts.push_back({offset_of(address), bytes, 0, bytes, {}});
    Cta& cta = *copy->targets[0].cta;
    MBarrier& barrier = use_mbarrier(warp, in.pc, l, cta, offset_of(mbarrier));
    Access store = {barrier.slot, kInFlight, in.pc};
    store.counted = true;
    cta.shared.shadow.write(offset_of(address), bytes, warp.actor(l), store);
    issue(warp, std::move(copy));
  });
  engine.lane = -1;
}

void commit(Warp& warp, const Instruction&, u32 mask) {
  for_lanes(mask, [&](u32 l) { warp.cta->bulk_groups[warp.thread(l)].committed++; });
}

// imm: groups that may stay in flight, reading only.
void wait(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  for_lanes(mask, [&](u32 l) {
    auto found = warp.cta->bulk_groups.find(warp.thread(l));
    if (found == warp.cta->bulk_groups.end() || found->second.committed <= u64(in.imm[0])) return;
    BulkGroups& groups = found->second;
    const u32 target = groups.committed - u32(in.imm[0]);
    for (auto& copy : groups.copies) {
      if (copy->group > target) continue;
      copy->read_waited = true;
      if (!copy->was_read) read_bulk(engine, *copy);
      if (in.imm[1]) continue;
      if (!copy->was_written) {
        engine.bulk.erase(std::find(engine.bulk.begin(), engine.bulk.end(), copy));
        run_bulk(engine, *copy);
      }
      for (const BulkCopy::Part& part : copy->parts)
        if (part.valid) part.global.region->shadow.complete_write(part.global.offset, part.valid, warp.owner(l), warp.now[l]);
    }
    if (!in.imm[1]) std::erase_if(groups.copies, [&](const auto& copy) { return copy->group <= target; });
    if (groups.agent == kNobody) return;
    Gathering gathering;
    gathering.add_component(groups.agent, target);
    warp.learn(1u << l, gathering.finish(engine.clocks));
  });
  warp.actions++;
}

template <class T> void add_elements(char* into, const char* from, u32 bytes) {
  for (u32 i = 0; i < bytes; i += sizeof(T)) {
    T a, b;
    memcpy(&a, into + i, sizeof a);
    memcpy(&b, from + i, sizeof b);
    a = T(a + b);
    memcpy(into + i, &a, sizeof a);
  }
}

template <auto Decode, auto Encode> void add_halves(char* into, const char* from, u32 bytes) {
  for (u32 i = 0; i < bytes; i += 2) {
    u16 a, b;
    memcpy(&a, into + i, 2);
    memcpy(&b, from + i, 2);
    a = Encode(Decode(a) + Decode(b));
    memcpy(into + i, &a, 2);
  }
}

void write_part(i64 reduction, char* into, const char* from, u32 bytes) {
  switch (ReductionType(reduction)) {
    case ReductionType::kNone: memcpy(into, from, bytes); break;
    case ReductionType::kF32: add_elements<float>(into, from, bytes); break;
    case ReductionType::kF64: add_elements<double>(into, from, bytes); break;
    case ReductionType::kF16: add_halves<f16_to_float, float_to_f16>(into, from, bytes); break;
    case ReductionType::kBf16: add_halves<bf16_to_float, float_to_bf16>(into, from, bytes); break;
    case ReductionType::kU64: add_elements<u64>(into, from, bytes); break;
    default: add_elements<u32>(into, from, bytes);
  }
}

}  // namespace

void read_bulk(Engine&, BulkCopy& copy) {
  copy.staged.resize(total_bytes(copy));
  char* to = copy.staged.data();
  for (const BulkCopy::Part& part : copy.parts) {
    memcpy(to, copy.cta->shared_bytes.data() + part.shared, part.bytes);
    to += part.bytes;
  }
  copy.was_read = true;
}

void run_bulk(Engine& engine, BulkCopy& copy) {
  if (!copy.load) {
    if (!copy.was_read) read_bulk(engine, copy);
    const char* from = copy.staged.data();
    for (const BulkCopy::Part& part : copy.parts) {
      if (part.valid) {
        write_part(copy.reduction, part.global.host(), from + part.lead, part.valid);
        engine.stored(part.global, part.valid);
      }
      from += part.bytes;
    }
    copy.was_written = true;
    return;
  }
  if (copy.parts.empty()) return arrive_copied(engine, copy);
  for (const BulkCopy::Target& target : copy.targets) {
    const MBarrier& barrier = target.cta->mbarriers[target.mbarrier];
    for (const BulkCopy::Part& part : copy.parts) {
      char* to = target.cta->shared_bytes.data() + part.shared;
      memset(to, 0, part.bytes);
      if (part.valid) memcpy(to + part.lead, copy.staged.empty() ? part.global.host() : copy.staged.data(), part.valid);
      target.cta->shared.shadow.complete_write(part.shared, part.bytes, barrier.slot, barrier.ever + 1);
    }
    arrive_tx(engine, *target.cta, target.mbarrier, total_bytes(copy));
  }
}

void add_tma_ops(OpTable& t) {
  t.add("tma.load", load_tensor);
  t.add("tma.store", store_tensor);
  t.add("bulk.load", load_linear);
  t.add("bulk.store", store_linear);
  t.add("st.async", store_async);
  t.add("bulk.commit_group", commit);
  t.add("bulk.wait_group", wait);
}

}  // namespace emu
