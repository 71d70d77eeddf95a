// The compiled kernels.
#pragma once
#include <vector>

namespace fastlora {

// A compiled kernel, and what the host must know of its traits.
struct Variant {
  const char* name;
  const void* kernel;
  int arch;  // 90 for compute capability 9.0
  bool backward, fp16;
  bool transposed;  // the base weight lies as [in_features, out_features]
  bool decodes;     // a packed base weight, in tiles of their own
  bool in_loop;     // likewise, in the loop of its products
  bool segments;    // rows lie in segments
  bool shared;      // several projections of one input
  bool dropout;
  bool splits;  // the contraction of a tile may be split
  bool fuses;   // column 0 may make S fused with its own tile of the output
  int cluster, threads;
  int block_m, block_n, block_k, rank;
  int shared_bytes;
  int gradient_columns;                               // of a gradient tile
  int split_partial_floats, gradient_partial_floats;  // of a CTA, in memory
};

const std::vector<Variant>& variants();

// Adds a variant to the list when the library is loaded.
struct Registration {
  explicit Registration(const Variant& variant);
};

}  // namespace fastlora
