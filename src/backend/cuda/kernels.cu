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
#define UNROLL _Pragma("unroll")
#else
// Defines KERNEL, threadIdx and their like, barriers, shuffles and atomics.
#include "host_kernels.hpp"
#define UNROLL
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
  __shared__ float largest[THREADS];
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
  largest[threadIdx.x] = mine;
  for (int32_t half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int32_t(threadIdx.x) < half)
      largest[threadIdx.x] = fmaxf(largest[threadIdx.x], largest[threadIdx.x + half]);
  }
  if (threadIdx.x == 0) (is_a ? p.of_a : p.of_b)[triplet] = power_below(largest[0]);
}

// A factor, in the type and terms that the matrix products take, padded with triplets of zeros.
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
  int32_t active_only;  // triplets whose E is 0 become zeros too
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
  for (int64_t i = block * THREADS + threadIdx.x; i < count; i += p.blocks * THREADS) {
    const int64_t row = i / (p.is_a ? p.features : p.padded), column = i - row * (p.is_a ? p.features : p.padded);
    const int64_t triplet = p.is_a ? row : column;
    T value = T(0);
    if (triplet < p.rank && is_kept(p.pattern, triplet) &&
        (!p.active_only || load<T>(p.e, p.e_dtype, triplet * p.e_stride) != T(0))) {
      value = load<T>(p.from, p.from_dtype, row * p.from_stride + column);
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

// Sums the tiles' sums, in order, into the gradient of E; and makes scales of the tiles' peaks, which bring a column of
// float16 elements into the upper half of its range. A warp for each triplet.
struct ReducePiece {
  const double* sums;  // null: no gradient
  const float* peaks;  // null: no scales
  float* scales;
  void* to;
  int64_t to_stride, rank;
  int64_t first_block;
  int32_t to_dtype, reserved;
};
struct PassReduce {
  ReducePiece piece[PIECES];
  int64_t tiles;
  int32_t pieces, is_double, accumulate, reserved;
};
static_assert(sizeof(ReducePiece) == 64 && sizeof(PassReduce) == 16 * 64 + 24, "as in pass.rs");

KERNEL(pass_reduce, PassReduce) {
  const ReducePiece& p = args.piece[piece_of_block(args, blockIdx.x)];
  const int32_t lane = threadIdx.x % 32;
  const int64_t j = (int64_t(blockIdx.x) - p.first_block) * (THREADS / 32) + threadIdx.x / 32;
  if (j >= p.rank) return;
  double sum = 0.0;
  float peak = 0.0f;
  for (int64_t tile = lane; tile < args.tiles; tile += 32) {
    if (p.sums != nullptr) sum += p.sums[tile * p.rank + j];
    if (p.peaks != nullptr) peak = fmaxf(peak, p.peaks[tile * p.rank + j]);
  }
  for (int32_t distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(ALL_LANES, sum, distance);
    peak = fmaxf(peak, __shfl_xor_sync(ALL_LANES, peak, distance));
  }
  if (lane != 0) return;
  if (p.sums != nullptr) {
    const int64_t at = j * p.to_stride;
    if (args.is_double)
      store<double>(p.to, p.to_dtype, at, (args.accumulate ? load<double>(p.to, p.to_dtype, at) : 0.0) + sum);
    else
      store<float>(p.to, p.to_dtype, at, (args.accumulate ? load<float>(p.to, p.to_dtype, at) : 0.0f) + float(sum));
  }
  // Nothing to scale by: as it is.
  if (p.peaks != nullptr) p.scales[j] = peak > 0.0f ? 16384.0f / power_below(peak) : 1.0f;
}

// A gradient of A or B from its product's terms.
struct GradientPiece {
  const void* from;  // of the compute type; row `triplet`, terms `segment` apart
  const void* e;
  const uint8_t* pattern;
  const float* scales;  // divide; null: 1
  void* to;
  int64_t from_stride, segment, to_stride;
  int64_t features, rank, e_stride;
  int64_t first_block, blocks;
  double multiplier;
  int32_t terms, e_dtype, to_dtype, is_a;
};
struct PassGradient {
  GradientPiece piece[PIECES];
  int32_t pieces, is_double, accumulate, reserved;
};
static_assert(sizeof(GradientPiece) == 128 && sizeof(PassGradient) == 16 * 128 + 16, "as in pass.rs");

namespace {

template <class T>
__device__ inline void gradient(const GradientPiece& p, int64_t block, bool accumulate) {
  const int64_t count = p.features * p.rank;
  for (int64_t i = block * THREADS + threadIdx.x; i < count; i += p.blocks * THREADS) {
    const int64_t row = i / (p.is_a ? p.features : p.rank), column = i - row * (p.is_a ? p.features : p.rank);
    const int64_t triplet = p.is_a ? row : column, feature = p.is_a ? column : row;
    T value = T(0);
    // A triplet whose E is 0 receives nothing, also where x or dy is not finite.
    if (is_kept(p.pattern, triplet) && load<T>(p.e, p.e_dtype, triplet * p.e_stride) != T(0)) {
      value = sum_of_terms<T>(p.from, triplet * p.from_stride + feature, p.segment, p.terms) * T(p.multiplier);
      if (p.scales != nullptr) value /= T(p.scales[triplet]);
    }
    const int64_t at = row * p.to_stride + column;
    store<T>(p.to, p.to_dtype, at, (accumulate ? load<T>(p.to, p.to_dtype, at) : T(0)) + value);
  }
}

}  // namespace

KERNEL(pass_gradient, PassGradient) {
  const GradientPiece& p = args.piece[piece_of_block(args, blockIdx.x)];
  const int64_t block = int64_t(blockIdx.x) - p.first_block;
  if (args.is_double)
    gradient<double>(p, block, args.accumulate != 0);
  else
    gradient<float>(p, block, args.accumulate != 0);
}

// Dropout's mask on [tokens, columns]. Four neighbouring columns of the whole layer are one draw, and one thread's.
struct Mask {
  const uint64_t *seed, *offset;
  uint64_t threshold;  // 2^32 * p
  int64_t first_column, token0;
};

namespace {

template <class Visit>
__device__ inline void for_each_column(const Mask& mask, int64_t t, int64_t quad, int64_t columns, Visit visit) {
  const uint64_t seed = *mask.seed, offset = *mask.offset;
  const int64_t word = mask.first_column / 4 + quad;
  const Philox drawn = philox({{uint32_t(word), uint32_t(mask.token0 + t), uint32_t(offset), uint32_t(offset >> 32)}},
                              uint32_t(seed), uint32_t(seed >> 32));
  for (int32_t i = 0; i < 4; ++i) {
    const int64_t column = 4 * word + i - mask.first_column;
    if (column >= 0 && column < columns) visit(column, drawn.word[i] >= mask.threshold);
  }
}

}  // namespace

// Copies x without the elements that fall.
struct PassDrop {
  Mask mask;
  const void* x;
  void* to;
  int64_t x_stride, to_stride, tokens, columns;
  int64_t row_blocks, blocks;
  int32_t dtype, reserved;
};
static_assert(sizeof(Mask) == 40 && sizeof(PassDrop) == 112, "as in pass.rs");

namespace {

template <class Element>
__device__ inline void drop(const PassDrop& args) {
  for (int64_t block = blockIdx.x; block < args.tokens * args.row_blocks; block += args.blocks) {
    const int64_t t = block / args.row_blocks, quad = (block - t * args.row_blocks) * THREADS + threadIdx.x;
    const Element* from = static_cast<const Element*>(args.x) + t * args.x_stride;
    Element* to = static_cast<Element*>(args.to) + t * args.to_stride;
    if (4 * quad < args.columns + 3)
      for_each_column(args.mask, t, quad, args.columns, [&](int64_t column, bool stays) {
        to[column] = stays ? from[column] : Element{};
      });
  }
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
  const void* share;  // of the compute type
  const void* before;  // likewise; null: nothing
  void* after;         // likewise; null: this is the last one
  void* dx;
  double multiplier;
  int64_t stride;  // of the three
  int64_t dx_stride, tokens, columns;
  int64_t row_blocks, blocks;
  int32_t dx_dtype, is_double;
};
static_assert(sizeof(PassUndrop) == 136, "as in pass.rs");

namespace {

template <class T>
__device__ inline void undrop(const PassUndrop& args) {
  for (int64_t block = blockIdx.x; block < args.tokens * args.row_blocks; block += args.blocks) {
    const int64_t t = block / args.row_blocks, quad = (block - t * args.row_blocks) * THREADS + threadIdx.x;
    if (4 * quad >= args.columns + 3) continue;
    for_each_column(args.mask, t, quad, args.columns, [&](int64_t column, bool stays) {
      const int64_t at = t * args.stride + column;
      T value = stays ? static_cast<const T*>(args.share)[at] * T(args.multiplier) : T(0);
      if (args.before != nullptr) value += static_cast<const T*>(args.before)[at];
      if (args.after != nullptr) {
        static_cast<T*>(args.after)[at] = value;
      } else {
        const int64_t to = t * args.dx_stride + column;
        store<T>(args.dx, args.dx_dtype, to, load<T>(args.dx, args.dx_dtype, to) + value);
      }
    });
  }
}

}  // namespace

KERNEL(pass_undrop, PassUndrop) {
  if (args.is_double)
    undrop<double>(args);
  else
    undrop<float>(args);
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
  int32_t w_dtype, dtype, is_double;
  int32_t combine;  // 0: overwrite, 1: add, 2: subtract
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
    const int32_t depth = args.rank - first < DELTA_DEPTH ? int32_t(args.rank - first) : DELTA_DEPTH;
    for (int32_t k = 0; k < depth; ++k)
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

KERNEL(weight_delta, WeightDelta) {
  __shared__ double across[DELTA_DEPTH][DELTA_ROWS];
  __shared__ double along[DELTA_DEPTH][DELTA_COLUMNS];
  if (args.is_double)
    delta<double>(args, across, along);
  else
    delta<float>(args, reinterpret_cast<float(*)[DELTA_ROWS]>(across),
                 reinterpret_cast<float(*)[DELTA_COLUMNS]>(along));
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
