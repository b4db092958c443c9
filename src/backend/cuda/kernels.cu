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
// One that a multiprocessor runs two blocks of.
#define KERNEL_OF_TWO(name, Arguments) extern "C" __global__ void __launch_bounds__(256, 2) name(const Arguments args)
// One that takes the registers that it needs.
#define KERNEL_OF_ONE(name, Arguments) extern "C" __global__ void __launch_bounds__(256, 1) name(const Arguments args)
// One that a multiprocessor runs three blocks of.
#define KERNEL_OF_THREE(name, Arguments) extern "C" __global__ void __launch_bounds__(256, 3) name(const Arguments args)
#define UNROLL _Pragma("unroll")
// Copies of a loop's body take registers.
#define KEEP_ROLLED _Pragma("unroll 1")
#else
// Defines KERNEL, threadIdx and their like, barriers, shuffles and atomics.
#include "host_kernels.hpp"
#define KERNEL_OF_TWO KERNEL
#define KERNEL_OF_ONE KERNEL
#define KERNEL_OF_THREE KERNEL
#define UNROLL
#define KEEP_ROLLED
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

namespace {

// A launch serves so many adapters, or factors of adapters: as many as fit the 4 KB of a kernel's arguments.
constexpr int32_t PIECES = 16;
constexpr int32_t THREADS = 256;

// The piece that a block belongs to: blocks are dealt out to pieces in order.
template <class Arguments>
__device__ inline int32_t piece_of_block(const Arguments& args, int64_t block) {
  int32_t i = 0;
  while (i + 1 < args.pieces && block >= args.piece[i + 1].first_block) ++i;
  return i;
}

__device__ inline bool is_kept(const uint8_t* pattern, int64_t triplet) {
  return pattern == nullptr || pattern[triplet] != 0;
}

// A value as up to three elements: the nearest one, then what its rounding left over, and so on. What is not finite is
// the first element alone.
template <class Element>
struct Terms {
  Element term[3];

