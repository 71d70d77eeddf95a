// The emulator's own contents of a 128-byte TMA descriptor; tensor_map.py packs it.
#pragma once
#include "common.h"

namespace emu {

constexpr u32 kMaxRank = 5;
constexpr u64 kTensorMapMagic = 0x70616d726f736e74;  // "tnsormap"

struct TensorMap {
  u64 magic, address;
  u32 rank, element_bytes;
  u64 size[kMaxRank];        // in elements, innermost first
  u64 stride[kMaxRank - 1];  // in bytes, of all dimensions but the innermost
  u32 box[kMaxRank];
  u32 swizzle;       // bytes; 0: none
  u32 element_type;  // ReductionType
  u32 reserved;
};
static_assert(sizeof(TensorMap) == 128);

}  // namespace emu
