// Kernels that keep the rules, and kernels that break them.
#include "host_kernels.hpp"

namespace {

constexpr uint32_t ALL_LANES = 0xffffffffu;

template <class T>
__device__ T block_sum(T value) {
  __shared__ T sums[8];
  for (int by = 16; by > 0; by >>= 1) value += __shfl_down_sync(ALL_LANES, value, by);
  if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = value;
  __syncthreads();
  T total = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) total += sums[i];
  __syncthreads();
  return total;
}

}  // namespace

struct Add {
  float* to;
  const float* from;
  int64_t count;
  float value;
  int32_t padding;
};
KERNEL(add, Add) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < args.count) args.to[i] = args.from[i] + args.value;
}

struct Sum {
  double* to;
  const double* from;
};
KERNEL(sum, Sum) {
  const double total = block_sum(args.from[blockIdx.x * blockDim.x + threadIdx.x]);
  if (threadIdx.x == 0) args.to[blockIdx.x] = total;
}

struct Plain {
  uint32_t* to;
};
// What the warp's and the block's operations say.
KERNEL(operations, Plain) {
  __shared__ uint32_t counter;
  if (threadIdx.x == 0) counter = 0;
  __syncthreads();
  atomicAdd(&counter, threadIdx.x);
  atomicMax(&counter, 0u);
  __syncthreads();
  const uint32_t lane = threadIdx.x & 31;
  uint32_t* to = args.to + threadIdx.x * 8;
  to[0] = counter;
  to[1] = __shfl_xor_sync(ALL_LANES, threadIdx.x, 1);
  to[2] = __shfl_sync(ALL_LANES, threadIdx.x, 3);
  to[3] = __shfl_up_sync(ALL_LANES, threadIdx.x, 2);
  to[4] = __ballot_sync(ALL_LANES, lane % 3 == 0);
  to[5] = uint32_t(__syncthreads_count(threadIdx.x < 5));
  to[6] = lane < 16 ? __shfl_down_sync(0xffffu, threadIdx.x, 1, 8) : 0u;
  __syncwarp();
  to[7] = uint32_t(__any_sync(ALL_LANES, lane == 7)) + 2 * uint32_t(__all_sync(ALL_LANES, lane < 31));
}

// Reads what no thread of the block wrote.
KERNEL(unset_shared, Plain) {
  __shared__ uint32_t values[64];
  if (threadIdx.x % 2 == 0) values[threadIdx.x] = 7;
  __syncthreads();
  args.to[threadIdx.x] = values[threadIdx.x];
}

// Which thread was first depends on the order.
KERNEL(race, Plain) { args.to[0] = threadIdx.x; }

KERNEL(divergent_barrier, Plain) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  args.to[0] = 0;
}
KERNEL(barrier_after_return, Plain) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  args.to[0] = 0;
}
KERNEL(shuffle_after_return, Plain) {
  if (threadIdx.x == 5) return;
  args.to[threadIdx.x] = __shfl_xor_sync(ALL_LANES, threadIdx.x, 1);
}
KERNEL(shuffle_in_a_branch, Plain) {
  if (threadIdx.x % 2 == 0) args.to[threadIdx.x] = __shfl_xor_sync(ALL_LANES, threadIdx.x, 2);
}
KERNEL(misaligned, Plain) { *reinterpret_cast<uint64_t*>(args.to + 1) = threadIdx.x; }
KERNEL(divides_by_zero, Plain) { args.to[0] = 7u / (args.to[0] - 2u); }
KERNEL(past_an_array, Plain) {
  __shared__ uint32_t values[4];
  values[(threadIdx.x & 3) + args.to[0]] = 1;
  __syncthreads();
  args.to[threadIdx.x] = values[0];
}
KERNEL(past_the_stack, Plain) {
  volatile char large[80 << 10];
  for (int i = int(sizeof large); i-- > 0;) large[i] = char(i);
  args.to[0] = uint32_t(large[args.to[0] & 7]);
}