  __device__ Terms(float value, int32_t count) {
    for (int32_t i = 0; i < 3; ++i) {
      term[i] = narrow<Element>(i < count ? value : 0.0f);
      const float rest = value - widen(term[i]);
      value = fabsf(rest) <= FLT_LARGEST ? rest : 0.0f;
    }
  }
};

// Where one operand of a product goes. The product of an operand in `first` terms and one in `second` is the sum over
// the pairs (i, j) with i + j below the larger count (what is left out is as small as what the terms leave out): each
// pair is a segment of the dimension that is summed over, `segment` elements after the one before it.
struct Stack {
  void* data;
  int64_t segment;
  int32_t dtype, first, second;
  int32_t part;  // 0: this is the first operand, 1: the second
};

template <class Element>
__device__ inline void put_terms(const Stack& to, int64_t at, float value) {
  const Terms<Element> terms(value, to.part == 0 ? to.first : to.second);
  Element* data = static_cast<Element*>(to.data);
  const int32_t largest = to.first > to.second ? to.first : to.second;
  for (int32_t j = 0; j < to.second; ++j)
    for (int32_t i = 0; i < to.first && i + j < largest; ++i, at += to.segment) {
      const int32_t k = to.part == 0 ? i : j;
      data[at] = k == 0 ? terms.term[0] : k == 1 ? terms.term[1] : terms.term[2];
    }
}

template <class T>
__device__ inline void put(const Stack& to, int64_t at, T value) {
  if (to.dtype == BFLOAT16)
    put_terms<bfloat16>(to, at, float(value));
  else if (to.dtype == FLOAT16)
    put_terms<float16>(to, at, float(value));
  else
    static_cast<T*>(to.data)[at] = value;
}

// The power of two that a largest value is at least, and less than twice; 1 where there is none or it is not finite.
__device__ inline float power_below(float largest) {
  if (!(largest > 0.0f && largest <= FLT_LARGEST)) return 1.0f;
  const uint32_t exponent = float_to_bits(largest) >> 23;
  return bits_to_float((exponent < 2 ? 2u : exponent > 252 ? 252u : exponent) << 23);
}

struct Philox {
  uint32_t word[4];
};

// Philox4x32-10, as src/philox.rs has it.
__device__ inline Philox philox(Philox counter, uint32_t key0, uint32_t key1) {
  for (int32_t round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * counter.word[0], p1 = uint64_t(0xCD9E8D57u) * counter.word[2];
    counter = {{uint32_t(p1 >> 32) ^ counter.word[1] ^ key0, uint32_t(p1), uint32_t(p0 >> 32) ^ counter.word[3] ^ key1,
                uint32_t(p0)}};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Threads side by side for so many columns: a power of two.
__device__ inline int32_t columns_for(int64_t count) {
  int32_t columns = 8;
  while (columns < count && columns < THREADS) columns *= 2;
  return columns;
}

// What the threads of a block have, combined: in an order of its own, but always the same one. Thread 0 has it.
template <class T, class Combine>
__device__ inline T combined(T* shared, T mine, Combine combine) {
  shared[threadIdx.x] = mine;
  for (int32_t half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int32_t(threadIdx.x) < half)
      shared[threadIdx.x] = combine(shared[threadIdx.x], shared[threadIdx.x + half]);
  }
  return shared[threadIdx.x];
}

}  // namespace

// The powers of two that bring each row of A and column of B into [1, 2), for float16, whose range is small.
struct MagnitudePiece {
  const void *a, *b;
  float *of_a, *of_b;  // a value a triplet
  int64_t a_stride, b_stride;
  int64_t in, out, rank;
  int64_t first_block;  // 2 * rank blocks
  int32_t dtype, reserved;
};
struct PassMagnitudes {
  MagnitudePiece piece[PIECES];
  int32_t pieces, reserved;
};
static_assert(sizeof(MagnitudePiece) == 88 && sizeof(PassMagnitudes) == 16 * 88 + 8, "as in pass.rs");

KERNEL(pass_magnitudes, PassMagnitudes) {
  __shared__ float shared[THREADS];
  const MagnitudePiece& p = args.piece[piece_of_block(args, blockIdx.x)];
  const int64_t block = int64_t(blockIdx.x) - p.first_block, triplet = block / 2;
  const bool is_a = block % 2 == 0;
  float mine = 0.0f;
  const int64_t count = is_a ? p.in : p.out;
  for (int64_t f = threadIdx.x; f < count; f += THREADS) {
    const float value = is_a ? load<float>(p.a, p.dtype, triplet * p.a_stride + f)
                             : load<float>(p.b, p.dtype, f * p.b_stride + triplet);
    // A value that is not finite decides nothing.
    if (fabsf(value) <= FLT_LARGEST) mine = fmaxf(mine, fabsf(value));
  }
  const float largest = combined(shared, mine, [](float a, float b) { return fmaxf(a, b); });
  if (threadIdx.x == 0) (is_a ? p.of_a : p.of_b)[triplet] = power_below(largest);
}

// A factor, in the type and terms that the matrix products take, padded with triplets of zeros. For the first product
// it lies as it does in its adapter, for the second one a feature is a row.
struct PackPiece {
  const void *from, *e;
  const uint8_t* pattern;
  const float* magnitudes;  // divide each triplet; null: 1
  Stack to;
  int64_t from_stride, to_stride;
  int64_t features, rank, padded, e_stride;
  int64_t first_block, blocks;
  int32_t from_dtype, e_dtype;
  int32_t is_a;  // triplets are rows, else columns
  int32_t expands;  // for the second product, where triplets whose E is 0 become zeros too
};
struct PassPack {
  PackPiece piece[PIECES];
  int32_t pieces, is_double;
};
static_assert(sizeof(PackPiece) == 144 && sizeof(PassPack) == 16 * 144 + 8, "as in pass.rs");

namespace {

template <class T>
__device__ inline void pack(const PackPiece& p, int64_t block) {
  const int64_t count = p.features * p.padded;
  const bool rows_are_triplets = p.is_a && !p.expands;
  const int64_t columns = rows_are_triplets ? p.features : p.padded;
  for (int64_t i = block * THREADS + threadIdx.x; i < count; i += p.blocks * THREADS) {
    const int64_t row = i / columns, column = i - row * columns;
    const int64_t triplet = rows_are_triplets ? row : column, feature = rows_are_triplets ? column : row;
    T value = T(0);
    if (triplet < p.rank && is_kept(p.pattern, triplet) &&
        (!p.expands || load<T>(p.e, p.e_dtype, triplet * p.e_stride) != T(0))) {
      const int64_t at = p.is_a ? triplet * p.from_stride + feature : feature * p.from_stride + triplet;
      value = load<T>(p.from, p.from_dtype, at);
      if (p.magnitudes != nullptr) value /= T(p.magnitudes[triplet]);
    }
    put(p.to, row * p.to_stride + column, value);
  }
}

}  // namespace

KERNEL(pass_pack, PassPack) {
  const PackPiece& p = args.piece[piece_of_block(args, blockIdx.x)];
  const int64_t block = int64_t(blockIdx.x) - p.first_block;
  if (args.is_double)
    pack<double>(p, block);
  else
    pack<float>(p, block);
}

// What follows a product with the first factor: h or g from the product's terms, its columns for the next product,
// and sums over tokens.
struct FinishPiece {
  const void* from;      // [tokens, ...] of the compute type; terms are `from_segment` apart
  const void* partner;   // h, for the gradient of E; null: not wanted
  void* saved;           // [tokens, rank]; null: not kept
  const void* e;
  const uint8_t* pattern;
  const float* magnitudes;          // multiply what comes from `from`; null: 1
  const float* partner_magnitudes;  // likewise
  const float* scales;              // multiply the weighted columns; null: 1
  double* sums;                     // [tiles, rank], of value * partner
  float* peaks;                     // [tiles, rank], largest weighted value; null: not wanted
  Stack weighted;                   // [tokens, ...]: value * E * weight; null: not wanted
  double multiplier, partner_multiplier, weight;
  int64_t from_stride, from_segment, partner_stride, partner_segment, weighted_stride;
  int64_t rank, padded, e_stride;
  int32_t from_terms, partner_terms, e_dtype, reserved;
};
// Blocks: piece by piece, a tile of tokens each.
struct PassFinish {
  FinishPiece piece[PIECES];
  int64_t tokens, tile, tiles;
};
static_assert(sizeof(FinishPiece) == 216 && sizeof(PassFinish) == 16 * 216 + 24, "as in pass.rs");

namespace {

// The sum of an element's terms, the smallest first.
template <class T>
__device__ inline T sum_of_terms(const void* from, int64_t at, int64_t segment, int32_t terms) {
  const T* values = static_cast<const T*>(from) + at;
  T sum = values[(terms - 1) * segment];
  for (int32_t i = terms - 2; i >= 0; --i) sum += values[i * segment];
  return sum;
}

template <class T>
__device__ inline void finish(const PassFinish& args, double* sums, float* peaks) {
  const int64_t piece = int64_t(blockIdx.x) / args.tiles, tile = int64_t(blockIdx.x) - piece * args.tiles;
  const FinishPiece& p = args.piece[piece];
  const int32_t columns = columns_for(p.padded), lanes = THREADS / columns;
  const int32_t column = threadIdx.x % columns, lane = threadIdx.x / columns;
  const int64_t begin = tile * args.tile, end = begin + args.tile < args.tokens ? begin + args.tile : args.tokens;
  for (int64_t first = 0; first < p.padded; first += columns) {
    const int64_t j = first + column;
    const bool is_triplet = j < p.rank, is_live = is_triplet && is_kept(p.pattern, j);
    T multiplier = T(0), partner_multiplier = T(0), weight = T(0);
    if (is_live) {
      multiplier = T(p.multiplier) * (p.magnitudes != nullptr ? T(p.magnitudes[j]) : T(1));
      partner_multiplier =
          T(p.partner_multiplier) * (p.partner_magnitudes != nullptr ? T(p.partner_magnitudes[j]) : T(1));
      weight = load<T>(p.e, p.e_dtype, j * p.e_stride) * T(p.weight);
      if (p.scales != nullptr) weight *= T(p.scales[j]);
    }
    double sum = 0.0;
    float peak = 0.0f;
    for (int64_t t = begin + lane; t < end && j < p.padded; t += lanes) {
      // What a masked or padding column holds may be anything: it is not read.
      T value = T(0);
      if (is_live) value = sum_of_terms<T>(p.from, t * p.from_stride + j, p.from_segment, p.from_terms) * multiplier;
      if (is_triplet && p.saved != nullptr) static_cast<T*>(p.saved)[t * p.rank + j] = value;
      if (is_live && p.partner != nullptr) {
        const T partner =
            sum_of_terms<T>(p.partner, t * p.partner_stride + j, p.partner_segment, p.partner_terms) *
            partner_multiplier;
        sum += double(value) * double(partner);
      }
      const T weighted = weight != T(0) ? value * weight : T(0);
      if (fabsf(float(weighted)) <= FLT_LARGEST) peak = fmaxf(peak, fabsf(float(weighted)));
      if (p.weighted.data != nullptr) put(p.weighted, t * p.weighted_stride + j, weighted);
    }
    if (p.sums == nullptr && p.peaks == nullptr) continue;
    sums[threadIdx.x] = sum;
    peaks[threadIdx.x] = peak;
    for (int32_t half = lanes / 2; half > 0; half /= 2) {
      __syncthreads();
      if (lane < half) {
        sums[threadIdx.x] += sums[threadIdx.x + half * columns];
        peaks[threadIdx.x] = fmaxf(peaks[threadIdx.x], peaks[threadIdx.x + half * columns]);
      }
    }
    if (lane == 0 && is_triplet) {
      if (p.sums != nullptr) p.sums[tile * p.rank + j] = sums[threadIdx.x];
      if (p.peaks != nullptr) p.peaks[tile * p.rank + j] = peaks[threadIdx.x];
    }
    __syncthreads();
  }
}

}  // namespace

KERNEL(pass_finish_float32, PassFinish) {
  __shared__ double sums[THREADS];
  __shared__ float peaks[THREADS];
  finish<float>(args, sums, peaks);
}

KERNEL(pass_finish_float64, PassFinish) {
  __shared__ double sums[THREADS];
  __shared__ float peaks[THREADS];
  finish<double>(args, sums, peaks);
}

// Makes scales of the tiles' peaks, which bring a column of float16 elements into the upper half of its range.
struct ScalePiece {
  const float* peaks;
  float* scales;
  int64_t rank;
  int64_t first_block;  // a block for each triplet
};
struct PassScales {
  ScalePiece piece[PIECES];
  int64_t tiles;
  int32_t pieces, reserved;
};
static_assert(sizeof(ScalePiece) == 32 && sizeof(PassScales) == 16 * 32 + 16, "as in pass.rs");

KERNEL(pass_scales, PassScales) {
  __shared__ float shared[THREADS];
  const ScalePiece& p = args.piece[piece_of_block(args, blockIdx.x)];
  const int64_t j = int64_t(blockIdx.x) - p.first_block;
  float mine = 0.0f;
  for (int64_t tile = threadIdx.x; tile < args.tiles; tile += THREADS) mine = fmaxf(mine, p.peaks[tile * p.rank + j]);
  const float peak = combined(shared, mine, [](float a, float b) { return fmaxf(a, b); });
  // Nothing to scale by: as it is. What is smaller than LEAST needs no more: neither a scale nor what it multiplies
  // overflows then.
  constexpr float LEAST = 2.0679515e-25f;  // 2^-82
  if (threadIdx.x == 0) p.scales[j] = peak > 0.0f ? 16384.0f / power_below(fmaxf(peak, LEAST)) : 1.0f;
}

// Adds a second product, of weighted h or g and a factor, to y or dx of half precision: sums in float32, rounded once.
struct ExpandPiece {
  const void* first;   // [tokens, depth]
  const void* second;  // [columns, depth]
  void* to;            // [tokens, columns]
  int64_t to_stride, tokens, columns;
  int64_t depth;  // a multiple of 8
  int64_t first_block;
  int32_t column_tiles;
  int32_t is_aligned;  // rows of `to` begin on 16 bytes
};
struct PassExpand {
  ExpandPiece piece[PIECES];
  int32_t pieces, dtype;  // of all three matrices
};
static_assert(sizeof(ExpandPiece) == 72 && sizeof(PassExpand) == 16 * 72 + 8, "as in pass.rs");

namespace {

// Tokens of a block, and columns.
constexpr int32_t EXPAND_TILE = 128;

// How much of the depth is in shared memory at a time, in so many stages: what is multiplied, and what is on its way.
constexpr int32_t EXPAND_DEPTH = 32, EXPAND_STAGES = 3;
// Elements of 16 bytes, the part of a row that is copied at once; and how many a row in shared memory has.
constexpr int32_t VECTOR = 8, ROW_VECTORS = EXPAND_DEPTH / VECTOR;

// Rows of the first operand, then of the second. Eight neighbouring rows' vectors of one number lie in different banks:
// each has the place of its number, with bits flipped by the row's.
struct alignas(128) ExpandStage {
  uint4 row[2 * EXPAND_TILE][ROW_VECTORS];
};

#ifdef __CUDACC_RTC__

__device__ inline uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

// Zeros where there is nothing.
__device__ inline void copy_vector(uint32_t to, const uint16_t* from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}

__device__ inline void end_of_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until all copies but those before the last `PENDING` ends have come.
template <int32_t PENDING>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// Four 8 x 8 matrices: lane i gives a row of matrix i / 8, and gets row i / 4, columns 2 * (i % 4) on, of each.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

#define MULTIPLY_TILE(type)                                                                        \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                       \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                       \
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// sum[16, 8] += a[16, 16] b[16, 8], of a warp.
template <class Element>
__device__ inline void multiply_tile(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b);
template <>
__device__ inline void multiply_tile<bfloat16>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  MULTIPLY_TILE("bf16");
}
template <>
__device__ inline void multiply_tile<float16>(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  MULTIPLY_TILE("f16");
}

// Two neighbouring elements.
template <class Element>
__device__ inline uint32_t narrow_two(float first, float second);
template <>
__device__ inline uint32_t narrow_two<bfloat16>(float first, float second) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
template <>
__device__ inline uint32_t narrow_two<float16>(float first, float second) {
  uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}

// Eight columns of a row: 16 bytes.
struct Eight {
  uint32_t word[4];
};

// Zeros where there is nothing. No branches: a thread's reads are all on their way at once.
__device__ inline Eight read_eight(const uint16_t* from, bool exists) {
  Eight eight = {};
  asm volatile("{ .reg .pred exists; setp.ne.u32 exists, %5, 0; @exists ld.global.v4.u32 {%0, %1, %2, %3}, [%4]; }"
               : "+r"(eight.word[0]), "+r"(eight.word[1]), "+r"(eight.word[2]), "+r"(eight.word[3])
               : "l"(from), "r"(uint32_t(exists))
               : "memory");
  return eight;
}

__device__ inline void write_eight(uint16_t* to, const Eight& eight, bool exists) {
  asm volatile("{ .reg .pred exists; setp.ne.u32 exists, %5, 0; @exists st.global.v4.u32 [%4], {%0, %1, %2, %3}; }"
               :
               : "r"(eight.word[0]), "r"(eight.word[1]), "r"(eight.word[2]), "r"(eight.word[3]), "l"(to),
                 "r"(uint32_t(exists))
               : "memory");
}

// On tensor cores. A warp has 32 tokens and 64 columns, as 2 x 8 products of 16 tokens and 8 columns. Of four products
// side by side, the thread whose columns are 2 * i and 2 * i + 1 has, as columns of the matrix, 8 * i to 8 * i + 7 of 32:
// column c of product j stands for column 8 * (c / 2) + 2 * j + c % 2. So it reads and writes 16 bytes at a time.
template <class Element>
__device__ inline void expand(const ExpandPiece& p, uint32_t block, ExpandStage (&stages)[EXPAND_STAGES]) {
  const uint32_t row_tile = block / uint32_t(p.column_tiles), column_tile = block - row_tile * uint32_t(p.column_tiles);
  const int64_t first_token = int64_t(row_tile) * EXPAND_TILE, first_column = int64_t(column_tile) * EXPAND_TILE;
  const int32_t tokens = int32_t(min(p.tokens - first_token, int64_t(EXPAND_TILE)));
  const int32_t columns = int32_t(min(p.columns - first_column, int64_t(EXPAND_TILE)));
  const int32_t thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const uint32_t shared = shared_address(stages);

  // What is added to comes first of all, since nothing else is as large. Where its rows cannot be read and written 16
  // bytes at a time, the tile passes through shared memory, whose own loops are small. Sums begin with it, so that it
  // takes no registers beside them. What does not exist may be anything: its sums go nowhere.
  const int32_t warp_token = warp / 2 * 32, warp_column = warp % 2 * 64;
  const int32_t token = warp_token + lane / 4, column = warp_column + lane % 4 * VECTOR;
  const bool has_vectors = p.is_aligned && columns % VECTOR == 0;
  uint16_t* const tile = static_cast<uint16_t*>(p.to) + first_token * p.to_stride + first_column;
  uint16_t* const to = tile + token * p.to_stride + column;
  uint16_t* const staged = reinterpret_cast<uint16_t*>(stages);
  const int32_t own_token = thread / EXPAND_TILE, own_column = thread % EXPAND_TILE;
  uint32_t* const staged_two = reinterpret_cast<uint32_t*>(staged + token * EXPAND_TILE + column);
  static_assert(sizeof stages >= EXPAND_TILE * EXPAND_TILE * sizeof(uint16_t), "a tile fits");
  const auto exists = [&](int32_t t, int32_t group) {
    return token + 8 * t < tokens && column + 32 * group < columns;
  };
  Eight eight[4][2];
  if (has_vectors) {
    UNROLL for (int32_t t = 0; t < 4; ++t)
      UNROLL for (int32_t group = 0; group < 2; ++group)
        eight[t][group] = read_eight(to + 8 * t * p.to_stride + 32 * group, exists(t, group));
  } else {
    // Eight rows are on their way at once.
    if (own_column < columns)
      _Pragma("unroll 8") for (int32_t t = own_token; t < tokens; t += THREADS / EXPAND_TILE)
        staged[t * EXPAND_TILE + own_column] = tile[t * p.to_stride + own_column];
    __syncthreads();
    UNROLL for (int32_t t = 0; t < 4; ++t)
      UNROLL for (int32_t group = 0; group < 2; ++group)
        UNROLL for (int32_t i = 0; i < VECTOR / 2; ++i)
          eight[t][group].word[i] = staged_two[(t * 8 * EXPAND_TILE + group * 32) / 2 + i];
    __syncthreads();
  }

  // What a thread copies: a vector of two rows of each operand.
  const int32_t row = thread / ROW_VECTORS, vector = thread % ROW_VECTORS;
  const int32_t of_32 = row % 32, product_row = row - of_32 + 8 * (of_32 % 8 / 2) + 2 * (of_32 / 8) + of_32 % 2;
  const uint32_t a_to = 16 * (row * ROW_VECTORS + (vector ^ row / 2 % ROW_VECTORS));
  const uint32_t b_to =
      16 * ((EXPAND_TILE + product_row) * ROW_VECTORS + (vector ^ product_row / 2 % ROW_VECTORS));
  const uint16_t* const a_from =
      static_cast<const uint16_t*>(p.first) + (first_token + row) * p.depth + vector * VECTOR;
  const uint16_t* const b_from =
      static_cast<const uint16_t*>(p.second) + (first_column + row) * p.depth + vector * VECTOR;
  const int32_t vectors = int32_t(p.depth / VECTOR), chunks = (vectors + ROW_VECTORS - 1) / ROW_VECTORS;
  const auto copy = [&](int32_t chunk) {
    constexpr int32_t ROWS = THREADS / ROW_VECTORS;
    const uint32_t stage = shared + chunk % EXPAND_STAGES * uint32_t(sizeof(ExpandStage));
    const bool exists = chunk * ROW_VECTORS + vector < vectors;
    UNROLL for (int32_t i = 0; i < EXPAND_TILE / ROWS; ++i) {
      const int64_t at = i * ROWS * p.depth + int64_t(chunk) * EXPAND_DEPTH;
      copy_vector(stage + a_to + i * ROWS * ROW_VECTORS * 16, a_from + at, exists && row + i * ROWS < tokens);
      copy_vector(stage + b_to + i * ROWS * ROW_VECTORS * 16, b_from + at, exists && row + i * ROWS < columns);
    }
  };
  UNROLL for (int32_t chunk = 0; chunk < EXPAND_STAGES - 1; ++chunk) {
    copy(chunk);
    end_of_copies();
  }
  // Here, since a compiler would else widen what is added to, and so wait for it, before it asks for the operands.
  if (chunks == 0) return;

  float sum[2][8][4];
  UNROLL for (int32_t t = 0; t < 4; ++t)
    UNROLL for (int32_t group = 0; group < 2; ++group)
      UNROLL for (int32_t i = 0; i < VECTOR; ++i)
        sum[t / 2][4 * group + i / 2][t % 2 * 2 + i % 2] =
            widen(Element{uint16_t(eight[t][group].word[i / 2] >> 16 * (i % 2))});

  // Rows of the first operand come as tokens 0 to 7 and 8 to 15, then the same with the other half of the depth; those
  // of the second as the halves of the depth, then the same of the next product.
  const uint32_t flip = lane / 2 % ROW_VECTORS;
  const uint32_t a_at = (warp_token + lane % 16) * ROW_VECTORS * 16 + ((lane / 16) ^ flip) * 16;
  const uint32_t b_at = (EXPAND_TILE + warp_column + lane / 16 * 8 + lane % 8) * ROW_VECTORS * 16 +
                        ((lane / 8 % 2) ^ flip) * 16;
  for (int32_t chunk = 0; chunk < chunks; ++chunk) {
    wait_for_copies<EXPAND_STAGES - 2>();
    // Everybody's copies have come, and everybody is done with the stage that comes next.
    __syncthreads();
    if (chunk + EXPAND_STAGES - 1 < chunks) copy(chunk + EXPAND_STAGES - 1);
    end_of_copies();
    const uint32_t stage = shared + chunk % EXPAND_STAGES * uint32_t(sizeof(ExpandStage));
    UNROLL for (int32_t half = 0; half < 2; ++half) {
      if (chunk * ROW_VECTORS + half * ROW_VECTORS / 2 >= vectors) break;
      uint32_t a[2][4];
      UNROLL for (int32_t i = 0; i < 2; ++i)
        load_matrices(a[i], (stage + a_at + i * 16 * ROW_VECTORS * 16) ^ half * 32);
      UNROLL for (int32_t j = 0; j < 8; j += 2) {
        uint32_t b[4];
        load_matrices(b, (stage + b_at + j * 8 * ROW_VECTORS * 16) ^ half * 32);
        UNROLL for (int32_t i = 0; i < 2; ++i) {
          multiply_tile<Element>(sum[i][j], a[i], b);
          multiply_tile<Element>(sum[i][j + 1], a[i], b + 2);
        }
      }
    }
  }

  UNROLL for (int32_t t = 0; t < 4; ++t)
    UNROLL for (int32_t group = 0; group < 2; ++group)
      UNROLL for (int32_t i = 0; i < VECTOR / 2; ++i) {
        const float* const two = sum[t / 2][4 * group + i] + t % 2 * 2;
        eight[t][group].word[i] = narrow_two<Element>(two[0], two[1]);
      }
  if (has_vectors) {
    UNROLL for (int32_t t = 0; t < 4; ++t)
      UNROLL for (int32_t group = 0; group < 2; ++group)
        write_eight(to + 8 * t * p.to_stride + 32 * group, eight[t][group], exists(t, group));
  } else {
    // Also copies of what is beyond the depth are over.
    wait_for_copies<0>();
    __syncthreads();
    UNROLL for (int32_t t = 0; t < 4; ++t)
      UNROLL for (int32_t group = 0; group < 2; ++group)
        UNROLL for (int32_t i = 0; i < VECTOR / 2; ++i)
          staged_two[(t * 8 * EXPAND_TILE + group * 32) / 2 + i] = eight[t][group].word[i];
    __syncthreads();
    if (own_column < columns)
      for (int32_t t = own_token; t < tokens; t += THREADS / EXPAND_TILE)
        tile[t * p.to_stride + own_column] = staged[t * EXPAND_TILE + own_column];
  }
}

#else

// The plain twin of what runs on tensor cores: of what runs there it shares where things lie, and that sums
// begin with what is added to.
template <class Element>
inline void expand(const ExpandPiece& p, uint32_t block, ExpandStage (&)[EXPAND_STAGES]) {
  const uint32_t row_tile = block / uint32_t(p.column_tiles), column_tile = block - row_tile * uint32_t(p.column_tiles);
  for (int32_t i = threadIdx.x; i < EXPAND_TILE * EXPAND_TILE; i += THREADS) {
    const int64_t token = int64_t(row_tile) * EXPAND_TILE + i / EXPAND_TILE;
    const int64_t column = int64_t(column_tile) * EXPAND_TILE + i % EXPAND_TILE;
    if (token >= p.tokens || column >= p.columns) continue;
    const Element* first = static_cast<const Element*>(p.first) + token * p.depth;
    const Element* second = static_cast<const Element*>(p.second) + column * p.depth;
    Element& to = static_cast<Element*>(p.to)[token * p.to_stride + column];
    float sum = widen(to);
    for (int64_t k = 0; k < p.depth; ++k) sum += widen(first[k]) * widen(second[k]);
    to = narrow<Element>(sum);
  }
}

#endif

}  // namespace

