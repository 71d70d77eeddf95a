// The forward kernels; see variants.cuh.
#include "variants.cuh"

FL_PAIR_OF_RANK(forward, false, 16)
FL_PAIR_OF_RANK(forward, false, 64)
#if FASTLORA_BLOCK_N == 256
FL_PAIR_OF_RANK(forward, false, 32)
FL_PAIR_OF_RANK(forward, false, 128)
FL_PAIR_OF_RANK(forward, false, 256)
#endif
