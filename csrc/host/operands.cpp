// From operands to a kernel's parameters.
#include <algorithm>
#include <cstddef>

#include "plan.h"

namespace fastlora {

namespace {

constexpr uintptr_t kCopyAlignment = 16;  // bytes: of what the copy engine or a float4 reads

// `what` returns the text: to make it for every operand takes longer than the launch.
template <class What>
void require(bool holds, What what) {
  if (!holds) throw std::invalid_argument("fastlora: " + std::string(what()));
}

// An operand is given where the launch needs one, and nowhere else.
void check_given(const char* name, bool given, bool needed) {
  if (given == needed) return;
  throw OperandNameError(std::string("fastlora: operand ") + name +
                         (needed ? " is missing" : " is given to a launch that does not use it"));
}

void check_aligned(const char* name, uintptr_t address, uintptr_t bytes) {
  require(address % bytes == 0,
          [=] { return std::string(name) + " does not start on " + std::to_string(bytes) + " bytes"; });
}

// A matrix whose rows of `columns` elements the copy engine can address.
void check_matrix(const char* name, const Matrix& matrix, bool needed, int64_t rows, int64_t columns) {
  check_given(name, matrix.address, needed);
  if (!matrix.address) return;
  check_aligned(name, matrix.address, kCopyAlignment);
  const bool apart = matrix.stride > 0 && (rows == 1 || matrix.stride >= columns);
  const bool on_16_bytes = matrix.stride % int64_t(kCopyAlignment / kElementBytes) == 0;
  require(apart && on_16_bytes && matrix.stride < int64_t(1) << 39, [&] {
    return std::string(name) + " has rows of " + std::to_string(columns) + " elements " +
           std::to_string(matrix.stride) + " apart: they must not overlap and must start on 16 bytes";
  });
}

void check_vector(const char* name, uintptr_t address, bool needed, uintptr_t alignment) {
  check_given(name, address, needed);
  check_aligned(name, address, alignment);
}

// How many matrices lie in a stack, elements apart; 0: there is none.
struct Stack {
  int64_t matrices = 0, stride = 0;
};

// Collects descriptions of the matrices that a kernel copies boxes of.
class Maps {
 public:
  Maps(std::vector<MapSpec>& maps, bool fp16)
      : maps_(maps), element_(fp16 ? MapElement::kFloat16 : MapElement::kBfloat16) {}

  void add(size_t offset, const Matrix& matrix, int64_t columns, int64_t rows, int box_columns, int box_rows,
           int swizzle, const Stack& stack = {}) {
    if (!matrix.address) return;
    maps_.push_back({offset, matrix.address, uint64_t(columns), uint64_t(rows), uint64_t(matrix.stride) * kElementBytes,
                     uint32_t(box_columns), uint32_t(box_rows), uint32_t(swizzle), element_, uint64_t(stack.matrices),
                     uint64_t(stack.stride) * kElementBytes});
  }
  // A contiguous matrix of bytes.
  void add_bytes(size_t offset, uintptr_t address, int64_t columns, int64_t rows, int box_columns, int box_rows,
                 int swizzle) {
    maps_.push_back({offset, address, uint64_t(columns), uint64_t(rows), uint64_t(columns), uint32_t(box_columns),
                     uint32_t(box_rows), uint32_t(swizzle), MapElement::kByte});
  }
  void add_square(size_t offset, const Matrix& matrix, int64_t columns, int64_t rows) {
    add(offset, matrix, columns, rows, kBox, kBox, kSwizzleSpan);
  }

