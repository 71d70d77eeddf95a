// The kernels of one direction, element type and tile; setup.py compiles this file once for each:
//   -DFASTLORA_DIRECTION=forward|backward -DFASTLORA_ELEMENT=bf16|fp16 -DFASTLORA_TILE_128x256
#include "kernel.cuh"

namespace fastlora::sm90 {
using bf16 = __nv_bfloat16;
using fp16 = __half;
[[maybe_unused]] constexpr bool forward = false, backward = true;
}  // namespace fastlora::sm90

// A kernel by its own name, so that profiles, disassembly and tests can tell variants apart.
#define FL_KERNEL(NAME, ...)                                                                             \
  extern "C" __global__ void __cluster_dims__(fastlora::sm90::KernelTraits<__VA_ARGS__>::kCluster, 1, 1) \
      __launch_bounds__(fastlora::sm90::kThreads, 1)                                                     \
          NAME(const __grid_constant__ fastlora::sm90::KernelTraits<__VA_ARGS__>::Params params) {       \
    fastlora::sm90::run<fastlora::sm90::KernelTraits<__VA_ARGS__>>(params);                              \
  }                                                                                                      \
  static const fastlora::Registration NAME##_registration(                                               \
      fastlora::sm90::variant_of<fastlora::sm90::KernelTraits<__VA_ARGS__>>(#NAME,                       \
                                                                            reinterpret_cast<const void*>(&NAME)));
#define FL_NAME(DIRECTION, ELEMENT, M, N, R, REST) lora_sm90_##DIRECTION##_##ELEMENT##_##M##x##N##_r##R##REST
#define FL_DEFINE(NAME, ...) FL_KERNEL(NAME, __VA_ARGS__)  // expands NAME
#define FL_PAIR(DIRECTION, ELEMENT, M, N, R, WEIGHT, REST)                                                            \
  FL_DEFINE(FL_NAME(DIRECTION, ELEMENT, M, N, R, REST), fastlora::sm90::ELEMENT, fastlora::sm90::DIRECTION, M, N, R,  \
            false, fastlora::sm90::WEIGHT, fastlora::sm90::Call::kLayer)                                              \
  FL_DEFINE(FL_NAME(DIRECTION, ELEMENT, M, N, R, REST##_dropout), fastlora::sm90::ELEMENT, fastlora::sm90::DIRECTION, \
            M, N, R, true, fastlora::sm90::WEIGHT, fastlora::sm90::Call::kLayer)
#define FL_OF_SEGMENTS(DIRECTION, ELEMENT, M, N, R, WEIGHT, REST)                                                      \
  FL_DEFINE(FL_NAME(DIRECTION, ELEMENT, M, N, R, REST##_segments), fastlora::sm90::ELEMENT, fastlora::sm90::DIRECTION, \
            M, N, R, false, fastlora::sm90::WEIGHT, fastlora::sm90::Call::kSegments)
#define FL_OF_PROJECTIONS(DIRECTION, ELEMENT, M, N, R, WEIGHT, REST)                                                 \
  FL_DEFINE(FL_NAME(DIRECTION, ELEMENT, M, N, R, REST##_shared), fastlora::sm90::ELEMENT, fastlora::sm90::DIRECTION, \
            M, N, R, false, fastlora::sm90::WEIGHT, fastlora::sm90::Call::kProjections)                              \
  FL_DEFINE(FL_NAME(DIRECTION, ELEMENT, M, N, R, REST##_shared_dropout), fastlora::sm90::ELEMENT,                    \
            fastlora::sm90::DIRECTION, M, N, R, true, fastlora::sm90::WEIGHT, fastlora::sm90::Call::kProjections)
// There is one direction of these.
#define FL_IN_LOOP_backward(...)
#define FL_IN_LOOP_forward(ELEMENT, M, N, R)                                                                         \
  FL_DEFINE(FL_NAME(forward, ELEMENT, M, N, R, _in_loop), fastlora::sm90::ELEMENT, fastlora::sm90::forward, M, N, R, \
            false, fastlora::sm90::InLoopWeight, fastlora::sm90::Call::kLayer)
#define FL_IN_LOOP(DIRECTION, ...) FL_IN_LOOP_##DIRECTION(__VA_ARGS__)
// They expand the object's direction and element type, and the name's rest.
#define FL_EXPAND(...) FL_PAIR(__VA_ARGS__)
#define FL_EXPAND_OF_SEGMENTS(...) FL_OF_SEGMENTS(__VA_ARGS__)
#define FL_EXPAND_OF_PROJECTIONS(...) FL_OF_PROJECTIONS(__VA_ARGS__)
#define FL_EXPAND_IN_LOOP(...) FL_IN_LOOP(__VA_ARGS__)

#define FL_REST_DenseWeight
#define FL_REST_TransposedWeight _transposed
#define FL_REST_DecodedWeight _decoded
#define FASTLORA_SM90(M, N, R, WEIGHT) \
  FL_EXPAND(FASTLORA_DIRECTION, FASTLORA_ELEMENT, M, N, R, WEIGHT, FL_REST_##WEIGHT)
#define FASTLORA_SM90_SEGMENTS(M, N, R, WEIGHT) \
  FL_EXPAND_OF_SEGMENTS(FASTLORA_DIRECTION, FASTLORA_ELEMENT, M, N, R, WEIGHT, FL_REST_##WEIGHT)
#define FASTLORA_SM90_SHARED(M, N, R, WEIGHT) \
  FL_EXPAND_OF_PROJECTIONS(FASTLORA_DIRECTION, FASTLORA_ELEMENT, M, N, R, WEIGHT, FL_REST_##WEIGHT)
#define FASTLORA_SM90_IN_LOOP(M, N, R) FL_EXPAND_IN_LOOP(FASTLORA_DIRECTION, FASTLORA_ELEMENT, M, N, R)
#include "../variants.def"
