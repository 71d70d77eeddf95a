// A packed base weight: codes with a scale for each block of them, as bitsandbytes and torchao store them.
#pragma once
#include <cstdint>

#include "../schedule.h"

namespace fastlora {

// 4-bit codes (two a byte, the first in its high half) index a table; others are bytes: whole numbers or float8.
enum class CodeFormat { kNone, kNf4, kFp4, kInt8, kFloat8E4M3, kFloat8E5M2 };

// A nested scale is a byte that stands for code2[byte] * absmax2[its block of scales] + offset.
enum class ScaleFormat { kFloat32, kFloat16, kBfloat16, kNested };

FL_HOST_DEVICE constexpr bool is_four_bit(CodeFormat format) {
  return format == CodeFormat::kNf4 || format == CodeFormat::kFp4;
}

// Of so many neighbouring codes, an even number.
FL_HOST_DEVICE int code_bytes(CodeFormat format, int codes) { return is_four_bit(format) ? codes / 2 : codes; }

constexpr int kDecodedTogether = 8;     // elements of a thread, which have one scale
constexpr int kDecodedInStage = 32;     // likewise, where products decode a step of the weight in their loop
constexpr int kPartElements = 1 << 15;  // that a CTA decodes in a tile: few enough to spread a panel over many

// One row of out_features x in_features elements: blocks may run over the end of a row of the weight.
struct PackedWeight {
  const void *codes, *scales;
  const int8_t* zeros;                        // one for each scale, subtracted from the codes; or null
  const float *absmax2, *code2, *offset;      // of nested scales: [scales / nested block], [256], one number
  void* decoded;                              // [out_features, in_features], in the operands' type; null in the loop
  int64_t elements, panel_elements;           // of the whole, of a panel
  uint32_t block, block_shift, nested_shift;  // elements that share a scale; base-2 logarithms of 4-bit codes' blocks
  CodeFormat code_format;
  ScaleFormat scale_format;
};

}  // namespace fastlora
