// The devices that a launch can go to.
#pragma once

namespace fastlora {

// CUDA devices; 0 without a driver.
int device_count();

}  // namespace fastlora
