// A packed base weight, decoded in the loop of its product: the codes of a step's columns, which the copy engine has
// put into the stage, to the elements that the product reads there.
//
// A warpgroup decodes its own 64 columns, so that a barrier of its threads is enough, while its products of the step
// before are in flight. A thread has half a step of one column, of one scale.
#pragma once
#include "consumer.cuh"
#include "packed.cuh"
#include "ptx/tma.cuh"

namespace fastlora::sm90 {

constexpr int kRun = kDecodedInStage;       // elements of a thread, neighbours in a row of the weight
constexpr int kRunsOfRow = kBlockK / kRun;  // in a step
constexpr int kGroups = kRun / kDecodedTogether;

// Of a base weight that lies in the stage as the product reads it.
struct NoConversion {
  template <class Consumer>
  __device__ __forceinline__ void convert(Consumer&, uint32_t, int) {}
};

// The values of all 4-bit codes of a block, rounded to Element: byte i of `low` and of `high` is half of the value of
// code i. Byte permutes look up four codes at a time; a table in shared memory would be read once for each code,
// through the port of the products' operands.
template <class Element, CodeFormat kFormat>
struct RoundedValues {
  uint32_t low[4], high[4];

  __device__ __forceinline__ explicit RoundedValues(float scale) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const auto value = [=](int j) { return number_of_code<kFormat>(4 * i + j) * scale; };
      const uint32_t first = pack<Element>(value(0), value(1)), second = pack<Element>(value(2), value(3));
      low[i] = permute_bytes(first, second, 0x6420);
      high[i] = permute_bytes(first, second, 0x7531);
    }
  }

  // Of the eight codes of a word, two a byte, the first in its high half.
  __device__ __forceinline__ uint4 look_up(uint32_t word) const {
    const uint32_t in_half = word & 0x77777777;                         // which of the codes below 8, or from 8 on
    const uint32_t which_half = 0x32103210 | (word >> 1 & 0x44444444);  // for each byte of a result
    const uint2 first = look_up_four(in_half, which_half), second = look_up_four(in_half >> 16, which_half >> 16);
    return make_uint4(first.x, first.y, second.x, second.y);
  }

 private:
  __device__ __forceinline__ uint2 look_up_four(uint32_t in_half, uint32_t which_half) const {
    const auto bytes_of = [=](const uint32_t (&bytes)[4]) {
      return permute_bytes(permute_bytes(bytes[0], bytes[1], in_half), permute_bytes(bytes[2], bytes[3], in_half),
                           which_half);
    };
    const uint32_t lows = bytes_of(low), highs = bytes_of(high);
    return {permute_bytes(lows, highs, 0x4051), permute_bytes(lows, highs, 0x6273)};
  }
};

// A run of codes in a stage, from where the copy engine has put them, to its elements: store(j, 16 bytes) of each
// group.
template <CodeFormat kFormat, bool kFourBit = is_four_bit(kFormat)>
struct Run {
  ByteCodes<kFormat> groups[kGroups];

  // The copy has swizzled spans of a row: else every second row would be read from the banks of the one before.
  __device__ __forceinline__ void load(uint32_t codes, uint32_t row, uint32_t number) {
#pragma unroll
    for (uint32_t i = 0; i < kGroups / 2; ++i) {
      const uint32_t chunk = number * (kGroups / 2) + i;
      const uint4 words = load_shared_16(codes + row * kBlockK + ((chunk ^ (row >> 1 & 3)) << 4));
      groups[2 * i].words = make_uint2(words.x, words.y);
      groups[2 * i + 1].words = make_uint2(words.z, words.w);
    }
  }

  template <class Element, class Store>
  __device__ __forceinline__ void decode(float scale, float zero, Store store) const {
#pragma unroll
    for (int j = 0; j < kGroups; ++j) store(j, decode_group<Element>(groups[j], scale, zero, 0));
  }
};

template <CodeFormat kFormat>
struct Run<kFormat, true> {
  uint4 words;

  __device__ __forceinline__ void load(uint32_t codes, uint32_t row, uint32_t number) {
    words = load_shared_16(codes + (row * kBlockK + number * kRun) / 2);
  }

  template <class Element, class Store>
  __device__ __forceinline__ void decode(float scale, float, Store store) const {
    const RoundedValues<Element, kFormat> values(scale);
    store(0, values.look_up(words.x));
    store(1, values.look_up(words.y));
    store(2, values.look_up(words.z));
    store(3, values.look_up(words.w));
  }
};