KERNEL_OF_TWO(pass_expand, PassExpand) {
  __shared__ ExpandStage stages[EXPAND_STAGES];
  const ExpandPiece& p = args.piece[piece_of_block(args, blockIdx.x)];
  const uint32_t block = blockIdx.x - uint32_t(p.first_block);
  if (args.dtype == BFLOAT16)
    expand<bfloat16>(p, block, stages);
  else
    expand<float16>(p, block, stages);
}

// A gradient: of A or B from its product's terms, of E from the tiles' sums.
struct GradientPiece {
  const void* from;  // A and B: of the compute type, row `triplet`, terms `segment` apart. E: float64, [tiles, rank]
  const void* e;
  const uint8_t* pattern;
  const float* scales;  // divide; null: 1
  void* to;
  int64_t from_stride, segment, to_stride;
  int64_t features, rank, e_stride;  // of E: tiles
  int64_t first_block, blocks;       // of E: a block for each triplet
  double multiplier;
  int32_t terms, e_dtype, to_dtype;
  int32_t matrix;  // as the header numbers them: 1: A, 2: E, 3: B
};
struct PassGradient {
  GradientPiece piece[PIECES];
  int32_t pieces, is_double, accumulate, reserved;
};
static_assert(sizeof(GradientPiece) == 128 && sizeof(PassGradient) == 16 * 128 + 16, "as in pass.rs");

namespace {

template <class T>
__device__ inline void give(const GradientPiece& p, int64_t at, bool accumulate, T value) {
  store<T>(p.to, p.to_dtype, at, (accumulate ? load<T>(p.to, p.to_dtype, at) : T(0)) + value);
}

template <class T>
__device__ inline void gradient(const GradientPiece& p, int64_t block, bool accumulate) {
  const bool is_a = p.matrix == 1;
  // Eight neighbours of a warp read eight features of a triplet, whose rows the product has; those of B lie apart where
  // they are written.
  const int64_t rows = (p.features + 7) / 8, count = is_a ? p.features * p.rank : 8 * rows * p.rank;
  for (int64_t i = block * THREADS + threadIdx.x; i < count; i += p.blocks * THREADS) {
    int64_t triplet, feature;
    if (is_a) {
      triplet = i / p.features;
      feature = i - triplet * p.features;
    } else {
      const int64_t row = i / (8 * p.rank), rest = i - row * 8 * p.rank;
      triplet = rest / 8;
      feature = 8 * row + rest % 8;
      if (feature >= p.features) continue;
    }
    T value = T(0);
    // A triplet whose E is 0 receives nothing, also where x or dy is not finite.
    if (is_kept(p.pattern, triplet) && load<T>(p.e, p.e_dtype, triplet * p.e_stride) != T(0)) {
      value = sum_of_terms<T>(p.from, triplet * p.from_stride + feature, p.segment, p.terms) * T(p.multiplier);
      if (p.scales != nullptr) value /= T(p.scales[triplet]);
    }
    give(p, is_a ? triplet * p.to_stride + feature : feature * p.to_stride + triplet, accumulate, value);
  }
}

}  // namespace

KERNEL(pass_gradient, PassGradient) {
  __shared__ double shared[THREADS];
  const GradientPiece& p = args.piece[piece_of_block(args, blockIdx.x)];
  const int64_t block = int64_t(blockIdx.x) - p.first_block;
  const bool accumulate = args.accumulate != 0;
  if (p.matrix != 2) {
    if (args.is_double)
      gradient<double>(p, block, accumulate);
    else
      gradient<float>(p, block, accumulate);
    return;
  }
  double mine = 0.0;
  for (int64_t tile = threadIdx.x; tile < p.features; tile += THREADS)
    mine += static_cast<const double*>(p.from)[tile * p.rank + block];
  const double sum = combined(shared, mine, [](double a, double b) { return a + b; });
  if (threadIdx.x != 0) return;
  if (args.is_double)
    give(p, block * p.to_stride, accumulate, sum);
  else
    give(p, block * p.to_stride, accumulate, float(sum));
}

// Dropout's mask on [tokens, columns]. Four neighbouring columns of the whole layer are one draw, and one thread's.
struct Mask {
  const uint64_t *seed, *offset;
  uint64_t threshold;  // 2^32 * p
  int64_t first_column, token0;
};

namespace {

template <class Element>
struct alignas(4 * sizeof(Element)) Four {
  Element of[4];
};

// Four columns of a token, from `column` on, which is below 0 where a draw begins before the share does.
struct Draw {
  int64_t token, column;
  bool stays[4];
  bool is_whole;  // all four are columns
};

// The draws of a grid that goes over tokens, `row_blocks` blocks for each.
template <class Arguments, class Visit>
__device__ inline void for_each_draw(const Arguments& args, Visit visit) {
  const Mask& mask = args.mask;
  const uint64_t seed = *mask.seed, offset = *mask.offset;
  const int64_t first_word = mask.first_column / 4;
  for (int64_t block = blockIdx.x; block < args.tokens * args.row_blocks; block += args.blocks) {
    Draw draw;
    draw.token = block / args.row_blocks;
    const int64_t word = first_word + (block - draw.token * args.row_blocks) * THREADS + threadIdx.x;
    draw.column = 4 * word - mask.first_column;
    if (draw.column >= args.columns) continue;
    const uint32_t token = uint32_t(mask.token0 + draw.token);
    const Philox drawn = philox({{uint32_t(word), token, uint32_t(offset), uint32_t(offset >> 32)}}, uint32_t(seed),
                                uint32_t(seed >> 32));
    UNROLL for (int32_t i = 0; i < 4; ++i) draw.stays[i] = drawn.word[i] >= mask.threshold;
    draw.is_whole = draw.column >= 0 && draw.column + 4 <= args.columns;
    visit(draw);
  }
}

// The four of a row, at once where they are aligned to four; what is no column is zero, and not written.
template <class Element>
__device__ inline Four<Element> read_four(const void* row, const Draw& draw, int64_t columns, bool is_aligned) {
  const Element* from = static_cast<const Element*>(row) + draw.column;
  if (draw.is_whole && is_aligned) return *reinterpret_cast<const Four<Element>*>(from);
  Four<Element> four = {};
  UNROLL for (int32_t i = 0; i < 4; ++i)
    if (draw.column + i >= 0 && draw.column + i < columns) four.of[i] = from[i];
  return four;
}

template <class Element>
__device__ inline void write_four(void* row, const Draw& draw, int64_t columns, bool is_aligned,
                                  const Four<Element>& four) {
  Element* to = static_cast<Element*>(row) + draw.column;
  if (draw.is_whole && is_aligned) {
    *reinterpret_cast<Four<Element>*>(to) = four;
    return;
  }
  UNROLL for (int32_t i = 0; i < 4; ++i)
    if (draw.column + i >= 0 && draw.column + i < columns) to[i] = four.of[i];
}

}  // namespace

// Copies x without the elements that fall.
struct PassDrop {
  Mask mask;
  const void* x;
  void* to;
  int64_t x_stride, to_stride, tokens, columns;
  int64_t row_blocks, blocks;
  int32_t dtype, is_aligned;
};
static_assert(sizeof(Mask) == 40 && sizeof(PassDrop) == 112, "as in pass.rs");

namespace {

template <class Element>
__device__ inline void drop(const PassDrop& args) {
  for_each_draw(args, [&](const Draw& draw) {
    const Element* from = static_cast<const Element*>(args.x) + draw.token * args.x_stride;
    Four<Element> four = read_four<Element>(from, draw, args.columns, args.is_aligned);
    UNROLL for (int32_t i = 0; i < 4; ++i)
      if (!draw.stays[i]) four.of[i] = Element{};
    Element* to = static_cast<Element*>(args.to) + draw.token * args.to_stride;
    write_four(to, draw, args.columns, args.is_aligned, four);
  });
}

}  // namespace

KERNEL(pass_drop, PassDrop) {
  switch (args.dtype) {
    case FLOAT64: drop<double>(args); break;
    case FLOAT32: drop<float>(args); break;
    default: drop<uint16_t>(args);
  }
}

// Adds one share of dx, its dropped elements left out, to those before it; the last is rounded to dx.
struct PassUndrop {
  Mask mask;
  const void* share;   // of the compute type
  const void* before;  // likewise; null: nothing
  void* after;         // likewise; null: this is the last one
  void* dx;
  double multiplier;
  int64_t stride;  // of the three
  int64_t dx_stride, tokens, columns;
  int64_t row_blocks, blocks;
  int32_t dx_dtype, is_aligned;
};
static_assert(sizeof(PassUndrop) == 136, "as in pass.rs");

namespace {

template <class T, class Dx, int32_t DTYPE>
__device__ inline void undrop(const PassUndrop& args) {
  for_each_draw(args, [&](const Draw& draw) {
    const int64_t row = draw.token * args.stride, columns = args.columns;
    const bool is_aligned = args.is_aligned;
    const Four<T> share = read_four<T>(static_cast<const T*>(args.share) + row, draw, columns, is_aligned);
    Four<T> sum = {};
    if (args.before != nullptr)
      sum = read_four<T>(static_cast<const T*>(args.before) + row, draw, columns, is_aligned);
    UNROLL for (int32_t i = 0; i < 4; ++i)
      if (draw.stays[i]) sum.of[i] += share.of[i] * T(args.multiplier);
    if (args.after != nullptr) {
      write_four(static_cast<T*>(args.after) + row, draw, columns, is_aligned, sum);
      return;
    }
    Dx* to = static_cast<Dx*>(args.dx) + draw.token * args.dx_stride;
    Four<Dx> dx = read_four<Dx>(to, draw, columns, is_aligned);
    UNROLL for (int32_t i = 0; i < 4; ++i)
      store<T>(dx.of, DTYPE, i, load<T>(dx.of, DTYPE, i) + sum.of[i]);
    write_four(to, draw, columns, is_aligned, dx);
  });
}

}  // namespace

KERNEL(pass_undrop, PassUndrop) {
  switch (args.dx_dtype) {
    case FLOAT64: undrop<double, double, FLOAT64>(args); break;
    case FLOAT32: undrop<float, float, FLOAT32>(args); break;
    case BFLOAT16: undrop<float, bfloat16, BFLOAT16>(args); break;
    default: undrop<float, float16, FLOAT16>(args);
  }
}

namespace {

// The float32 towards zero, its last bit set if anything was cut off: rounded once more, to nearest, it gives what one
// rounding of the float64 would.
__device__ inline float round_to_odd(double value) {
  const float nearest = float(value);
  const double back = double(nearest);
  if (back == value || value != value) return nearest;
  return bits_to_float((float_to_bits(nearest) - (fabs(back) > fabs(value) ? 1u : 0u)) | 1u);
}

// As round_to_odd, of a sum: which way it was rounded shows in what the rounding left over.
__device__ inline float sum_to_odd(float a, float b) {
  const float sum = a + b, of_b = sum - a;
  const float rest = (a - (sum - of_b)) + (b - of_b);
  if (!(fabsf(rest) > 0.0f)) return sum;
  const bool is_away = (rest < 0.0f) == (sum > 0.0f);
  return bits_to_float((float_to_bits(sum) - (is_away ? 1u : 0u)) | 1u);
}

// Rounds a float64 once, to an element of any type.
__device__ inline void store_rounded_once(void* to, int32_t dtype, int64_t at, double value) {
  if (dtype == FLOAT64)
    static_cast<double*>(to)[at] = value;
  else if (dtype == FLOAT32)
    static_cast<float*>(to)[at] = float(value);
  else
    store<float>(to, dtype, at, round_to_odd(value));
}

}  // namespace

// Initial triplets: A and B normal, E zero. Four neighbouring features of the whole layer are one draw.
struct WeightInitialize {
  void *a, *e, *b;
  int64_t a_stride, e_stride, b_stride;
  int64_t in, in_begin, out, out_begin, rank;
  uint64_t seed;
  int64_t a_blocks, b_blocks;  // then the blocks of E
  int32_t a_dtype, e_dtype, b_dtype, reserved;
};
static_assert(sizeof(WeightInitialize) == 128, "as in weight.rs");

namespace {

constexpr double DEVIATION = 0.02;
constexpr double TWO_PI = 6.283185307179586;

// Features 4 * word to 4 * word + 3 of a triplet, by Box and Muller.
__device__ inline void draw_normal(uint64_t seed, uint32_t factor, int64_t triplet, int64_t word, double* values) {
  const Philox drawn = philox({{uint32_t(word), uint32_t(triplet), uint32_t(uint64_t(triplet) >> 32), factor}},
                              uint32_t(seed), uint32_t(seed >> 32));
  UNROLL for (int32_t i = 0; i < 4; i += 2) {
    const double radius = sqrt(-2.0 * log((double(drawn.word[i]) + 0.5) / 4294967296.0));
    const double angle = TWO_PI * ((double(drawn.word[i + 1]) + 0.5) / 4294967296.0);
    double sine, cosine;
    sincos(angle, &sine, &cosine);
    values[i] = DEVIATION * (radius * cosine);
    values[i + 1] = DEVIATION * (radius * sine);
  }
}

}  // namespace

KERNEL(weight_initialize, WeightInitialize) {
  const bool is_a = blockIdx.x < args.a_blocks, is_b = !is_a && blockIdx.x < args.a_blocks + args.b_blocks;
  if (!is_a && !is_b) {
    const int64_t i = (int64_t(blockIdx.x) - args.a_blocks - args.b_blocks) * THREADS + threadIdx.x;
    if (i < args.rank) store<double>(args.e, args.e_dtype, i * args.e_stride, 0.0);
    return;
  }
  const int64_t begin = is_a ? args.in_begin : args.out_begin, count = is_a ? args.in : args.out;
  const int64_t first_word = begin / 4, words = (begin + count - 1) / 4 - first_word + 1;
  const int64_t i = (int64_t(blockIdx.x) - (is_a ? 0 : args.a_blocks)) * THREADS + threadIdx.x;
  if (i >= words * args.rank) return;
  // Neighbouring threads write neighbouring elements: features of A, triplets of B.
  const int64_t triplet = is_a ? i / words : i % args.rank, word = first_word + (is_a ? i % words : i / args.rank);
  double values[4];
  draw_normal(args.seed, is_a ? 0u : 1u, triplet, word, values);
  UNROLL for (int32_t k = 0; k < 4; ++k) {
    const int64_t feature = 4 * word + k - begin;
    if (feature < 0 || feature >= count) continue;
    if (is_a)
      store_rounded_once(args.a, args.a_dtype, triplet * args.a_stride + feature, values[k]);
    else
      store_rounded_once(args.b, args.b_dtype, feature * args.b_stride + triplet, values[k]);
  }
}

