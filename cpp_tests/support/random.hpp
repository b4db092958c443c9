// Reproducible numbers for inputs: SplitMix64.
#pragma once

#include <cstdint>

#include "dense.hpp"

namespace support {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }

  // In [-1, 1).
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-52 - 1.0; }

  Dense<double> matrix(int64_t rows, int64_t columns, double size = 1.0) {
    Dense<double> m(rows, columns);
    for (double& value : m.values) value = size * uniform();
    return m;
  }

 private:
  uint64_t state_;
};

}  // namespace support
