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
        at.region->shadow.write(at.offset, 16, actor, {actor.owner, actor.now, in.pc});
        memcpy(at.host(), matrix[row], 16);
      }
    }
    if (kLoad) exchange([](u32& held, u32 at, u16 element) { held = (held & (at ? 0xffffu : 0u)) | u32(element) << at; });
  }
  engine.lane = -1;
  warp.actions++;
  engine.maybe_preempt(warp);
}

// mma.sync m16n8kK with fp32 accumulation; imm: K, type (MmaType). Registers: d[4], a[], b[], c[4].
void mma(Warp& warp, const Instruction& in, u32 mask) {
  if (!warp.converged(mask, kAllLanes, "mma.sync")) return;
  const u32 k_size = u32(in.imm[0]);
  const MmaType type = MmaType(in.imm[1]);
  const bool wide = type == MmaType::kTf32;          // one element a register instead of two
  const u32 per = wide ? 1 : 2, k_step = wide ? 4 : 8;  // k covered by one register of every lane
  const u32 n_b = k_size / k_step, n_a = 2 * n_b;
  static_assert(kWarpSize == 32);
  float a[16][16], b[16][8], d[16][8];
  for (u32 l = 0; l < kWarpSize; l++) {
    u32 group = l / 4, within = l % 4;
    for (u32 i = 0; i < n_a; i++)
      for (u32 e = 0; e < per; e++) a[group + i % 2 * 8][within * per + i / 2 * k_step + e] = mma_element(type, warp.lanes32(in.reg[4 + i])[l], e);
    for (u32 i = 0; i < n_b; i++)
      for (u32 e = 0; e < per; e++) b[within * per + i * k_step + e][group] = mma_element(type, warp.lanes32(in.reg[4 + n_a + i])[l], e);
    for (u32 i = 0; i < 4; i++) d[group + i / 2 * 8][within * 2 + i % 2] = std::bit_cast<float>(warp.lanes32(in.reg[4 + n_a + n_b + i])[l]);
  }
  for (u32 m = 0; m < 16; m++)
    for (u32 k = 0; k < k_size; k++)
      for (u32 n = 0; n < 8; n++) d[m][n] += a[m][k] * b[k][n];
  for (u32 l = 0; l < kWarpSize; l++)
    for (u32 i = 0; i < 4; i++) warp.lanes32(in.reg[i])[l] = std::bit_cast<u32>(d[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2]);
  warp.engine->stats.mma++;
  warp.engine->stats.macs += 16 * 8 * k_size;
  warp.engine->progress++;
}

}  // namespace

void add_matrix_ops(OpTable& t) {
  t.add("ldmatrix", move_matrix<true>);
  t.add("stmatrix", move_matrix<false>);
  t.add("mma", mma);
}

}  // namespace emu