// Combines a base weight with the delta weight, in tiles.
struct WeightDelta {
  void* w;
  const void *across, *e, *along;  // of w's rows, and of its columns: B and A, or A and B
  float* non_finite;               // set to 1 where an element is not; null: not looked for
  double scaling;
  int64_t w_stride, e_stride;
  int64_t rows, columns, rank;
  int64_t across_feature, across_triplet, along_feature, along_triplet;  // elements from one to the next
  int64_t column_tiles;
  int32_t w_dtype, dtype;
  int32_t combine;  // 0: overwrite, 1: add, 2: subtract
  int32_t reserved;
};
static_assert(sizeof(WeightDelta) == 144, "as in weight.rs");

namespace {

constexpr int32_t DELTA_ROWS = 32, DELTA_COLUMNS = 128, DELTA_DEPTH = 16;

// An element of w with its delta; returns whether it is finite.
template <class T>
__device__ inline bool combine(const WeightDelta& args, int64_t at, T delta) {
  if (args.combine == 2) delta = -delta;
  const bool adds = args.combine != 0;
  if (args.w_dtype == FLOAT64 || sizeof(T) == sizeof(double)) {
    const double there = adds ? load<double>(args.w, args.w_dtype, at) : 0.0;
    store_rounded_once(args.w, args.w_dtype, at, adds ? there + double(delta) : double(delta));
  } else {
    const float there = adds ? load<float>(args.w, args.w_dtype, at) : 0.0f, added = float(delta);
    const bool is_half = args.w_dtype == BFLOAT16 || args.w_dtype == FLOAT16;
    store<float>(args.w, args.w_dtype, at, !adds ? added : is_half ? sum_to_odd(there, added) : there + added);
  }
  return fabs(load<double>(args.w, args.w_dtype, at)) <= DBL_LARGEST;
}

template <class T>
__device__ inline void delta(const WeightDelta& args, T (*c)[DELTA_ROWS], T (*p)[DELTA_COLUMNS]) {
  const int64_t row_tile = int64_t(blockIdx.x) / args.column_tiles;
  const int64_t first_row = row_tile * DELTA_ROWS;
  const int64_t first_column = (int64_t(blockIdx.x) - row_tile * args.column_tiles) * DELTA_COLUMNS;
  const int32_t x = threadIdx.x % 32, y = threadIdx.x / 32;
  T sum[4][4] = {};
  for (int64_t first = 0; first < args.rank; first += DELTA_DEPTH) {
    // The side whose elements lie side by side decides which index neighbouring threads differ in.
    for (int32_t i = threadIdx.x; i < DELTA_DEPTH * DELTA_ROWS; i += THREADS) {
      const bool by_triplet = args.across_triplet == 1;
      const int32_t k = by_triplet ? i % DELTA_DEPTH : i / DELTA_ROWS;
      const int32_t r = by_triplet ? i / DELTA_DEPTH : i % DELTA_ROWS;
      const int64_t triplet = first + k, row = first_row + r;
      double value = 0.0;
      if (triplet < args.rank && row < args.rows)
        value = args.scaling * load<double>(args.e, args.dtype, triplet * args.e_stride) *
                load<double>(args.across, args.dtype, row * args.across_feature + triplet * args.across_triplet);
      c[k][r] = T(value);
    }
    for (int32_t i = threadIdx.x; i < DELTA_DEPTH * DELTA_COLUMNS; i += THREADS) {
      const bool by_triplet = args.along_triplet == 1;
      const int32_t k = by_triplet ? i % DELTA_DEPTH : i / DELTA_COLUMNS;
      const int32_t f = by_triplet ? i / DELTA_DEPTH : i % DELTA_COLUMNS;
      const int64_t triplet = first + k, column = first_column + f;
      T value = T(0);
      if (triplet < args.rank && column < args.columns)
        value = load<T>(args.along, args.dtype, column * args.along_feature + triplet * args.along_triplet);
      p[k][f] = value;
    }
    __syncthreads();
    // Zeros stand where there is no triplet.
    for (int32_t k = 0; k < DELTA_DEPTH; ++k)
      UNROLL for (int32_t i = 0; i < 4; ++i)
        UNROLL for (int32_t j = 0; j < 4; ++j) sum[i][j] += c[k][4 * y + i] * p[k][32 * j + x];
    __syncthreads();
  }
  bool finite = true;
  UNROLL for (int32_t i = 0; i < 4; ++i)
    UNROLL for (int32_t j = 0; j < 4; ++j) {
      const int64_t row = first_row + 4 * y + i, column = first_column + 32 * j + x;
      if (row < args.rows && column < args.columns) finite &= combine(args, row * args.w_stride + column, sum[i][j]);
    }
  if (!finite && args.non_finite != nullptr) *args.non_finite = 1.0f;
}

}  // namespace

KERNEL(weight_delta_float32, WeightDelta) {
  __shared__ float across[DELTA_DEPTH][DELTA_ROWS];
  __shared__ float along[DELTA_DEPTH][DELTA_COLUMNS];
  delta(args, across, along);
}

KERNEL(weight_delta_float64, WeightDelta) {
  __shared__ double across[DELTA_DEPTH][DELTA_ROWS];
  __shared__ double along[DELTA_DEPTH][DELTA_COLUMNS];
  delta(args, across, along);
}

// What unscales and clips gradients, as src/optimizer.rs has it.
struct GradientFactor {
  const double *sum_of_squares, *loss_scale;
  double max_norm;
  double* factor;
};
static_assert(sizeof(GradientFactor) == 32, "as in weight.rs");

KERNEL(gradient_factor, GradientFactor) {
  if (threadIdx.x != 0) return;
  const double scale = args.loss_scale != nullptr ? *args.loss_scale : 1.0;
  const double clip = args.max_norm / (sqrt(*args.sum_of_squares) / scale + 1e-6);
  *args.factor = (clip < 1.0 ? clip : 1.0) / scale;
}

// ---- The allocator -----------------------------------------------------------------------------------------------

namespace {
namespace allocator {

constexpr int WARPS = THREADS / 32;

// A state begins with it; clocks and pattern follow.
struct Header {
  uint64_t magic, model;
  int64_t last_step, steps, skipped, irregular, selections, flags;
};
static_assert(sizeof(Header) == 64);
enum : int64_t { HAS_PATTERN = 1, IS_FINAL = 2 };

enum : int32_t { FACTOR_A = 0, FACTOR_E = 1, FACTOR_B = 2 };

// Some elements of a factor that this process owns: never none.
struct Slice {
  void *p, *p_low, *g, *m, *v, *exp_avg_ipt, *exp_avg_unc;
  const double *lr, *weight_decay;
  double beta1, beta2, eps;
  int64_t begin, end;
  int32_t adapter, factor;
  int32_t p_dtype, low_dtype, g_dtype, state_dtype;
  int32_t replica;
  // Four elements of every array can be read at once.
  int32_t aligned;
};
static_assert(sizeof(Slice) == 144);

// A run of elements of a slice, counted from the slice's first.
struct Chunk {
  int64_t begin;
  int32_t count, slice;
};
static_assert(sizeof(Chunk) == 16);

// One more follows the last, in which the firsts are the ends.
struct Adapter {
  int64_t input, output, rank;
  int64_t first_triplet;
  // Elements of the Gram buffer before A's matrix, which B's follows.
  int64_t gram;
  // Rows of B that one block adds up for scores; blocks and sums before this adapter's, of A and of B.
  int64_t score_rows, score_block_of_a, score_part_of_a, score_block_of_b, score_part_of_b;
  // First slices of A, E, B, and one past the last.
  int32_t slices[4];
  int32_t is_float64, reserved;
};
static_assert(sizeof(Adapter) == 104);

// What is computed with A and with B of each adapter in turn; one more follows the last.
struct Factor {
  // Columns that one block multiplies; blocks and products before this factor's.
  int64_t gram_columns, gram_block, gram_part;
  int64_t distance_block;
  // Columns whose penalty's gradient one block adds.
  int64_t penalty_columns, penalty_block;
};
static_assert(sizeof(Factor) == 48);

enum : int32_t { PATTERN_STAYS = 0, PATTERN_CHOSEN = 1, PATTERN_GIVEN = 2, PATTERN_ONES = 3 };
enum : int32_t { CLOCKS_STAY = 0, CLOCKS_ADVANCE = 1, CLOCKS_ZERO = 2 };
enum : int32_t { CLEARS_NOTHING = 0, CLEARS_AVERAGES = 1, CLEARS_MOMENTS_TOO = 2 };

// What a call does, decided by its first launch and done by the others; the last one makes `next` the state's header.
struct Plan {
  Header next;
  double factor;
  int64_t budget;
  int32_t updates, takes_importance;
  int32_t chooses, clears, masks;
  int32_t pattern, clocks;
  int32_t reserved;
};
static_assert(sizeof(Plan) == 112);

// What AdamW multiplies by, rounded once.
template <class T>
struct Rates {
  T decay, beta1, rest1, beta2, rest2, step_size, root_of_bias2, eps;
};
struct SliceRates {
  Rates<float> single;
  Rates<double> whole;
};
static_assert(sizeof(SliceRates) == 96);

template <class T>
__device__ inline const Rates<T>& rates_of(const SliceRates& rates);
template <>
__device__ inline const Rates<float>& rates_of<float>(const SliceRates& rates) {
  return rates.single;
}
template <>
__device__ inline const Rates<double>& rates_of<double>(const SliceRates& rates) {
  return rates.whole;
}

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }
__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline double magnitude(double x) { return fabs(x); }

// The largest number in place of infinity and NaN.
__device__ inline float capped(float x) { return x < FLT_LARGEST ? x : FLT_LARGEST; }
__device__ inline double capped(double x) { return x < DBL_LARGEST ? x : DBL_LARGEST; }

__device__ inline uint64_t double_to_bits(double value) {
#ifdef __CUDACC_RTC__
  return uint64_t(__double_as_longlong(value));
#else
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

__device__ inline bool is_finite(float x) { return (float_to_bits(x) & 0x7f800000u) != 0x7f800000u; }
__device__ inline bool is_finite(double x) {
  return (double_to_bits(x) & 0x7ff0000000000000ull) != 0x7ff0000000000000ull;
}

__device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__device__ inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// The sum over a warp, in its first lane.
template <class T>
__device__ inline T warp_sum(T value) {
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(ALL_LANES, value, offset);
  return value;
}

// The sum over a block, in every thread; `shared` has a place for each warp.
template <class T>
__device__ inline T block_sum(T value, T* shared) {
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  T sum = 0;
  for (int warp = 0; warp < WARPS; ++warp) sum += shared[warp];
  __syncthreads();
  return sum;
}

// The sum over this thread and those before it.
__device__ inline uint64_t block_scan(uint64_t value, uint64_t* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t before = __shfl_sync(ALL_LANES, value, (lane - offset) & 31);
    if (lane >= offset) value += before;
  }
  if (lane == 31) shared[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += shared[w];
  __syncthreads();
  return value;
}

// The last of n + 1 rising numbers, `stride` apart, that is not above `value`.
__device__ inline int64_t last_up_to(const int64_t* first, int64_t stride, int64_t n, int64_t value) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (first[middle * stride] <= value) low = middle;
    else high = middle - 1;
  }
  return low;
}

// The first of the slices low..high that ends past an element.
__device__ inline int32_t first_slice_past(const Slice* slices, int32_t low, int32_t high, int64_t element) {
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (slices[middle].end > element) high = middle;
    else low = middle + 1;
  }
  return low;
}

// Four elements that lie side by side.
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

template <class T>
__device__ inline Four<T> four(const void* from, int64_t at) {
  return *reinterpret_cast<const Four<T>*>(static_cast<const T*>(from) + at);
}

// ---- Binding

struct RebindArguments {
  Slice* slices;
  // Of those whose gradients are elsewhere now.
  int64_t first, count;
  // A state all of zeros becomes this one.
  Header* header;
  uint8_t* pattern;
  int64_t n_triplets;
  Header fresh;
  void* g[496];
};
static_assert(sizeof(RebindArguments) == 4080);

// ---- Norm

struct SquaresArguments {
  const Slice* slices;
  const Chunk* chunks;
  const uint8_t* has_grad;
  double* sums;
  uint32_t* not_finite;
  int64_t with_replicas;
};
static_assert(sizeof(SquaresArguments) == 48);

template <class T>
__device__ inline void add_square(T x, double& sum, uint32_t& not_finite) {
  sum += double(x) * double(x);
  not_finite |= is_finite(x) ? 0u : 1u;
}

template <class G>
__device__ inline void add_squares(const G* g, int32_t count, bool aligned, double& sum, uint32_t& not_finite) {
  int32_t done = 0;
  if (aligned) {
    for (int32_t i = threadIdx.x; i < count / 4; i += THREADS) {
      const Four<G> values = four<G>(g, int64_t(i) * 4);
      UNROLL for (int k = 0; k < 4; ++k) add_square(widen(values.x[k]), sum, not_finite);
    }
    done = count / 4 * 4;
  }
  for (int32_t i = done + threadIdx.x; i < count; i += THREADS) add_square(widen(g[i]), sum, not_finite);
}

struct NormArguments {
  const double* sums;
  const uint32_t* not_finite;
  int64_t n_chunks;
  double* sum_of_squares;
  float* found_inf;
};
static_assert(sizeof(NormArguments) == 40);

// ---- Plan

enum : int32_t { UPDATE = 1, SELECT = 2, FINALIZE = 4, RESET = 8, SET_PATTERN = 16 };

struct PlanArguments {
  Plan* plan;
  const Header* header;
  const int64_t* step;
  const double* grad_factor;
  const float* found_inf;
  // Of the chunks' gradients, where found_inf does not say it.
  const uint32_t* not_finite;
  int64_t n_chunks;
  // At each multiple of delta_t after tinit, up to the end.
  const int64_t* budgets;
  int64_t tinit, end, delta_t, target;
  uint64_t model;
  int64_t fresh_flags;
  const Slice* slices;
  const int64_t* clocks;
  SliceRates* rates;
  int64_t n_slices;
  int32_t operation, with_adamw, in_float32, is_final;
};
static_assert(sizeof(PlanArguments) == 160);

