// Floating-point arithmetic and every comparison.
#include <cfenv>
#include <cmath>

#include "half.h"
#include "lanes.h"

namespace emu {
namespace {

// Above them: how to round.
enum FloatFlags : i64 { kFlush = 1, kSaturate = 2, kPropagateNan = 4, kFlags = 7 };
constexpr int kRoundings[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD};

template <class T> T flush(T x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(T(0), x) : x; }

template <class T> T add(T a, T b) { return a + b; }
template <class T> T sub(T a, T b) { return a - b; }
template <class T> T mul(T a, T b) { return a * b; }
template <class T> T divide(T a, T b) { return a / b; }
template <class T> T fma(T a, T b, T c) { return std::fma(a, b, c); }
template <class T> T negate(T a) { return -a; }
template <class T> T absolute(T a) { return std::fabs(a); }
template <class T> T copysign(T sign, T magnitude) { return std::copysign(magnitude, sign); }
// A NaN loses against a number; -0 is less than +0.
template <class T> T minimum(T a, T b) {
  return std::isnan(a) ? b : std::isnan(b) ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
}
template <class T> T maximum(T a, T b) {
  return std::isnan(a) ? b : std::isnan(b) ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
}

// How a type of registers is computed with: C is the arithmetic type, and 16-bit formats come alone or in pairs.
struct F32 {
  using C = float;
  using R = u32;
  static constexpr int kParts = 1;
  static C load(u32 r, int) { return std::bit_cast<float>(r); }
  static u32 store(C v, int) { return std::bit_cast<u32>(v); }
};
struct F64 {
  using C = double;
  using R = u64;
  static constexpr int kParts = 1;
  static C load(u64 r, int) { return std::bit_cast<double>(r); }
  static u64 store(C v, int) { return std::bit_cast<u64>(v); }
};
// 16-bit results are computed in double precision, which holds every product and almost every sum exactly, and rounded once.
template <bool kBf16, int kCount> struct Half {
  using C = double;
  using R = u32;
  static constexpr int kParts = kCount;
  static C load(u32 r, int part) {
    u16 h = u16(r >> (16 * part));
    return kBf16 ? bf16_to_float(h) : f16_to_float(h);
  }
  static u32 store(C v, int part) {
    return u32(encode_float(v, kBf16 ? 8 : 5, kBf16 ? 7 : 10, Rounding::kNearestEven)) << (16 * part);
  }
};

// d = f(operands) by part, with the modifiers of imm[0]. Not inline: nothing may move across a change of the rounding mode.
template <class Type, int kOperands, class F>
[[gnu::noinline]] void compute(Warp& warp, const Instruction& in, u32 mask, F f) {
  using R = typename Type::R;
  using C = typename Type::C;
  const R* source[3] = {};
  for (int i = 0; i < kOperands; i++) source[i] = raw_lanes<R>(warp, in.reg[1 + i]);
  const i64 flags = in.imm[0] & kFlags;
  if (flags == 0 && Type::kParts == 1) {
    map_lanes<R>(warp, in.reg[0], mask, [=](u32 l) {
      C a = Type::load(source[0][l], 0), b = kOperands > 1 ? Type::load(source[1][l], 0) : C(),
        c = kOperands > 2 ? Type::load(source[2][l], 0) : C();
      return Type::store(f(a, b, c), 0);
    });
    return;
  }
  map_lanes<R>(warp, in.reg[0], mask, [=](u32 l) {
    R result = 0;
    for (int part = 0; part < Type::kParts; part++) {
      C x[3] = {};
      bool nan = false;
      for (int i = 0; i < kOperands; i++) {
        x[i] = Type::load(source[i][l], part);
        if (flags & kFlush) x[i] = flush(x[i]);
        nan |= std::isnan(x[i]);
      }
      C y = f(x[0], x[1], x[2]);
      if (flags & kPropagateNan && nan) y = std::numeric_limits<C>::quiet_NaN();
      if (flags & kFlush) y = flush(y);
      if (flags & kSaturate) y = y > 0 ? std::min(y, C(1)) : C(0);
      result |= Type::store(y, part);
    }
    return result;
  });
}

template <class Type, int kOperands, class F> void compute_rounded(Warp& warp, const Instruction& in, u32 mask, F f) {
  const i64 rounding = in.imm[0] / (kFlags + 1);
  if (rounding) std::fesetround(kRoundings[rounding]);
  compute<Type, kOperands>(warp, in, mask, f);
  if (rounding) std::fesetround(FE_TONEAREST);
}

template <class Type, auto F> void one(Warp& w, const Instruction& in, u32 m) {
  compute_rounded<Type, 1>(w, in, m, [](auto a, auto, auto) { return F(a); });
}
template <class Type, auto F> void two(Warp& w, const Instruction& in, u32 m) {
  compute_rounded<Type, 2>(w, in, m, [](auto a, auto b, auto) { return F(a, b); });
}
template <class Type, auto F> void three(Warp& w, const Instruction& in, u32 m) {
  compute_rounded<Type, 3>(w, in, m, [](auto a, auto b, auto c) { return F(a, b, c); });
}

float ex2(float x) { return std::exp2(x); }
float lg2(float x) { return std::log2(x); }
float sine(float x) { return std::sin(x); }
float cosine(float x) { return std::cos(x); }
float hyperbolic(float x) { return std::tanh(x); }
template <class T> T reciprocal(T x) { return T(1) / x; }
template <class T> T root(T x) { return std::sqrt(x); }
template <class T> T reciprocal_root(T x) { return T(1) / std::sqrt(x); }

template <class Type> void add_float(OpTable& t, const std::string& type) {
  using C = typename Type::C;
  t.add("add." + type, two<Type, add<C>>);
  t.add("sub." + type, two<Type, sub<C>>);
  t.add("mul." + type, two<Type, mul<C>>);
  t.add("fma." + type, three<Type, fma<C>>);
  t.add("min." + type, two<Type, minimum<C>>);
  t.add("max." + type, two<Type, maximum<C>>);
  t.add("neg." + type, one<Type, negate<C>>);
  t.add("abs." + type, one<Type, absolute<C>>);
}

template <class Type> void add_full(OpTable& t, const std::string& type) {
  using C = typename Type::C;
  add_float<Type>(t, type);
  t.add("div." + type, two<Type, divide<C>>);
  t.add("copysign." + type, two<Type, copysign<C>>);
  t.add("rcp." + type, one<Type, reciprocal<C>>);
  t.add("sqrt." + type, one<Type, root<C>>);
  t.add("rsqrt." + type, one<Type, reciprocal_root<C>>);
}

// setp, imm: comparison, boolean combination (0 none, 1 and, 2 or, 3 xor), number of predicates written. Registers: p, [q], a,
// b, [c].
enum class Compare : i64 { kEq, kNe, kLt, kLe, kGt, kGe, kNumber, kNan };
constexpr i64 kUnordered = 8;  // the comparison is true of a NaN

template <class T> bool compare(Compare how, T a, T b) {
  switch (how) {
    case Compare::kEq: return a == b;
    case Compare::kNe: return a < b || a > b;
    case Compare::kLt: return a < b;
    case Compare::kLe: return a <= b;
    case Compare::kGt: return a > b;
    case Compare::kGe: return a >= b;
    case Compare::kNumber: return a == a && b == b;
    default: return a != a || b != b;
  }
}

template <class Load, class R> void set_predicate(Warp& warp, const Instruction& in, u32 mask) {
  const i64 how = in.imm[0], combine = in.imm[1], n_dst = in.imm[2];
  const R *a = raw_lanes<R>(warp, in.reg[n_dst]), *b = raw_lanes<R>(warp, in.reg[n_dst + 1]);
  u32 bits = 0;
  for (u32 l = 0; l < kWarpSize; l++) {
    auto x = Load::load(a[l]), y = Load::load(b[l]);
    bool result = compare(Compare(how & 7), x, y) || (how & kUnordered && (x != x || y != y));
    bits |= u32(result) << l;
  }
  u32 inverse = ~bits;
  if (combine) {
    u32 c = warp.predicate(in.reg[n_dst + 2]);
    auto combined = [&](u32 p) { return combine == 1 ? p & c : combine == 2 ? p | c : p ^ c; };
    bits = combined(bits);
    inverse = combined(inverse);
  }
  write_predicate(warp, in.reg[0], mask, bits);
  if (n_dst == 2) write_predicate(warp, in.reg[1], mask, inverse);
}

template <class T> struct Plain {
  static T load(Raw<T> r) { return from_raw<T>(r); }
};
struct Bf16 {
  static float load(u32 r) { return bf16_to_float(u16(r)); }
};
struct F16 {
  static float load(u32 r) { return f16_to_float(u16(r)); }
};
template <class T> void add_compare(OpTable& t, const std::string& type) {
  t.add("setp." + type, set_predicate<Plain<T>, Raw<T>>);
}

}  // namespace

void add_float_ops(OpTable& t) {
  add_full<F32>(t, "f32");
  add_full<F64>(t, "f64");
  add_float<Half<true, 1>>(t, "bf16");
  add_float<Half<true, 2>>(t, "bf16x2");
  add_float<Half<false, 1>>(t, "f16");
  add_float<Half<false, 2>>(t, "f16x2");
  t.add("ex2.f32", one<F32, ex2>);
  t.add("lg2.f32", one<F32, lg2>);
  t.add("sin.f32", one<F32, sine>);
  t.add("cos.f32", one<F32, cosine>);
  t.add("tanh.f32", one<F32, hyperbolic>);
  add_compare<u16>(t, "u16");
  add_compare<i16>(t, "s16");
  add_compare<u32>(t, "u32");
  add_compare<i32>(t, "s32");
  add_compare<u64>(t, "u64");
  add_compare<i64>(t, "s64");
  add_compare<float>(t, "f32");
  add_compare<double>(t, "f64");
  t.add("setp.bf16", set_predicate<Bf16, u32>);
  t.add("setp.f16", set_predicate<F16, u32>);
}

}  // namespace emu
