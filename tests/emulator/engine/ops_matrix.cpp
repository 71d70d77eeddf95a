// ldmatrix, stmatrix and mma.sync.
#include "half.h"
#include "lanes.h"

namespace emu {
namespace {

// ldmatrix and stmatrix. imm: matrices, transposed, offset. Lane 8 m + r gives the address of row r of matrix m;
// lane l holds the elements (l / 4, l % 4 * 2) and the next of every matrix.
template <bool kLoad> void move_matrix(Warp& warp, const Instruction& in, u32 mask) {
  if (!warp.converged(mask, kAllLanes, kLoad ? "ldmatrix" : "stmatrix")) return;
  Engine& engine = *warp.engine;
  const u32 n = u32(in.imm[0]);
  const bool transposed = in.imm[1];
  const Operand* fragments = in.reg + (kLoad ? 0 : 1);
  const u32* address = warp.lanes32(in.reg[kLoad ? n : 0]);
  (kLoad ? engine.stats.ldmatrix : engine.stats.stmatrix)++;
  for (u32 m = 0; m < n; m++) {
    u16 matrix[8][8];
    u32* fragment = warp.lanes32(fragments[m]);
    auto exchange = [&](auto f) {
      for (u32 l = 0; l < kWarpSize; l++)
        for (u32 half = 0; half < 2; half++) {
          u32 row = l / 4, column = l % 4 * 2 + half;
          f(fragment[l], 16 * half, transposed ? matrix[column][row] : matrix[row][column]);
        }
    };
    if (!kLoad) exchange([](u32 held, u32 at, u16& element) { element = u16(held >> at); });
    for (u32 row = 0; row < 8; row++) {
      u32 l = 8 * m + row;
      Place at = engine.place(warp, l, address[l] + u64(in.imm[2]), Space::kShared, 16, 16, !kLoad);
      Actor actor = warp.actor(l);
      if (kLoad) {
        // The row goes to other lanes too: what only the addressing lane knows to be written is not enough.
        Access read{actor.owner, actor.now, in.pc};
        actor.owner = kNobody;
        at.region->shadow.read(at.offset, 16, actor, read);
        memcpy(matrix[row], at.host(), 16);
      } else {
        const bool repeats = memcmp(at.host(), matrix[row], 16) == 0;
        at.region->shadow.write(at.offset, 16, actor, {actor.owner, actor.now, in.pc, kWeak, Proxy::kGeneric, repeats});
        memcpy(at.host(), matrix[row], 16);
      }
    }
    if (kLoad) exchange([](u32& held, u32 at, u16 element) { held = (held & (at ? 0xffffu : 0u)) | u32(element) << at; });
  }
  engine.lane = -1;
  warp.actions++;
  engine.maybe_preempt(warp);
}

// mma.sync m16n8kK with fp32 accumulation: the sum of the products and the accumulator is taken in double precision, then cut
// off. Registers: d[4], a[], b[], c[4].
template <MmaType kType, u32 kK> void multiply(Warp& warp, const Instruction& in) {
  constexpr u32 kPer = kType == MmaType::kTf32 ? 1 : 2,
                kStep = 4 * kPer;  // elements in a register; k covered by one of every lane
  constexpr u32 kRegistersB = kK / kStep, kRegistersA = 2 * kRegistersB;
  double a[16][kK], b[kK][8], d[16][8];
  for (u32 i = 0; i < kRegistersA; i++) {
    const u32* lanes = warp.lanes32(in.reg[4 + i]);
    for (u32 l = 0; l < kWarpSize; l++)
      for (u32 e = 0; e < kPer; e++) a[l / 4 + i % 2 * 8][l % 4 * kPer + i / 2 * kStep + e] = mma_element(kType, lanes[l], e);
  }
  for (u32 i = 0; i < kRegistersB; i++) {
    const u32* lanes = warp.lanes32(in.reg[4 + kRegistersA + i]);
    for (u32 l = 0; l < kWarpSize; l++)
      for (u32 e = 0; e < kPer; e++) b[l % 4 * kPer + i * kStep + e][l / 4] = mma_element(kType, lanes[l], e);
  }
  for (u32 i = 0; i < 4; i++) {
    const u32* lanes = warp.lanes32(in.reg[4 + kRegistersA + kRegistersB + i]);
    for (u32 l = 0; l < kWarpSize; l++) d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2] = std::bit_cast<float>(lanes[l]);
  }
  for (u32 m = 0; m < 16; m++)
    for (u32 k = 0; k < kK; k++)
      for (u32 n = 0; n < 8; n++) d[m][n] += a[m][k] * b[k][n];
  for (u32 i = 0; i < 4; i++) {
    u32* lanes = warp.lanes32(in.reg[i]);
    for (u32 l = 0; l < kWarpSize; l++)
      lanes[l] = std::bit_cast<u32>(truncate_to_float(d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]));
  }
  warp.engine->stats.macs += 16 * 8 * kK;
}

// imm: K, type.
void mma(Warp& warp, const Instruction& in, u32 mask) {
  if (!warp.converged(mask, kAllLanes, "mma.sync")) return;
  const bool full = in.imm[0] == (MmaType(in.imm[1]) == MmaType::kTf32 ? 8 : 16);
  switch (MmaType(in.imm[1])) {
    case MmaType::kBf16: full ? multiply<MmaType::kBf16, 16>(warp, in) : multiply<MmaType::kBf16, 8>(warp, in); break;
    case MmaType::kF16: full ? multiply<MmaType::kF16, 16>(warp, in) : multiply<MmaType::kF16, 8>(warp, in); break;
    case MmaType::kTf32: full ? multiply<MmaType::kTf32, 8>(warp, in) : multiply<MmaType::kTf32, 4>(warp, in); break;
  }
  warp.engine->stats.mma++;
  warp.engine->progress++;
}

}  // namespace

void add_matrix_ops(OpTable& t) {
  t.add("ldmatrix", move_matrix<true>);
  t.add("stmatrix", move_matrix<false>);
  t.add("mma", mma);
}

}  // namespace emu
