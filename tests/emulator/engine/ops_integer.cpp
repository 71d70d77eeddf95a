// Integer arithmetic, logic and bit fields.
#include <algorithm>

#include "lanes.h"

namespace emu {
namespace {

template <class T> using Unsigned = std::make_unsigned_t<T>;
template <class T> constexpr u32 kBits = sizeof(T) * 8;
template <class T> struct WiderOf;
template <> struct WiderOf<u16> {
  using type = u32;
};
template <> struct WiderOf<i16> {
  using type = i32;
};
template <> struct WiderOf<u32> {
  using type = u64;
};
template <> struct WiderOf<i32> {
  using type = i64;
};
template <> struct WiderOf<u64> {
  using type = unsigned __int128;
};
template <> struct WiderOf<i64> {
  using type = __int128;
};
template <class T> using Wider = typename WiderOf<T>::type;

// Wrap-around arithmetic without signed overflow: in u64, then cut.
template <class T> T add(T a, T b) { return T(u64(a) + u64(b)); }
template <class T> T sub(T a, T b) { return T(u64(a) - u64(b)); }
template <class T> T mul_lo(T a, T b) { return T(u64(a) * u64(b)); }
template <class T> T mul_hi(T a, T b) { return T((Wider<T>(a) * Wider<T>(b)) >> kBits<T>); }
template <class T> Wider<T> mul_wide(T a, T b) { return Wider<T>(a) * Wider<T>(b); }
template <class T> T mad_lo(T a, T b, T c) { return T(u64(a) * u64(b) + u64(c)); }
template <class T> T mad_hi(T a, T b, T c) { return T(u64(mul_hi(a, b)) + u64(c)); }
template <class T> Wider<T> mad_wide(T a, T b, Wider<T> c) { return Wider<T>(u64(mul_wide(a, b)) + u64(c)); }
// PTX leaves division by zero unspecified; the hardware gives all ones.
template <class T> T divide(T a, T b) {
  if (b == 0) return T(~T(0));
  if constexpr (std::is_signed_v<T>)
    if (b == T(-1)) return T(0 - u64(a));
  return T(a / b);
}
template <class T> T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == T(-1)) return 0;
  return T(a % b);
}
template <class T> T minimum(T a, T b) { return std::min(a, b); }
template <class T> T maximum(T a, T b) { return std::max(a, b); }
template <class T> T absolute(T a) { return a < 0 ? T(0 - u64(a)) : a; }
template <class T> T negate(T a) { return T(0 - u64(a)); }
template <class T> T bit_and(T a, T b) { return a & b; }
template <class T> T bit_or(T a, T b) { return a | b; }
template <class T> T bit_xor(T a, T b) { return a ^ b; }
template <class T> T bit_not(T a) { return T(~a); }
template <class T> T cnot(T a) { return a == 0; }
template <class T> T shl(T a, u32 n) { return n >= kBits<T> ? T(0) : T(Unsigned<T>(a) << n); }
template <class T> T shr(T a, u32 n) {
  if constexpr (std::is_signed_v<T>)
    return T(a >> std::min(n, kBits<T> - 1));
  else
    return n >= kBits<T> ? T(0) : T(a >> n);
}
template <class T> u32 popc(T a) { return u32(std::popcount(a)); }
template <class T> u32 clz(T a) { return u32(std::countl_zero(a)); }
template <class T> T brev(T a) {
  T reversed = 0;
  for (u32 i = 0; i < kBits<T>; i++) reversed |= ((a >> i) & 1) << (kBits<T> - 1 - i);
  return reversed;
}
template <class T> u32 bfind(T a) {
  Unsigned<T> bits = std::is_signed_v<T> && a < 0 ? Unsigned<T>(~a) : Unsigned<T>(a);
  return bits ? kBits<T> - 1 - u32(std::countl_zero(bits)) : ~0u;
}

template <class T> u32 bfind_shift(T a) {
  u32 found = bfind(a);
  return found == ~0u ? found : kBits<T> - 1 - found;
}
template <class T> T sad(T a, T b, T c) { return T(u64(c) + (a < b ? u64(b) - u64(a) : u64(a) - u64(b))); }
// The two halves of a register, each on its own.
template <class T, auto F> u32 pairs(u32 a, u32 b) { return u32(u16(F(T(a), T(b)))) | u32(F(T(a >> 16), T(b >> 16))) << 16; }

// d = a + b + carry, or a - b - borrow; imm: subtracts. Registers: d, carry out, a, b, carry in.
template <class T> void add_carry(Warp& warp, const Instruction& in, u32 mask) {
  for_lanes(mask, [&](u32 l) {
    const T a = T(warp.get(in.reg[2], l)), b = T(warp.get(in.reg[3], l));
    const unsigned __int128 other = (unsigned __int128)(b) + warp.get(in.reg[4], l);
    const unsigned __int128 result = in.imm[0] ? a - other : a + other;
    warp.set(in.reg[0], l, u64(T(result)));
    warp.set(in.reg[1], l, u64(result >> kBits<T>) & 1);
  });
}

