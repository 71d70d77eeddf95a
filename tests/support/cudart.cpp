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

#define API extern "C" __attribute__((visibility("default")))

namespace {

using Hook = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared_bytes, void* stream,
                     void** arguments);

constexpr int kSharedByDefault = 48 << 10, kSharedAtMost = 227 << 10;
// A map is laid out as the emulator's are, in tests/emulator/tensor_map.py; the last word is the driver's element type.
constexpr unsigned long long kMapMagic = 0x70616D726F736E74;

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

// The conditions of cuda.h for a matrix of 16-bit elements, and the emulator's form of a map.
CUresult CUDAAPI encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                        const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* step,
                        CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                        CUtensorMapFloatOOBfill fill) {
  note("encode %p %llu x %llu", address, (unsigned long long)size[1], (unsigned long long)size[0]);
  if (!has_context) return CUDA_ERROR_INVALID_CONTEXT;
  constexpr unsigned kElementBytes = 2, kSpans[] = {0, 32, 64, 128};
  const bool halves = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16 || type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const unsigned span = swizzle > CU_TENSOR_MAP_SWIZZLE_128B ? 0 : kSpans[swizzle], row = box[0] * kElementBytes;
  bool fits = halves && rank == 2 && swizzle <= CU_TENSOR_MAP_SWIZZLE_128B && !interleave && !fill &&
              uintptr_t(address) % 16 == 0 && uintptr_t(map) % 64 == 0 && stride[0] % 16 == 0 &&
              stride[0] < 1ull << 40 && stride[0] >= size[0] * kElementBytes && row % 16 == 0 && (!span || row <= span);
  for (int i = 0; i < 2; ++i) {
    fits = fits && size[i] >= 1 && size[i] <= 1ull << 32 && box[i] >= 1 && box[i] <= 256 && step[i] == 1;
  }
  if (!fits) return CUDA_ERROR_INVALID_VALUE;
  struct {
    unsigned long long magic, address;
    unsigned rank, element_bytes;
    unsigned long long size[5], stride[4];
    unsigned box[5], swizzle, reduction, element_type;
  } described = {
      kMapMagic, uintptr_t(address), 2, kElementBytes, {size[0], size[1]}, {stride[0]}, {box[0], box[1]}, span,
      0,         unsigned(type)};
  static_assert(sizeof described == sizeof *map);
  memcpy(map, &described, sizeof described);
  return CUDA_SUCCESS;
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
