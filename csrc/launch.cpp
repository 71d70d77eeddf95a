// Tensor maps and the launch itself. Loads on a machine without a driver: the driver's one function that is needed is
// looked up when first used.
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <stdexcept>
#include <unordered_map>

#include "lora.h"

namespace fastlora {

namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("fastlora: " + what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Makes a device current for as long as this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = device != previous_;
    if (changed_) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

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
    check(error, "looking up cuTensorMapEncodeTiled");
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
         std::to_string(s.box_columns);
}

CUtensorMap encode(const MapSpec& s) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {s.columns, s.rows}, strides[1] = {s.stride_bytes};
  const cuuint32_t box[2] = {s.box_columns, s.box_rows}, steps[2] = {1, 1};
  const CUtensorMapSwizzle swizzle = s.swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : s.swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : s.swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                       : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult result =
      encode_function()(&map, s.half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                        reinterpret_cast<void*>(s.address), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                        swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("fastlora: cuTensorMapEncodeTiled failed with error " + std::to_string(result) +
                             " for a matrix " + describe(s));
  }
  return map;
}

struct HashSpec {
  size_t operator()(const MapSpec& s) const {
    uint64_t hash = s.address;
    for (uint64_t part : {s.columns, s.rows, s.stride_bytes, uint64_t(s.box_columns) << 32 | s.box_rows,
                          uint64_t(s.swizzle) << 1 | s.half}) {
      hash = (hash ^ part) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 29;
    }
    return size_t(hash);
  }
};

// A map says where a matrix lies and how boxes are cut from it, all of which is its key: an entry cannot go stale.
CUtensorMap cached_map(const MapSpec& spec) {
  constexpr size_t kMost = 4096;
  static std::unordered_map<MapSpec, CUtensorMap, HashSpec> cache;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = cache.find(spec);
  if (found != cache.end()) return found->second;
  if (cache.size() >= kMost) cache.clear();
  return cache.emplace(spec, encode(spec)).first->second;
}

// Dynamic shared memory beyond 48 KiB must be allowed once for each kernel and device.
void allow_shared_memory(const Variant& variant, int device) {
  static std::set<std::pair<const void*, int>> allowed;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({variant.kernel, device})) return;
  check(cudaFuncSetAttribute(variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, variant.shared_bytes),
        std::string("asking for ") + std::to_string(variant.shared_bytes) + " bytes of shared memory for " +
            variant.name);
  allowed.insert({variant.kernel, device});
}

}  // namespace

int device_count() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
    cudaGetLastError();
    return 0;
  }
  check(error, "cudaGetDeviceCount");
  return count;
}

void Plan::launch(const Operands& operands, int device, uintptr_t stream) const {
  static const bool has_device = device_count() > 0;
  if (!has_device) {
    throw std::runtime_error("fastlora: no CUDA device or no driver: cannot launch " + describe());
  }
  const DeviceGuard guard(device);
  std::vector<MapSpec> maps;
  Params parameters = this->parameters(operands, maps);
  for (const MapSpec& spec : maps) {
    *reinterpret_cast<CUtensorMap*>(reinterpret_cast<char*>(&parameters) + spec.offset) = cached_map(spec);
  }
  allow_shared_memory(*variant_, device);
  void* arguments[] = {&parameters};
  check(cudaLaunchKernel(variant_->kernel, dim3(ctas_), dim3(384), arguments, variant_->shared_bytes,
                         reinterpret_cast<cudaStream_t>(stream)),
        "launching " + describe());
}

}  // namespace fastlora