template <class T> void bfe(Warp& warp, const Instruction& in, u32 mask) {
  const Raw<T>* a = raw_lanes<T>(warp, in.reg[1]);
  const u32 *at = warp.lanes32(in.reg[2]), *length = warp.lanes32(in.reg[3]);
  map_lanes<T>(warp, in.reg[0], mask, [=](u32 l) {
    T value = from_raw<T>(a[l]);
    u32 pos = at[l] & 0xff, len = length[l] & 0xff;
    if (len == 0) return T(0);
    T field = shr<T>(value, pos);
    if (len >= kBits<T>) return field;
    Unsigned<T> cut = Unsigned<T>(field) & ((Unsigned<T>(1) << len) - 1);
    bool sign = std::is_signed_v<T> && (value >> std::min(pos + len - 1, kBits<T> - 1) & 1);
    return T(sign ? cut | ~((Unsigned<T>(1) << len) - 1) : cut);
  });
}

template <class T> void bfi(Warp& warp, const Instruction& in, u32 mask) {
  const Raw<T>*a = raw_lanes<T>(warp, in.reg[1]), *b = raw_lanes<T>(warp, in.reg[2]);
  const u32 *at = warp.lanes32(in.reg[3]), *length = warp.lanes32(in.reg[4]);
  map_lanes<T>(warp, in.reg[0], mask, [=](u32 l) {
    u32 pos = at[l] & 0xff, len = length[l] & 0xff;
    T ones = len >= kBits<T> ? T(~T(0)) : T((T(1) << len) - 1);
    return T((T(b[l]) & ~shl<T>(ones, pos)) | shl<T>(T(a[l]) & ones, pos));
  });
}

void prmt(Warp& warp, const Instruction& in, u32 mask) {
  const u32 *a = warp.lanes32(in.reg[1]), *b = warp.lanes32(in.reg[2]), *selector = warp.lanes32(in.reg[3]);
  map_lanes<u32>(warp, in.reg[0], mask, [=](u32 l) {
    u64 bytes = a[l] | u64(b[l]) << 32;
    u32 result = 0;
    for (u32 i = 0; i < 4; i++) {
      u32 pick = selector[l] >> (4 * i) & 15, byte = u32(bytes >> (8 * (pick & 7))) & 0xff;
      if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
      result |= byte << (8 * i);
    }
    return result;
  });
}

void lop3(Warp& warp, const Instruction& in, u32 mask) {
  const u32 *a = warp.lanes32(in.reg[1]), *b = warp.lanes32(in.reg[2]), *c = warp.lanes32(in.reg[3]);
  u32 table = u32(in.imm[0]);
  map_lanes<u32>(warp, in.reg[0], mask, [=](u32 l) {
    u32 result = 0;
    for (u32 row = 0; row < 8; row++)
      if (table >> row & 1) result |= (row & 4 ? a[l] : ~a[l]) & (row & 2 ? b[l] : ~b[l]) & (row & 1 ? c[l] : ~c[l]);
    return result;
  });
}

// imm: left, wrap.
void shf(Warp& warp, const Instruction& in, u32 mask) {
  const u32 *low = warp.lanes32(in.reg[1]), *high = warp.lanes32(in.reg[2]), *amount = warp.lanes32(in.reg[3]);
  bool left = in.imm[0], wrap = in.imm[1];
  map_lanes<u32>(warp, in.reg[0], mask, [=](u32 l) {
    u32 n = wrap ? amount[l] & 31 : std::min(amount[l], 32u);
    u64 both = low[l] | u64(high[l]) << 32;
    return u32(left ? n == 32 ? both : both << n >> 32 : both >> n);
  });
}

template <class T> void dp4a(Warp& warp, const Instruction& in, u32 mask) {
  const u32 *a = warp.lanes32(in.reg[1]), *b = warp.lanes32(in.reg[2]), *c = warp.lanes32(in.reg[3]);
  map_lanes<u32>(warp, in.reg[0], mask, [=](u32 l) {
    u32 sum = c[l];
    for (u32 i = 0; i < 32; i += 8) sum += u32(i32(T(a[l] >> i)) * i32(T(b[l] >> i)));
    return sum;
  });
}

template <class T> void select(Warp& warp, const Instruction& in, u32 mask) {
  const Raw<T>*a = raw_lanes<T>(warp, in.reg[1]), *b = raw_lanes<T>(warp, in.reg[2]);
  u32 chosen = warp.predicate(in.reg[3]);
  map_lanes<T>(warp, in.reg[0], mask, [=](u32 l) { return T(chosen >> l & 1 ? a[l] : b[l]); });
}

template <class T> void move(Warp& warp, const Instruction& in, u32 mask) {
  const Raw<T>* a = raw_lanes<T>(warp, in.reg[1]);
  map_lanes<T>(warp, in.reg[0], mask, [=](u32 l) { return T(a[l]); });
}

