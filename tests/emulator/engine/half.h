// Small floating-point formats and their rounding.
#pragma once
#include <cmath>
#include <limits>

#include "common.h"

namespace emu {

enum class Rounding : i64 { kNearestEven, kZero, kDown, kUp, kNearestAway };

// Rounds a magnitude to an integer; `negative` is the sign of the whole number, for the directed modes.
inline double round_magnitude(double x, bool negative, Rounding rounding) {
  switch (rounding) {
    case Rounding::kZero: return std::floor(x);
    case Rounding::kDown: return negative ? std::ceil(x) : std::floor(x);
    case Rounding::kUp: return negative ? std::floor(x) : std::ceil(x);
    case Rounding::kNearestAway: return std::floor(x + 0.5);
    default: return std::nearbyint(x);
  }
}

// The bits of x in an IEEE-like format. A NaN becomes the hardware's canonical one (all ones but the sign).
inline u64 encode_float(double x, int exponent_bits, int mantissa_bits, Rounding rounding) {
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  const u64 sign = u64(std::signbit(x)) << (exponent_bits + mantissa_bits), infinity = u64(top) << mantissa_bits;
  if (std::isnan(x)) return infinity | ((1ull << mantissa_bits) - 1);
  double magnitude = std::fabs(x);
  if (std::isinf(magnitude)) return sign | infinity;
  if (magnitude == 0) return sign;
  int exponent = std::max(std::ilogb(magnitude), 1 - bias);
  u64 scaled = u64(round_magnitude(std::ldexp(magnitude, mantissa_bits - exponent), std::signbit(x), rounding));
  // A carry out of the mantissa moves into the exponent by itself.
  u64 bits = scaled + (u64(exponent + bias - 1) << mantissa_bits);
  if (bits >= infinity) {
    bool to_infinity =
        rounding == Rounding::kNearestEven || rounding == Rounding::kNearestAway || (rounding == Rounding::kUp) == !sign;
    if (rounding == Rounding::kZero) to_infinity = false;
    bits = to_infinity ? infinity : infinity - 1;
  }
  return sign | bits;
}

inline double decode_float(u64 bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, top = (1 << exponent_bits) - 1;
  u64 mantissa = bits & ((1ull << mantissa_bits) - 1);
  int exponent = int(bits >> mantissa_bits) & top;
  double magnitude = exponent == top
                         ? (mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity())
                     : exponent == 0 ? std::ldexp(double(mantissa), 1 - bias - mantissa_bits)
                                     : std::ldexp(double(mantissa | 1ull << mantissa_bits), exponent - bias - mantissa_bits);
  return bits >> (exponent_bits + mantissa_bits) & 1 ? -magnitude : magnitude;
}

inline float bf16_to_float(u16 bits) { return std::bit_cast<float>(u32(bits) << 16); }

inline u16 float_to_bf16(float value) {
  u32 bits = std::bit_cast<u32>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(u16 bits) {
  u32 exponent = bits >> 10 & 31, mantissa = bits & 0x3ff, sign = u32(bits & 0x8000) << 16;
  if (exponent == 0) return std::bit_cast<float>(sign | std::bit_cast<u32>(float(mantissa) * 0x1p-24f));
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

inline u16 float_to_f16(float value) {
  u32 bits = std::bit_cast<u32>(value), magnitude = bits & 0x7fffffff;
  u16 sign = u16(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) return u16(sign | u32(std::nearbyint(std::fabs(value) * 0x1p24f)));  // subnormal
  return u16(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13));
}

// tf32 keeps ten bits of the mantissa; the tensor cores ignore the rest.
inline float truncate_tf32(u32 bits) { return std::bit_cast<float>(bits & 0xffffe000); }

// Operands of the tensor cores.
enum class MmaType : i64 { kBf16, kF16, kTf32 };

inline float mma_element(MmaType type, u32 bits, u32 half) {
  switch (type) {
    case MmaType::kBf16: return bf16_to_float(u16(bits >> (16 * half)));
    case MmaType::kF16: return f16_to_float(u16(bits >> (16 * half)));
    default: return truncate_tf32(bits);
  }
}

// What a tensor core makes of an exact sum: it cuts the result off instead of rounding it.
inline float truncate_to_float(double sum) {
  float nearest = float(sum);
  bool beyond = std::fabs(double(nearest)) > std::fabs(sum);
  return std::bit_cast<float>(std::bit_cast<u32>(nearest) - u32(beyond));
}

}  // namespace emu
