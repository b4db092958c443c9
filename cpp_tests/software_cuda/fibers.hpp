// Blocks of a kernel on one thread of the host.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "host_kernels.hpp"

namespace fibers {

const host::Kernel* kernels();

// Makes the stacks; before anything runs.
void prepare();

// Runs all blocks in an order that the seed gives. False where a thread broke a rule: `problem` says which.
bool run(const host::Kernel& kernel, uint3 grid, uint3 block, const void* args, uint64_t seed);
const std::string& problem();

// The kernel, block and thread that run now, in words.
std::string here();

}  // namespace fibers
