// Multiply-adds of vectors that wait for no memory and for none of each other: what a thread can do at most.

#include <stdint.h>

#if defined(__AVX512F__)
enum { BYTES = 64 };
#elif defined(__AVX__)
enum { BYTES = 32 };
#else
enum { BYTES = 16 };
#endif
// As many as hide the latency, and as the registers hold beside the factor and the summand.
enum { CHAINS = 12, LANES = BYTES / sizeof(float) };

typedef float vector __attribute__((vector_size(BYTES)));

// Returns how many floating-point operations were done; `sums` takes CHAINS results, so that none is left out.
int64_t multiply_add(int64_t rounds, float* sums) {
  vector chains[CHAINS], factor, summand;
  for (int lane = 0; lane < LANES; ++lane) factor[lane] = 0.999f, summand[lane] = 0.001f;
  for (int i = 0; i < CHAINS; ++i) chains[i] = summand;
  for (int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < CHAINS; ++i) chains[i] = chains[i] * factor + summand;
  for (int i = 0; i < CHAINS; ++i) sums[i] = chains[i][0];
  return 2 * LANES * CHAINS * rounds;
}