template <class T>
__device__ inline Rates<T> rates(const Slice& slice, int64_t k) {
  const double lr = *slice.lr, weight_decay = *slice.weight_decay;
  const double bias1 = 1.0 - pow(slice.beta1, double(k)), bias2 = 1.0 - pow(slice.beta2, double(k));
  return {T(1.0 - lr * weight_decay), T(slice.beta1), T(1.0 - slice.beta1), T(slice.beta2),
          T(1.0 - slice.beta2),       T(lr / bias1),  T(sqrt(bias2)),       T(slice.eps)};
}

__device__ inline Plan decide(const PlanArguments& args, bool not_finite) {
  Plan plan{};
  plan.next = *args.header;
  Header& next = plan.next;
  const bool was_final = (next.flags & IS_FINAL) != 0;
  const auto choose = [&](int64_t budget) {
    plan.chooses = 1;
    plan.budget = budget;
    plan.pattern = PATTERN_CHOSEN;
    next.flags |= HAS_PATTERN;
    ++next.selections;
  };
  const auto fix = [&] {
    plan.clears = CLEARS_AVERAGES;
    next.flags |= IS_FINAL;
  };
  if (args.operation & UPDATE) {
    plan.factor = args.grad_factor ? *args.grad_factor : 1.0;
    // Also where it is NaN.
    const bool found = args.found_inf ? !(*args.found_inf <= 0.0f) : not_finite;
    if (found || !is_finite(plan.factor) || (args.in_float32 && !is_finite(float(plan.factor)))) {
      ++next.skipped;
    } else {
      plan.updates = 1;
      plan.takes_importance = *args.step < args.end && !was_final;
      plan.clocks = args.with_adamw ? CLOCKS_ADVANCE : CLOCKS_STAY;
    }
  }
  if (args.operation & SELECT) {
    const int64_t step = *args.step;
    const bool reached = step >= args.end;
    const bool falls = step > args.end || (step > args.tinit && step % args.delta_t == 0);
    if (!was_final && reached) {
      choose(args.target);
      fix();
    } else if (!was_final && falls) {
      choose(args.budgets[step / args.delta_t - args.tinit / args.delta_t - 1]);
    }
    next.irregular += next.steps > 0 && step <= next.last_step;
    ++next.steps;
    next.last_step = step;
    plan.masks = (next.flags & HAS_PATTERN) && (falls || (next.flags & IS_FINAL));
  }
  if ((args.operation & FINALIZE) && !was_final) {
    choose(args.target);
    fix();
    plan.masks = 1;
  }
  if (args.operation & RESET) {
    next = Header{next.magic, args.model, 0, 0, 0, 0, 0, args.fresh_flags};
    plan.clears = CLEARS_MOMENTS_TOO;
    plan.pattern = PATTERN_ONES;
    plan.clocks = CLOCKS_ZERO;
  }
  if (args.operation & SET_PATTERN) {
    plan.pattern = PATTERN_GIVEN;
    next.flags |= HAS_PATTERN;
    if (args.is_final) fix();
    plan.masks = 1;
  }
  return plan;
}

// ---- Update

struct UpdateArguments {
  const Plan* plan;
  const Slice* slices;
  const Chunk* chunks;
  const SliceRates* rates;
  const uint8_t* has_grad;
  // Importance's.
  double beta1, rest1, beta2, rest2;
  int64_t with_adamw;
};
static_assert(sizeof(UpdateArguments) == 80);

// What an update does to each element of a chunk.
template <class T>
struct Change {
  Rates<T> adamw;
  T factor;
  T beta1, rest1, beta2, rest2;
  bool has_grad, steps, smooths;
};

template <class T>
struct Element {
  T p, g, m, v, ipt, unc;
};

__device__ inline double rounded(double value, int32_t) { return value; }
__device__ inline float rounded(float value, int32_t dtype) {
  if (dtype == BFLOAT16) return widen(narrow<bfloat16>(value));
  if (dtype == FLOAT16) return widen(narrow<float16>(value));
  return value;
}

template <class T>
__device__ inline void advance(const Change<T>& change, int32_t p_dtype, Element<T>& e) {
  const T g = e.g * change.factor;
  if (change.steps) {
    const Rates<T>& r = change.adamw;
    e.m = r.beta1 * e.m + r.rest1 * g;
    e.v = r.beta2 * e.v + r.rest2 * g * g;
    // Importance sees what the forward pass will read.
    e.p = rounded(e.p * r.decay - r.step_size * e.m / (root(e.v) / r.root_of_bias2 + r.eps), p_dtype);
  }
  if (change.smooths) {
    const T now = change.has_grad ? capped(magnitude(e.p * g)) : T(0);
    const T ipt = capped(change.beta1 * e.ipt + change.rest1 * now);
    e.unc = capped(change.beta2 * e.unc + change.rest2 * magnitude(now - ipt));
    e.ipt = ipt;
  }
}

template <class T>
__device__ inline void update_one(const Change<T>& change, const Slice& slice, int64_t at) {
  Element<T> e{};
  T *m = static_cast<T*>(slice.m) + at, *v = static_cast<T*>(slice.v) + at;
  T *ipt = static_cast<T*>(slice.exp_avg_ipt) + at, *unc = static_cast<T*>(slice.exp_avg_unc) + at;
  if (change.has_grad) {
    e.p = load<T>(slice.p, slice.p_dtype, at);
    e.g = load<T>(slice.g, slice.g_dtype, at);
  }
  if (change.steps) {
    e.m = *m;
    e.v = *v;
  }
  if (change.smooths) {
    e.ipt = *ipt;
    e.unc = *unc;
  }
  advance(change, slice.p_dtype, e);
  if (change.steps) {
    store<T>(slice.p, slice.p_dtype, at, e.p);
    if (slice.p_low) store<T>(slice.p_low, slice.low_dtype, at, e.p);
    *m = e.m;
    *v = e.v;
  }
  if (change.smooths) {
    *ipt = e.ipt;
    *unc = e.unc;
  }
}

// Four elements of a type of 2 or 4 bytes, as they lie: so that all loads are on their way before the first is needed.
struct Raw {
  uint32_t words[4];
};

__device__ inline bool is_half(int32_t dtype) { return dtype == BFLOAT16 || dtype == FLOAT16; }

__device__ inline Raw load_raw(const void* from, int32_t dtype, int64_t at) {
  if (is_half(dtype)) {
    const Four<uint16_t> halves = four<uint16_t>(from, at);
    return {{halves.x[0], halves.x[1], halves.x[2], halves.x[3]}};
  }
  const Four<uint32_t> words = four<uint32_t>(from, at);
  return {{words.x[0], words.x[1], words.x[2], words.x[3]}};
}

__device__ inline float widen_raw(uint32_t word, int32_t dtype) {
  if (dtype == BFLOAT16) return widen(bfloat16{uint16_t(word)});
  if (dtype == FLOAT16) return widen(float16{uint16_t(word)});
  return bits_to_float(word);
}

__device__ inline void store_four(void* to, int32_t dtype, int64_t at, const float* values) {
  if (is_half(dtype)) {
    Four<uint16_t> halves;
    UNROLL for (int k = 0; k < 4; ++k)
      halves.x[k] = dtype == BFLOAT16 ? narrow<bfloat16>(values[k]).bits : narrow<float16>(values[k]).bits;
    *reinterpret_cast<Four<uint16_t>*>(static_cast<uint16_t*>(to) + at) = halves;
  } else {
    *reinterpret_cast<Four<float>*>(static_cast<float*>(to) + at) = {{values[0], values[1], values[2], values[3]}};
  }
}

__device__ inline void update_four(const Change<float>& change, const Slice& slice, int64_t at) {
  Raw p{}, g{}, m{}, v{}, ipt{}, unc{};
  if (change.has_grad) {
    p = load_raw(slice.p, slice.p_dtype, at);
    g = load_raw(slice.g, slice.g_dtype, at);
  }
  if (change.steps) {
    m = load_raw(slice.m, FLOAT32, at);
    v = load_raw(slice.v, FLOAT32, at);
  }
  if (change.smooths) {
    ipt = load_raw(slice.exp_avg_ipt, FLOAT32, at);
    unc = load_raw(slice.exp_avg_unc, FLOAT32, at);
  }
  float to[6][4];
  UNROLL for (int k = 0; k < 4; ++k) {
    Element<float> e{widen_raw(p.words[k], slice.p_dtype), widen_raw(g.words[k], slice.g_dtype),
                     bits_to_float(m.words[k]),            bits_to_float(v.words[k]),
                     bits_to_float(ipt.words[k]),          bits_to_float(unc.words[k])};
    advance(change, slice.p_dtype, e);
    to[0][k] = e.p;
    to[1][k] = e.m;
    to[2][k] = e.v;
    to[3][k] = e.ipt;
    to[4][k] = e.unc;
  }
  if (change.steps) {
    store_four(slice.p, slice.p_dtype, at, to[0]);
    if (slice.p_low) store_four(slice.p_low, slice.low_dtype, at, to[0]);
    store_four(slice.m, FLOAT32, at, to[1]);
    store_four(slice.v, FLOAT32, at, to[2]);
  }
  if (change.smooths) {
    store_four(slice.exp_avg_ipt, FLOAT32, at, to[3]);
    store_four(slice.exp_avg_unc, FLOAT32, at, to[4]);
  }
}

template <class T>
__device__ inline Change<T> change_of(const UpdateArguments& args, const Chunk& chunk, bool has_grad) {
  Change<T> change{};
  change.has_grad = has_grad;
  change.steps = args.with_adamw && has_grad;
  change.smooths = args.plan->takes_importance != 0;
  if (change.steps) change.adamw = rates_of<T>(args.rates[chunk.slice]);
  change.factor = T(args.plan->factor);
  change.beta1 = T(args.beta1);
  change.rest1 = T(args.rest1);
  change.beta2 = T(args.beta2);
  change.rest2 = T(args.rest2);
  return change;
}

// ---- Scores

struct ScoresArguments {
  // Scores are written where it chooses; NULL: always.
  const Plan* plan;
  const Adapter* adapters;
  const Slice* slices;
  const uint32_t* adapter_of;
  // Blocks of B come first.
  const uint32_t* adapter_of_block;
  double* parts_of_a;
  double* parts_of_b;
  double* scores;
  int64_t blocks_of_b, n_triplets;
};
static_assert(sizeof(ScoresArguments) == 80);

// Columns of a row of A whose scores one warp adds up.
constexpr int64_t SCORE_COLUMNS = 1 << 10;

__device__ inline double score(const Slice& slice, int64_t at) {
  return capped(load<double>(slice.exp_avg_ipt, slice.state_dtype, at) *
                load<double>(slice.exp_avg_unc, slice.state_dtype, at));
}

// Takes the scores of N fours, `stride` fours apart: all are on their way before the first is needed.
template <int N, class Take>
__device__ inline void take_some(const Four<float>* ipt, const Four<float>* unc, int stride, const Take& take) {
  Four<float> i[N], u[N];
  UNROLL for (int n = 0; n < N; ++n) {
    i[n] = ipt[n * stride];
    u[n] = unc[n * stride];
  }
  UNROLL for (int n = 0; n < N; ++n)
    UNROLL for (int k = 0; k < 4; ++k) take(k, capped(double(i[n].x[k]) * double(u[n].x[k])));
}

// The same for every `stride` of the fours of a slice from `begin` on, N at once.
template <int N, class Take>
__device__ inline void take_scores(const Slice& slice, int64_t begin, int64_t fours, int first, int stride,
                                   const Take& take) {
  const auto* ipt = reinterpret_cast<const Four<float>*>(static_cast<const float*>(slice.exp_avg_ipt) + begin) + first;
  const auto* unc = reinterpret_cast<const Four<float>*>(static_cast<const float*>(slice.exp_avg_unc) + begin) + first;
  int64_t left = fours - first;
  KEEP_ROLLED for (; left > (N - 1) * stride; left -= N * stride, ipt += N * stride, unc += N * stride)
    take_some<N>(ipt, unc, stride, take);
  KEEP_ROLLED for (; left > 0; left -= stride, ipt += stride, unc += stride) take_some<1>(ipt, unc, stride, take);
}

// What the lanes of a warp find between two elements of a slice.
__device__ inline double lane_scores(const Slice& slice, int64_t begin, int64_t end) {
  const int lane = int(threadIdx.x % 32);
  double sum = 0.0;
  if (slice.aligned && slice.state_dtype == FLOAT32 && begin % 4 == 0) {
    const int64_t fours = (end - begin) / 4;
    take_scores<4>(slice, begin, fours, lane, 32, [&](int, double score) { sum += score; });
    begin += 4 * fours;
  }
  for (int64_t at = begin + lane; at < end; at += 32) sum += score(slice, at);
  return sum;
}

// Whether a slice has all of some elements, and their averages can be read four at once.
__device__ inline bool can_read_fours(const Slice& slice, int64_t begin, int64_t end) {
  return !slice.replica && slice.aligned && slice.state_dtype == FLOAT32 && slice.begin <= begin && slice.end >= end &&
         (begin - slice.begin) % 4 == 0;
}

// The sums over rows of B that one slice has, in which four elements can be read at once: a thread keeps to its four
// columns. Sums lie as columns do, row upon row; returns how many rows there are.
__device__ inline int scores_in_fours(const Slice& slice, int64_t begin, int64_t count, int rank, double* sums) {
  const int period = rank % 4 == 0 ? rank / 4 : rank % 2 == 0 ? rank / 2 : rank;
  const int stride = THREADS / period * period, thread = int(threadIdx.x);
  double own[4] = {0.0, 0.0, 0.0, 0.0};
  if (thread < stride) {
    const int64_t fours = count / 4;
    take_scores<3>(slice, begin, fours, thread, stride, [&](int k, double score) { own[k] += score; });
    if (thread == fours % stride)
      UNROLL for (int k = 0; k < 4; ++k)
        if (k < count % 4) own[k] += score(slice, begin + 4 * fours + k);
    UNROLL for (int k = 0; k < 4; ++k) sums[4 * thread + k] = own[k];
  }
  return 4 * stride / rank;
}

