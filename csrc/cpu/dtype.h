// The element types of CPU tensors, and scalar conversions between them and fp32 (round to nearest even).
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

namespace coconut_fast {

enum class Dtype { f32, bf16, f16, f64 };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

inline float bf16_to_f32(uint16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

inline uint16_t f32_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}

// Without branches, so that loops over it vectorise on every CPU. The product renormalises subnormals.
inline float f16_to_f32(uint16_t x) {
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fff) << 13;
  const uint32_t finite = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t bits = (x & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite;
  return std::bit_cast<float>(bits | static_cast<uint32_t>(x & 0x8000) << 16);
}

inline uint16_t f32_to_f16(float x) {
  const uint32_t sign = std::bit_cast<uint32_t>(x) >> 16 & 0x8000, bits = std::bit_cast<uint32_t>(x) & 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;
  } else if (bits >= 0x477ff000) {  // rounds to 65536 or more
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // subnormal: fp32 in [0.5, 1) has the spacing of fp16's subnormals
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(bits) + 0.5f) - 0x3f000000;
  } else {
    half = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000) >> 13;
  }
  return static_cast<uint16_t>(sign | half);
}

}  // namespace coconut_fast
