// Errors of the CUDA runtime as exceptions.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastlora {

inline std::string describe(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

// `what` returns the text: to make it takes longer than most calls that succeed.
template <class What>
void check(cudaError_t error, What what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("fastlora: " + std::string(what()) + ": " + describe(error));
}

}  // namespace fastlora
