// Which variants are compiled: tiles of 128 x 256 for every rank (16, 32, 64, 128 and 256, a rank takes the next), the
// small ones, whose contraction may be split, for ranks up to 64. One object holds one direction, element type and
// tile:
//   -DFASTLORA_ELEMENT=bf16|fp16 -DFASTLORA_BLOCK_M=128|64 -DFASTLORA_BLOCK_N=256|128
#pragma once
#include "kernel.cuh"

namespace fastlora {
using bf16 = __nv_bfloat16;
using fp16 = __half;
}  // namespace fastlora

#define FL_JOIN(DIRECTION, ELEMENT, M, N, R) lora_##DIRECTION##_##ELEMENT##_##M##x##N##_r##R
#define FL_DEFINE(NAME, ...) FASTLORA_KERNEL(NAME, __VA_ARGS__)
#define FL_PAIR(DIRECTION, BACKWARD, ELEMENT, M, N, R)                                         \
  FL_DEFINE(FL_JOIN(DIRECTION, ELEMENT, M, N, R), fastlora::ELEMENT, BACKWARD, M, N, R, false) \
  FL_DEFINE(FL_JOIN(DIRECTION, ELEMENT, M, N, R##_dropout), fastlora::ELEMENT, BACKWARD, M, N, R, true)
#define FL_PAIR_OF_RANK(DIRECTION, BACKWARD, R) \
  FL_EXPAND(DIRECTION, BACKWARD, FASTLORA_ELEMENT, FASTLORA_BLOCK_M, FASTLORA_BLOCK_N, R)
#define FL_EXPAND(...) FL_PAIR(__VA_ARGS__)
