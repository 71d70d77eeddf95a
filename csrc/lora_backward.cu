// The backward kernels; see variants.cuh.
#include "variants.cuh"

FL_PAIR_OF_RANK(backward, true, 16)
FL_PAIR_OF_RANK(backward, true, 64)
#if FASTLORA_BLOCK_N == 256
FL_PAIR_OF_RANK(backward, true, 32)
FL_PAIR_OF_RANK(backward, true, 128)
FL_PAIR_OF_RANK(backward, true, 256)
#endif