// Scores of some columns of a row of A, added up by a warp.
__device__ inline void add_scores_of_a(const ScoresArguments& args) {
  const Adapter& adapter = args.adapters[args.adapter_of_block[blockIdx.x]];
  const int64_t block = blockIdx.x - args.blocks_of_b - adapter.score_block_of_a;
  const int64_t part = block * WARPS + threadIdx.x / 32, segments = ceil_div(adapter.input, SCORE_COLUMNS);
  if (part >= adapter.rank * segments) return;
  const int64_t row = part / segments * adapter.input, first = part % segments * SCORE_COLUMNS;
  const int64_t begin = row + first, end = row + smaller(first + SCORE_COLUMNS, adapter.input);
  double sum = 0.0;
  int32_t s = first_slice_past(args.slices, adapter.slices[FACTOR_A], adapter.slices[FACTOR_A + 1], begin);
  for (; s < adapter.slices[FACTOR_A + 1] && args.slices[s].begin < end; ++s) {
    const Slice& slice = args.slices[s];
    if (!slice.replica)
      sum += lane_scores(slice, larger(begin, slice.begin) - slice.begin, smaller(end, slice.end) - slice.begin);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) args.parts_of_a[adapter.score_part_of_a + part] = sum;
}

// Scores of some rows of a B, added up for each column by a block.
__device__ inline void add_scores_of_b(const ScoresArguments& args, double* sums) {
  const Adapter& adapter = args.adapters[args.adapter_of_block[blockIdx.x]];
  const int64_t rank = adapter.rank;
  const uint32_t own = uint32_t(blockIdx.x - adapter.score_block_of_b), across = uint32_t(ceil_div(rank, THREADS));
  const int64_t block = own / across, first_column = int64_t(own % across) * THREADS;
  const int width = int(smaller(THREADS, rank - first_column)), high = THREADS / width;
  const int row = threadIdx.x / width, column = threadIdx.x % width;
  const int64_t begin = block * adapter.score_rows, end = smaller(adapter.output, begin + adapter.score_rows);
  const int32_t last_slice = adapter.slices[FACTOR_B + 1];
  int32_t s = first_slice_past(args.slices, adapter.slices[FACTOR_B], last_slice, begin * rank);
  int rows = high;
  if (across == 1 && s < last_slice && can_read_fours(args.slices[s], begin * rank, end * rank)) {
    rows = scores_in_fours(args.slices[s], begin * rank - args.slices[s].begin, (end - begin) * rank, int(rank), sums);
  } else {
    double sum = 0.0;
    for (; row < high && s < last_slice && args.slices[s].begin < end * rank; ++s) {
      const Slice& slice = args.slices[s];
      if (slice.replica) continue;
      // Counted from the block's first row, elements fit 32 bits.
      const uint32_t skipped = uint32_t(larger(slice.begin - begin * rank, 0)) / uint32_t(rank);
      const uint32_t taken = uint32_t(smaller(slice.end - begin * rank, (end - begin) * rank) + rank - 1) / uint32_t(rank);
      const int64_t first = begin + skipped, last = begin + taken;
      for (int64_t r = first + row; r < last; r += high) {
        const int64_t element = r * rank + first_column + column;
        if (element >= slice.begin && element < slice.end) sum += score(slice, element - slice.begin);
      }
    }
    sums[threadIdx.x] = sum;
  }
  __syncthreads();
  double total = 0.0;
  if (row < high)
    for (int r = row; r < rows; r += high) total += sums[r * width + column];
  __syncthreads();
  sums[threadIdx.x] = total;
  __syncthreads();
  if (int(threadIdx.x) < width) {
    total = 0.0;
    for (int r = 0; r < high; ++r) total += sums[r * width + threadIdx.x];
    args.parts_of_b[adapter.score_part_of_b + block * rank + first_column + threadIdx.x] = total;
  }
}

// ---- Selection

struct SelectArguments {
  const Plan* plan;
  const double* scores;
  const Adapter* adapters;
  const uint32_t* adapter_of;
  uint8_t* chosen;
  int64_t n_triplets;
  int64_t in_parameters;
};
static_assert(sizeof(SelectArguments) == 56);

// A number whose order is the score's; -0 and 0 are a tie.
__device__ inline uint64_t key_of(double score) {
  constexpr uint64_t SIGN = 0x8000000000000000ull;
  const uint64_t bits = double_to_bits(score);
  if (bits == SIGN) return SIGN;
  return bits & SIGN ? ~bits : bits | SIGN;
}

__device__ inline uint64_t weight_of(const SelectArguments& args, int64_t triplet) {
  if (!args.in_parameters) return 1;
  const Adapter& adapter = args.adapters[args.adapter_of[triplet]];
  return uint64_t(adapter.input + adapter.output + 1);
}

// ---- The end of a call

struct FinishArguments {
  const Plan* plan;
  Header* header;
  int64_t* clocks;
  uint8_t* pattern;
  const uint8_t* chosen;
  const uint8_t* given;
  const uint8_t* has_grad;
  const Adapter* adapters;
  const Slice* slices;
  const Chunk* chunks;
  const uint32_t* adapter_of;
  int64_t n_chunks, n_adapters, n_triplets;
};
static_assert(sizeof(FinishArguments) == 112);

__device__ inline bool is_kept(const FinishArguments& args, int64_t triplet) {
  switch (args.plan->pattern) {
    case PATTERN_CHOSEN: return args.chosen[triplet] != 0;
    case PATTERN_GIVEN: return args.given[triplet] != 0;
    case PATTERN_ONES: return true;
    default: return args.pattern[triplet] != 0;
  }
}

// E of a triplet becomes 0, where this process owns it.
__device__ inline void mask(const FinishArguments& args, int64_t triplet) {
  const Adapter& adapter = args.adapters[args.adapter_of[triplet]];
  const int64_t i = triplet - adapter.first_triplet;
  const int32_t last = adapter.slices[FACTOR_E + 1];
  const int32_t s = first_slice_past(args.slices, adapter.slices[FACTOR_E], last, i);
  if (s == last || args.slices[s].begin > i) return;
  const Slice& slice = args.slices[s];
  store<double>(slice.p, slice.p_dtype, i - slice.begin, 0.0);
  if (slice.p_low) store<double>(slice.p_low, slice.low_dtype, i - slice.begin, 0.0);
}

__device__ inline void zero(void* array, int32_t dtype, const Chunk& chunk) {
  for (int32_t i = threadIdx.x; i < chunk.count; i += THREADS) store<double>(array, dtype, chunk.begin + i, 0.0);
}

// ---- Orthogonality

// Rows of a factor P, which is A, or B transposed, that a block takes at once.
constexpr int TILE = 32;
// Columns over which a thread adds products in the compute type.
constexpr int PANEL = 256;

// The slice in which a thread looks for elements of a factor.
struct Owner {
  const Slice* slices;
  int32_t low, high;
  const Slice* slice;

  // Whether there is one with that element, and which.
  __device__ inline bool find(int64_t element) {
    if (slice && element >= slice->begin && element < slice->end) return true;
    const int32_t i = first_slice_past(slices, low, high, element);
    slice = i < high ? slices + i : nullptr;
    return slice && element >= slice->begin;
  }
};

// A factor of an adapter, and the block's place in it.
struct Place {
  const Adapter* adapter;
  const Factor* factor;
  bool is_b;
  int64_t rank, columns;
  // The block among those of the factor.
  uint32_t block;

  __device__ inline Owner owner(const Slice* slices) const {
    const int32_t matrix = is_b ? FACTOR_B : FACTOR_A;
    return {slices, adapter->slices[matrix], adapter->slices[matrix + 1], nullptr};
  }
  __device__ inline int64_t element(int64_t row, int64_t column) const {
    return is_b ? column * rank + row : row * columns + column;
  }
  __device__ inline int64_t gram() const { return adapter->gram + (is_b ? rank * rank : 0); }
};

__device__ inline Place place_of(const Adapter* adapters, const Factor* factors, int64_t n_factors,
                                 const int64_t* first_block, int64_t block) {
  const int64_t f = last_up_to(first_block, sizeof(Factor) / sizeof(int64_t), n_factors, block);
  Place place;
  place.adapter = adapters + f / 2;
  place.factor = factors + f;
  place.is_b = f % 2 != 0;
  place.rank = place.adapter->rank;
  place.columns = place.is_b ? place.adapter->output : place.adapter->input;
  place.block = uint32_t(block - first_block[f * int64_t(sizeof(Factor) / sizeof(int64_t))]);
  return place;
}

// Elements as they lie, so that a load waits for no other.
template <class T>
struct Lying;
template <>
struct Lying<float> {
  using Word = uint32_t;
  static __device__ inline float value(Word word, int32_t dtype) { return widen_raw(word, dtype); }
};
template <>
struct Lying<double> {
  using Word = double;
  static __device__ inline double value(Word word, int32_t) { return word; }
};

__device__ inline void store_four(void* to, int32_t, int64_t at, const double* values) {
  *reinterpret_cast<Four<double>*>(static_cast<double*>(to) + at) = {{values[0], values[1], values[2], values[3]}};
}

// How a block's threads share a tile of P. Four rows of a column are a cell; all of a thread's are of the same rows.
template <class T>
struct Cells {
  // Of a thread, read at once.
  static constexpr int N = sizeof(T) == 8 ? 2 : 3;
  // Most elements of a tile in shared memory.
  static constexpr int TILE_SIZE = 1536 * N;
  // Columns from a thread's cell to its next, and elements from column to column in shared memory, which keep
  // neighbouring columns' cells in different banks.
  int across, pitch;
  // Of the thread's first cell.
  int row, column;
  bool works;

  __device__ inline Cells(bool is_b, int rows) {
    const int groups = (rows + 3) / 4, thread = int(threadIdx.x);
    // A multiple of 8, so that rows of A are read in whole sectors.
    across = THREADS / groups / 8 * 8;
    pitch = 4 * (groups | 1);
    row = 4 * (is_b ? thread % groups : thread / across);
    column = is_b ? thread / groups : thread % across;
    works = thread < groups * across;
  }
};

// Where elements that a block takes lie, if that is in one slice.
struct Reach {
  const Slice* slice;
  int32_t row_stride, column_stride;
  // A cell's elements lie side by side, and can be read at once.
  bool in_fours;

  __device__ inline Reach(const Place& place, const Slice* slices, int64_t first_column, int64_t end_column) {
    Owner owner = place.owner(slices);
    const int64_t last = place.element(place.rank - 1, end_column - 1);
    const bool is_whole = owner.find(place.element(0, first_column)) && last < owner.slice->end;
    // From cell to cell, and within one, elements are counted in 32 bits.
    slice = is_whole && place.columns < 1 << 29 ? owner.slice : nullptr;
    row_stride = place.is_b ? 1 : int32_t(place.columns);
    column_stride = place.is_b ? int32_t(place.rank) : 1;
    in_fours = slice && place.is_b && slice->aligned && place.rank % 4 == 0 && slice->begin % 4 == 0;
  }
};

template <class Stored, class Word, int N>
__device__ inline void read_stored(const Stored* from, const Reach& reach, int across, int rows, int columns,
                                   Word (&to)[N][4]) {
  UNROLL for (int i = 0; i < N; ++i) {
    UNROLL for (int k = 0; k < 4; ++k) to[i][k] = 0;
    if (i * across >= columns) continue;
    const Stored* const cell = from + i * across * reach.column_stride;
    if (reach.in_fours) {
      const Four<Stored> values = *reinterpret_cast<const Four<Stored>*>(cell);
      UNROLL for (int k = 0; k < 4; ++k) to[i][k] = values.x[k];
    } else {
      UNROLL for (int k = 0; k < 4; ++k)
        if (k < rows) to[i][k] = cell[k * reach.row_stride];
    }
  }
}

// Cells of an array from `at` on, `across` columns apart: of them so many rows (at most 4), and columns.
template <int N>
__device__ inline void read_cells(const void* from, int32_t dtype, int64_t at, const Reach& reach, int across, int rows,
                                  int columns, uint32_t (&to)[N][4]) {
  if (is_half(dtype)) read_stored(static_cast<const uint16_t*>(from) + at, reach, across, rows, columns, to);
  else read_stored(static_cast<const uint32_t*>(from) + at, reach, across, rows, columns, to);
}
template <int N>
__device__ inline void read_cells(const void* from, int32_t, int64_t at, const Reach& reach, int across, int rows,
                                  int columns, double (&to)[N][4]) {
  read_stored(static_cast<const double*>(from) + at, reach, across, rows, columns, to);
}

// Some rows and columns of P as a block's tile, column upon column; 0 in a cell's rows where P ends, and where another
// process owns or counts it.
template <class T>
__device__ inline void load_tile(const Place& place, const Cells<T>& cells, const Reach& reach,
                                 const Slice* slices, bool with_replicas, int64_t first_row, int64_t first_column, int columns, T* tile) {
  const int rows = int(smaller(TILE, place.rank - first_row)) - cells.row;
  if (!cells.works || rows <= 0) return;
  KEEP_ROLLED for (int column = cells.column; column < columns; column += Cells<T>::N * cells.across) {
    T* to = tile + column * cells.pitch + cells.row;
    if (reach.slice && (with_replicas || !reach.slice->replica)) {
      const Slice& slice = *reach.slice;
      const int64_t at = place.element(first_row + cells.row, first_column + column) - slice.begin;
      typename Lying<T>::Word words[Cells<T>::N][4];
      read_cells(slice.p, slice.p_dtype, at, reach, cells.across, rows, columns - column, words);
      UNROLL for (int i = 0; i < Cells<T>::N; ++i) {
        if (column + i * cells.across >= columns) break;
        Four<T> values;
        UNROLL for (int k = 0; k < 4; ++k) values.x[k] = Lying<T>::value(words[i][k], slice.p_dtype);
        *reinterpret_cast<Four<T>*>(to + i * cells.across * cells.pitch) = values;
      }
      continue;
    }
    Owner owner = place.owner(slices);
    KEEP_ROLLED for (int i = 0; i < Cells<T>::N && column + i * cells.across < columns; ++i) {
      KEEP_ROLLED for (int k = 0; k < 4; ++k) {
        const int64_t element = place.element(first_row + cells.row + k, first_column + column + i * cells.across);
        T value = 0;
        if (k < rows && owner.find(element) && (with_replicas || !owner.slice->replica))
          value = load<T>(owner.slice->p, owner.slice->p_dtype, element - owner.slice->begin);
        to[i * cells.across * cells.pitch + k] = value;
      }
    }
  }
}

struct GramArguments {
  const Adapter* adapters;
  const Factor* factors;
  const Slice* slices;
  double* parts;
  int64_t n_factors;
};
static_assert(sizeof(GramArguments) == 40);

