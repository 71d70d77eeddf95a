// mbarriers in shared memory.
#pragma once
#include <cstdint>

#include "spin.cuh"

namespace fastlora::sm90 {

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the asynchronous copies that will signal them.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same on a barrier of any CTA of the cluster. It orders this thread's reads only; a release at the cluster's scope
// would wait for all outstanding memory accesses of the thread.
__device__ __forceinline__ void mbarrier_arrive_peer(uint32_t peer_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(peer_barrier) : "memory");
}

// Arrives and announces bytes that asynchronous copies will deliver before the phase completes.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// The same on a barrier of any CTA of the cluster.
__device__ __forceinline__ void mbarrier_arrive_expect_peer(uint32_t peer_barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(peer_barrier), "r"(bytes) : "memory");
}

#ifdef FASTLORA_SPIN_LIMIT

// Waits for a time that the hardware chooses. True once the phase of this parity has completed.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

#endif

// Returns once the phase of this parity has completed.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity,
                                              [[maybe_unused]] WaitPlace place = {}) {
#ifdef FASTLORA_SPIN_LIMIT
  spin_until([=] { return mbarrier_try_wait(barrier, parity); }, "mbarrier at shared address", barrier, parity, place);
#else
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}

}  // namespace fastlora::sm90
