// From sizes to a kernel, its grid and its parameters; nothing here touches a device.
#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "schedule.h"

namespace fastlora {

namespace {

std::vector<Variant>& mutable_variants() {
  static std::vector<Variant> list;
  return list;
}

const Variant* find_variant(bool backward, bool half, bool dropout, int block_m, int block_n, int64_t rank) {
  const Variant* best = nullptr;
  for (const Variant& v : variants()) {
    const bool fits = v.backward == backward && v.half == half && v.dropout == dropout && v.block_m == block_m &&
                      v.block_n == block_n && v.rank >= rank;
    if (fits && (!best || v.rank < best->rank)) best = &v;
  }
  return best;
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("fastlora: " + what);
}

// A kernel reads an operand where it needs one and nowhere else.
void check_given(const char* name, bool given, bool needed) {
  require(given || !needed, std::string("operand ") + name + " is missing");
  require(needed || !given, std::string("operand ") + name + " is given to a launch that has no use for it");
}

void check_aligned(const char* name, uintptr_t address, uintptr_t bytes) {
  require(address % bytes == 0, std::string(name) + " does not start on " + std::to_string(bytes) + " bytes");
}

// A matrix whose rows of `columns` elements the copy engine can address.
void check_matrix(const char* name, const Matrix& matrix, bool needed, int64_t rows, int64_t columns) {
  check_given(name, matrix.address, needed);
  if (!matrix.address) return;
  check_aligned(name, matrix.address, 16);
  require((rows == 1 || matrix.stride >= columns) && matrix.stride > 0 && matrix.stride % 8 == 0 &&
              matrix.stride < int64_t(1) << 39,
          std::string(name) + " has rows of " + std::to_string(columns) + " elements " + std::to_string(matrix.stride) +
              " apart: they must not overlap and must start on 16 bytes");
}

void check_vector(const char* name, uintptr_t address, bool needed, uintptr_t alignment) {
  check_given(name, address, needed);
  check_aligned(name, address, alignment);
}

}  // namespace

const std::vector<Variant>& variants() { return mutable_variants(); }

Registration::Registration(const Variant& variant) { mutable_variants().push_back(variant); }

bool MapSpec::operator==(const MapSpec& o) const {
  return address == o.address && columns == o.columns && rows == o.rows && stride_bytes == o.stride_bytes &&
         box_columns == o.box_columns && box_rows == o.box_rows && swizzle == o.swizzle && half == o.half;
}

Plan::Plan(bool backward, bool half, bool dropout, int block_m, int block_n, int64_t m, int64_t n, int64_t k, int64_t r,
           int group_m, int splits, bool fused, int ctas, bool makes_c, bool grad_a, bool grad_b, bool grad_bias)
    : makes_c_(makes_c), grad_a_(grad_a), grad_b_(grad_b), grad_bias_(grad_bias), ctas_(ctas) {
  variant_ = find_variant(backward, half, dropout, block_m, block_n, r);
  const std::string what = std::string(backward ? "backward" : "forward") + ", tile " + std::to_string(block_m) + "x" +
                           std::to_string(block_n) + ", M=" + std::to_string(m) + " N=" + std::to_string(n) +
                           " K=" + std::to_string(k) + " R=" + std::to_string(r);
  if (!variant_) throw std::invalid_argument("fastlora: no compiled kernel serves " + what);
  const int64_t limit = (int64_t(1) << 31) - 1024;
  if (m <= 0 || n <= 0 || k <= 0 || r <= 0 || m > limit || n > limit || k > limit || n % 8 || k % 8 || r % 8) {
    throw std::invalid_argument("fastlora: sizes must be positive, below 2^31, and N, K and R multiples of 8: " + what);
  }
  if (group_m <= 0 || ctas <= 0 || splits <= 0 || splits > ceil_div(int(k), 64) || (splits > 1 && !variant_->split)) {
    throw std::invalid_argument("fastlora: bad group_m, ctas or splits for " + what);
  }
  require(backward || !(grad_a || grad_b || grad_bias), "a forward makes no gradients");
  const bool makes_s = makes_c || grad_a;
  const int columns_of_c = makes_c ? ceil_div(int(n), block_n) : 0;
  Params& p = base_;
  p.m = int(m);
  p.n = int(n);
  p.k = int(k);
  p.r = int(r);
  p.fused = fused && makes_c && variant_->fuses;
  const int cluster = variant_->cluster, grad_columns = variant_->grad_columns * cluster;
  p.blocks_b = grad_b || grad_bias ? ceil_div(int(k), grad_columns) : 0;
  const int blocks_a = grad_a ? ceil_div(int(n), grad_columns) : 0;
  p.schedule = {ceil_div(int(m), block_m * cluster), columns_of_c + (makes_s && !p.fused), ceil_div(group_m, cluster),
                p.blocks_b + blocks_a, splits};
  const int64_t tiles = int64_t(p.schedule.rows) * p.schedule.columns;
  const int64_t groups = ceil_div(p.schedule.rows, p.schedule.group_m);
  if (tiles * splits + groups * p.schedule.gradients > limit) {
    throw std::invalid_argument("fastlora: more tiles than a 32-bit ticket counts: " + what);
  }
  const int64_t chains = p.schedule.gradients + (splits > 1 ? tiles : 0);
  words_ = kFlagsWord + (p.schedule.rows + 2 * chains) * cluster;
  p.n_words = int(words_);
  gradient_floats_ = groups > 1 ? int64_t(p.schedule.gradients) * cluster * 2 * variant_->grad_planes * 128 : 0;
  part_floats_ = tiles * (splits - 1) * 2 * variant_->tile_planes * 128;
  const int64_t work = tiles * splits + groups * p.schedule.gradients;
  const int64_t clusters = std::min<int64_t>(work, std::max(ctas / cluster, 1));
  ctas_ = int(clusters) * cluster;
}

std::vector<std::array<int, 4>> Plan::queue() const {
  std::vector<std::array<int, 4>> tiles;
  for (int ticket = 0; ticket < count_tiles(base_.schedule); ++ticket) {
    const Tile tile = locate(base_.schedule, ticket, ctas_ / variant_->cluster);
    tiles.push_back({tile.row, tile.column, tile.part, tile.gradient});
  }
  return tiles;
}

void Plan::check_operands(const Operands& o) const {
  const Params& p = base_;
  const bool backward = variant_->backward, makes_s = makes_c_ || grad_a_;
  const int64_t in = backward ? p.n : p.k, out = backward ? p.k : p.n;
  check_matrix("u", o.u, true, p.m, p.k);
  check_matrix("v", o.v, true, out, in);
  check_matrix("a", o.a, true, p.r, in);
  check_matrix("b", o.b, true, out, p.r);
  check_matrix("c", o.c, makes_c_, p.m, p.n);
  check_matrix("x", o.x, grad_a_, p.m, p.n);
  check_matrix("saved", o.saved, grad_b_, p.m, p.r);
  check_vector("bias", o.bias, o.bias && !backward, 16);
  check_vector("s", o.s, makes_s, 16);
  check_vector("grad_a", o.grad_a, grad_a_, o.fp32_grads ? 4 : 2);
  check_vector("grad_b", o.grad_b, grad_b_, o.fp32_grads ? 4 : 2);
  check_vector("grad_bias", o.grad_bias, grad_bias_, 2);
  check_vector("workspace", o.workspace, true, 4);
  check_vector("gradient_sums", o.gradient_sums, gradient_floats_ > 0, 16);
  check_vector("tile_parts", o.tile_parts, part_floats_ > 0, 16);
  check_vector("seed_address", o.seed_address, o.seed_address && variant_->dropout, 8);
  require(!(o.seed_address && o.seed), "the seed is given by value and by address");
  require(variant_->dropout || (o.drop_threshold == 0 && o.inverse_keep == 1 && o.seed == 0),
          "dropout is asked of a kernel without");
  require(variant_->half || o.branch_scale == 1, "only fp16 kernels scale the branch");
}

Params Plan::parameters(const Operands& o, std::vector<MapSpec>& maps) const {
  check_operands(o);
  Params p = base_;
  const uint32_t chunk = variant_->rank < 64 ? variant_->rank : 64;
  auto add = [&](size_t offset, const Matrix& matrix, int64_t columns, int64_t rows, uint32_t box_columns,
                 uint32_t box_rows, uint32_t swizzle) {
    if (!matrix.address) return;
    maps.push_back({offset, matrix.address, uint64_t(columns), uint64_t(rows), uint64_t(matrix.stride) * 2, box_columns,
                    box_rows, swizzle, variant_->half});
  };
  auto add_square = [&](size_t offset, const Matrix& matrix, int64_t columns, int64_t rows) {
    add(offset, matrix, columns, rows, 64, 64, 128);
  };
  const bool backward = variant_->backward;
  const int64_t in = backward ? p.n : p.k, out = backward ? p.k : p.n;
  add_square(offsetof(Params, u), o.u, p.k, p.m);
  add_square(offsetof(Params, v), o.v, in, out);
  add(offsetof(Params, a), o.a, in, p.r, 64, chunk, 128);
  add(offsetof(Params, b), o.b, p.r, out, chunk, 64, chunk * 2);
  add(offsetof(Params, s), {o.s, p.r}, p.r, p.m, chunk, 64, chunk * 2);
  add_square(offsetof(Params, c), o.c, p.n, p.m);
  add(offsetof(Params, bias), {o.bias, (p.n + 7) / 8 * 8}, p.n, 1, uint32_t(variant_->block_n), 1, 0);
  add_square(offsetof(Params, x), o.x, p.n, p.m);
  // dbias alone: its tiles multiply by S all the same, and leave the product. Any matrix of M rows stands in.
  const Matrix saved = o.saved.address ? o.saved : p.blocks_b ? o.u : Matrix{};
  add(offsetof(Params, saved), saved, o.saved.address || p.r < p.k ? p.r : p.k, p.m, chunk, 64, chunk * 2);

  p.s_out = reinterpret_cast<void*>(o.s);
  p.grad_a = reinterpret_cast<void*>(o.grad_a);
  p.grad_b = reinterpret_cast<void*>(o.grad_b);
  p.grad_bias = reinterpret_cast<void*>(o.grad_bias);
  p.gradient_sums = reinterpret_cast<float*>(o.gradient_sums);
  p.tile_parts = reinterpret_cast<float*>(o.tile_parts);
  p.workspace = reinterpret_cast<int*>(o.workspace);
  p.seed_address = reinterpret_cast<const uint64_t*>(o.seed_address);
  p.seed = o.seed;
  p.has_bias = o.bias != 0;
  p.fp32_grads = o.fp32_grads;
  // A kernel that splits the scaling applies 1 / (1 - p) by itself, in front of it.
  p.scale_s = float(backward || variant_->half ? o.scale_s : o.scale_s * o.inverse_keep);
  p.inverse_keep = float(o.inverse_keep);
  p.branch_scale = float(o.branch_scale);
  p.inverse_branch_scale = float(1 / o.branch_scale);
  p.drop_threshold = o.drop_threshold;
  return p;
}

std::string Plan::describe() const {
  return std::string(variant_->name) + " M=" + std::to_string(base_.m) + " N=" + std::to_string(base_.n) +
         " K=" + std::to_string(base_.k) + " R=" + std::to_string(base_.r);
}

}  // namespace fastlora
