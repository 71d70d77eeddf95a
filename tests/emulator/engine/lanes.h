// Helpers for handlers that compute lane by lane.
#pragma once
#include <type_traits>

#include "engine.h"

namespace emu {

// Register lanes as values of T: 64-bit types live in 64-bit registers, all others in the low bits of 32-bit ones.
template <class T> using Raw = std::conditional_t<sizeof(T) == 8, u64, u32>;

template <class T> inline Raw<T>* raw_lanes(Warp& warp, Operand o) {
  if constexpr (sizeof(T) == 8)
    return warp.lanes64(o);
  else
    return warp.lanes32(o);
}

template <class T> inline T from_raw(Raw<T> raw) {
  if constexpr (std::is_floating_point_v<T>)
    return std::bit_cast<T>(raw);
  else
    return T(raw);
}

template <class T> inline Raw<T> to_raw(T value) {
  if constexpr (std::is_floating_point_v<T>)
    return std::bit_cast<Raw<T>>(value);
  else
    return Raw<T>(value);  // a narrow signed value fills its register
}

// d[l] = f(l) in the lanes of the mask. All lanes are computed, so that the loop is a vector loop; f must not fault.
template <class T, class F> inline void map_lanes(Warp& warp, Operand dst, u32 mask, F f) {
  Raw<T>* d = raw_lanes<T>(warp, dst);
  if (mask == kAllLanes) {
    Raw<T> result[kWarpSize];
    for (u32 l = 0; l < kWarpSize; l++) result[l] = to_raw<T>(f(l));
    memcpy(d, result, sizeof result);
  } else {
    for_lanes(mask, [&](u32 l) { d[l] = to_raw<T>(f(l)); });
  }
}

template <class D, class S, auto F> void unary(Warp& warp, const Instruction& in, u32 mask) {
  const Raw<S>* a = raw_lanes<S>(warp, in.reg[1]);
  map_lanes<D>(warp, in.reg[0], mask, [=](u32 l) { return F(from_raw<S>(a[l])); });
}

template <class D, class S, auto F> void binary(Warp& warp, const Instruction& in, u32 mask) {
  const Raw<S>*a = raw_lanes<S>(warp, in.reg[1]), *b = raw_lanes<S>(warp, in.reg[2]);
  map_lanes<D>(warp, in.reg[0], mask, [=](u32 l) { return F(from_raw<S>(a[l]), from_raw<S>(b[l])); });
}

// f(a, b, c) where c has the type of the result (mad.wide adds a wider one).
template <class D, class S, auto F> void ternary(Warp& warp, const Instruction& in, u32 mask) {
  const Raw<S>*a = raw_lanes<S>(warp, in.reg[1]), *b = raw_lanes<S>(warp, in.reg[2]);
  const Raw<D>* c = raw_lanes<D>(warp, in.reg[3]);
  map_lanes<D>(warp, in.reg[0], mask, [=](u32 l) { return F(from_raw<S>(a[l]), from_raw<S>(b[l]), from_raw<D>(c[l])); });
}

// Shifts: the amount is always 32 bits.
template <class T, auto F> void shift(Warp& warp, const Instruction& in, u32 mask) {
  const Raw<T>* a = raw_lanes<T>(warp, in.reg[1]);
  const u32* b = warp.lanes32(in.reg[2]);
  map_lanes<T>(warp, in.reg[0], mask, [=](u32 l) { return F(from_raw<T>(a[l]), b[l]); });
}

inline void write_predicate(Warp& warp, Operand o, u32 mask, u32 bits) {
  u32& predicate = warp.predicate(o);
  predicate = (predicate & ~mask) | (bits & mask);
}

}  // namespace emu
