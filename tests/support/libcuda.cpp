// A CUDA driver for machines without a GPU: what the conformance runner and Triton's driver and launchers call of it. A
// launch goes to a hook. Errors are those of CUDA: without a context that is current in the thread nothing works.
#include <cstring>
#include <string>

#include "emulated_map.h"

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kSharedByDefault = 48 << 10, kSharedAtMost = 227 << 10;

struct Module {
  std::string ptx;  // nothing where it is machine code
};
struct Function {
  const Module* module;
  std::string name;
  int allowed_shared = kSharedByDefault;
};

// function: the handle that cuModuleGetFunction gave. grid, block and cluster are three numbers each; a cluster of
// zeros: the kernel's own.
using Hook = int (*)(void* function, const char* ptx, const char* kernel, const unsigned* grid, const unsigned* block,
                     const unsigned* cluster, unsigned shared_bytes, void* stream, void** arguments);
Hook hook;
int primary;  // its address is the one context
thread_local CUcontext current;

CUcontext primary_context() { return reinterpret_cast<CUcontext>(&primary); }

}  // namespace

API void fake_hook(Hook launched) { hook = launched; }

API CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  if (device) return CUDA_ERROR_INVALID_DEVICE;
  *context = primary_context();
  return CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext context) {
  if (context && context != primary_context()) return CUDA_ERROR_INVALID_CONTEXT;
  current = context;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = current;
  return CUDA_SUCCESS;
}
API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}
// Those of an H200 that Triton reads.
API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = kSharedAtMost;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = kSharedAtMost + 1024;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      return CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH:
      *value = 0;
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}
// Every pointer is of the device: a launch finds out what it leads to.
API CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
  memcpy(data, &pointer, sizeof pointer);
  return CUDA_SUCCESS;
}
// Of Triton's driver, never called here.
API CUresult cuCtxGetLimit(size_t*, CUlimit) { return CUDA_ERROR_NOT_SUPPORTED; }
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_ERROR_NOT_SUPPORTED; }
API CUresult cuOccupancyMaxActiveClusters(int*, CUfunction, const CUlaunchConfig*) { return CUDA_ERROR_NOT_SUPPORTED; }

API CUresult cuGetErrorString(CUresult error, const char** text) {
  static thread_local std::string last;
  last = "error " + std::to_string(int(error)) + " of the emulated driver";
  *text = last.c_str();
  return CUDA_SUCCESS;
}

API CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  const char* text = static_cast<const char*>(image);
  const bool machine_code = !strncmp(text, "\177ELF", 4);
  if (!machine_code && strncmp(text, ".version", 8)) return CUDA_ERROR_INVALID_IMAGE;
  *module = reinterpret_cast<CUmodule>(new Module{machine_code ? "" : text});
  return CUDA_SUCCESS;
}
API CUresult cuModuleUnload(CUmodule module) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  delete reinterpret_cast<Module*>(module);
  return CUDA_SUCCESS;
}
// Functions live as long as the process: a test loads a few hundred.
API CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  const Module* loaded = reinterpret_cast<const Module*>(module);
  const bool known = loaded->ptx.empty() || loaded->ptx.find(std::string(".entry ") + name + "(") != std::string::npos;
  if (!known) return CUDA_ERROR_NOT_FOUND;
  *function = reinterpret_cast<CUfunction>(new Function{loaded, name});
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0 || value > kSharedAtMost) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  reinterpret_cast<Function*>(function)->allowed_shared = value;
  return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) {
  return current ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

API CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                    const cuuint64_t* size, const cuuint64_t* stride, const cuuint32_t* box,
                                    const cuuint32_t* step, CUtensorMapInterleave interleave,
                                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  return emulated::encode_map(map, type, rank, address, size, stride, box, step, interleave, swizzle, fill);
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  if (!current) return CUDA_ERROR_INVALID_CONTEXT;
  const Function* launched = reinterpret_cast<const Function*>(function);
  if (extra || config->sharedMemBytes > unsigned(launched->allowed_shared)) return CUDA_ERROR_INVALID_VALUE;
  unsigned cluster[3] = {};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id != CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) return CUDA_ERROR_NOT_SUPPORTED;
    cluster[0] = attribute.value.clusterDim.x;
    cluster[1] = attribute.value.clusterDim.y;
    cluster[2] = attribute.value.clusterDim.z;
  }
  const unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
  const unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
  const bool failed = hook && hook(function, launched->module->ptx.c_str(), launched->name.c_str(), grid, block,
                                   cluster, config->sharedMemBytes, config->hStream, arguments);
  return failed ? CUDA_ERROR_LAUNCH_FAILED : CUDA_SUCCESS;
}
