// Waits that end. In a debug build (FASTLORA_SPIN_LIMIT) a thread that has tried so many times prints what it waits for
// and traps: a hang is a diagnosis. In any other build a wait is what it would be without this file.
#pragma once
#include <cstdint>
#ifdef FASTLORA_SPIN_LIMIT
#include <cstdio>
#endif

namespace fastlora::sm90 {

#ifdef FASTLORA_SPIN_LIMIT

constexpr int kNotedCtas = 1024, kNotedWarps = 12;
// The tile in progress of each warp, for the message: 1 + kind, row, column and split, as in pipeline.cuh. CTAs of a
// larger grid, and launches that run at once, share places.
static __device__ int noted_tiles[kNotedCtas][kNotedWarps][4];

__device__ __forceinline__ volatile int* noted_tile() {
  return noted_tiles[blockIdx.x % kNotedCtas][threadIdx.x / 32 % kNotedWarps];
}

// Records a warp's tile in progress; kind -1: none. One of its threads calls this.
__device__ __forceinline__ void note_tile(int kind, int row, int column, int split) {
  volatile int* tile = noted_tile();
  tile[0] = 1 + kind, tile[1] = row, tile[2] = column, tile[3] = split;
}

__device__ constexpr const char* file_name(const char* path) {
  const char* name = path;
  for (; *path; ++path) {
    if (*path == '/') name = path + 1;
  }
  return name;
}

// Where a wait is called: as a default argument it stands for its caller's line.
struct WaitPlace {
  const char* file;
  int line;
  __device__ constexpr WaitPlace(const char* path = __builtin_FILE(), int at = __builtin_LINE())
      : file(file_name(path)), line(at) {}
};

// Returns once done() holds. What is waited for: a name, its address in the space that the name says, a value. Of the
// threads of a warp that give up together, one prints.
template <class Done>
__device__ __forceinline__ void spin_until(Done done, const char* name, uint64_t address, int value, WaitPlace place) {
  for (long long tries = FASTLORA_SPIN_LIMIT; !done(); --tries) {
    if (tries > 1) continue;
    const unsigned together = __activemask();
    if (int(threadIdx.x & 31) == __ffs(together) - 1) {
      const volatile int* tile = noted_tile();
      printf(
          "fastlora: block %u thread %u gives up at %s:%d: %s %#llx, wanted %d; tile kind %d row %d column %d split "
          "%d\n",
          blockIdx.x, threadIdx.x, place.file, place.line, name, static_cast<unsigned long long>(address), value,
          tile[0] - 1, tile[1], tile[2], tile[3]);
    }
    __syncwarp(together);
    __trap();
  }
}

#else

struct WaitPlace {};

__device__ __forceinline__ void note_tile(int, int, int, int) {}

#endif

}  // namespace fastlora::sm90
