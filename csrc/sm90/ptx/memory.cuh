// Shared and global memory, and flags in the latter.
#pragma once
#include <cstdint>

#include "spin.cuh"

namespace fastlora::sm90 {

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ uint4 load_shared_16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ void store_shared_16(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

// Stores into the shared memory of another CTA of the cluster; the bytes count towards a barrier there. Whoever waits
// for that sees them, without the fence over all memory that a release at the cluster's scope would be.
__device__ __forceinline__ void store_async_16(uint32_t peer, uint4 v, uint32_t peer_barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(peer),
               "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(peer_barrier)
               : "memory");
}

// Four 8x8 matrices of 16-bit elements into the fragment of an m16k16 operand; each lane gives the address of one row.
__device__ __forceinline__ void load_matrix(uint32_t (&fragment)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row_address)
               : "memory");
}

// The inverse of load_matrix.
__device__ __forceinline__ void store_matrix(uint32_t row_address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

// Reads a flag; what its releaser wrote or acquired before the release is visible afterwards.
__device__ __forceinline__ int load_acquire(const int* flag) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// Adds to a flag; everything that this thread wrote or acquired is visible to a thread that acquires it.
__device__ __forceinline__ void add_release(int* flag, int value) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ int fetch_add_relaxed(int* counter, int value) {
  int old;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
  return old;
}

__device__ __forceinline__ int fetch_add_acq_rel(int* counter, int value) {
  int old;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
  return old;
}

// Spins until the flag has reached a value.
__device__ __forceinline__ void wait_for(const int* flag, int value, [[maybe_unused]] WaitPlace place = {}) {
#ifdef FASTLORA_SPIN_LIMIT
  spin_until([=] { return load_acquire(flag) >= value; }, "flag at", reinterpret_cast<uint64_t>(flag), value, place);
#else
  while (load_acquire(flag) < value) {
  }
#endif
}

}  // namespace fastlora::sm90
