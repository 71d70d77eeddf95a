// Types, faults and bit casts used by every part of the engine.
#pragma once
#include <bit>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

namespace emu {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = unsigned long long;
using i16 = int16_t;
using i32 = int32_t;
using i64 = long long;

constexpr u32 kWarpSize = 32;
constexpr u32 kAllLanes = ~0u;

// The order is part of the C interface: errors.py lists the same kinds.
enum class ErrorKind : int {
  kNone,
  kLaunch,
  kRace,
  kProxy,
  kReadOnly,
  kBounds,
  kAlignment,
  kUninitialised,
  kBarrier,
  kDivergence,
  kWgmma,
  kAsyncCopy,
  kTrap,
  kDeadlock,
  kLivelock,
  kTimeout
};

// Thrown by whatever finds a defect; the scheduler adds the thread and the instruction.
// In the text, "<pc:12>" stands for the source of instruction 12 and "<at:3:64>" for byte 64 of buffer 3: Python spells them
// out.
struct Fault {
  ErrorKind kind;
  std::string text;
};

[[noreturn, gnu::format(printf, 2, 3)]] inline void fault(ErrorKind kind, const char* format, ...) {
  char text[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw Fault{kind, text};
}

inline u32 lowest_lane(u32 mask) { return u32(std::countr_zero(mask)); }
inline u64 round_up(u64 value, u64 multiple) { return (value + multiple - 1) / multiple * multiple; }

// Calls f(lane) for every lane of the mask, lowest first.
template <class F> inline void for_lanes(u32 mask, F f) {
  for (; mask; mask &= mask - 1) f(lowest_lane(mask));
}

}  // namespace emu
