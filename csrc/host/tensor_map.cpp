// The driver is not linked: its one function that is needed is looked up when first used, so that the library loads on
// a machine without a driver.
#include "tensor_map.h"

#include <cudaTypedefs.h>

#include <list>
#include <mutex>
#include <unordered_map>

#include "cuda_error.h"

namespace fastlora {

namespace {

PFN_cuTensorMapEncodeTiled_v12000 encode_function() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    check(error, [] { return "looking up cuTensorMapEncodeTiled"; });
    if (result != cudaDriverEntryPointSuccess || !found) {
      throw std::runtime_error("fastlora: the driver has no cuTensorMapEncodeTiled; it must support CUDA 12.0");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return function;
}

std::string describe(const MapSpec& s) {
  return std::to_string(s.rows) + " x " + std::to_string(s.columns) + " with rows of " +
         std::to_string(s.stride_bytes) + " bytes, box " + std::to_string(s.box_rows) + " x " +
         std::to_string(s.box_columns) +
         (s.matrices
              ? ", " + std::to_string(s.matrices) + " of them " + std::to_string(s.matrix_stride_bytes) + " bytes apart"
              : "");
}

CUtensorMapSwizzle swizzle_of(uint32_t span_bytes) {
  switch (span_bytes) {
    case 128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    case 64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case 32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

CUtensorMapDataType type_of(MapElement element) {
  switch (element) {
    case MapElement::kBfloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case MapElement::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

CUtensorMap encode(const MapSpec& s) {
  CUtensorMap map;
  const cuuint64_t sizes[3] = {s.columns, s.rows, s.matrices}, strides[2] = {s.stride_bytes, s.matrix_stride_bytes};
  const cuuint32_t box[3] = {s.box_columns, s.box_rows, 1}, steps[3] = {1, 1, 1};
  const CUresult result =
      encode_function()(&map, type_of(s.element), s.matrices ? 3 : 2, reinterpret_cast<void*>(s.address), sizes,
                        strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(s.swizzle),
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("fastlora: cuTensorMapEncodeTiled failed with error " + std::to_string(result) +
                             " for a matrix " + describe(s));
  }
  return map;
}

struct HashSpec {
  size_t operator()(const MapSpec& s) const {
    uint64_t hash = s.address;
    for (uint64_t word : {s.columns, s.rows, s.stride_bytes, uint64_t(s.box_columns) << 32 | s.box_rows,
                          uint64_t(s.swizzle) << 2 | uint64_t(s.element), s.matrices, s.matrix_stride_bytes}) {
      hash = (hash ^ word) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 29;
    }
    return size_t(hash);
  }
};

}  // namespace

bool MapSpec::operator==(const MapSpec& o) const {
  return address == o.address && columns == o.columns && rows == o.rows && stride_bytes == o.stride_bytes &&
         box_columns == o.box_columns && box_rows == o.box_rows && swizzle == o.swizzle && element == o.element &&
         matrices == o.matrices && matrix_stride_bytes == o.matrix_stride_bytes;
}

// A map says where a matrix lies and how boxes are cut from it, all of which is its key: an entry cannot go stale.
// Those of weights are used in every step of a model and stay; those of activations, which move, make room by age.
CUtensorMap cached_map(const MapSpec& spec) {
  using Entry = std::pair<MapSpec, CUtensorMap>;
  constexpr size_t kMaxEntries = 4096;
  static std::list<Entry> by_use;  // the last used first
  static std::unordered_map<MapSpec, std::list<Entry>::iterator, HashSpec> cache;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = cache.find(spec);
  if (found != cache.end()) {
    by_use.splice(by_use.begin(), by_use, found->second);
    return found->second->second;
  }
  by_use.emplace_front(spec, encode(spec));
  cache.emplace(spec, by_use.begin());
  if (cache.size() > kMaxEntries) {
    cache.erase(by_use.back().first);
    by_use.pop_back();
  }
  return by_use.front().second;
}

}  // namespace fastlora
