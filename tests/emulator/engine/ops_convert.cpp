// cvt between all scalar types, and the packing conversions.
#include <algorithm>

#include "half.h"
#include "lanes.h"

namespace emu {
namespace {

// The order is the translator's list of types.
enum class Type : i64 { kU8, kS8, kU16, kS16, kU32, kS32, kU64, kS64, kF16, kBf16, kTf32, kF32, kF64 };

template <class D, class S> void integer(Warp& warp, const Instruction& in, u32 mask) {
  const Raw<S>* a = raw_lanes<S>(warp, in.reg[1]);
  map_lanes<D>(warp, in.reg[0], mask, [=](u32 l) { return D(S(a[l])); });
}

// Integer to float32 and 16-bit float to float32: the frequent ones.
template <class S> void integer_to_float(Warp& warp, const Instruction& in, u32 mask) {
  const Raw<S>* a = raw_lanes<S>(warp, in.reg[1]);
  map_lanes<float>(warp, in.reg[0], mask, [=](u32 l) { return float(S(a[l])); });
}
template <auto F> void half_to_float(Warp& warp, const Instruction& in, u32 mask) {
  const u32* a = warp.lanes32(in.reg[1]);
  map_lanes<float>(warp, in.reg[0], mask, [=](u32 l) { return F(u16(a[l])); });
}

// cvt.rn.{bf16x2, f16x2}.f32 d, a, b: a goes to the upper half. imm: ReLU.
template <auto F> void pair(Warp& warp, const Instruction& in, u32 mask) {
  const u32 *high = warp.lanes32(in.reg[1]), *low = warp.lanes32(in.reg[2]);
  bool relu = in.imm[0];
  map_lanes<u32>(warp, in.reg[0], mask, [=](u32 l) {
    float h = std::bit_cast<float>(high[l]), w = std::bit_cast<float>(low[l]);
    if (relu) h = h < 0 ? 0 : h, w = w < 0 ? 0 : w;
    return u32(F(h)) << 16 | F(w);
  });
}

bool is_float(Type type) { return type >= Type::kF16; }
u32 bits_of(Type type) { return 8u << (u32(type) / 2); }
bool is_signed(Type type) { return u32(type) & 1; }

double load_float(Type type, u64 raw) {
  switch (type) {
    case Type::kF16: return f16_to_float(u16(raw));
    case Type::kBf16: return bf16_to_float(u16(raw));
    case Type::kF64: return std::bit_cast<double>(raw);
    default: return std::bit_cast<float>(u32(raw));
  }
}

u64 store_float(Type type, double value, Rounding rounding) {
  switch (type) {
    case Type::kF16: return encode_float(value, 5, 10, rounding);
    case Type::kBf16: return encode_float(value, 8, 7, rounding);
    case Type::kTf32: return encode_float(value, 8, 10, rounding) << 13;
    case Type::kF64: return std::bit_cast<u64>(value);
    default:
      return rounding == Rounding::kNearestEven ? std::bit_cast<u32>(float(value)) : encode_float(value, 8, 23, rounding);
  }
}

u64 float_to_integer(Type type, double value, Rounding rounding) {
  if (std::isnan(value)) return bits_of(type) == 64 ? 1ull << 63 : 0;
  double whole = std::copysign(round_magnitude(std::fabs(value), std::signbit(value), rounding), value);
  u32 bits = bits_of(type);
  double limit = std::ldexp(1.0, int(bits) - (is_signed(type) ? 1 : 0));
  if (whole >= limit) return is_signed(type) ? (1ull << (bits - 1)) - 1 : ~0ull >> (64 - bits);
  if (is_signed(type)) return whole < -limit ? u64(-(1ll << (bits - 1))) : u64(i64(whole));
  return whole <= 0 ? 0 : u64(whole);
}

// `again`: what does not fit is kept as an odd last bit, so that rounding once more, to fewer bits, rounds as if only once.
double integer_to_double(u64 magnitude, bool negative, Rounding rounding, bool again) {
  const int surplus = int(std::bit_width(magnitude)) - 53;
  u64 kept = magnitude;
  if (surplus > 0) {
    const u64 rest = magnitude & ((1ull << surplus) - 1), half = 1ull << (surplus - 1);
    kept >>= surplus;
    if (again)
      kept |= rest != 0;
    else if (rounding == Rounding::kNearestEven)
      kept += rest > half || (rest == half && kept & 1);
    else
      kept += rest && rounding == (negative ? Rounding::kDown : Rounding::kUp);
  }
  const double value = std::ldexp(double(kept), std::max(surplus, 0));
  return negative ? -value : value;
}

i64 sign_extend(u64 raw, u32 bits) { return i64(raw << (64 - bits)) >> (64 - bits); }

// imm: destination and source type, rounding, saturate, flush subnormals, ReLU, round to an integer.
void general(Warp& warp, const Instruction& in, u32 mask) {
  const Type to = Type(in.imm[0]), from = Type(in.imm[1]);
  const Rounding rounding = Rounding(in.imm[2]);
  const bool saturate = in.imm[3], flush = in.imm[4], relu = in.imm[5], to_integer = in.imm[6];
  for_lanes(mask, [&](u32 l) {
    u64 raw = warp.get(in.reg[1], l);
    if (!is_float(from) && !is_float(to)) {
      i64 value = is_signed(from) ? sign_extend(raw, bits_of(from))
                                  : i64(bits_of(from) == 64 ? raw : raw & ((1ull << bits_of(from)) - 1));
      if (saturate && bits_of(to) < 64) {
        i64 low = is_signed(to) ? -(1ll << (bits_of(to) - 1)) : 0, high = (1ll << (bits_of(to) - (is_signed(to) ? 1 : 0))) - 1;
        value = is_signed(from) || value >= 0 ? std::clamp(value, low, high) : high;
      }
      warp.set(in.reg[0], l,
               is_signed(to) ? u64(sign_extend(u64(value), bits_of(to))) : u64(value) & (~0ull >> (64 - bits_of(to))));
    } else if (!is_float(from)) {
      u32 bits = bits_of(from);
      const bool negative = is_signed(from) && sign_extend(raw, bits) < 0;
      u64 magnitude = negative ? 0 - u64(sign_extend(raw, bits)) : raw & (~0ull >> (64 - bits));
      double value = integer_to_double(magnitude, negative, rounding, to != Type::kF64);
      warp.set(in.reg[0], l, store_float(to, value, rounding));
    } else {
      double value = load_float(from, raw);
      if (flush && std::fabs(value) < 0x1p-126) value = std::copysign(0.0, value);
      if (!is_float(to)) {
        warp.set(in.reg[0], l, float_to_integer(to, value, rounding));
        return;
      }
      if (to_integer && !std::isnan(value))
        value = std::copysign(round_magnitude(std::fabs(value), std::signbit(value), rounding), value);
      if (saturate) value = value > 0 ? std::min(value, 1.0) : 0.0;
      if (relu && value < 0) value = 0;
      warp.set(in.reg[0], l, store_float(to, value, to_integer ? Rounding::kNearestEven : rounding));
    }
  });
}

template <class S> void add_integer_sources(OpTable& t, const std::string& from) {
  t.add("cvt.u8." + from, integer<u8, S>);
  t.add("cvt.s8." + from, integer<int8_t, S>);
  t.add("cvt.u16." + from, integer<u16, S>);
  t.add("cvt.s16." + from, integer<int16_t, S>);
  t.add("cvt.u32." + from, integer<u32, S>);
  t.add("cvt.s32." + from, integer<i32, S>);
  t.add("cvt.u64." + from, integer<u64, S>);
  t.add("cvt.s64." + from, integer<i64, S>);
  t.add("cvt.f32." + from, integer_to_float<S>);
}

}  // namespace

void add_convert_ops(OpTable& t) {
  add_integer_sources<u8>(t, "u8");
  add_integer_sources<int8_t>(t, "s8");
  add_integer_sources<u16>(t, "u16");
  add_integer_sources<int16_t>(t, "s16");
  add_integer_sources<u32>(t, "u32");
  add_integer_sources<i32>(t, "s32");
  add_integer_sources<u64>(t, "u64");
  add_integer_sources<i64>(t, "s64");
  t.add("cvt.f32.bf16", half_to_float<bf16_to_float>);
  t.add("cvt.f32.f16", half_to_float<f16_to_float>);
  t.add("cvt.bf16x2.f32", pair<float_to_bf16>);
  t.add("cvt.f16x2.f32", pair<float_to_f16>);
  t.add("cvt", general);
}

}  // namespace emu