// Numbers in shared memory: two tiles of half the columns, or what 256 threads found of 16 products.
template <class T>
constexpr int GRAM_SIZE = Cells<T>::TILE_SIZE > 16 * (THREADS + 1) ? Cells<T>::TILE_SIZE : 16 * (THREADS + 1);

template <class T>
__device__ inline void gram_tile(const GramArguments& args, const Place& place, T* shared) {
  const int64_t rank = place.rank;
  const uint32_t tiles = uint32_t(ceil_div(rank, TILE)), pairs = tiles * (tiles + 1) / 2;
  const uint32_t split = place.block / pairs;
  uint32_t up = 0, across = place.block % pairs;
  while (across >= tiles - up) across -= tiles - up++;
  across += up;
  const bool same = up == across;
  const int64_t begin = split * place.factor->gram_columns;
  const int64_t end = smaller(place.columns, begin + place.factor->gram_columns);
  const Cells<T> cells(place.is_b, int(smaller(TILE, rank)));
  const int columns = Cells<T>::N * cells.across / (same ? 1 : 2);
  const Reach reach(place, args.slices, begin, end);
  T* const left = shared;
  T* const right = same ? left : left + columns * cells.pitch;

  // Threads share parts of 4 by 4 products, a share of the columns each.
  const int thread = int(threadIdx.x);
  const int high = int(smaller(TILE, rank - int64_t(up) * TILE) + 3) / 4;
  const int wide = int(smaller(TILE, rank - int64_t(across) * TILE) + 3) / 4;
  const int parts = same ? high * (high + 1) / 2 : high * wide, shares = THREADS / parts;
  const auto place_of_part = [&](int part, int& i, int& j) {
    i = same ? 0 : part / wide;
    j = same ? part : part % wide;
    if (!same) return;
    while (j >= high - i) j -= high - i++;
    j += i;
  };
  const bool works = thread < parts * shares;
  const int share = thread % shares;
  int i = 0, j = 0;
  if (works) place_of_part(thread / shares, i, j);
  T sums[4][4];
  UNROLL for (int k = 0; k < 16; ++k) sums[k / 4][k % 4] = 0;
  double totals[4] = {0.0, 0.0, 0.0, 0.0};
  int added = 0;
  KEEP_ROLLED for (int64_t first = begin; first < end; first += columns) {
    const int n = int(smaller(columns, end - first));
    KEEP_ROLLED for (int side = 0; side < (same ? 1 : 2); ++side)
      load_tile(place, cells, reach, args.slices, false, int64_t(side ? across : up) * TILE, first, n, side ? right : left);
    __syncthreads();
    if (works) {
      KEEP_ROLLED for (int c = share; c < n; c += shares) {
        const Four<T> l = *reinterpret_cast<const Four<T>*>(left + c * cells.pitch + 4 * i);
        const Four<T> r = *reinterpret_cast<const Four<T>*>(right + c * cells.pitch + 4 * j);
        UNROLL for (int k = 0; k < 16; ++k) sums[k / 4][k % 4] += l.x[k / 4] * r.x[k % 4];
      }
    }
    __syncthreads();
    added += (columns + shares - 1) / shares;
    if (first + columns < end && added + (columns + shares - 1) / shares <= PANEL) continue;
    added = 0;
    if (works) {
      UNROLL for (int k = 0; k < 16; ++k) {
        shared[k * (THREADS + 1) + thread] = sums[k / 4][k % 4];
        sums[k / 4][k % 4] = 0;
      }
    }
    __syncthreads();
    UNROLL for (int k = 0; k < 4; ++k) {
      const int product = thread + k * THREADS;
      if (product >= 16 * parts) continue;
      const T* from = shared + product % 16 * (THREADS + 1) + product / 16 * shares;
      KEEP_ROLLED for (int s = 0; s < shares; ++s) totals[k] += double(from[s]);
    }
    __syncthreads();
  }
  double* to = args.parts + place.factor->gram_part + split * rank * rank;
  UNROLL for (int k = 0; k < 4; ++k) {
    const int product = thread + k * THREADS;
    if (product >= 16 * parts) continue;
    place_of_part(product / 16, i, j);
    const int64_t row = int64_t(up) * TILE + 4 * i + product % 16 / 4;
    const int64_t column = int64_t(across) * TILE + 4 * j + product % 4;
    if (row <= column && column < rank) to[row * rank + column] = totals[k];
  }
}

template <class T>
__device__ inline void gram_block(const GramArguments& args, T* shared) {
  const Place place = place_of(args.adapters, args.factors, args.n_factors, &args.factors->gram_block, blockIdx.x);
  if ((place.adapter->is_float64 != 0) == (sizeof(T) == sizeof(double))) gram_tile(args, place, shared);
}

struct DistanceArguments {
  const Adapter* adapters;
  const Factor* factors;
  // NULL: the Gram matrices are given.
  const double* parts;
  double* gram;
  double* distances;
  int64_t n_factors;
};
static_assert(sizeof(DistanceArguments) == 48);

// Elements of a Gram matrix whose distance from the identity's one block adds up.
constexpr int64_t DISTANCE_ELEMENTS = 4096;

struct PenaltyArguments {
  const Adapter* adapters;
  const Factor* factors;
  const Slice* slices;
  const double* gram;
  const double* distances;
  const double* factor;
  double* value;
  double share;
  int64_t n_factors, n_blocks;
};
static_assert(sizeof(PenaltyArguments) == 80);

// Coefficients in shared memory, from column to column: cells start at multiples of four.
constexpr int COEFFICIENTS_PITCH = TILE + 4;

template <class T>
__device__ inline void penalty_tile(const PenaltyArguments& args, const Place& place, double coefficient,
                                    T* coefficients, T* tile) {
  const int64_t rank = place.rank;
  const uint32_t tiles = uint32_t(ceil_div(rank, TILE));
  const int64_t first_row = int64_t(place.block % tiles) * TILE;
  const int64_t begin = place.block / tiles * place.factor->penalty_columns;
  const int64_t end = smaller(place.columns, begin + place.factor->penalty_columns);
  const double* gram = args.gram + place.gram();
  const Cells<T> cells(place.is_b, int(smaller(TILE, rank)));
  const int rows = int(smaller(TILE, rank - first_row)), own_rows = rows - cells.row;
  const bool works = cells.works && own_rows > 0;
  const int padded = int(smaller(TILE, rank) + 3) / 4 * 4;
  const Reach reach(place, args.slices, begin, end);
  KEEP_ROLLED for (int64_t first = begin; first < end; first += Cells<T>::N * cells.across) {
    const int columns = int(smaller(Cells<T>::N * cells.across, end - first));
    const int64_t element = place.element(first_row + cells.row, first + cells.column);
    typename Lying<T>::Word g[Cells<T>::N][4];
    if (works && reach.slice)
      read_cells(reach.slice->g, reach.slice->g_dtype, element - reach.slice->begin, reach, cells.across, own_rows,
                 columns - cells.column, g);
    T sums[Cells<T>::N][4];
    UNROLL for (int i = 0; i < Cells<T>::N; ++i)
      UNROLL for (int k = 0; k < 4; ++k) sums[i][k] = 0;
    KEEP_ROLLED for (int64_t across = 0; across < rank; across += TILE) {
      const int n = int(smaller(TILE, rank - across));
      load_tile(place, cells, reach, args.slices, true, across, first, columns, tile);
      if (tiles > 1 || first == begin) {
        KEEP_ROLLED for (int e = threadIdx.x; e < padded * padded; e += THREADS) {
          const int i = e / padded, j = e % padded;
          double distance = 0.0;
          if (i < rows && j < n)
            distance = gram[(first_row + i) * rank + across + j] - (first_row + i == across + j ? 1.0 : 0.0);
          coefficients[j * COEFFICIENTS_PITCH + i] = T(distance * coefficient);
        }
      }
      __syncthreads();
      if (works) {
        KEEP_ROLLED for (int j = 0; j < n; j += 4) {
          Four<T> p[Cells<T>::N];
          UNROLL for (int i = 0; i < Cells<T>::N; ++i)
            p[i] = *reinterpret_cast<const Four<T>*>(tile + (cells.column + i * cells.across) * cells.pitch + j);
          UNROLL for (int q = 0; q < 4; ++q) {
            const Four<T> c =
                *reinterpret_cast<const Four<T>*>(coefficients + (j + q) * COEFFICIENTS_PITCH + cells.row);
            UNROLL for (int i = 0; i < Cells<T>::N; ++i)
              UNROLL for (int k = 0; k < 4; ++k) sums[i][k] += c.x[k] * p[i].x[q];
          }
        }
      }
      __syncthreads();
    }
    if (!works) continue;
    if (reach.slice) {
      const Slice& slice = *reach.slice;
      UNROLL for (int i = 0; i < Cells<T>::N; ++i) {
        if (cells.column + i * cells.across >= columns) break;
        const int64_t at = element - slice.begin + i * cells.across * reach.column_stride;
        UNROLL for (int k = 0; k < 4; ++k) sums[i][k] += Lying<T>::value(g[i][k], slice.g_dtype);
        if (reach.in_fours) {
          store_four(slice.g, slice.g_dtype, at, sums[i]);
        } else {
          UNROLL for (int k = 0; k < 4; ++k)
            if (k < own_rows) store<T>(slice.g, slice.g_dtype, at + k * reach.row_stride, sums[i][k]);
        }
      }
      continue;
    }
    // A thread's cells of the tile are its own again.
    T* const own = tile + cells.column * cells.pitch + cells.row;
    UNROLL for (int i = 0; i < Cells<T>::N; ++i)
      UNROLL for (int k = 0; k < 4; ++k) own[i * cells.across * cells.pitch + k] = sums[i][k];
    Owner owner = place.owner(args.slices);
    KEEP_ROLLED for (int i = 0; i < Cells<T>::N && cells.column + i * cells.across < columns; ++i) {
      KEEP_ROLLED for (int k = 0; k < 4 && k < own_rows; ++k) {
        const int64_t e = element + (place.is_b ? i * cells.across * rank + k : i * cells.across + k * place.columns);
        if (!owner.find(e)) continue;
        const Slice& slice = *owner.slice;
        const int64_t at = e - slice.begin;
        store<T>(slice.g, slice.g_dtype, at,
                 load<T>(slice.g, slice.g_dtype, at) + own[i * cells.across * cells.pitch + k]);
      }
    }
  }
}

template <class T>
__device__ inline void penalty_block(const PenaltyArguments& args, T* coefficients, T* tile) {
  __shared__ double shared[WARPS];
  if (int64_t(blockIdx.x) == args.n_blocks) {
    double sum = 0.0;
    for (int64_t f = threadIdx.x; f < args.n_factors; f += THREADS) {
      double squares = 0.0;
      for (int64_t i = args.factors[f].distance_block; i < args.factors[f + 1].distance_block; ++i)
        squares += args.distances[i];
      sum += args.share * sqrt(squares);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0 && args.value) *args.value = sum;
    return;
  }
  const Place place = place_of(args.adapters, args.factors, args.n_factors, &args.factors->penalty_block, blockIdx.x);
  if ((place.adapter->is_float64 != 0) != (sizeof(T) == sizeof(double))) return;
  double squares = 0.0;
  for (int64_t i = place.factor[0].distance_block + threadIdx.x; i < place.factor[1].distance_block; i += THREADS)
    squares += args.distances[i];
  const double norm = sqrt(block_sum(squares, shared));
  const double scale = args.share * (args.factor ? *args.factor : 1.0);
  penalty_tile(args, place, norm > 0.0 ? scale * 2.0 / norm : 0.0, coefficients, tile);
}

// ---- Digest

struct DigestArguments {
  const Header* header;
  const uint8_t* pattern;
  int64_t n_triplets;
  uint64_t* digest;
};
static_assert(sizeof(DigestArguments) == 32);

constexpr uint64_t FNV_BASIS = 0xcbf29ce484222325ull;
constexpr uint64_t FNV_PRIME = 0x00000100000001b3ull;

__device__ inline uint64_t fnv(uint64_t hash, uint64_t number) {
  for (int byte = 0; byte < 8; ++byte) hash = (hash ^ (number >> 8 * byte & 255)) * FNV_PRIME;
  return hash;
}

__device__ inline uint64_t power(uint64_t base, int64_t exponent) {
  uint64_t result = 1;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2) result *= base;
  return result;
}

// ---- Compaction

struct GatherArguments {
  const void* from[7];
  void* to[7];
  int64_t size[7];
  // The adapter's triplets that are kept.
  const uint32_t* kept;
  int64_t from_begin, to_begin, count;
  int64_t input, from_rank, to_rank;
  int64_t factor;
};
static_assert(sizeof(GatherArguments) == 232);

}  // namespace allocator
}  // namespace

// One block: gradients that have moved, and a run that begins.
KERNEL(allocator_rebind, allocator::RebindArguments) {
  using namespace allocator;
  for (int64_t i = threadIdx.x; i < args.count; i += THREADS) args.slices[args.first + i].g = args.g[i];
  const bool begins = args.header->magic == 0;
  __syncthreads();
  if (!begins) return;
  for (int64_t i = threadIdx.x; i < args.n_triplets; i += THREADS) args.pattern[i] = 1;
  if (threadIdx.x == 0) *args.header = args.fresh;
}

// Sums of squares of the gradients that count, a chunk each, and whether any is not finite.
KERNEL(allocator_squares, allocator::SquaresArguments) {
  using namespace allocator;
  __shared__ double sums[WARPS];
  __shared__ uint32_t flags[WARPS];
  const Chunk chunk = args.chunks[blockIdx.x];
  const Slice& slice = args.slices[chunk.slice];
  double sum = 0.0;
  uint32_t not_finite = 0;
  if ((args.with_replicas || !slice.replica) && (!args.has_grad || args.has_grad[slice.adapter])) {
    const bool aligned = slice.aligned != 0;
    switch (slice.g_dtype) {
      case FLOAT64:
        add_squares(static_cast<const double*>(slice.g) + chunk.begin, chunk.count, aligned, sum, not_finite);
        break;
      case BFLOAT16:
        add_squares(static_cast<const bfloat16*>(slice.g) + chunk.begin, chunk.count, aligned, sum, not_finite);
        break;
      case FLOAT16:
        add_squares(static_cast<const float16*>(slice.g) + chunk.begin, chunk.count, aligned, sum, not_finite);
        break;
      default: add_squares(static_cast<const float*>(slice.g) + chunk.begin, chunk.count, aligned, sum, not_finite);
    }
  }
  sum = block_sum(sum, sums);
  not_finite = block_sum(not_finite, flags);
  if (threadIdx.x == 0) {
    args.sums[blockIdx.x] = sum;
    args.not_finite[blockIdx.x] = not_finite;
  }
}

