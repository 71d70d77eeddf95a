// What a launch passes to a kernel, by value.
//
// Forward and dX are one computation, out[M, N] = act*weight^T + S*up^T with S[M, R] = scale * act*down^T, contracting
// K:
//             act   weight   down   up    out    K              N
//   forward   X     W0       A      B     Y      in_features    out_features
//   dX        dY    W0^T     B^T    A^T   dX     out_features   in_features
// M, N and K below are those of the output, not of the layer. In dX, S is called dS.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "../schedule.h"
#include "packed_weight.h"

namespace fastlora {

// The workspace: 32-bit words, all zero before and after a launch.
constexpr int kTicketWord = 0;  // next tile to claim
constexpr int kExitedWord = 1;  // CTAs that have finished
constexpr int kFlagsWord = 2;   // one for each row block: warpgroups that have stored their rows of S; then one for
                                // each serial reduction and warpgroup: partial sums that have been stored; the last
                                // ones for each panel of a packed weight: warpgroups that have stored their elements

// Matrices are copied in boxes of 64 x 64 elements of 16 bits: a box's row is one span of the widest swizzle. S and the
// factor that expands it are copied in boxes of 64 x the ranks of a step. An operand that is contiguous along the
// contraction is copied in taller boxes, so that a step takes fewer copies.
constexpr int kElementBytes = 2;
constexpr int kBox = 64;
constexpr int kTallBox = 128;  // rows: block_m of the activations, 128 columns of the output of the weight
constexpr int kSwizzleSpan = kBox * kElementBytes;  // bytes
constexpr int ranks_per_step(int rank) { return rank < kBox ? rank : kBox; }

constexpr int kMaxSegments = 1023;       // whose table fits shared memory, with the rows past the last end
constexpr int kMaxProjections = 4;       // that share an input, in one launch
constexpr int kAdaptersOfZeroTile = 16;  // whose gradients one tile zeroes, where no row adds anything to them

// Rows in segments: what every CTA reads of them, and what is stored by pointers because its rows end with a segment.
// Weights, A and B are then stacks, whose maps have a third dimension.
struct SegmentParams {
  const int32_t* ends;                         // [count], cumulative
  const void *experts, *adapters;              // of each segment; null: its own number, or the only one
  const float* scalings;                       // of each adapter; null: `scale_in_s` is that of all
  void* out;                                   // as Params::out
  void* kept_s;                                // forward: S [M, R] for the backward; backward: null
  int64_t out_stride;                          // elements from row to row
  int wide_experts, wide_adapters;             // 64-bit numbers, not 32-bit ones
  int count, n_weights, n_adapters, n_biases;  // segments, and matrices of the stacks
};

struct Params {
  CUtensorMap act;                    // block_m x 64
  CUtensorMap weight;                 // W0: 128 x 64 where it is contiguous along the contraction, else 64 x 64; where
                                      // products decode it its codes, block_n x 64
  CUtensorMap lora_a, lora_b;         // A [R, in_features]: ranks x 64; B [out_features, R]: 64 x ranks
  CUtensorMap s;                      // 64 x ranks boxes of the S (forward) or dS (backward) that this launch makes
  CUtensorMap out;                    // 64 x 64
  CUtensorMap bias;                   // 1 x block_n, forward
  CUtensorMap act_square;             // backward: dY again, 64 x 64, for dB
  CUtensorMap layer_input, saved_s;   // backward: X in 64 x 64 boxes, the forward's S in 64 x ranks ones
  void* s_out;                        // [M, R]; of rows in segments, [row blocks * block_m, R]
  void *grad_a, *grad_b, *grad_bias;  // [R, in_features], [out_features, R], [out_features], or null
  float* gradient_partials;           // fp32 partial sums of the gradient tiles
  float* split_partials;              // fp32 partial sums of tiles whose contraction is split
  int* workspace;
  const uint64_t* seed_address;  // null: use `seed`
  uint64_t seed;
  Schedule schedule;
  int m, n, k, r;
  int has_bias;
  int fused_shrink;  // column 0 makes S fused with its own tile of the output
  int grad_b_tiles;  // a group's gradient tiles along out_features; those along in_features follow
  int workspace_words;
  int fp32_grads;  // dA and dB are fp32, not the operands' type
  float scale_in_s, inverse_keep;
  uint32_t last_dropped;                           // see sm90/dropout.cuh
  float scale_on_branch, inverse_scale_on_branch;  // a power of two and its inverse; see KernelTraits::kSplitsScaling
  PackedWeight packed;                             // where the base weight is packed
  SegmentParams segments;                          // of kernels for rows in segments
};

// Several projections of one input. Each is described as the layer that it would be alone: of a forward all read the
// same `act`, of a backward all have the same `out` and `layer_input`; one without an adapter has rank 0. The base says
// what the launch has once: M, schedule, workspace and partial sums. More than 4 KiB are passed so: CUDA 12.1.
struct SharedParams : Params {
  Params layers[kMaxProjections];
  int count;
  int shrink_columns;                   // forward: projections with an adapter, which are the first ones; backward: 1
  int last_shrunk;                      // backward: the last one whose dS a shrink tile makes
  int first_column[kMaxProjections];    // forward: each one's columns that make no S, behind those that do
  int first_gradient[kMaxProjections];  // each one's gradient tiles of a group
};

}  // namespace fastlora
