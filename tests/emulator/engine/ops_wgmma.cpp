// wgmma: products of a warpgroup that run on their own until they are waited for.
//
// The four warps of a warpgroup issue the same instruction; once all have, it may execute, in order, at any time up to the
// wait. Until then its registers belong to it, and it reads shared memory through the asynchronous proxy.
#include "half.h"
#include "lanes.h"

namespace emu {
namespace {

constexpr u32 kRows = 64, kMaxN = 256, kMaxK = 16;

// imm of wgmma.mma_async. Registers: d[N / 2], a descriptor or a[4], b descriptor, predicate scale-d.
struct Shape {
  u32 n, k;
  MmaType type;
  bool a_in_registers, a_mn_major, b_mn_major, negate_a, negate_b;
  explicit Shape(const Instruction& in)
      : n(u32(in.imm[0])),
        k(u32(in.imm[1])),
        type(MmaType(in.imm[2])),
        a_in_registers(in.imm[3]),
        a_mn_major(in.imm[4]),
        b_mn_major(in.imm[5]),
        negate_a(in.imm[6]),
        negate_b(in.imm[7]) {}
  u32 element_bytes() const { return type == MmaType::kTf32 ? 4 : 2; }
  const Operand* a(const Instruction& in) const { return in.reg + in.n_dst; }
  u32 n_a() const { return a_in_registers ? 4 : 1; }
};

// A matrix in shared memory as its descriptor lays it out.
struct Matrix {
  u32 start, leading, stride, swizzle, element_bytes;
  bool mn_major;

  Matrix(u64 descriptor, bool mn_major, u32 element_bytes)
      : start(u32(descriptor & 0x3fff) << 4),
        leading(u32(descriptor >> 16 & 0x3fff) << 4),
        stride(u32(descriptor >> 32 & 0x3fff) << 4),
        swizzle(descriptor >> 62 == 1   ? 128
                : descriptor >> 62 == 2 ? 64
                : descriptor >> 62 == 3 ? 32
                                        : 0),
        element_bytes(element_bytes),
        mn_major(mn_major) {
    if (descriptor >> 49 & 7) fault(ErrorKind::kWgmma, "a matrix descriptor with a base offset is not modelled");
  }

  // The shared address of 16 bytes: elements k .. of row mn (K-major) or elements mn .. of column k (MN-major).
  u32 chunk(u32 mn, u32 k) const {
    const u32 per = 16 / element_bytes;
    u32 address = start;
    if (!mn_major) {
      address += mn / 8 * stride;
      address += swizzle ? mn % 8 * swizzle + k * element_bytes : k / per * leading + mn % 8 * 16;
    } else if (swizzle) {
      const u32 span = swizzle / element_bytes;
      address += mn / span * leading + k / 8 * stride + k % 8 * swizzle + mn % span * element_bytes;
    } else {
      address += mn / per * stride + k / 8 * leading + k % 8 * 16;
    }
    return swizzled(address, swizzle);
  }

