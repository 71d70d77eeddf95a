// Descriptors of matrices of which a kernel copies boxes.
#pragma once
#include <cuda.h>

#include <cstddef>
#include <cstdint>

namespace fastlora {

enum class MapElement { kBfloat16, kFloat16, kByte };

// A row-major matrix of 16-bit elements or of bytes, or a stack of such, and the boxes that are cut from it: of one
// matrix each.
struct MapSpec {
  size_t offset;  // of the map in Params
  uintptr_t address;
  uint64_t columns, rows, stride_bytes;
  uint32_t box_columns, box_rows;
  uint32_t swizzle;  // bytes of a span, or 0
  MapElement element;
  uint64_t matrices = 0, matrix_stride_bytes = 0;  // of a stack, which has a dimension more; 0: one matrix

  bool operator==(const MapSpec& other) const;
};

// The driver's form of it. Throws std::runtime_error if the driver refuses.
CUtensorMap cached_map(const MapSpec& spec);

}  // namespace fastlora
