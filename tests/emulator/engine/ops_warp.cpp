// Exchanges between the lanes of a warp.
#include <algorithm>

#include "lanes.h"

namespace emu {
namespace {

// The lanes that a .sync instruction names must all be here. Its operand says which; they must include every executing lane.
// Lanes that name others (the halves of a warp, each on its own) run apart: `mask` becomes those that can go now, and the
// rest comes back to the instruction.
bool gather(Warp& warp, u32& mask, Operand members, const char* what) {
  u32 first = 0, first_named = 0;
  for (u32 rest = mask, same; rest; rest &= ~same) {
    const u32 named = u32(warp.get(members, lowest_lane(rest)));
    same = 0;
    for_lanes(rest, [&](u32 l) { same |= u32(u32(warp.get(members, l)) == named) << l; });
    if (same & ~named)
      fault(ErrorKind::kDivergence, "%s: lanes %08x execute it but are not in its member mask %08x", what, same & ~named, named);
    if (rest == mask) first = same, first_named = named;
    if ((named & warp.live) != same || same == mask) continue;
    Group others = warp.group();
    others.pc--;
    others.mask = mask & ~same;
    warp.group().mask &= ~others.mask;
    warp.groups.push_back(others);
    mask = same;
    return true;
  }
  const u32 need = first_named & warp.live;
  if (first != mask && !(need & ~mask))
    fault(ErrorKind::kDivergence, "%s: the member masks of lanes %08x and of lanes %08x differ, but name each other", what, first,
          need & ~first);
  return warp.converged(mask, need, what);
}

// shfl.sync d|p, a, b, c, members; imm: mode (up, down, bfly, idx). Registers: d, p, a, b, c, members.
void shuffle(Warp& warp, const Instruction& in, u32 mask) {
  if (!gather(warp, mask, in.reg[5], "shfl.sync")) return;
  const i64 mode = in.imm[0];
  u32 result[kWarpSize], inside = 0;
  const u32 *a = warp.lanes32(in.reg[2]), *b = warp.lanes32(in.reg[3]), *c = warp.lanes32(in.reg[4]);
  for_lanes(mask, [&](u32 l) {
    u32 segment = c[l] >> 8 & 31, clamp = c[l] & 31, low = l & segment, high = low | (clamp & ~segment);
    i32 source;
    bool ok;
    u32 delta = b[l] & 31;
    switch (mode) {
      case 0:
        source = i32(l) - i32(delta);
        ok = source >= i32(high);
        break;
      case 1:
        source = i32(l + delta);
        ok = source <= i32(high);
        break;
      case 2:
        source = i32(l ^ delta);
        ok = source <= i32(high);
        break;
      default:
        source = i32(low | (delta & ~segment));
        ok = source <= i32(high);
        break;
    }
    if (!ok) source = i32(l);
    if (!(mask >> source & 1))
      fault(ErrorKind::kDivergence, "shfl.sync: lane %u reads lane %d, which does not take part", l, source);
    result[l] = a[source];
    inside |= u32(ok) << l;
  });
  for_lanes(mask, [&](u32 l) { warp.set(in.reg[0], l, result[l]); });
  write_predicate(warp, in.reg[1], mask, inside);
}

// vote.sync; imm: all, any, uni, ballot. Registers: d, p, members.
void vote(Warp& warp, const Instruction& in, u32 mask) {
  if (!gather(warp, mask, in.reg[2], "vote.sync")) return;
  u32 yes = warp.predicate(in.reg[1]) & mask;
  switch (in.imm[0]) {
    case 0: return write_predicate(warp, in.reg[0], mask, yes == mask ? ~0u : 0);
    case 1: return write_predicate(warp, in.reg[0], mask, yes ? ~0u : 0);
    case 2: return write_predicate(warp, in.reg[0], mask, yes == mask || !yes ? ~0u : 0);
    default: for_lanes(mask, [&](u32 l) { warp.set(in.reg[0], l, yes); });
  }
}

// match.sync; imm: all. Registers: d, p, a, members.
void match(Warp& warp, const Instruction& in, u32 mask) {
  if (!gather(warp, mask, in.reg[3], "match.sync")) return;
  u64 first = warp.get(in.reg[2], lowest_lane(mask));
  u32 same[kWarpSize], all = ~0u;
  for_lanes(mask, [&](u32 l) {
    same[l] = 0;
    for_lanes(mask, [&](u32 other) { same[l] |= u32(warp.get(in.reg[2], l) == warp.get(in.reg[2], other)) << other; });
    if (warp.get(in.reg[2], l) != first) all = 0;
  });
  for_lanes(mask, [&](u32 l) { warp.set(in.reg[0], l, in.imm[0] ? mask & all : same[l]); });
  write_predicate(warp, in.reg[1], mask, all);
}

enum class Reduction : i64 { kAdd, kMin, kMax, kAnd, kOr, kXor };

// redux.sync; imm: operation, signed. Registers: d, a, members.
void reduce(Warp& warp, const Instruction& in, u32 mask) {
  if (!gather(warp, mask, in.reg[2], "redux.sync")) return;
  const u32* a = warp.lanes32(in.reg[1]);
  u32 result = a[lowest_lane(mask)];
  for_lanes(mask & (mask - 1), [&](u32 l) {
    switch (Reduction(in.imm[0])) {
      case Reduction::kAdd: result += a[l]; break;
      case Reduction::kMin: result = in.imm[1] ? u32(std::min(i32(result), i32(a[l]))) : std::min(result, a[l]); break;
      case Reduction::kMax: result = in.imm[1] ? u32(std::max(i32(result), i32(a[l]))) : std::max(result, a[l]); break;
      case Reduction::kAnd: result &= a[l]; break;
      case Reduction::kOr: result |= a[l]; break;
      case Reduction::kXor: result ^= a[l]; break;
    }
  });
  for_lanes(mask, [&](u32 l) { warp.set(in.reg[0], l, result); });
}

// elect.sync d|p, members: the lowest lane leads.
void elect(Warp& warp, const Instruction& in, u32 mask) {
  if (!gather(warp, mask, in.reg[2], "elect.sync")) return;
  u32 leader = lowest_lane(mask);
  for_lanes(mask, [&](u32 l) { warp.set(in.reg[0], l, leader); });
  write_predicate(warp, in.reg[1], mask, 1u << leader);
}

// bar.warp.sync members.
void sync(Warp& warp, const Instruction& in, u32 mask) {
  if (!gather(warp, mask, in.reg[0], "bar.warp.sync")) return;
  Engine& engine = *warp.engine;
  warp.actions++;
  if (!engine.racing()) return;
  Gathering gathering;
  for_lanes(mask, [&](u32 l) { gathering.add(engine.clocks, warp.actor(l)); });
  Knowledge knowledge = gathering.finish(engine.clocks);
  warp.learn(mask, knowledge);
  warp.tick(mask);
}

}  // namespace

void add_warp_ops(OpTable& t) {
  t.add("shfl", shuffle);
  t.add("vote", vote);
  t.add("match", match);
  t.add("redux", reduce);
  t.add("elect", elect);
  t.add("bar.warp.sync", sync);
}

}  // namespace emu
