// What kernels.cu needs of CUDA C++, for the host: every thread of a block is a fiber (fibers.cpp). Only what NVRTC has
// without a header, and of that only what the kernels may use: no float atomics, no dynamic shared memory.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

struct alignas(8) uint2 {
  unsigned x, y;
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

namespace host {

// Of the fiber that runs.
extern uint3 thread_index, block_index, block_size, grid_size;

// A kernel by its name: fibers.cpp lists them.
struct Kernel {
  Kernel(const char* name, size_t argument_bytes, void (*run)(const void*));

  const char* name;
  size_t argument_bytes;
  void (*run)(const void*);
  const Kernel* next;
};

// All threads of the block, at one line.
void barrier(int line);
// All lanes of the mask, at one line. Lane i leaves `value` and gets that of lane `source`, where that is a lane of
// the mask; its own where `source` is -1.
uint64_t exchange(uint32_t mask, uint64_t value, int source, int line);
// Bit i is that of lane i.
uint32_t ballot(uint32_t mask, bool predicate, int line);
// How many threads of the block say so, at a barrier.
int count(bool predicate, int line);
struct Lanes {
  uint32_t mask = 0xffffffffu;
};
inline int lane() { return int(thread_index.x & 31u); }

enum class Toward { lane, up, down, across };

template <class T>
T shuffle(Toward toward, uint32_t mask, T value, int by, int width, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "as CUDA has them");
  const int me = lane(), first = me & ~(width - 1), last = first + width - 1;
  int source = -1;
  switch (toward) {
    case Toward::lane:
      source = first + (by & (width - 1));
      break;
    case Toward::up:
      source = me - by;
      break;
    case Toward::down:
      source = me + by;
      break;
    case Toward::across:
      source = me ^ by;
      break;
  }
  if (toward != Toward::lane && (source < first || source > last)) source = -1;
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  float value;
  if (magnitude >= 0x7c00u) {
    const uint32_t bits = sign | 0x7f800000u | (magnitude & 0x3ffu ? 0x400000u | (magnitude & 0x3ffu) << 13 : 0u);
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  if (magnitude < 0x400u) {
    value = float(magnitude) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | ((magnitude << 13) + 0x38000000u);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, ties to even.
inline uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return 0x7fffu;
  if (bits >= 0x477ff000u) return sign | 0x7c00u;
  if (bits < 0x38800000u) {
    float magnitude;
    memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;  // its unit in the last place is the smallest half
    memcpy(&bits, &magnitude, sizeof bits);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  return uint16_t(sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13));
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// One thread runs at a time: plain reads and writes are atomic.
template <class T, class Combine>
T atomic(T* at, Combine combine) {
  static_assert(std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "integers alone, as CUDA has them");
  const T before = *at;
  *at = combine(before);
  return before;
}

}  // namespace host

#define KERNEL(name, Arguments)                                                                                  \
  static void name(const Arguments& args);                                                                       \
  static const host::Kernel name##_kernel(#name, sizeof(Arguments),                                              \
                                          [](const void* args) { name(*static_cast<const Arguments*>(args)); }); \
  static void name(const Arguments& args)

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
// The device program has no other thread-local variable: all of them together are poisoned before every block.
#define __shared__ static thread_local

#define threadIdx (host::thread_index)
#define blockIdx (host::block_index)
#define blockDim (host::block_size)
#define gridDim (host::grid_size)
constexpr int warpSize = 32;

#define __syncthreads() host::barrier(__LINE__)
#define __syncthreads_count(predicate) host::count(predicate, __LINE__)
#define __syncthreads_or(predicate) int(host::count(predicate, __LINE__) > 0)
#define __syncthreads_and(predicate) int(host::count(!(predicate), __LINE__) == 0)
#define __syncwarp(...) (void)host::ballot(host::Lanes{__VA_ARGS__}.mask, false, __LINE__)
#define __ballot_sync(mask, predicate) host::ballot(mask, predicate, __LINE__)
#define __any_sync(mask, predicate) int(host::ballot(mask, predicate, __LINE__) != 0)
#define __all_sync(mask, predicate) int(host::ballot(mask, !(predicate), __LINE__) == 0)
#define HOST_SHUFFLE(toward, mask, value, by, width, ...) \
  host::shuffle(host::Toward::toward, mask, value, int(by), width, __LINE__)
#define __shfl_sync(mask, value, ...) HOST_SHUFFLE(lane, mask, value, __VA_ARGS__, 32, 0)
#define __shfl_up_sync(mask, value, ...) HOST_SHUFFLE(up, mask, value, __VA_ARGS__, 32, 0)
#define __shfl_down_sync(mask, value, ...) HOST_SHUFFLE(down, mask, value, __VA_ARGS__, 32, 0)
#define __shfl_xor_sync(mask, value, ...) HOST_SHUFFLE(across, mask, value, __VA_ARGS__, 32, 0)
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T, class U>
T atomicAdd(T* at, U value) {
  return host::atomic(at,
                      [=](T before) { return T(std::make_unsigned_t<T>(before) + std::make_unsigned_t<T>(value)); });
}
template <class T, class U>
T atomicMax(T* at, U value) {
  return host::atomic(at, [=](T before) { return before < T(value) ? T(value) : before; });
}
template <class T, class U>
T atomicMin(T* at, U value) {
  return host::atomic(at, [=](T before) { return T(value) < before ? T(value) : before; });
}
template <class T, class U>
T atomicOr(T* at, U value) {
  return host::atomic(at, [=](T before) { return T(before | T(value)); });
}
template <class T, class U>
T atomicAnd(T* at, U value) {
  return host::atomic(at, [=](T before) { return T(before & T(value)); });
}
template <class T, class U>
T atomicXor(T* at, U value) {
  return host::atomic(at, [=](T before) { return T(before ^ T(value)); });
}
template <class T, class U>
T atomicExch(T* at, U value) {
  return host::atomic(at, [=](T) { return T(value); });
}
template <class T, class U, class V>
T atomicCAS(T* at, U expected, V value) {
  return host::atomic(at, [=](T before) { return before == T(expected) ? T(value) : before; });
}

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return T(fmin(T(a), T(b)));
  else
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return T(fmax(T(a), T(b)));
  else
    return T(a) < T(b) ? T(b) : T(a);
}

inline unsigned __float_as_uint(float x) { return host::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return host::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return host::bit_cast<float>(x); }
inline float __int_as_float(int x) { return host::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return host::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return host::bit_cast<double>(x); }

// Without contraction, as on the device.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline void sincospi(double x, double* sine, double* cosine) { sincos(x * 3.14159265358979323846, sine, cosine); }

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  __extension__ using Wide = unsigned __int128;
  return static_cast<unsigned long long>(Wide(a) * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
template <class T>
T __ldg(const T* at) {
  return *at;
}
