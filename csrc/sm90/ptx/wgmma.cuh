// Warpgroup matrix products: D[64, N] (+)= A[64, 16] * B[16, N], fp32 accumulation.
#pragma once
#include "convert.cuh"

namespace fastlora::sm90 {

// Orders register accesses before the products that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns once at most kPending committed groups are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of accumulators across a fence or a wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// kCount accumulators from kFirst on.
template <int kFirst, int kCount, int kAll>
__device__ __forceinline__ float (&slice(float (&registers)[kAll])) [kCount] {
  static_assert(kFirst + kCount <= kAll, "out of the accumulators");
  return reinterpret_cast<float (&)[kCount]>(registers[kFirst]);
}

// The descriptor of an operand in shared memory that is swizzled in spans of kSpan bytes (128, 64 or 32).
// Contiguous along the contracted dimension: `stride` is the distance of groups of eight rows.
// Contiguous along the other ("transposed"): `stride` is the distance of groups of eight contracted elements, `leading`
// that of spans.
template <int kSpan>
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kMode = kSpan == 128 ? 1 : kSpan == 64 ? 2 : 3;
  static_assert(kSpan == 128 || kSpan == 64 || kSpan == 32, "no such swizzle");
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | kMode << 62;
}

// Moves an operand's start; never carries out of the address field.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

#define FL_D4 "%0, %1, %2, %3"
#define FL_D8 FL_D4 ", %4, %5, %6, %7"
#define FL_D16 FL_D8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FL_D32 FL_D16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FL_D64                                                                                             \
  FL_D32                                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
  "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FL_D128                                                                                              \
  FL_D64                                                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, "   \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
  "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "   \
  "%121, %122, %123, %124, %125, %126, %127"

#define FL_O4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FL_O8(d, i) FL_O4(d, i), FL_O4(d, i + 4)
#define FL_O16(d, i) FL_O8(d, i), FL_O8(d, i + 8)
#define FL_O32(d, i) FL_O16(d, i), FL_O16(d, i + 16)
#define FL_O64(d, i) FL_O32(d, i), FL_O32(d, i + 32)
#define FL_O128(d, i) FL_O64(d, i), FL_O64(d, i + 64)

// Both operands in shared memory. Operand numbers follow the accumulators' REGS.
#define FL_WGMMA_SHARED(N, REGS, A, B, P, TA, TB, TYPE)                                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                         \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FL_D##REGS \
               "}, %" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}"                          \
               : FL_O##REGS(d, 0)                                                              \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kTransA), "n"(kTransB))

// A in registers.
#define FL_WGMMA_REGISTERS(N, REGS, A0, A1, A2, A3, B, P, TB, TYPE)                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                         \
               ", 0;\n"                                                                        \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" FL_D##REGS \
               "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #TB ";\n}"   \
               : FL_O##REGS(d, 0)                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransB))

#define FL_SHARED(TYPE)                                                        \
  if constexpr (kN == 8) FL_WGMMA_SHARED(8, 4, 4, 5, 6, 7, 8, TYPE);           \
  if constexpr (kN == 16) FL_WGMMA_SHARED(16, 8, 8, 9, 10, 11, 12, TYPE);      \
  if constexpr (kN == 32) FL_WGMMA_SHARED(32, 16, 16, 17, 18, 19, 20, TYPE);   \
  if constexpr (kN == 64) FL_WGMMA_SHARED(64, 32, 32, 33, 34, 35, 36, TYPE);   \
  if constexpr (kN == 128) FL_WGMMA_SHARED(128, 64, 64, 65, 66, 67, 68, TYPE); \
  if constexpr (kN == 256) FL_WGMMA_SHARED(256, 128, 128, 129, 130, 131, 132, TYPE)

#define FL_REGISTERS(TYPE)                                                                \
  if constexpr (kN == 16) FL_WGMMA_REGISTERS(16, 8, 8, 9, 10, 11, 12, 13, 14, TYPE);      \
  if constexpr (kN == 32) FL_WGMMA_REGISTERS(32, 16, 16, 17, 18, 19, 20, 21, 22, TYPE);   \
  if constexpr (kN == 64) FL_WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37, 38, TYPE);   \
  if constexpr (kN == 128) FL_WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69, 70, TYPE); \
  if constexpr (kN == 256) FL_WGMMA_REGISTERS(256, 128, 128, 129, 130, 131, 132, 133, 134, TYPE)

// d = a * b, plus d if accumulate; kTransA / kTransB: the operand is contiguous along M / N, not along K.
template <class Element, int kTransA, int kTransB, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, int accumulate) {
  constexpr int kN = kRegisters * 2;
  if constexpr (kIsFp16<Element>) {
    FL_SHARED("f16");
  } else {
    FL_SHARED("bf16");
  }
}

// The same with a, an m64k16 fragment, in registers.
template <class Element, int kTransB, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  constexpr int kN = kRegisters * 2;
  if constexpr (kIsFp16<Element>) {
    FL_REGISTERS("f16");
  } else {
    FL_REGISTERS("bf16");
  }
}

}  // namespace fastlora::sm90
