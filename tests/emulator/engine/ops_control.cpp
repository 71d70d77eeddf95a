// Branches, exits, and what only changes how a warp runs.
#include "lanes.h"

namespace emu {
namespace {

// imm: target.
void branch(Warp& warp, const Instruction& in, u32 mask) {
  u32 target = u32(in.imm[0]);
  if (mask == warp.group().mask) {
    warp.group().pc = target;
    return;
  }
  warp.group().mask &= ~mask;
  warp.groups.push_back({target, mask});
}

void leave(Warp& warp, const Instruction&, u32 mask) { warp.exit(mask); }

void trap(Warp& warp, const Instruction&, u32) {
  const std::string& printed = warp.engine->printed;
  if (printed.empty()) fault(ErrorKind::kTrap, "the kernel executed trap");
  fault(ErrorKind::kTrap, "the kernel executed trap; it printed: %.800s", printed.c_str());
}

void sleep(Warp& warp, const Instruction&, u32) { warp.engine->polled(warp); }

// %clock and the like: something that grows.
void clock(Warp& warp, const Instruction& in, u32 mask) {
  for_lanes(mask, [&](u32 l) { warp.set(in.reg[0], l, warp.engine->stats.instructions); });
}

void activemask(Warp& warp, const Instruction& in, u32 mask) {
  for_lanes(mask, [&](u32 l) { warp.set(in.reg[0], l, mask); });
}

// setmaxnreg; imm: registers, increase. The CTA's registers are those it was launched with.
void setmaxnreg(Warp& warp, const Instruction& in, u32 mask) {
  if (!warp.converged(mask, warp.live, "setmaxnreg")) return;
  const u32 wanted = u32(in.imm[0]);
  Cta& cta = *warp.cta;
  const i64 change = (i64(wanted) - i64(warp.registers)) * kWarpSize;
  if ((change < 0) == bool(in.imm[1]) && change)
    fault(ErrorKind::kLaunch, "setmaxnreg.%s to %u from %u registers", in.imm[1] ? "inc" : "dec", wanted, warp.registers);
  if (change > cta.free_registers) {
    cta.register_waiters.push_back(&warp);
    return warp.block("setmaxnreg.inc: no free registers");
  }
  cta.free_registers -= change;
  warp.registers = wanted;
  warp.engine->wake_all(cta.register_waiters);
}

// The address of the same variable in another CTA of the cluster. Registers: d, a, rank.
void mapa(Warp& warp, const Instruction& in, u32 mask) {
  for_lanes(mask, [&](u32 l) {
    u64 address = warp.get(in.reg[1], l), rank = warp.get(in.reg[2], l);
    if (rank >= warp.cta->cluster->ctas.size())
      fault(ErrorKind::kBounds, "mapa to CTA %llu of a cluster of %zu", rank, warp.cta->cluster->ctas.size());
    warp.set(in.reg[0], l, (address & ~(0xffull << kClusterRankShift)) | (rank + 1) << kClusterRankShift);
  });
}

void getctarank(Warp& warp, const Instruction& in, u32 mask) {
  for_lanes(mask, [&](u32 l) {
    u64 rank = warp.get(in.reg[1], l) >> kClusterRankShift & 0xff;
    warp.set(in.reg[0], l, rank ? rank - 1 : warp.cta->rank);
  });
}

u32 logic_and(u32 a, u32 b) { return a & b; }
u32 logic_or(u32 a, u32 b) { return a | b; }
u32 logic_xor(u32 a, u32 b) { return a ^ b; }

template <auto F> void predicate_logic(Warp& warp, const Instruction& in, u32 mask) {
  write_predicate(warp, in.reg[0], mask, F(warp.predicate(in.reg[1]), warp.predicate(in.reg[2])));
}
void predicate_not(Warp& warp, const Instruction& in, u32 mask) {
  write_predicate(warp, in.reg[0], mask, ~warp.predicate(in.reg[1]));
}
void predicate_move(Warp& warp, const Instruction& in, u32 mask) {
  write_predicate(warp, in.reg[0], mask, warp.predicate(in.reg[1]));
}

}  // namespace

void add_control_ops(OpTable& t) {
  t.add("bra", branch);
  t.add("exit", leave);
  t.add("trap", trap);
  t.add("nanosleep", sleep);
  t.add("clock", clock);
  t.add("activemask", activemask);
  t.add("setmaxnreg", setmaxnreg);
  t.add("mapa", mapa);
  t.add("getctarank", getctarank);
  t.add("and.pred", predicate_logic<logic_and>);
  t.add("or.pred", predicate_logic<logic_or>);
  t.add("xor.pred", predicate_logic<logic_xor>);
  t.add("not.pred", predicate_not);
  t.add("mov.pred", predicate_move);
}

}  // namespace emu