 private:
  std::vector<MapSpec>& maps_;
  MapElement element_;
};

}  // namespace

void check_no_projections(const Operands& o, size_t first) {
  for (size_t i = first; i < o.projections.size(); ++i) {
    const LayerOperands& each = o.projections[i];
    const bool given = each.act.address || each.weight.address || each.lora_a.address || each.lora_b.address ||
                       each.out.address || each.layer_input.address || each.saved_s.address || each.bias || each.s ||
                       each.grad_a || each.grad_b || each.grad_bias || each.seed_address;
    check_given(("of projection " + std::to_string(i)).c_str(), given, false);
  }
}

std::pair<int64_t, int64_t> Plan::weight_sizes() const {
  const bool rows_are_of_out = variant_->backward == variant_->transposed;
  return rows_are_of_out ? std::pair(base_.n, base_.k) : std::pair(base_.k, base_.n);
}

// What a packed weight is decoded from.
void Plan::check_packed(const Operands& o) const {
  const bool packed = is_packed(), nested = problem_.scale_format == ScaleFormat::kNested;
  const uintptr_t scale_bytes = nested ? 1 : problem_.scale_format == ScaleFormat::kFloat32 ? sizeof(float) : 2;
  check_vector("codes", o.codes, packed, kCopyAlignment);
  check_vector("scales", o.scales, packed, scale_bytes);
  check_given("zeros", o.zeros, o.zeros && packed && !is_four_bit(problem_.code_format));
  for (const auto& [name, address] : {std::pair{"absmax2", o.absmax2}, {"code2", o.code2}, {"offset", o.offset}}) {
    check_vector(name, address, nested, sizeof(float));
  }
  const int64_t in_features = variant_->backward ? base_.n : base_.k;
  require(!variant_->decodes || o.weight.stride == in_features, [&] {
    return "a packed weight is decoded into rows without gaps of " + std::to_string(in_features) + " elements, not " +
           std::to_string(o.weight.stride) + " apart";
  });
}

void Plan::check_operands(const Operands& o) const {
  const Params& p = base_;
  const bool backward = variant_->backward, has_adapter = p.r > 0;
  const bool makes_s = has_adapter && (problem_.makes_out || problem_.grad_a);
  const int64_t in_features = backward ? p.n : p.k, out_features = backward ? p.k : p.n;
  check_matrix("act", o.act, true, p.m, p.k);
  const auto [weight_rows, weight_columns] = weight_sizes();
  check_matrix("weight", o.weight, !variant_->in_loop, weight_rows, weight_columns);
  check_packed(o);
  check_matrix("lora_a", o.lora_a, has_adapter, p.r, in_features);
  check_matrix("lora_b", o.lora_b, has_adapter, out_features, p.r);
  const bool segmented = is_segmented();
  require(!segmented || (o.weight_stride % int64_t(kCopyAlignment / kElementBytes) == 0 &&
                         (p.segments.n_weights == 1 || o.weight_stride >= weight_rows * o.weight.stride)),
          [&] { return "weights are " + std::to_string(o.weight_stride) + " elements apart: they must not overlap"; });
  // Their stacks are contiguous.
  require(!segmented || (o.lora_a.stride == in_features && o.lora_b.stride == p.r),
          [] { return "factors of segments have rows with gaps between them"; });
  check_vector("ends", o.ends, segmented, sizeof(int32_t));
  check_vector("experts", o.experts, o.experts && segmented, o.wide_experts ? sizeof(int64_t) : sizeof(int32_t));
  check_vector("adapters", o.adapters, o.adapters && segmented, o.wide_adapters ? sizeof(int64_t) : sizeof(int32_t));
  check_vector("scalings", o.scalings, o.scalings && segmented, sizeof(float));
  require(!o.scalings || !variant_->fp16, [] { return "fp16 kernels take one scaling for all adapters"; });
  check_matrix("out", o.out, problem_.makes_out, p.m, p.n);
  check_matrix("layer_input", o.layer_input, problem_.grad_a, p.m, p.n);
  check_matrix("saved_s", o.saved_s, problem_.grad_b, p.m, p.r);
  check_vector("bias", o.bias, segmented ? p.segments.n_biases > 0 : o.bias && !backward, kCopyAlignment);
  check_vector("s", o.s, makes_s, kCopyAlignment);
  check_vector("kept_s", o.kept_s, segmented && !backward, sizeof(uint32_t));
  const uintptr_t gradient_bytes = o.fp32_grads ? sizeof(float) : kElementBytes;
  check_vector("grad_a", o.grad_a, problem_.grad_a, gradient_bytes);
  check_vector("grad_b", o.grad_b, problem_.grad_b, gradient_bytes);
  check_vector("grad_bias", o.grad_bias, problem_.grad_bias, kElementBytes);
  check_vector("workspace", o.workspace, true, sizeof(int));
  check_vector("gradient_partials", o.gradient_partials, gradient_partial_floats_ > 0, kCopyAlignment);
  check_vector("split_partials", o.split_partials, split_partial_floats_ > 0, kCopyAlignment);
  check_vector("seed_address", o.seed_address, o.seed_address && variant_->dropout, sizeof(uint64_t));
  require(!(o.seed_address && o.seed), [] { return "the seed is given by value and by address"; });
  require(variant_->dropout || (o.drop_threshold == 0 && o.inverse_keep == 1 && o.seed == 0),
          [] { return "dropout is given to a kernel without it"; });
  require(!variant_->dropout || !has_adapter || (o.drop_threshold >= 1 && o.drop_threshold <= 1 << 16), [&] {
    return "a kernel with dropout takes a threshold of 1 to 65536, got " + std::to_string(o.drop_threshold);
  });
  require(variant_->fp16 || o.scale_on_branch == 1, [] { return "only fp16 kernels scale the branch"; });
}

Params Plan::parameters(const Operands& o, std::vector<MapSpec>& specs) const {
  check_operands(o);
  check_no_projections(o, 0);
  Params p = base_;
  const bool backward = variant_->backward;
  const int64_t in_features = backward ? p.n : p.k, out_features = backward ? p.k : p.n;
  const int ranks = ranks_per_step(variant_->rank), rank_span = ranks * kElementBytes;
  Maps maps(specs, variant_->fp16);
  maps.add(offsetof(Params, act), o.act, p.k, p.m, kBox, variant_->block_m, kSwizzleSpan);
  // A box of what is contiguous along the contraction is taller.
  const auto [weight_rows, weight_columns] = weight_sizes();
  const int weight_box = backward == variant_->transposed ? kTallBox : kBox;
  const SegmentParams& stacks = p.segments;
  maps.add(offsetof(Params, weight), o.weight, weight_columns, weight_rows, kBox, weight_box, kSwizzleSpan,
           {stacks.n_weights, o.weight_stride});
  if (variant_->in_loop) {  // its codes, a step of a tile's columns in a box; see Run in sm90/decode_stage.cuh
    const CodeFormat format = problem_.code_format;
    const int bytes = code_bytes(format, variant_->block_k);
    maps.add_bytes(offsetof(Params, weight), o.codes, code_bytes(format, p.k), p.n, bytes, variant_->block_n,
                   is_four_bit(format) ? 0 : bytes);
  }
  if (p.grad_b_tiles) maps.add_square(offsetof(Params, act_square), o.act, p.k, p.m);
  maps.add(offsetof(Params, lora_a), o.lora_a, in_features, p.r, kBox, ranks, kSwizzleSpan,
           {stacks.n_adapters, p.r * in_features});
  maps.add(offsetof(Params, lora_b), o.lora_b, p.r, out_features, ranks, kBox, rank_span,
           {stacks.n_adapters, p.r * out_features});
  maps.add(offsetof(Params, s), {o.s, p.r}, p.r, s_rows(), ranks, kBox, rank_span);
  maps.add_square(offsetof(Params, out), o.out, p.n, p.m);
  maps.add(offsetof(Params, bias), {o.bias, (p.n + 7) / 8 * 8}, p.n, std::max(stacks.n_biases, 1), variant_->block_n, 1,
           0);
  maps.add_square(offsetof(Params, layer_input), o.layer_input, p.n, p.m);
  // dbias alone: its tiles compute dB all the same and do not store it. Any matrix of M rows stands in for S.
  const Matrix saved_s = o.saved_s.address ? o.saved_s : p.grad_b_tiles ? o.act : Matrix{};
  maps.add(offsetof(Params, saved_s), saved_s, o.saved_s.address || p.r < p.k ? p.r : p.k, p.m, ranks, kBox, rank_span);

  p.segments.ends = reinterpret_cast<const int32_t*>(o.ends);
  p.segments.experts = reinterpret_cast<const void*>(o.experts);
  p.segments.adapters = reinterpret_cast<const void*>(o.adapters);
  p.segments.wide_experts = o.wide_experts;
  p.segments.wide_adapters = o.wide_adapters;
  p.segments.scalings = reinterpret_cast<const float*>(o.scalings);
  p.segments.kept_s = reinterpret_cast<void*>(o.kept_s);
  p.segments.out = reinterpret_cast<void*>(o.out.address);
  p.segments.out_stride = o.out.stride;
  p.s_out = reinterpret_cast<void*>(o.s);
  p.grad_a = reinterpret_cast<void*>(o.grad_a);
  p.grad_b = reinterpret_cast<void*>(o.grad_b);
  p.grad_bias = reinterpret_cast<void*>(o.grad_bias);
  p.gradient_partials = reinterpret_cast<float*>(o.gradient_partials);
  p.split_partials = reinterpret_cast<float*>(o.split_partials);
  p.workspace = reinterpret_cast<int*>(o.workspace);
  p.seed_address = reinterpret_cast<const uint64_t*>(o.seed_address);
  p.seed = o.seed;
  p.has_bias = o.bias != 0;
  p.fp32_grads = o.fp32_grads;
  // A kernel that splits the scaling multiplies by 1 / (1 - p) first; in the others S takes both factors at once.
  p.scale_in_s = float(backward || variant_->fp16 ? o.scale_in_s : o.scale_in_s * o.inverse_keep);
  p.inverse_keep = float(o.inverse_keep);
  p.last_dropped = (o.drop_threshold << 16) - 1;
  p.scale_on_branch = float(o.scale_on_branch);
  p.inverse_scale_on_branch = float(1 / o.scale_on_branch);
  p.packed.codes = reinterpret_cast<const void*>(o.codes);
  p.packed.scales = reinterpret_cast<const void*>(o.scales);
  p.packed.zeros = reinterpret_cast<const int8_t*>(o.zeros);
  p.packed.absmax2 = reinterpret_cast<const float*>(o.absmax2);
  p.packed.code2 = reinterpret_cast<const float*>(o.code2);
  p.packed.offset = reinterpret_cast<const float*>(o.offset);
  p.packed.decoded = variant_->decodes ? reinterpret_cast<void*>(o.weight.address) : nullptr;
  return p;
}

}  // namespace fastlora
