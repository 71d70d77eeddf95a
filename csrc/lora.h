// What the launchers and the kernels share: kernel parameters, and the plan of a launch.
//
// Forward and dX are one computation, C[M, N] = U*V^T + S*P^T with S[M, R] = scale * U*D^T, contracting K:
//   forward  U = X    V = W0    D = A    P = B    C = Y    K = in_features    N = out_features
//   dX       U = dY   V = W0^T  D = B^T  P = A^T  C = dX   K = out_features   N = in_features
// M, N and K below are those of C, not of the layer.
#pragma once
#include <cuda.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace fastlora {

// Where a launch's counters lie in its workspace of 32-bit words, all zero before and after.
constexpr int kTicketWord = 0;   // next tile to claim
constexpr int kLeaversWord = 1;  // CTAs that are done
constexpr int kFlagsWord = 2;  // one for each row block: warpgroups that have written their rows of S; then the chains

// The order of the tiles: see schedule.h. A cluster of CTAs takes a tile each at a time, from neighbouring row blocks;
// so "row blocks" here are the cluster's.
struct Schedule {
  int rows;       // row blocks of C
  int columns;    // columns of tiles, the one that makes S (column 0) included
  int group_m;    // row blocks that share a stretch of the queue
  int gradients;  // gradient tiles that follow each group
  int splits;     // parts that the contraction of each tile is cut into
};

struct Params {
  CUtensorMap u, v;                   // 64 x 64 boxes
  CUtensorMap a, b;                   // A [R, in]: rank rows x 64; B [out, R]: 64 x rank
  CUtensorMap s;                      // 64 x rank boxes of the S (forward) or dS (backward) that this launch makes
  CUtensorMap c;                      // 64 x 64
  CUtensorMap bias;                   // 1 x block_n, forward
  CUtensorMap x, saved;               // backward: X in 64 x 64 boxes, the forward's S in 64 x rank ones
  void* s_out;                        // [M, R]
  void *grad_a, *grad_b, *grad_bias;  // [R, in], [out, R], [out], or null
  float* gradient_sums;               // fp32 partial sums of the gradient tiles
  float* tile_parts;                  // the parts of product tiles whose contraction is split
  int* workspace;
  const uint64_t* seed_address;  // null: use `seed`
  uint64_t seed;
  Schedule schedule;
  int m, n, k, r;
  int has_bias;
  int fused;       // column 0 makes S beside its own tile of C, not alone
  int blocks_b;    // a group's gradient tiles along out_features; those along in_features follow
  int n_words;     // of the workspace
  int fp32_grads;  // dA and dB are fp32, not the operands' type
  float scale_s, inverse_keep;
  uint32_t drop_threshold;
  float branch_scale, inverse_branch_scale;  // a power of two on S*P^T; see Traits::kSplitsScale
};

// A compiled kernel, and what the host needs to know of its traits.
struct Variant {
  const char* name;
  const void* kernel;
  bool backward, half, dropout, split, fuses;
  int cluster;
  int block_m, block_n, rank;
  int shared_bytes;
  int tile_planes, grad_planes, grad_columns;
};

const std::vector<Variant>& variants();

// Adds a variant to the list when the library is loaded.
struct Registration {
  explicit Registration(const Variant& variant);
};

// A matrix of 16-bit elements in device memory; a null address stands for "not needed".
struct Matrix {
  uintptr_t address = 0;
  int64_t stride = 0;  // elements from row to row
};

// Everything a launch reads and writes, by C's names.
struct Operands {
  Matrix u, v, a, b, c, x, saved;
  uintptr_t bias = 0, s = 0, grad_a = 0, grad_b = 0, grad_bias = 0;
  uintptr_t workspace = 0, gradient_sums = 0, tile_parts = 0;
  uintptr_t seed_address = 0;
  uint64_t seed = 0;
  double scale_s = 0, branch_scale = 1;  // the scaling is their product; branch_scale, a power of two, is 1 but in fp16
  double inverse_keep = 1;
  uint32_t drop_threshold = 0;
  bool fp32_grads = false;
};

// A row-major matrix of which a kernel copies boxes.
struct MapSpec {
  size_t offset;  // of the map in Params
  uintptr_t address;
  uint64_t columns, rows, stride_bytes;
  uint32_t box_columns, box_rows;
  uint32_t swizzle;  // bytes of a span, or 0
  bool half;

  bool operator==(const MapSpec& other) const;
};

// What is launched, as far as sizes decide it.
class Plan {
 public:
  // m, n, k and r are C's; fused is a wish that not every variant can grant; the rest is what is to be computed besides
  // S. Throws std::invalid_argument if no variant fits.
  Plan(bool backward, bool half, bool dropout, int block_m, int block_n, int64_t m, int64_t n, int64_t k, int64_t r,
       int group_m, int splits, bool fused, int ctas, bool makes_c, bool grad_a, bool grad_b, bool grad_bias);

  const Variant& variant() const { return *variant_; }
  int ctas() const { return ctas_; }
  int64_t words() const { return words_; }
  int64_t gradient_floats() const { return gradient_floats_; }
  int64_t part_floats() const { return part_floats_; }

  // The tiles in the order in which they are claimed: (row block, column, part, gradient tile or -1), the cluster's.
  std::vector<std::array<int, 4>> queue() const;

  // The kernel's parameters but for its tensor maps, which `maps` describes. Throws std::invalid_argument where an
  // operand is missing, is of no use, or lies in memory as no kernel can read it.
  Params parameters(const Operands& operands, std::vector<MapSpec>& maps) const;
  void launch(const Operands& operands, int device, uintptr_t stream) const;
  std::string describe() const;

 private:
  void check_operands(const Operands& operands) const;

  const Variant* variant_;
  Params base_{};
  bool makes_c_, grad_a_, grad_b_, grad_bias_;
  int ctas_;
  int64_t words_, gradient_floats_, part_floats_;
};

int device_count();

}  // namespace fastlora