// One block: what the chunks' sums add to the trainer's.
KERNEL(allocator_norm, allocator::NormArguments) {
  using namespace allocator;
  __shared__ double sums[WARPS];
  __shared__ uint32_t flags[WARPS];
  double sum = 0.0;
  uint32_t not_finite = 0;
  for (int64_t i = threadIdx.x; i < args.n_chunks; i += THREADS) {
    sum += args.sums[i];
    not_finite |= args.not_finite[i] != 0 ? 1u : 0u;
  }
  sum = block_sum(sum, sums);
  not_finite = block_sum(not_finite, flags);
  if (threadIdx.x == 0) {
    *args.sum_of_squares += sum;
    if (args.found_inf && not_finite) *args.found_inf = 1.0f;
  }
}

// The first launch of a call that changes the run: what it will do, and with AdamW what each slice multiplies by.
KERNEL(allocator_plan, allocator::PlanArguments) {
  using namespace allocator;
  __shared__ uint32_t flags[WARPS];
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (args.with_adamw && i < args.n_slices) {
    const Slice& slice = args.slices[i];
    const int64_t k = args.clocks[slice.adapter] + 1;
    if (slice.state_dtype == FLOAT64) args.rates[i].whole = rates<double>(slice, k);
    else args.rates[i].single = rates<float>(slice, k);
  }
  if (blockIdx.x != 0) return;
  uint32_t not_finite = 0;
  if (args.not_finite)
    for (int64_t c = threadIdx.x; c < args.n_chunks; c += THREADS) not_finite |= args.not_finite[c] != 0 ? 1u : 0u;
  not_finite = block_sum(not_finite, flags);
  if (threadIdx.x == 0) *args.plan = decide(args, not_finite != 0);
}

// AdamW, importance and both averages of one chunk: everything is read and written once.
KERNEL(allocator_update, allocator::UpdateArguments) {
  using namespace allocator;
  if (!args.plan->updates) return;
  const Chunk chunk = args.chunks[blockIdx.x];
  const Slice& slice = args.slices[chunk.slice];
  const bool has_grad = !args.has_grad || args.has_grad[slice.adapter] != 0;
  if (slice.state_dtype == FLOAT64) {
    const Change<double> change = change_of<double>(args, chunk, has_grad);
    for (int32_t i = threadIdx.x; i < chunk.count; i += THREADS) update_one(change, slice, chunk.begin + i);
    return;
  }
  const Change<float> change = change_of<float>(args, chunk, has_grad);
  if (!change.steps && !change.smooths) return;
  const int32_t fours = slice.aligned ? chunk.count / 4 : 0;
  for (int32_t i = threadIdx.x; i < fours; i += THREADS) update_four(change, slice, chunk.begin + int64_t(i) * 4);
  for (int32_t i = fours * 4 + threadIdx.x; i < chunk.count; i += THREADS) update_one(change, slice, chunk.begin + i);
}

// Scores added up over parts of A and B.
KERNEL_OF_THREE(allocator_score_parts, allocator::ScoresArguments) {
  using namespace allocator;
  __shared__ double sums[4 * THREADS];
  if (args.plan && !args.plan->chooses) return;
  if (blockIdx.x < args.blocks_of_b) add_scores_of_b(args, sums);
  else add_scores_of_a(args);
}

// The parts together: a warp for each triplet.
KERNEL(allocator_scores, allocator::ScoresArguments) {
  using namespace allocator;
  if (args.plan && !args.plan->chooses) return;
  const int64_t triplet = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (triplet >= args.n_triplets) return;
  const Adapter& adapter = args.adapters[args.adapter_of[triplet]];
  const int64_t i = triplet - adapter.first_triplet, lane = threadIdx.x % 32;
  double of_a = 0.0, of_e = 0.0, of_b = 0.0;
  const int64_t segments = ceil_div(adapter.input, SCORE_COLUMNS);
  for (int64_t segment = lane; segment < segments; segment += 32)
    of_a += args.parts_of_a[adapter.score_part_of_a + i * segments + segment];
  const int32_t s = first_slice_past(args.slices, adapter.slices[FACTOR_E], adapter.slices[FACTOR_E + 1], i);
  if (s < adapter.slices[FACTOR_E + 1] && args.slices[s].begin <= i && !args.slices[s].replica)
    of_e = score(args.slices[s], i - args.slices[s].begin);
  const int64_t blocks = ceil_div(adapter.output, adapter.score_rows);
  for (int64_t block = lane; block < blocks; block += 32)
    of_b += args.parts_of_b[adapter.score_part_of_b + block * adapter.rank + i];
  of_a = warp_sum(of_a);
  of_b = warp_sum(of_b);
  if (lane == 0) {
    double total = capped(of_a / double(adapter.input));
    total = capped(total + of_e);
    args.scores[triplet] = capped(total + of_b / double(adapter.output));
  }
}

// One block: which triplets stay. Highest scores first, a byte of their keys at a time, until it is known which key the
// budget ends at; then its ties in their order.
KERNEL(allocator_select, allocator::SelectArguments) {
  using namespace allocator;
  __shared__ uint32_t low[256], high[256];
  __shared__ uint64_t scans[WARPS];
  __shared__ uint64_t cut_before;
  __shared__ int32_t cut;
  if (!args.plan->chooses) return;
  uint64_t left = args.plan->budget > 0 ? uint64_t(args.plan->budget) : 0;
  uint64_t head = 0;
  int shift = 64;
  bool all_stay = false;
  const uint32_t n = uint32_t(args.n_triplets);
  do {
    shift -= 8;
    low[threadIdx.x] = high[threadIdx.x] = 0;
    if (threadIdx.x == 0) cut = -1;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < n; i += THREADS) {
      const uint64_t key = key_of(args.scores[i]);
      if (shift < 56 && key >> (shift + 8) != head) continue;
      // Two words, as shared memory adds 32 bits fast; how often the lower one overflows does not depend on the order.
      const uint64_t weight = weight_of(args, i);
      const uint32_t digit = uint32_t(key >> shift) & 255u, lower = uint32_t(weight);
      const uint32_t before = atomicAdd(&low[digit], lower);
      const uint32_t upper = uint32_t(weight >> 32) + (before + lower < lower ? 1u : 0u);
      if (upper != 0) atomicAdd(&high[digit], upper);
    }
    __syncthreads();
    const int digit = 255 - int(threadIdx.x);
    const uint64_t weight = uint64_t(high[digit]) << 32 | low[digit];
    const uint64_t up_to = block_scan(weight, scans);
    if (up_to > left && up_to - weight <= left) {
      cut = digit;
      cut_before = up_to - weight;
    }
    __syncthreads();
    all_stay = cut < 0;
    if (!all_stay) {
      left -= cut_before;
      head = head << 8 | uint64_t(cut);
    }
    __syncthreads();
  } while (!all_stay && left > 0 && shift > 0);
  uint64_t spent = 0;
  for (uint32_t first = 0; first < n; first += THREADS) {
    const uint32_t i = first + threadIdx.x;
    const uint64_t own = i < n ? key_of(args.scores[i]) >> shift : 0;
    bool stays = all_stay || own > head;
    // Without it no further tie fits.
    if (!all_stay && spent < left) {
      const bool is_tie = i < n && own == head;
      const uint64_t up_to = spent + block_scan(is_tie ? weight_of(args, i) : 0, scans);
      stays = stays || (is_tie && up_to <= left);
      if (threadIdx.x == THREADS - 1) cut_before = up_to;
      __syncthreads();
      spent = cut_before;
      __syncthreads();
    }
    if (i < n) args.chosen[i] = stays ? 1 : 0;
  }
}

// The last launch of a call that changes the run: averages cleared, E masked, and the state's own next values.
KERNEL(allocator_finish, allocator::FinishArguments) {
  using namespace allocator;
  const Plan& plan = *args.plan;
  if (plan.clears) {
    for (int64_t c = blockIdx.x; c < args.n_chunks; c += gridDim.x) {
      const Chunk chunk = args.chunks[c];
      const Slice& slice = args.slices[chunk.slice];
      zero(slice.exp_avg_ipt, slice.state_dtype, chunk);
      zero(slice.exp_avg_unc, slice.state_dtype, chunk);
      if (plan.clears == CLEARS_MOMENTS_TOO && slice.m) {
        zero(slice.m, slice.state_dtype, chunk);
        zero(slice.v, slice.state_dtype, chunk);
      }
    }
  }
  const int64_t thread = int64_t(blockIdx.x) * THREADS + threadIdx.x, threads = int64_t(gridDim.x) * THREADS;
  if (plan.masks || plan.pattern != PATTERN_STAYS) {
    for (int64_t i = thread; i < args.n_triplets; i += threads) {
      const bool kept = is_kept(args, i);
      if (plan.masks && !kept) mask(args, i);
      args.pattern[i] = kept ? 1 : 0;
    }
  }
  if (plan.clocks == CLOCKS_ADVANCE)
    for (int64_t i = thread; i < args.n_adapters; i += threads)
      args.clocks[i] += !args.has_grad || args.has_grad[i] != 0 ? 1 : 0;
  if (plan.clocks == CLOCKS_ZERO)
    for (int64_t i = thread; i < args.n_adapters; i += threads) args.clocks[i] = 0;
  if (thread == 0) *args.header = plan.next;
}

// Products of some rows of a factor with others, over some of its columns.
KERNEL_OF_THREE(allocator_gram_float32, allocator::GramArguments) {
  using namespace allocator;
  __shared__ allocator::Four<float> shared[GRAM_SIZE<float> / 4];
  gram_block(args, reinterpret_cast<float*>(shared));
}

KERNEL_OF_ONE(allocator_gram_float64, allocator::GramArguments) {
  using namespace allocator;
  __shared__ allocator::Four<double> shared[GRAM_SIZE<double> / 4];
  gram_block(args, reinterpret_cast<double*>(shared));
}

// Some elements of a Gram matrix, from the sums over its columns unless it is given, and how far from the identity's
// they are.
KERNEL(allocator_distance, allocator::DistanceArguments) {
  using namespace allocator;
  __shared__ double shared[WARPS];
  const Place place = place_of(args.adapters, args.factors, args.n_factors, &args.factors->distance_block, blockIdx.x);
  const int64_t rank = place.rank, square = rank * rank;
  const int64_t splits = ceil_div(place.columns, place.factor->gram_columns);
  double* gram = args.gram + place.gram();
  double sum = 0.0;
  const int64_t end = smaller(square, (place.block + 1) * DISTANCE_ELEMENTS);
  for (int64_t e = place.block * DISTANCE_ELEMENTS + threadIdx.x; e < end; e += THREADS) {
    const int64_t row = e / rank, column = e % rank;
    double value = 0.0;
    if (args.parts) {
      const double* from = args.parts + place.factor->gram_part + smaller(row, column) * rank + larger(row, column);
      for (int64_t split = 0; split < splits; ++split) value += from[split * square];
      gram[e] = value;
    } else {
      value = gram[e];
    }
    const double distance = value - (row == column ? 1.0 : 0.0);
    sum += distance * distance;
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) args.distances[blockIdx.x] = sum;
}

// The penalty's gradient added to some elements of a factor's; the last block writes the penalty.
KERNEL_OF_THREE(allocator_penalty_float32, allocator::PenaltyArguments) {
  using namespace allocator;
  __shared__ allocator::Four<float> tile[Cells<float>::TILE_SIZE / 4], coefficients[TILE * COEFFICIENTS_PITCH / 4];
  penalty_block(args, reinterpret_cast<float*>(coefficients), reinterpret_cast<float*>(tile));
}

KERNEL_OF_ONE(allocator_penalty_float64, allocator::PenaltyArguments) {
  using namespace allocator;
  __shared__ allocator::Four<double> tile[Cells<double>::TILE_SIZE / 4], coefficients[TILE * COEFFICIENTS_PITCH / 4];
  penalty_block(args, reinterpret_cast<double*>(coefficients), reinterpret_cast<double*>(tile));
}

// One block: FNV-1a of what every process must agree on. Bytes that are 0 or 1 change the hash's lowest bit alone
// before it is multiplied, by an amount that the parity of those before decides; so the hash is a sum of powers.
KERNEL(allocator_digest, allocator::DigestArguments) {
  using namespace allocator;
  __shared__ uint64_t scans[WARPS];
  uint64_t hash = fnv(FNV_BASIS, args.header->model);
  hash = fnv(fnv(hash, uint64_t(args.header->flags)), uint64_t(args.header->last_step));
  if (args.header->flags & HAS_PATTERN) {
    const int64_t n = args.n_triplets, each = ceil_div(n, THREADS);
    const int64_t begin = smaller(n, each * threadIdx.x), end = smaller(n, begin + each);
    uint64_t ones = 0;
    for (int64_t i = begin; i < end; ++i) ones += args.pattern[i];
    bool is_odd = (hash + block_scan(ones, scans) - ones) % 2 != 0;
    uint64_t own = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (args.pattern[i]) {
        own += is_odd ? ~uint64_t(0) : 1;
        is_odd = !is_odd;
      }
      own *= FNV_PRIME;
    }
    hash = hash * power(FNV_PRIME, n) + block_sum(own * power(FNV_PRIME, n - end), scans);
  }
  if (threadIdx.x == 0) *args.digest = hash;
}

// What is kept of a slice.
KERNEL(allocator_gather, allocator::GatherArguments) {
  using namespace allocator;
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= args.count) return;
  const int64_t element = args.to_begin + i;
  int64_t source = 0;
  switch (args.factor) {
    case FACTOR_A: source = int64_t(args.kept[element / args.input]) * args.input + element % args.input; break;
    case FACTOR_E: source = args.kept[element]; break;
    default: source = element / args.to_rank * args.from_rank + args.kept[element % args.to_rank];
  }
  source -= args.from_begin;
  for (int array = 0; array < 7; ++array) {
    switch (args.size[array]) {
      case 2: static_cast<uint16_t*>(args.to[array])[i] = static_cast<const uint16_t*>(args.from[array])[source]; break;
      case 4: static_cast<uint32_t*>(args.to[array])[i] = static_cast<const uint32_t*>(args.from[array])[source]; break;
      case 8: static_cast<uint64_t*>(args.to[array])[i] = static_cast<const uint64_t*>(args.from[array])[source]; break;
      default: break;
    }
  }
}
