// cuTensorMapEncodeTiled for the emulator: the conditions that cuda.h states, and a map in the form of
// tests/emulator/tensor_map.py, whose last word is here the driver's element type.
#pragma once
#include <cuda.h>

#include <cstdint>
#include <cstring>

namespace emulated {

inline CUresult encode_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                           const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                           const cuuint32_t* step, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                           CUtensorMapFloatOOBfill fill) {
  constexpr unsigned kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4}, kSpans[] = {0, 32, 64, 128}, kMaxRank = 5;
  if (type > 12 || swizzle > CU_TENSOR_MAP_SWIZZLE_128B || interleave || fill || rank < 1 || rank > kMaxRank) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  struct {
    unsigned long long magic, address;
    unsigned rank, element_bytes;
    unsigned long long size[kMaxRank], stride[kMaxRank - 1];
    unsigned box[kMaxRank], swizzle, reduction, element_type;
  } described{};
  static_assert(sizeof described == sizeof *map);
  const unsigned bytes = kBytes[type], span = kSpans[swizzle];
  bool fits = uintptr_t(address) % 16 == 0 && uintptr_t(map) % 64 == 0 && box[0] * bytes % 16 == 0 &&
              (!span || box[0] * bytes <= span);
  for (unsigned i = 0; i < rank; ++i) {
    fits = fits && size[i] >= 1 && size[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256 && step[i] == 1;
    described.size[i] = size[i];
    described.box[i] = box[i];
  }
  for (unsigned i = 0; i + 1 < rank; ++i) {
    fits = fits && stride[i] % 16 == 0 && stride[i] < 1ull << 40 && stride[i] >= (i ? stride[i - 1] : size[0] * bytes);
    described.stride[i] = stride[i];
  }
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  described.magic = 0x70616D726F736E74;
  described.address = uintptr_t(address);
  described.rank = rank;
  described.element_bytes = bytes;
  described.swizzle = span;
  described.element_type = type;
  memcpy(map, &described, sizeof described);
  return CUDA_SUCCESS;
}

}  // namespace emulated