// body(run) with a run of a format that is known at run time, and is the same for all threads.
template <class Body>
__device__ __forceinline__ void with_run(CodeFormat format, Body body) {
  if (format == CodeFormat::kNf4) {
    body(Run<CodeFormat::kNf4>());
  } else if (format == CodeFormat::kFp4) {
    body(Run<CodeFormat::kFp4>());
  } else if (format == CodeFormat::kInt8) {
    body(Run<CodeFormat::kInt8>());
  } else if (format == CodeFormat::kFloat8E4M3) {
    body(Run<CodeFormat::kFloat8E4M3>());
  } else {
    body(Run<CodeFormat::kFloat8E5M2>());
  }
}

// The conversion of a tile's stages. The scale of the next step is loaded while this one's codes are decoded.
//
// Formats are told apart in each step: with a loop for each of them, ptxas serialises the products of all (C7515).
template <class Traits>
struct StageDecoder {
  using Element = typename Traits::Element;

  uint32_t row, number;            // of the thread's run: among the tile's columns, and in the row
  int end;                         // of what the tile contracts; 0 of a column that is out of bounds
  uint32_t first_block, in_block;  // of the row's first element
  NestedScale nested{};            // the next step's, or `plain`
  AnyScale plain{};

  __device__ __forceinline__ StageDecoder(const Consumer<Traits>& c, TileInfo tile) {
    static_assert(Traits::kColumns * kRunsOfRow == kWarpgroupThreads, "a run for each thread");
    const PackedWeight& w = c.params.packed;
    row = c.warpgroup_column * Traits::kColumns + c.thread / kRunsOfRow;
    number = c.thread % kRunsOfRow;
    const int column = tile.column * Traits::kBlockN + int(row);
    const Steps steps = steps_of<Traits>(c.params, c.own(), tile.split);
    end = column < c.params.n ? min(steps.end * kBlockK, c.params.k) : 0;
    // A long division for all steps, short ones within them.
    const int64_t first = int64_t(column) * c.params.k;
    first_block = uint32_t(first / w.block);
    in_block = uint32_t(first % w.block);
    load_scale(w, steps.first);
  }

  // Decodes the warpgroup's columns of the stage, whose copies have arrived, and hands them to its products.
  __device__ __forceinline__ void convert(Consumer<Traits>& c, uint32_t stage, int step) {
    const PackedWeight& w = c.params.packed;
    const uint32_t weight = stage + Traits::kWeightOffset;
    // Out of bounds the copied codes are zeros, which stand for a number all the same.
    const bool is_nested = w.scale_format == ScaleFormat::kNested, exists = has_scale(step);
    const float scale = !exists ? 0.f : is_nested ? nested.value(w) : plain.value(w);
    const float zero = exists ? plain.zero() : 0.f;
    load_scale(w, step + 1);
    with_run(w.code_format, [&](auto run) {
      run.load(weight + Traits::BaseWeight::kCodesOffset, row, number);
      run.template decode<Element>(scale, zero, [&](uint32_t group, uint4 elements) {
        store_shared_16(chunk_address(weight, row, number * kGroups + group), elements);
      });
    });
    fence_async_shared();
    c.sync_warpgroup();
  }

 private:
  __device__ __forceinline__ int first_element(int step) const { return step * kBlockK + int(number) * kRun; }
  __device__ __forceinline__ bool has_scale(int step) const { return first_element(step) < end; }

  __device__ __forceinline__ void load_scale(const PackedWeight& w, int step) {
    if (!has_scale(step)) return;
    const uint32_t from_block = in_block + first_element(step);
    const uint32_t block =
        first_block + (is_four_bit(w.code_format) ? from_block >> w.block_shift : from_block / w.block);
    if (w.scale_format == ScaleFormat::kNested) {
      nested.load(w, block);
    } else {
      plain.load(w, block);
    }
  }
};

// body(conversion) with what stands between a tile's copies and its base product.
template <class Traits, class Body>
__device__ __forceinline__ void with_conversion(const Consumer<Traits>& c, TileInfo tile, Body body) {
  if constexpr (Traits::BaseWeight::kConverts) {
    body(StageDecoder<Traits>(c, tile));
  } else {
    body(NoConversion());
  }
}

}  // namespace fastlora::sm90
