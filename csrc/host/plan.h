// From a problem to a kernel, its grid and its parameters. Nothing in a Plan touches a device before launch().
#pragma once
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "params.h"
#include "tensor_map.h"
#include "variant.h"

namespace fastlora {

// One of several projections of an input; rank 0: without an adapter.
struct Projection {
  int64_t out_features = 0, r = 0;
  bool grad_a = false, grad_b = false, grad_bias = false;
};

// What a launch computes and how it is cut into tiles; sizes are the output's, as in params.h.
struct Problem {
  bool backward = false, fp16 = false;
  bool transposed = false;  // the base weight lies as [in_features, out_features]
  bool dropout = false;
  // Rows in segments, where there are any: segments, and matrices of the stacks of weights, adapters and biases.
  int n_segments = 0, n_weights = 0, n_adapters = 0, n_biases = 0;
  int block_m = 0, block_n = 0;
  int64_t m = 0, n = 0, k = 0, r = 0;
  // Where there are any, they say out_features, rank and gradients of weights: what is given of these is not read.
  std::vector<Projection> projections;
  int group_m = 0;              // row blocks of a group
  int splits = 1;               // of the contraction of each tile
  bool fused = false;           // S is made fused with column 0
  bool gradients_last = false;  // gradient tiles follow all others, not their own group's
  int ctas = 0;                 // that run at once
  bool makes_out = true, grad_a = false, grad_b = false, grad_bias = false;
  // A packed base weight: what its codes and scales are, and how many of them share a scale, and a nested one.
  CodeFormat code_format = CodeFormat::kNone;
  ScaleFormat scale_format = ScaleFormat::kFloat32;
  int64_t block = 0, nested_block = 0;
  bool in_loop = false;  // products decode it, not tiles ahead of them
};

// A matrix of 16-bit elements in device memory; a null address stands for "not given".
struct Matrix {
  uintptr_t address = 0;
  int64_t stride = 0;  // elements from row to row
};

// What a launch reads and writes of a layer, by its name in Params.
struct LayerOperands {
  // Of a packed weight, `weight` is where it is decoded, and nothing where products decode it.
  Matrix act, weight, lora_a, lora_b, out, layer_input, saved_s;
  uintptr_t bias = 0, s = 0, grad_a = 0, grad_b = 0, grad_bias = 0;
  uintptr_t seed_address = 0;
  uint64_t seed = 0;
  double scale_in_s = 0,
         scale_on_branch = 1;  // the scaling is their product; the latter, a power of two, is 1 but in fp16
  double inverse_keep = 1;
  uint32_t drop_threshold = 0;
};

// Everything that a launch reads and writes. Of several projections, what all have is in the base (`act` and
// `layer_input`, which are X, or `out`, which is dX), and what each has of its own in `projections`.
struct Operands : LayerOperands {
  std::array<LayerOperands, kMaxProjections> projections;
  uintptr_t workspace = 0, gradient_partials = 0, split_partials = 0;
  uintptr_t codes = 0, scales = 0, zeros = 0, absmax2 = 0, code2 = 0, offset = 0;
  // Of rows in segments, whose `s` has rows for whole row blocks; a forward keeps S [M, R] for the backward besides.
  uintptr_t ends = 0, experts = 0, adapters = 0, scalings = 0, kept_s = 0;
  bool wide_experts = false, wide_adapters = false;  // 64-bit numbers
  int64_t weight_stride = 0;                         // elements from one weight to the next
  bool fp32_grads = false;
};

// Throws unless the operands of projections from number `first` on are not given.
void check_no_projections(const Operands& operands, size_t first);

// A needed operand is missing, or an operand is given that the launch does not use.
struct OperandNameError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

class Plan {
 public:
  // Throws std::invalid_argument if no variant fits.
  explicit Plan(const Problem& problem);

  const Variant& variant() const { return *variant_; }
  int64_t ctas() const { return ctas_; }
  int64_t workspace_words() const { return base_.workspace_words; }
  int64_t gradient_partial_floats() const { return gradient_partial_floats_; }
  int64_t split_partial_floats() const { return split_partial_floats_; }
  int64_t decode_tiles() const { return count_decode_tiles(base_.schedule); }
  // Rows of the S that a launch makes.
  int64_t s_rows() const { return is_segmented() ? int64_t(base_.schedule.rows) * variant_->block_m : base_.m; }

  // The cluster's tiles in the order in which they are claimed, behind those that decode a packed weight; of rows in
  // segments, as if there were as many row blocks as there may be.
  std::vector<Tile> queue() const;

  // What `use` returns of the kernel's parameters, of which `maps` describes the tensor maps. Throws
  // std::invalid_argument where an operand is missing, is of no use, or lies in memory as no kernel can read it.
  template <class Use>
  auto with_parameters(const Operands& operands, std::vector<MapSpec>& maps, Use use) const {
    if (!layers_.empty()) return use(shared_parameters(operands, maps));
    return use(parameters(operands, maps));
  }
  void launch(const Operands& operands, int device, uintptr_t stream) const;
  std::string describe() const;

 private:
  Plan(const Problem& problem, const Variant* variant);
  Params parameters(const Operands& operands, std::vector<MapSpec>& maps) const;
  SharedParams shared_parameters(const Operands& operands, std::vector<MapSpec>& maps) const;
  bool is_segmented() const { return variant_->segments; }
  bool is_packed() const { return variant_->decodes || variant_->in_loop; }
  std::pair<int64_t, int64_t> weight_sizes() const;  // rows and columns, as it lies in memory
  void take_packed();
  void cut_panels();
  void plan_projections();
  void check_operands(const Operands& operands) const;
  void check_packed(const Operands& operands) const;

  Problem problem_;
  const Variant* variant_;
  Params base_{};
  int ctas_;
  int64_t gradient_partial_floats_, split_partial_floats_;
  std::vector<Plan> layers_;  // of several projections, each as it would be alone
  // As in SharedParams.
  int shrink_columns_ = 1, last_shrunk_ = 0;
  std::array<int, kMaxProjections> first_column_{}, first_gradient_{};
};

}  // namespace fastlora
