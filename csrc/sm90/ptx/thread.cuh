// Threads, warps and clusters: one line of intent for each instruction.
#pragma once
#include <cstdint>

namespace fastlora::sm90 {

constexpr uint32_t kFullMask = 0xffffffffu;

__device__ __forceinline__ uint32_t lane_id() { return threadIdx.x & 31; }

// The warp's index, known to the compiler to be the same in all lanes.
__device__ __forceinline__ uint32_t warp_id() { return __shfl_sync(kFullMask, threadIdx.x >> 5, 0); }

// True in one lane of a converged warp. Behind a comparison of threadIdx instead, the assembler wraps each copy in a
// loop over the active lanes; here it can prove that there is one.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected;
}

// This CTA's index in its cluster.
__device__ __forceinline__ uint32_t cta_in_cluster() {
  uint32_t cta;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(cta));
  return cta;
}

// A barrier of all threads of the cluster, converged or not. Writes before it are visible after it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The same address in the shared memory of the cluster's CTA number `cta`.
__device__ __forceinline__ uint32_t peer_address(uint32_t shared, uint32_t cta) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared), "r"(cta));
  return address;
}

// Hardware barrier `id` (0 to 15) among `threads` threads.
__device__ __forceinline__ void named_barrier(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Returns registers to the multiprocessor's pool; consumer warpgroups allocate them with grow_registers.
template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fastlora::sm90
