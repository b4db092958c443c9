// Element types: how a number becomes a stored element and back, and how exact each type is.
#pragma once

#include <adalora.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace support {

constexpr adalora_dtype_t f32 = ADALORA_FLOAT32;
constexpr adalora_dtype_t f64 = ADALORA_FLOAT64;
constexpr adalora_dtype_t bf16 = ADALORA_BFLOAT16;
constexpr adalora_dtype_t f16 = ADALORA_FLOAT16;

inline size_t size_of(adalora_dtype_t type) {
  switch (type) {
    case f32:
      return 4;
    case f64:
      return 8;
    case bf16:
    case f16:
      return 2;
    default:
      throw std::invalid_argument("element type " + std::to_string(type));
  }
}

inline std::string name_of(adalora_dtype_t type) {
  switch (type) {
    case f32:
      return "f32";
    case f64:
      return "f64";
    case bf16:
      return "bf16";
    case f16:
      return "f16";
    default:
      throw std::invalid_argument("element type " + std::to_string(type));
  }
}

// What the library accumulates in, and keeps h, g, moments and averages in.
inline adalora_dtype_t compute_type(adalora_dtype_t type) { return type == f64 ? f64 : f32; }

// Largest relative error of rounding to nearest.
inline double roundoff(adalora_dtype_t type) {
  switch (type) {
    case f32:
      return 0x1p-24;
    case f64:
      return 0x1p-53;
    case bf16:
      return 0x1p-8;
    case f16:
      return 0x1p-11;
    default:
      throw std::invalid_argument("element type " + std::to_string(type));
  }
}

// Largest absolute error of rounding a number below the normal range.
inline double smallest_step(adalora_dtype_t type) {
  switch (type) {
    case f64:
      return 0x1p-1074;
    case f16:
      return 0x1p-24;
    default:
      return 0x1p-133;  // bfloat16's, which float32's does not exceed
  }
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // ties to even
}

inline float from_bfloat16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

inline uint16_t to_float16(float value) {
  const auto sign = static_cast<uint16_t>(bits_of(value) >> 16 & 0x8000);
  if (std::isnan(value)) return static_cast<uint16_t>(sign | 0x7e00);
  const float size = std::fabs(value);
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  // nearbyint rounds ties to even; the steps between float16 numbers are 2^-24 below 2^-14 and 2^(exponent - 10) above.
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f)));
  int exponent;
  std::frexp(size, &exponent);  // size = f * 2^exponent, f in [0.5, 1)
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // 1024 to 2048
  return static_cast<uint16_t>(sign | ((static_cast<uint32_t>(exponent + 13) << 10) + steps));
}

inline float from_float16(uint16_t bits) {
  const float sign = (bits & 0x8000) != 0 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31;
  const auto fraction = static_cast<float>(bits & 1023);
  if (exponent == 31) return fraction != 0.0f ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  return sign * std::ldexp(1024.0f + fraction, exponent - 25);
}

inline void store(void* at, double value, adalora_dtype_t type) {
  const auto single = static_cast<float>(value);
  switch (type) {
    case f64:
      std::memcpy(at, &value, 8);
      break;
    case f32:
      std::memcpy(at, &single, 4);
      break;
    default: {
      const uint16_t half = type == bf16 ? to_bfloat16(single) : to_float16(single);
      std::memcpy(at, &half, 2);
    }
  }
}

inline double load(const void* at, adalora_dtype_t type) {
  double value;
  float single;
  uint16_t half;
  switch (type) {
    case f64:
      std::memcpy(&value, at, 8);
      return value;
    case f32:
      std::memcpy(&single, at, 4);
      return single;
    default:
      std::memcpy(&half, at, 2);
      return type == bf16 ? from_bfloat16(half) : from_float16(half);
  }
}

inline double rounded(double value, adalora_dtype_t type) {
  unsigned char element[8];
  store(element, value, type);
  return load(element, type);
}

}  // namespace support