  template <class F> void for_chunks(u32 rows, u32 k_size, F f) const {
    const u32 per = 16 / element_bytes, mn_step = mn_major ? per : 1, k_step = mn_major ? 1 : per;
    for (u32 mn = 0; mn < rows; mn += mn_step)
      for (u32 k = 0; k < k_size; k += k_step) f(mn, k, chunk(mn, k));
  }
};

// f(mn, k) = element, for the whole matrix.
template <class F> void gather(Cta& cta, const Matrix& matrix, MmaType type, u32 rows, u32 k_size, F f) {
  const u32 per = 16 / matrix.element_bytes;
  matrix.for_chunks(rows, k_size, [&](u32 mn, u32 k, u32 address) {
    const char* bytes = cta.shared_bytes.data() + address;
    for (u32 i = 0; i < per; i++) {
      u32 bits = 0;
      memcpy(&bits, bytes + i * matrix.element_bytes, matrix.element_bytes);
      f(matrix.mn_major ? mn + i : mn, matrix.mn_major ? k : k + i, mma_element(type, bits, 0));
    }
  });
}

void execute(Cta& cta, u32 warpgroup, const WgmmaOp& op) {
  const Shape shape(*op.in);
  double a[kRows][kMaxK], b[kMaxK][kMaxN], d[kMaxN];
  Warp* warps = &cta.warps[warpgroup * 4];
  if (shape.a_in_registers) {
    const u32 per = shape.element_bytes() == 4 ? 1 : 2, k_step = per * 4;
    for (u32 w = 0; w < 4; w++)
      for (u32 i = 0; i < 4; i++) {
        const u32* lanes = warps[w].lanes32(shape.a(*op.in)[i]);
        for (u32 l = 0; l < kWarpSize; l++)
          for (u32 e = 0; e < per; e++)
            a[w * 16 + l / 4 + i % 2 * 8][l % 4 * per + i / 2 * k_step + e] = mma_element(shape.type, lanes[l], e);
      }
  } else {
    gather(cta, Matrix(op.desc_a, shape.a_mn_major, shape.element_bytes()), shape.type, kRows, shape.k,
           [&](u32 m, u32 k, float x) { a[m][k] = x; });
  }
  gather(cta, Matrix(op.desc_b, shape.b_mn_major, shape.element_bytes()), shape.type, shape.n, shape.k,
         [&](u32 n, u32 k, float x) { b[k][n] = x; });
  const double sign = shape.negate_a == shape.negate_b ? 1. : -1.;
  for (u32 m = 0; m < kRows; m++) {
    // Row m is in warp m / 16, in lanes 4 (m % 8) .. + 3; register j holds columns 8 (j / 4) + 2 (lane % 4) + j % 2.
    auto held = [&](u32 n) -> u32& {
      return warps[m / 16].lanes32(op.in->reg[n / 8 * 4 + m % 16 / 8 * 2 + n % 2])[m % 8 * 4 + n % 8 / 2];
    };
    for (u32 n = 0; n < shape.n; n++) d[n] = op.accumulate ? std::bit_cast<float>(held(n)) : 0.;
    for (u32 k = 0; k < shape.k; k++) {
      const double x = sign * a[m][k];
      for (u32 n = 0; n < shape.n; n++) d[n] += x * b[k][n];
    }
    for (u32 n = 0; n < shape.n; n++) held(n) = std::bit_cast<u32>(truncate_to_float(d[n]));
  }
}

// All four warps have issued the operation: it reads shared memory from now on.
void check_shared_reads(Warp& warp, const WgmmaOp& op) {
  Engine& engine = *warp.engine;
  Cta& cta = *warp.cta;
  const Shape shape(*op.in);
  const Warpgroup& group = cta.warpgroups[warp.index / 4];
  std::vector<const Knowledge*> distinct;  // what the issuing threads know; mostly the same
  for (u32 w = 0; w < 4; w++)
    for (const Knowledge& knows : cta.warps[warp.index / 4 * 4 + w].knows) {
      bool seen = false;
      for (const Knowledge* other : distinct)
        seen |= other->happened == knows.happened && other->fenced[kFenceShared] == knows.fenced[kFenceShared];
      if (!seen) distinct.push_back(&knows);
    }
  if (!engine.racing()) distinct.resize(1);
  auto check = [&](u64 descriptor, bool mn_major, u32 rows) {
    Matrix(descriptor, mn_major, shape.element_bytes()).for_chunks(rows, shape.k, [&](u32, u32, u32 address) {
      Place at = engine.shared_place(cta, address, 16, 16, false);
      for (const Knowledge* knows : distinct) {
        Actor actor{kNobody, 0, {0, 0}, knows, nullptr, cta.id};
        at.region->shadow.read(at.offset, 16, actor, {group.agent, op.group, op.in->pc, kWeak, Proxy::kAsync});
      }
    });
  };
  if (!shape.a_in_registers) check(op.desc_a, shape.a_mn_major, kRows);
  check(op.desc_b, shape.b_mn_major, shape.n);
}

void execute_up_to(Warp& warp, u32 group) {
  Warpgroup& warpgroup = warp.cta->warpgroups[warp.index / 4];
  while (!warpgroup.ops.empty() && warpgroup.ops.front().group <= group && warpgroup.ops.front().warps == 0xf) {
    execute(*warp.cta, warp.index / 4, warpgroup.ops.front());
    warpgroup.ops.pop_front();
    warpgroup.first_op++;
  }
}

// The registers of the instruction pass to it.
void hold_registers(Warp& warp, const Instruction& in, const Shape& shape) {
  auto hold = [&](Operand o, bool accumulator) {
    HeldRegister& held = warp.held[o >> 2];
    if (held.touched > warp.wgmma_fences)
      fault(ErrorKind::kWgmma, "wgmma uses a register that the thread has accessed since its last wgmma.fence");
    bool in_flight = held.group > warp.wgmma_waited;
    if (in_flight && (accumulator != held.accumulator || (accumulator && held.n != shape.n)))
      fault(ErrorKind::kWgmma, "wgmma uses a register that another wgmma in flight uses differently");
    held = {warp.wgmma_groups + 1, accumulator, shape.n, 0, in.pc};
  };
  for (u32 i = 0; i < in.n_dst; i++) hold(in.reg[i], true);
  if (shape.a_in_registers)
    for (u32 i = 0; i < 4; i++) hold(shape.a(in)[i], false);
}

void issue(Warp& warp, const Instruction& in, u32 mask) {
  if (!warp.converged(mask, kAllLanes, "wgmma.mma_async")) return;
  Engine& engine = *warp.engine;
  const Shape shape(in);
  Warpgroup& warpgroup = warp.cta->warpgroups[warp.index / 4];
  if (warp.index / 4 * 4 + 4 > warp.cta->warps.size())
    fault(ErrorKind::kWgmma, "wgmma in a warpgroup of fewer than four warps");
  if (!warp.wgmma_fences) fault(ErrorKind::kWgmma, "wgmma without a wgmma.fence before it");
  hold_registers(warp, in, shape);
  const Operand* operand = shape.a(in);
  WgmmaOp op{&in, warp.wgmma_groups + 1, 0, 0, true, 0};
  if (!shape.a_in_registers) op.desc_a = warp.uniform(operand[0], mask, "wgmma matrix descriptor");
  op.desc_b = warp.uniform(operand[shape.n_a()], mask, "wgmma matrix descriptor");
  op.accumulate = warp.uniform(operand[shape.n_a() + 1], mask, "wgmma scale-d");
  u32 at = warp.wgmma_ops++ - warpgroup.first_op;
  if (at == warpgroup.ops.size()) warpgroup.ops.push_back(op);
  WgmmaOp& shared = warpgroup.ops[at];
  if (shared.in != &in || shared.desc_a != op.desc_a || shared.desc_b != op.desc_b || shared.accumulate != op.accumulate ||
      shared.group != op.group)
    fault(ErrorKind::kDivergence, "the warps of a warpgroup issue different wgmma: the other one at <pc:%u>", shared.in->pc);
  shared.warps |= 1u << warp.index % 4;
  warp.actions++;
  if (shared.warps != 0xf) return;
  check_shared_reads(warp, shared);
  engine.stats.wgmma++;
  engine.stats.macs += u64(kRows) * shape.n * shape.k;
  engine.progress++;
  if (engine.early()) execute_up_to(warp, shared.group);
  engine.wake_all(warpgroup.waiters);
}

void fence(Warp& warp, const Instruction&, u32 mask) {
  if (warp.converged(mask, kAllLanes, "wgmma.fence")) warp.wgmma_fences++;
}

void commit(Warp& warp, const Instruction&, u32 mask) {
  if (warp.converged(mask, kAllLanes, "wgmma.commit_group")) warp.wgmma_groups++;
}

// imm: groups that may stay in flight.
void wait(Warp& warp, const Instruction& in, u32 mask) {
  if (!warp.converged(mask, kAllLanes, "wgmma.wait_group")) return;
  Engine& engine = *warp.engine;
  if (i64(warp.wgmma_groups) <= in.imm[0]) return;
  const u32 target = warp.wgmma_groups - u32(in.imm[0]);
  Warpgroup& warpgroup = warp.cta->warpgroups[warp.index / 4];
  execute_up_to(warp, target);
  if (!warpgroup.ops.empty() && warpgroup.ops.front().group <= target) {  // other warps have yet to issue it
    warpgroup.waiters.push_back(&warp);
    return warp.block("wgmma.wait_group: other warps of the warpgroup have not issued the wgmma");
  }
  warp.wgmma_waited = std::max(warp.wgmma_waited, target);
  warp.actions++;
  if (!engine.racing()) return;
  if (warpgroup.waited != target || !warpgroup.learned.happened.get()) {
    Gathering gathering;
    gathering.add_component(warpgroup.agent, target);
    warpgroup.learned = gathering.finish(engine.clocks);
    warpgroup.waited = target;
  }
  warp.learn(mask, warpgroup.learned);
}

}  // namespace

// Instructions that name a register of some wgmma come here first.
void check_held_registers(Warp& warp, const Instruction& in, u32 mask) {
  for (u32 i = 0; i < in.n_reg; i++) {
    if ((in.reg[i] & 3) != k32) continue;
    HeldRegister& held = warp.held[in.reg[i] >> 2];
    if (held.group > warp.wgmma_waited && (held.accumulator || i < in.n_dst))
      fault(ErrorKind::kWgmma, "a register that wgmma has in flight is %s before wgmma.wait_group: %s of <pc:%u>",
            i < in.n_dst ? "written" : "read", held.accumulator ? "an accumulator" : "a fragment of A", held.pc);
    held.touched = warp.wgmma_fences + 1;
  }
  in.unchecked(warp, in, mask);
}

void add_wgmma_ops(OpTable& t) {
  t.add("wgmma", issue);
  t.add("wgmma.fence", fence);
  t.add("wgmma.commit_group", commit);
  t.add("wgmma.wait_group", wait);
}

}  // namespace emu
