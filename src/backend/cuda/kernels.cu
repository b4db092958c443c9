// What no matrix product does, as CUDA kernels. NVRTC makes PTX of this very file (`kernels.ptx`, beside it), and the
// tests' software CUDA compiles it for the host.
//
// A kernel takes one structure by value, whose twin in Rust has the same name. Nothing here depends on how many blocks
// run at once: sums are taken in an order that the shapes alone decide, and no floating-point atomic is used.

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;

#define KERNEL(name, Arguments) extern "C" __global__ void __launch_bounds__(256) name(const Arguments args)
#else
// Defines KERNEL, threadIdx and their like, barriers, shuffles and atomics.
#include "host_kernels.hpp"
#endif

namespace {

constexpr float FLT_LARGEST = 3.402823466e+38f;
constexpr double DBL_LARGEST = 1.7976931348623157e+308;
constexpr uint32_t ALL_LANES = 0xffffffffu;

// Element types, by the header's numbers.
enum : int32_t { FLOAT32 = 1, FLOAT64 = 2, BFLOAT16 = 3, FLOAT16 = 4 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

__device__ inline float bits_to_float(uint32_t bits) {
#ifdef __CUDACC_RTC__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

__device__ inline uint32_t float_to_bits(float value) {
#ifdef __CUDACC_RTC__
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(bfloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
__device__ inline float widen(float16 x) {
#ifdef __CUDACC_RTC__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  return host::half_to_float(x.bits);
#endif
}

// To the nearest, ties to even; a NaN stays one.
template <class To>
__device__ inline To narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline double narrow<double>(float x) {
  return x;
}
template <>
__device__ inline bfloat16 narrow<bfloat16>(float x) {
  const uint32_t bits = float_to_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t(bits >> 16 | 0x40u)};
  return {uint16_t((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
__device__ inline float16 narrow<float16>(float x) {
#ifdef __CUDACC_RTC__
  float16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half.bits) : "f"(x));
  return half;
#else
  return {host::float_to_half(x)};
#endif
}

// An element of any type, as the compute type T has it.
template <class T>
__device__ inline T load(const void* from, int32_t dtype, int64_t at) {
  switch (dtype) {
    case FLOAT64: return T(static_cast<const double*>(from)[at]);
    case BFLOAT16: return T(widen(static_cast<const bfloat16*>(from)[at]));
    case FLOAT16: return T(widen(static_cast<const float16*>(from)[at]));
    default: return T(static_cast<const float*>(from)[at]);
  }
}

// Rounds to an element of any type. float64 goes with float64 alone, but for base weights.
template <class T>
__device__ inline void store(void* to, int32_t dtype, int64_t at, T value) {
  switch (dtype) {
    case FLOAT64: static_cast<double*>(to)[at] = double(value); break;
    case BFLOAT16: static_cast<bfloat16*>(to)[at] = narrow<bfloat16>(float(value)); break;
    case FLOAT16: static_cast<float16*>(to)[at] = narrow<float16>(float(value)); break;
    default: static_cast<float*>(to)[at] = float(value);
  }
}

}  // namespace

// ---- Forward, backward, weights ----------------------------------------------------------------------------------

// ---- The allocator -----------------------------------------------------------------------------------------------