// mov of a vector to a scalar and back; imm: bits of an element.
void pack(Warp& warp, const Instruction& in, u32 mask) {
  u32 bits = u32(in.imm[0]);
  for_lanes(mask, [&](u32 l) {
    u64 value = 0;
    for (u32 i = 1; i < in.n_reg; i++) value |= (warp.get(in.reg[i], l) & ((1ull << bits) - 1)) << ((i - 1) * bits);
    warp.set(in.reg[0], l, value);
  });
}

void unpack(Warp& warp, const Instruction& in, u32 mask) {
  u32 bits = u32(in.imm[0]), n = in.n_reg - 1;
  for_lanes(mask, [&](u32 l) {
    u64 value = warp.get(in.reg[n], l);
    for (u32 i = 0; i < n; i++) warp.set(in.reg[i], l, value >> (i * bits) & ((1ull << bits) - 1));
  });
}

template <class T> void add_signless(OpTable& t, const std::string& type) {
  t.add("and." + type, binary<T, T, bit_and<T>>);
  t.add("or." + type, binary<T, T, bit_or<T>>);
  t.add("xor." + type, binary<T, T, bit_xor<T>>);
  t.add("not." + type, unary<T, T, bit_not<T>>);
  t.add("cnot." + type, unary<T, T, cnot<T>>);
  t.add("shl." + type, shift<T, shl<T>>);
  t.add("selp." + type, select<T>);
  t.add("mov." + type, move<T>);
}

template <class T> void add_arithmetic(OpTable& t, const std::string& type) {
  t.add("add." + type, binary<T, T, add<T>>);
  t.add("sub." + type, binary<T, T, sub<T>>);
  t.add("mul.lo." + type, binary<T, T, mul_lo<T>>);
  t.add("mul.hi." + type, binary<T, T, mul_hi<T>>);
  t.add("mad.lo." + type, ternary<T, T, mad_lo<T>>);
  t.add("mad.hi." + type, ternary<T, T, mad_hi<T>>);
  t.add("div." + type, binary<T, T, divide<T>>);
  t.add("rem." + type, binary<T, T, remainder<T>>);
  t.add("min." + type, binary<T, T, minimum<T>>);
  t.add("max." + type, binary<T, T, maximum<T>>);
  t.add("shr." + type, shift<T, shr<T>>);
  t.add("sad." + type, ternary<T, T, sad<T>>);
  if constexpr (std::is_signed_v<T>) {
    t.add("neg." + type, unary<T, T, negate<T>>);
    t.add("abs." + type, unary<T, T, absolute<T>>);
  }
}

template <class T> void add_wide(OpTable& t, const std::string& type) {
  t.add("mul.wide." + type, binary<Wider<T>, T, mul_wide<T>>);
  t.add("mad.wide." + type, ternary<Wider<T>, T, mad_wide<T>>);
}

template <class T> void add_bits(OpTable& t, const std::string& type) {
  t.add("popc." + type, unary<u32, T, popc<T>>);
  t.add("clz." + type, unary<u32, T, clz<T>>);
  t.add("brev." + type, unary<T, T, brev<T>>);
  t.add("bfi." + type, bfi<T>);
}

template <class T> void add_fields(OpTable& t, const std::string& type) {
  t.add("bfe." + type, bfe<T>);
  t.add("bfind." + type, unary<u32, T, bfind<T>>);
  t.add("bfind.shiftamt." + type, unary<u32, T, bfind_shift<T>>);
}

template <class T> void add_pairs(OpTable& t, const std::string& type) {
  t.add("add." + type, binary<u32, u32, pairs<T, add<T>>>);
  t.add("min." + type, binary<u32, u32, pairs<T, minimum<T>>>);
  t.add("max." + type, binary<u32, u32, pairs<T, maximum<T>>>);
}

}  // namespace

void add_integer_ops(OpTable& t) {
  add_signless<u16>(t, "b16");
  add_signless<u32>(t, "b32");
  add_signless<u64>(t, "b64");
  add_arithmetic<u16>(t, "u16");
  add_arithmetic<i16>(t, "s16");
  add_arithmetic<u32>(t, "u32");
  add_arithmetic<i32>(t, "s32");
  add_arithmetic<u64>(t, "u64");
  add_arithmetic<i64>(t, "s64");
  add_wide<u16>(t, "u16");
  add_wide<i16>(t, "s16");
  add_wide<u32>(t, "u32");
  add_wide<i32>(t, "s32");
  add_bits<u32>(t, "b32");
  add_bits<u64>(t, "b64");
  add_fields<u32>(t, "u32");
  add_fields<i32>(t, "s32");
  add_fields<u64>(t, "u64");
  add_fields<i64>(t, "s64");
  add_pairs<u16>(t, "u16x2");
  add_pairs<i16>(t, "s16x2");
  t.add("carry.b32", add_carry<u32>);
  t.add("carry.b64", add_carry<u64>);
  t.add("prmt", prmt);
  t.add("lop3", lop3);
  t.add("shf", shf);
  t.add("dp4a.u32", dp4a<u8>);
  t.add("dp4a.s32", dp4a<int8_t>);
  t.add("pack", pack);
  t.add("unpack", unpack);
}

}  // namespace emu
