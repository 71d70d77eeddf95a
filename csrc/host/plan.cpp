#include "plan.h"

#include <algorithm>

namespace fastlora {

namespace {

std::vector<Variant>& mutable_variants() {
  static std::vector<Variant> list;
  return list;
}

// The kernel of the least rank that is enough, or null.
const Variant* find_variant(const Problem& problem) {
  const Variant* best = nullptr;
  const bool is_packed = problem.code_format != CodeFormat::kNone;
  for (const Variant& v : variants()) {
    const bool fits = v.backward == problem.backward && v.fp16 == problem.fp16 && v.transposed == problem.transposed &&
                      v.decodes == (is_packed && !problem.in_loop) && v.in_loop == problem.in_loop &&
                      v.segments == (problem.n_segments != 0) && v.shared == !problem.projections.empty() &&
                      v.dropout == problem.dropout && v.block_m == problem.block_m && v.block_n == problem.block_n &&
                      v.rank >= problem.r;
    if (fits && (!best || v.rank < best->rank)) best = &v;
  }
  return best;
}

std::string describe_problem(const Problem& p) {
  return std::string(p.backward ? "backward" : "forward") + (p.transposed ? ", transposed weight" : "") +
         (p.n_segments ? ", " + std::to_string(p.n_segments) + " segments" : "") +
         (p.projections.empty() ? "" : ", " + std::to_string(p.projections.size()) + " projections") + ", tile " +
         std::to_string(p.block_m) + "x" + std::to_string(p.block_n) + ", M=" + std::to_string(p.m) +
         " N=" + std::to_string(p.n) + " K=" + std::to_string(p.k) + " R=" + std::to_string(p.r);
}

void refuse_unless(bool holds, const std::string& what, const Problem& problem) {
  if (!holds) throw std::invalid_argument("fastlora: " + what + ": " + describe_problem(problem));
}

// With the sums of its projections' sizes and needs, and the highest of their ranks.
Problem summed(Problem problem) {
  if (problem.projections.empty()) return problem;
  int64_t& out_features = problem.backward ? problem.k : problem.n;
  out_features = problem.r = 0;
  problem.grad_a = problem.grad_b = problem.grad_bias = false;
  for (const Projection& each : problem.projections) {
    out_features += each.out_features;
    problem.r = std::max(problem.r, each.r);
    problem.grad_a |= each.grad_a;
    problem.grad_b |= each.grad_b;
    problem.grad_bias |= each.grad_bias;
  }
  return problem;
}

}  // namespace

const std::vector<Variant>& variants() { return mutable_variants(); }

Registration::Registration(const Variant& variant) { mutable_variants().push_back(variant); }

Plan::Plan(const Problem& problem) : Plan(summed(problem), find_variant(summed(problem))) {}

Plan::Plan(const Problem& problem, const Variant* variant_of_plan)
    : problem_(problem), variant_(variant_of_plan), ctas_(problem.ctas) {
  const auto require = [&](bool holds, const std::string& what) { refuse_unless(holds, what, problem); };
  const auto [m, n, k, r] = std::array{problem.m, problem.n, problem.k, problem.r};
  require(variant_ && (!problem.in_loop || problem.code_format != CodeFormat::kNone), "no compiled kernel serves this");
  const Variant& variant = *variant_;
  constexpr int64_t kLimit = (int64_t(1) << 31) - 1024;
  const int64_t least_rank = variant.shared && problem.projections.empty() ? 0 : 1;  // one of several has none
  require(m > 0 && n > 0 && k > 0 && r >= least_rank && m <= kLimit && n <= kLimit && k <= kLimit && n % 8 == 0 &&
              k % 8 == 0 && r % 8 == 0,
          "sizes must be positive, below 2^31, and N, K and R multiples of 8");
  require(problem.group_m > 0 && ctas_ > 0 && problem.splits > 0 &&
              problem.splits <= ceil_div(int(k), variant.block_k) && (problem.splits == 1 || variant.splits),
          "bad group_m, ctas or splits");
  require(!problem.fused || (variant.fuses && problem.makes_out), "S cannot be fused");
  require(problem.backward || !(problem.grad_a || problem.grad_b || problem.grad_bias), "a forward makes no gradients");

  const int64_t segments = problem.n_segments;
  const auto counts = std::array{problem.n_segments, problem.n_weights, problem.n_adapters, problem.n_biases};
  if (variant.segments) {
    require(segments > 0 && segments <= kMaxSegments && problem.n_weights > 0 && problem.n_adapters > 0,
            "a kernel takes 1 to " + std::to_string(kMaxSegments) + " segments, and one weight and adapter at least");
    require(problem.n_biases == 0 || problem.n_biases == 1 || problem.n_biases == problem.n_weights,
            "there is one bias, or one for each weight");
    require(!problem.grad_bias, "no kernel for rows in segments makes the bias's gradient");
  } else {
    require(counts == std::array{0, 0, 0, 0}, "there are no stacks without segments");
  }

  const bool makes_s = r > 0 && (problem.makes_out || problem.grad_a);
  const int out_columns = problem.makes_out ? ceil_div(int(n), variant.block_n) : 0;
  const int gradient_columns = variant.gradient_columns * variant.cluster;
  Params& p = base_;
  p.m = int(m);
  p.n = int(n);
  p.k = int(k);
  p.r = int(r);
  p.fused_shrink = problem.fused;
  p.grad_b_tiles = problem.grad_b || problem.grad_bias ? ceil_div(int(k), gradient_columns) : 0;
  Schedule& s = p.schedule;
  // Of segments, all but one row may each begin a row block more; rows past the last end are a segment.
  s.rows = variant.segments ? int(std::min(m, (m + (segments + 1) * (variant.block_m - 1)) / variant.block_m))
                            : ceil_div(int(m), variant.block_m * variant.cluster);
  s.columns = out_columns + (makes_s && !problem.fused);
  s.group_m = ceil_div(problem.group_m, variant.cluster);
  s.gradient_tiles = p.grad_b_tiles + (problem.grad_a ? ceil_div(int(n), gradient_columns) : 0);
  s.gradients_last = problem.gradients_last || variant.segments;
  s.splits = problem.splits;
  if (is_packed()) take_packed();
  if (variant.decodes) cut_panels();
  if (!problem.projections.empty()) plan_projections();

  // Of segments, a gradient tile has a column of a chunk, of which each segment may begin one more, or zeroes that of
  // some adapters.
  const int64_t column_tiles = int64_t(s.rows) * s.columns;
  const int64_t groups =
      count_groups(s) + segments + (problem.n_adapters + kAdaptersOfZeroTile - 1) / kAdaptersOfZeroTile;
  const int64_t tiles = int64_t(s.panels) * s.parts + column_tiles * s.splits + groups * s.gradient_tiles;
  require(tiles <= kLimit, "more tiles than a 32-bit ticket counts");
  const int64_t owners = std::max(problem.n_adapters, 1);  // of a gradient each
  const int64_t reductions = owners * s.gradient_tiles + (s.splits > 1 ? column_tiles : 0);
  constexpr int kFlagsOfReduction = 2;  // one for each warpgroup that computes
  const int64_t row_flags = s.rows * std::max<int64_t>(problem.projections.size(), 1);
  const int64_t words = kFlagsWord + (row_flags + kFlagsOfReduction * reductions) * variant.cluster + s.panels;
  require(words <= kLimit, "more flags than a 32-bit index counts");
  p.workspace_words = int(words);
  gradient_partial_floats_ =
      groups > 1 ? owners * s.gradient_tiles * variant.cluster * variant.gradient_partial_floats : 0;
  split_partial_floats_ = column_tiles * (s.splits - 1) * variant.split_partial_floats;
  p.segments.count = problem.n_segments;
  p.segments.n_weights = problem.n_weights;
  p.segments.n_adapters = problem.n_adapters;
  p.segments.n_biases = problem.n_biases;
  ctas_ = int(std::min<int64_t>(tiles, std::max(problem.ctas / variant.cluster, 1))) * variant.cluster;
}

// What a packed weight is made of.
void Plan::take_packed() {
  const auto require = [&](bool holds, const char* what) { refuse_unless(holds, what, problem_); };
  const auto is_power_of_two = [](int64_t x) { return (x & (x - 1)) == 0; };
  const Problem& problem = problem_;
  const bool four_bit = is_four_bit(problem.code_format), nested = problem.scale_format == ScaleFormat::kNested;
  constexpr int64_t kLargestBlock = int64_t(1) << 30;  // whose elements 32 bits count, with a part's
  const int together = variant_->in_loop ? kDecodedInStage : kDecodedTogether;
  require(problem.makes_out, "nothing reads the packed weight: such a launch takes a kernel of dense weights");
  require(
      problem.block > 0 && problem.block % together == 0 && problem.block <= kLargestBlock && problem.k % together == 0,
      "elements that are decoded together must have one scale");
  require(four_bit ? is_power_of_two(problem.block) : !nested, "no kernel decodes blocks or scales of this kind");
  require(nested ? problem.nested_block > 0 && is_power_of_two(problem.nested_block) : problem.nested_block == 0,
          "nested scales, and no others, come in blocks of a power of two");
  PackedWeight& w = base_.packed;
  w.code_format = problem.code_format;
  w.scale_format = problem.scale_format;
  w.block = uint32_t(problem.block);
  while (int64_t(1) << w.block_shift < problem.block) ++w.block_shift;
  while (int64_t(1) << w.nested_shift < problem.nested_block) ++w.nested_shift;
  w.elements = problem.n * problem.k;
  require((w.elements + w.block - 1) / w.block < kLargestBlock * 2,
          "more scales of the packed weight than 32 bits count");
}

// The panels of a packed weight and their parts. A panel is what a tile of the output waits for: a column of tiles
// reads so many rows of W0 forward, and all of them in dX.
void Plan::cut_panels() {
  PackedWeight& w = base_.packed;
  w.panel_elements = problem_.backward ? w.elements : std::min(w.elements, variant_->block_n * problem_.k);
  const int64_t of_tile = int64_t(kPartElements) * variant_->cluster;
  const int64_t parts = (w.panel_elements + of_tile - 1) / of_tile;
  refuse_unless(parts < int64_t(1) << 29, "more parts of the packed weight than 32 bits count", problem_);
  base_.schedule.panels = int((w.elements + w.panel_elements - 1) / w.panel_elements);
  base_.schedule.parts = int(parts);
}

std::vector<Tile> Plan::queue() const {
  std::vector<Tile> tiles;
  for (int ticket = 0; ticket < count_tiles(base_.schedule); ++ticket) {
    tiles.push_back(locate(base_.schedule, ticket, ctas_ / variant_->cluster, shrink_columns_));
  }
  return tiles;
}

std::string Plan::describe() const {
  return std::string(variant_->name) + " M=" + std::to_string(base_.m) + " N=" + std::to_string(base_.n) +
         " K=" + std::to_string(base_.k) + " R=" + std::to_string(base_.r);
}

}  // namespace fastlora
