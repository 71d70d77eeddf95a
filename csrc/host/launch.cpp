// The launch of a plan.
#include "launch.h"

#include <mutex>
#include <set>

#include "cuda_error.h"
#include "plan.h"

namespace fastlora {

namespace {

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

// Dynamic shared memory beyond 48 KiB must be allowed once for each kernel and device.
void allow_shared_memory(const Variant& variant, int device) {
  static std::set<std::pair<const void*, int>> allowed;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({variant.kernel, device})) return;
  check(cudaFuncSetAttribute(variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, variant.shared_bytes),
        "allowing " + std::to_string(variant.shared_bytes) + " bytes of shared memory for " + variant.name);
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
  check(cudaLaunchKernel(variant_->kernel, dim3(ctas_), dim3(variant_->threads), arguments, variant_->shared_bytes,
                         reinterpret_cast<cudaStream_t>(stream)),
        "launching " + describe());
}

}  // namespace fastlora
