// Address spaces. Every buffer has a device address range of its own; shared memory is addressed inside its CTA.
#pragma once
#include <vector>

#include "shadow.h"

namespace emu {

enum class Space : i64 { kGeneric, kGlobal, kShared, kLocal, kParam };

constexpr u32 kBufferShift = 36;           // buffer i starts at (i + 1) << kBufferShift, plus its own misalignment
constexpr u64 kSharedWindow = 1ull << 62;  // generic addresses of the other spaces
constexpr u64 kLocalWindow = 1ull << 61;
constexpr u64 kParamWindow = 1ull << 60;
constexpr u32 kSharedBase = 1024;      // as on sm_90: address 0 is nobody's
constexpr u32 kClusterRankShift = 24;  // shared::cluster address: (rank + 1) << 24 | offset

constexpr u32 kSharedRegion = 0xffff;  // the id of every CTA's shared memory

struct Region {
  u32 id = 0;  // number that messages use
  char* host = nullptr;
  u64 bytes = 0, address = 0;
  bool writable = true, initialised = true;
  u64 row_bytes = 0, row_stride = 0;  // rows with gaps between them; 0: none
  Shadow shadow;
  u64 bytes_read = 0, bytes_written = 0;
  TouchMap read_map, write_map;

  void check(u64 offset, u64 n, bool write) const {
    const char* what = write ? "write" : "read";
    const u64 own = id == kSharedRegion ? bytes - kSharedBase : bytes;
    if (offset + n > bytes || offset + n < n)
      fault(ErrorKind::kBounds, "%s of %llu bytes at <at:%u:%lld>, which has %llu bytes", what, n, id, offset, own);
    if (row_stride && offset % row_stride + n > row_bytes)
      fault(ErrorKind::kBounds, "%s of %llu bytes at <at:%u:%lld> runs past the end of a row of %llu bytes", what, n, id,
            offset, row_bytes);
    if (write && !writable) fault(ErrorKind::kBounds, "write to read-only <at:%u:%lld>", id, offset);
  }
};

// Where an address leads.
struct Place {
  Region* region;
  u64 offset;
  FenceSpace space;
  char* host() const { return region->host + offset; }
  // Names the location among the flags of the grid.
  u64 key() const {
    return space == kFenceGlobal ? region->address + offset : kSharedWindow | reinterpret_cast<uintptr_t>(host());
  }
};

// The 16-byte chunks of a swizzled tile: TMA and wgmma permute them by address bits.
inline u32 swizzled(u32 address, u32 swizzle) {
  return swizzle == 128  ? address ^ (address >> 3 & 0x70)
         : swizzle == 64 ? address ^ (address >> 3 & 0x30)
         : swizzle == 32 ? address ^ (address >> 3 & 0x10)
                         : address;
}

}  // namespace emu
