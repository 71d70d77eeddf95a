// The launch of a plan.
#include "launch.h"

#include <atomic>
#include <mutex>
#include <set>

#include "cuda_error.h"
#include "plan.h"

namespace fastlora {

namespace {

// Makes a device current for as long as this lives, and its context with it: a thread that has used no device yet, as
// autograd's may be, has none, and the driver encodes no map without one. cudaGetDevice returns the same with one and
// without.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), [] { return "cudaGetDevice"; });
    check(cudaSetDevice(device), [=] { return "cudaSetDevice(" + std::to_string(device) + ")"; });
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int device_, previous_ = 0;
};

// Dynamic shared memory beyond 48 KiB must be allowed once for each kernel and device.
void allow_shared_memory(const Variant& variant, int device) {
  static std::set<std::pair<const void*, int>> allowed;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({variant.kernel, device})) return;
  check(cudaFuncSetAttribute(variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, variant.shared_bytes), [&] {
    return "allowing " + std::to_string(variant.shared_bytes) + " bytes of shared memory for " + variant.name;
  });
  allowed.insert({variant.kernel, device});
}

}  // namespace

Devices devices() noexcept {
  Devices found;
  const cudaError_t error = cudaGetDeviceCount(&found.count);
  if (error == cudaSuccess) return found;
  cudaGetLastError();  // else the next call would report it
  return {0, describe(error)};
}

void Plan::launch(const Operands& operands, int device, uintptr_t stream) const {
  static std::atomic<bool> has_device{false};
  if (!has_device) {
    const Devices found = devices();
    if (!found.count) {
      throw std::runtime_error("fastlora: no CUDA device (" + found.error + "): cannot launch " + describe());
    }
    has_device = true;
  }
  const DeviceGuard guard(device);
  std::vector<MapSpec> maps;
  maps.reserve(layers_.empty() ? 16 : 64);
  with_parameters(operands, maps, [&](auto parameters) {
    for (const MapSpec& spec : maps) {
      *reinterpret_cast<CUtensorMap*>(reinterpret_cast<char*>(&parameters) + spec.offset) = cached_map(spec);
    }
    allow_shared_memory(*variant_, device);
    void* arguments[] = {&parameters};
    check(cudaLaunchKernel(variant_->kernel, dim3(ctas_), dim3(variant_->threads), arguments, variant_->shared_bytes,
                           reinterpret_cast<cudaStream_t>(stream)),
          [&] { return "launching " + describe(); });
  });
}

}  // namespace fastlora
