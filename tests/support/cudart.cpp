// A CUDA runtime for machines without a GPU: what csrc/host calls of it, and the driver function that it looks up.
// A launch goes to a hook. Errors are those of CUDA: a context is current in a thread only after a call that makes one.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "../../csrc/host/variant.h"
#include "emulated_map.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

using Hook = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared_bytes, void* stream,
                     void** arguments);

constexpr int kSharedByDefault = 48 << 10, kSharedAtMost = 227 << 10;

std::mutex mutex;
std::string calls;
Hook hook;
int device_count;
cudaError_t count_error;
std::map<std::pair<const void*, int>, int> allowed_shared;
thread_local int current_device;
thread_local bool has_context;

template <class... T>
void note(const char* format, T... values) {
  char line[256];
  snprintf(line, sizeof line, format, values...);
  const std::lock_guard<std::mutex> lock(mutex);
  calls.append(line).append("\n");
}

const char* kernel_name(const void* kernel) {
  for (const fastlora::Variant& v : fastlora::variants()) {
    if (v.kernel == kernel) return v.name;
  }
  return nullptr;
}

CUresult CUDAAPI encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                        const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* step,
                        CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                        CUtensorMapFloatOOBfill fill) {
  note("encode %p", address);
  if (!has_context) return CUDA_ERROR_INVALID_CONTEXT;
  return emulated::encode_map(map, type, rank, address, size, stride, box, step, interleave, swizzle, fill);
}

}  // namespace

// What a test says and asks. The devices that there are; an error stands in their place.
API void fake_devices(int count, int error) {
  device_count = count;
  count_error = cudaError_t(error);
}
API void fake_hook(Hook launched) { hook = launched; }
// The calls so far, a line for each; then starts over.
API const char* fake_calls() {
  static std::string taken;
  const std::lock_guard<std::mutex> lock(mutex);
  taken = std::exchange(calls, "");
  return taken.c_str();
}

API cudaError_t cudaGetDeviceCount(int* count) {
  note("cudaGetDeviceCount");
  *count = count_error ? 0 : device_count;
  return count_error ? count_error : device_count ? cudaSuccess : cudaErrorNoDevice;
}
API cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) {
  note("cudaSetDevice %d", device);
  if (device < 0 || device >= device_count) return cudaErrorInvalidDevice;
  current_device = device;
  has_context = true;
  return cudaSuccess;
}
API cudaError_t cudaGetLastError() { return cudaSuccess; }
API const char* cudaGetErrorName(cudaError_t error) {
  static thread_local char name[32];
  snprintf(name, sizeof name, "error %d", int(error));
  return name;
}
API const char* cudaGetErrorString(cudaError_t) { return "of the emulated runtime"; }

API cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (!kernel_name(kernel)) return cudaErrorInvalidDeviceFunction;
  note("cudaFuncSetAttribute %s %d", kernel_name(kernel), value);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > kSharedAtMost) return cudaErrorInvalidValue;
  has_context = true;
  allowed_shared[{kernel, current_device}] = value;
  return cudaSuccess;
}

static cudaError_t entry_point(const char* name, void** function, cudaDriverEntryPointQueryResult* result) {
  const bool known = !strcmp(name, "cuTensorMapEncodeTiled");
  *function = known ? reinterpret_cast<void*>(encode) : nullptr;
  *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
#if CUDART_VERSION >= 12050
API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                 cudaDriverEntryPointQueryResult* result) {
  return entry_point(name, function, result);
}
#else
API cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                        cudaDriverEntryPointQueryResult* result) {
  return entry_point(name, function, result);
}
#endif

API cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                                 cudaStream_t stream) {
  const char* name = kernel_name(kernel);
  if (!name) return cudaErrorInvalidDeviceFunction;
  note("cudaLaunchKernel %s on %d", name, current_device);
  has_context = true;
  const auto allowed = allowed_shared.find({kernel, current_device});
  if (shared_bytes > size_t(allowed == allowed_shared.end() ? kSharedByDefault : allowed->second)) {
    return cudaErrorInvalidValue;
  }
  const unsigned in_grid[] = {grid.x, grid.y, grid.z}, in_block[] = {block.x, block.y, block.z};
  return hook && hook(name, in_grid, in_block, shared_bytes, stream, arguments) ? cudaErrorLaunchFailure : cudaSuccess;
}
