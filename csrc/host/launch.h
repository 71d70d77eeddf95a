// The devices that a launch can go to.
#pragma once
#include <string>

namespace fastlora {

// CUDA devices, and where there are none the runtime's reason; never throws. Nothing is remembered: a driver may come.
struct Devices {
  int count = 0;
  std::string error;
};
Devices devices() noexcept;

}  // namespace fastlora
