// Strong loads and stores, atomics and fences: what threads of different CTAs synchronise through.
#include <algorithm>
#include <cmath>

#include "half.h"
#include "lanes.h"

namespace emu {
namespace {

enum class Atomic : i64 { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };
enum class Type : i64 { kB32, kU32, kS32, kB64, kU64, kS64, kF32, kF64, kF16x2, kBf16x2, kF16, kBf16, kB16 };

u32 bytes_of(Type type) {
  switch (type) {
    case Type::kB64:
    case Type::kU64:
    case Type::kS64:
    case Type::kF64: return 8;
    case Type::kF16:
    case Type::kBf16:
    case Type::kB16: return 2;
    default: return 4;
  }
}

// imm: space, offset, scope, acquire, release; then what each operation needs.
struct Order {
  Space space;
  i64 offset;
  Scope scope;
  bool acquire, release;
  explicit Order(const Instruction& in)
      : space(Space(in.imm[0])), offset(in.imm[1]), scope(Scope(in.imm[2])), acquire(in.imm[3]), release(in.imm[4]) {}
};

bool includes(const Engine& engine, Scope scope, u32 cta, u32 other) {
  return scope == kScopeGpu ||
         (scope == kScopeCluster ? cta / engine.cluster_size == other / engine.cluster_size : cta == other);
}

void acquire_from(Warp& warp, u32 l, const Flag& flag, const Order& order) {
  Engine& engine = *warp.engine;
  if (!engine.racing()) return;
  if (order.scope == kScopeGpu) warp.knows[l].sc_due = engine.clocks.join(warp.knows[l].sc_due, flag.sc);
  for (const Release& release : flag.releases) {
    if (!includes(engine, release.scope, release.cta, warp.cta->id) ||
        !includes(engine, order.scope, warp.cta->id, release.cta))
      continue;
    // A relaxed read becomes an acquire with the next fence.
    if (order.acquire)
      warp.learn(1u << l, release.knowledge);
    else
      join_into(engine.clocks, warp.fences[l].acquire[release.cta != warp.cta->id], release.knowledge);
  }
}

void release_to(Warp& warp, u32 l, Flag& flag, const Order& order, bool continues) {
  Engine& engine = *warp.engine;
  if (!engine.racing()) return;
  if (!continues) flag.releases.clear(), flag.sc = {};  // a plain store ends the release sequence, others continue it
  if (order.scope == kScopeGpu) flag.sc = engine.clocks.join(flag.sc, warp.knows[l].sc);
  Gathering gathering;
  Scope scope = order.scope;
  if (order.release) {
    gathering.add(engine.clocks, warp.actor(l));
    warp.now[l]++;
  } else {
    scope = std::min(scope, warp.fences[l].scope);  // a relaxed write after a fence
    if (scope == kWeak) return;
    gathering.add(engine.clocks, warp.fences[l].release);
  }
  Knowledge knowledge = gathering.finish(engine.clocks);
  for (Release& release : flag.releases)
    if (release.scope == scope && (scope == kScopeGpu || release.cta == warp.cta->id))
      return join_into(engine.clocks, release.knowledge, knowledge);
  flag.releases.push_back({scope, warp.cta->id, knowledge});
}

u64 fetch(const Place& at, u32 bytes) {
  u64 value = 0;
  memcpy(&value, at.host(), bytes);
  return value;
}

// A read-modify-write is recorded as the write it is.
void record(Warp& warp, u32 l, const Instruction& in, const Place& at, u32 bytes, Scope scope, bool read, bool write) {
  Actor actor = warp.actor(l);
  Access access{actor.owner, actor.now, in.pc, scope};
  if (read && !write) at.region->shadow.read(at.offset, bytes, actor, access);
  if (write) at.region->shadow.write(at.offset, bytes, actor, access);
  if (at.space != kFenceGlobal) return;
  if (read) at.region->bytes_read += bytes, at.region->read_map.touch(at.offset, bytes);
  if (write) at.region->bytes_written += bytes, at.region->write_map.touch(at.offset, bytes);
}

// Who reads the same flags again, with the same result and nothing done in between, is spinning: it sleeps until a store.
bool spins(Warp& warp, u32 mask, const Instruction& in, Operand address, const Order& order, u32 bytes) {
  Engine& engine = *warp.engine;
  u64 seen = in.pc + 1;
  std::vector<u64> keys;
  for_lanes(mask, [&](u32 l) {
    Place at = engine.place(warp, l, warp.address(address, l, order.offset), order.space, bytes, bytes, false);
    keys.push_back(at.key());
    seen = (seen * 0x100000001b3ull ^ keys.back()) * 0x100000001b3ull ^ fetch(at, std::min(bytes, 8u));
  });
  Group& group = warp.group();
  bool again = group.poll_seen == seen && group.poll_actions == warp.actions;
  group.poll_seen = seen;
  group.poll_actions = warp.actions;
  engine.polled(warp);
  if (!again) return false;
  for (u64 key : keys) engine.add_poller(key, &warp);
  warp.block("spinning on a flag");
  return true;
}

// ld.relaxed, ld.acquire, ld.volatile; imm[5]: bytes of an element.
void strong_load(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  const Order order(in);
  const u32 n = in.n_dst, bytes = u32(in.imm[5]);
  if (spins(warp, mask, in, in.reg[n], order, bytes * n)) return;
  for_lanes(mask, [&](u32 l) {
    Place at = engine.place(warp, l, warp.address(in.reg[n], l, order.offset), order.space, bytes * n, bytes * n, false);
    acquire_from(warp, l, engine.flags[at.key()], order);
    record(warp, l, in, at, bytes * n, order.scope, true, false);
    for (u32 i = 0; i < n; i++) {
      u64 value = 0;
      memcpy(&value, at.host() + i * bytes, bytes);
      warp.set(in.reg[i], l, value);
    }
  });
  engine.lane = -1;
}

void strong_store(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  const Order order(in);
  const u32 n = in.n_reg - 1, bytes = u32(in.imm[5]);
  for_lanes(mask, [&](u32 l) {
    Place at = engine.place(warp, l, warp.address(in.reg[0], l, order.offset), order.space, bytes * n, bytes * n, true);
    record(warp, l, in, at, bytes * n, order.scope, false, true);
    release_to(warp, l, engine.flags[at.key()], order, false);
    for (u32 i = 0; i < n; i++) {
      u64 value = warp.get(in.reg[1 + i], l);
      memcpy(at.host() + i * bytes, &value, bytes);
    }
    engine.wake_pollers(at.key());
  });
  engine.lane = -1;
  engine.progress++;
  warp.actions++;
  engine.maybe_preempt(warp);
}

template <class T> u64 integer_result(Atomic op, T old, T b, T c) {
  switch (op) {
    case Atomic::kAdd: return u64(old) + u64(b);
    case Atomic::kMin: return u64(std::min(old, b));
    case Atomic::kMax: return u64(std::max(old, b));
    case Atomic::kAnd: return u64(old & b);
    case Atomic::kOr: return u64(old | b);
    case Atomic::kXor: return u64(old ^ b);
    case Atomic::kExch: return u64(b);
    case Atomic::kCas: return u64(old == b ? c : old);
    case Atomic::kInc: return old >= b ? 0 : u64(old) + 1;
    default: return old == 0 || old > b ? u64(b) : u64(old) - 1;
  }
}

double float_result(Atomic op, double old, double b) {
  return op == Atomic::kMin ? std::fmin(old, b) : op == Atomic::kMax ? std::fmax(old, b) : old + b;
}

template <auto Decode, auto Encode> u32 half_result(Atomic op, u64 old, u64 b) {
  return u32(Encode(float(float_result(op, Decode(u16(old)), Decode(u16(b))))));
}

u64 result_of(Atomic op, Type type, u64 old, u64 b, u64 c) {
  if (op == Atomic::kExch) return b;
  switch (type) {
    case Type::kF32:
      return std::bit_cast<u32>(op == Atomic::kAdd
                                    ? std::bit_cast<float>(u32(old)) + std::bit_cast<float>(u32(b))
                                    : float(float_result(op, std::bit_cast<float>(u32(old)), std::bit_cast<float>(u32(b)))));
    case Type::kF64: return std::bit_cast<u64>(float_result(op, std::bit_cast<double>(old), std::bit_cast<double>(b)));
    case Type::kBf16: return half_result<bf16_to_float, float_to_bf16>(op, old, b);
    case Type::kF16: return half_result<f16_to_float, float_to_f16>(op, old, b);
    case Type::kBf16x2:
      return half_result<bf16_to_float, float_to_bf16>(op, old, b) |
             u64(half_result<bf16_to_float, float_to_bf16>(op, old >> 16, b >> 16)) << 16;
    case Type::kF16x2:
      return half_result<f16_to_float, float_to_f16>(op, old, b) |
             u64(half_result<f16_to_float, float_to_f16>(op, old >> 16, b >> 16)) << 16;
    case Type::kS32: return integer_result<i32>(op, i32(old), i32(b), i32(c));
    case Type::kS64: return integer_result<i64>(op, i64(old), i64(b), i64(c));
    case Type::kB64:
    case Type::kU64: return integer_result<u64>(op, old, b, c);
    default: return integer_result<u32>(op, u32(old), u32(b), u32(c));
  }
}

// atom and red; imm[5], imm[6]: operation, type. Registers: [old], address, b, [c].
void atomic(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  const Order order(in);
  const Atomic op = Atomic(in.imm[5]);
  const Type type = Type(in.imm[6]);
  const u32 bytes = bytes_of(type), first = in.n_dst;
  auto next_value = [&](u32 l, u64 old) {
    return result_of(op, type, old, warp.get(in.reg[first + 1], l), in.n_reg > first + 2 ? warp.get(in.reg[first + 2], l) : 0) &
           (~0ull >> (64 - 8 * bytes));
  };
  if (std::has_single_bit(mask)) {  // a lone thread whose atomic changes nothing may be spinning on it
    u32 l = lowest_lane(mask);
    Place at = engine.place(warp, l, warp.address(in.reg[first], l, order.offset), order.space, bytes, bytes, true);
    u64 old = fetch(at, bytes);
    bool changes = next_value(l, old) != old;
    if (changes)
      warp.actions++;
    else if (first && spins(warp, mask, in, in.reg[first], order, bytes))
      return;
  }
  bool changed = false;
  for_lanes(mask, [&](u32 l) {
    Place at = engine.place(warp, l, warp.address(in.reg[first], l, order.offset), order.space, bytes, bytes, true);
    u64 old = fetch(at, bytes), value = next_value(l, old);
    Flag& flag = engine.flags[at.key()];
    acquire_from(warp, l, flag, order);
    record(warp, l, in, at, bytes, order.scope, true, true);
    release_to(warp, l, flag, order, true);
    memcpy(at.host(), &value, bytes);
    if (first) warp.set(in.reg[0], l, type == Type::kS32 ? u64(i64(i32(old))) : old);
    engine.stats.atomics++;
    if (value != old) {
      changed = true;
      engine.progress++;
      engine.wake_pollers(at.key());
    }
  });
  engine.lane = -1;
  if (!changed && first && !std::has_single_bit(mask)) engine.polled(warp);
  engine.maybe_preempt(warp);
}

// fence.{acq_rel, sc}, membar. imm: scope, sequentially consistent.
void fence(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  if (!engine.racing()) return;
  const Scope scope = Scope(in.imm[0]);
  const bool sc = in.imm[1] && scope == kScopeGpu;
  for_lanes(mask, [&](u32 l) {
    ThreadFences& fences = warp.fences[l];
    join_into(engine.clocks, warp.knows[l], fences.acquire[0]);
    if (scope != kScopeCta) join_into(engine.clocks, warp.knows[l], fences.acquire[1]);
    Knowledge& knows = warp.knows[l];
    if (sc) knows.happened = engine.clocks.join(knows.happened, knows.sc_due);
    Gathering gathering;
    gathering.add(engine.clocks, warp.actor(l));
    fences.release = gathering.finish(engine.clocks);
    if (sc) knows.sc = fences.release.happened;
    fences.scope = scope;
    warp.now[l]++;
  });
}

// fence.proxy.async. imm: covers shared, covers global.
void fence_proxy_async(Warp& warp, const Instruction& in, u32 mask) {
  Engine& engine = *warp.engine;
  if (!engine.racing()) return;
  for (int space = 0; space < kFenceSpaces; space++) {
    if (!in.imm[space]) continue;
    for_lanes(mask, [&](u32 l) {
      warp.fenced_now[l][space] = warp.now[l];
      warp.reader_fenced[l][space] = warp.knows[l].happened;
      if (!engine.options.fence_by_writer)
        warp.knows[l].fenced[space] = engine.clocks.join(warp.knows[l].fenced[space], warp.knows[l].happened);
    });
  }
  warp.tick(mask);
}

}  // namespace

void Engine::add_poller(u64 key, Warp* warp) { flags[key].pollers.push_back(warp); }

void Engine::wake_pollers(u64 key) {
  auto flag = flags.find(key);
  if (flag == flags.end() || flag->second.pollers.empty()) return;
  wake_all(flag->second.pollers);
}

void Engine::stored(const Place& at, u64 bytes) {
  if (flags.empty()) return;
  for (u64 i = 0; i < bytes; i += 2) {
    auto flag = flags.find(at.key() + i);
    if (flag == flags.end()) continue;
    flag->second.releases.clear();  // an ordinary store ends a release sequence
    flag->second.sc = {};
    wake_pollers(at.key() + i);
  }
}

void add_atomic_ops(OpTable& t) {
  t.add("ld.strong", strong_load);
  t.add("st.strong", strong_store);
  t.add("atom", atomic);
  t.add("fence", fence);
  t.add("fence.proxy.async", fence_proxy_async);
}

}  // namespace emu
