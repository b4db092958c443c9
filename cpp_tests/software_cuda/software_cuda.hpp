// What tests ask of software CUDA beside CUDA's own functions.
#pragma once

#include <cstdint>

extern "C" {

// Objects that live now, over all devices.
enum {
  SOFTWARE_CUDA_ALLOCATIONS,
  SOFTWARE_CUDA_BYTES,
  SOFTWARE_CUDA_STREAMS,
  SOFTWARE_CUDA_EVENTS,
  SOFTWARE_CUDA_GRAPHS,
  SOFTWARE_CUDA_GRAPH_EXECS,
  SOFTWARE_CUDA_RETAINED_CONTEXTS,  // cuDevicePrimaryCtxRetain less cuDevicePrimaryCtxRelease
  SOFTWARE_CUDA_MODULES,
  SOFTWARE_CUDA_HANDLES,
};
int64_t software_cuda_live(int what);

// The nth call from now of a function that returns a status fails once, and does nothing; 0: none does. Functions that
// only tell what an error was do not count.
void software_cuda_fail_call(int64_t nth);
// The function whose call was made to fail; empty while none was since software_cuda_fail_call.
const char* software_cuda_failed_call();
// Calls of functions that return a status, so far: all, or those of one function.
int64_t software_cuda_calls();
int64_t software_cuda_calls_of(const char* function);

// Streams, blocks and threads interleave as it says; also the environment's SOFTWARE_CUDA_SEED.
void software_cuda_seed(uint64_t seed);

// The driver's version, as `cudaDriverGetVersion` tells it: functions that came later are not there.
void software_cuda_driver(int version);

// Operations that were enqueued and have not run.
int64_t software_cuda_pending();
// What was wrong last, in words, as it stands on stderr; empty after a reset.
const char* software_cuda_problem();

// Everything anew, as in a process that just began: all handles and pointers are invalid, errors forgotten.
void software_cuda_reset();
}
