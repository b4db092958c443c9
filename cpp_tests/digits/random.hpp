#pragma once

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace digits {

/// Random numbers that are the same with every standard library, whose distributions are not.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}

  std::uint64_t bits() { return engine_(); }

  /// In [-limit, limit).
  float uniform(double limit) {
    const double unit = static_cast<double>(bits() >> 11) * 0x1p-53;
    return static_cast<float>((2 * unit - 1) * limit);
  }

  /// The numbers 0 to n - 1 in random order.
  std::vector<std::size_t> permutation(std::size_t n) {
    std::vector<std::size_t> order(n);
    std::iota(order.begin(), order.end(), std::size_t{0});
    for (std::size_t i = n; i > 1; --i) std::swap(order[i - 1], order[bits() % i]);
    return order;
  }

 private:
  std::mt19937_64 engine_;
};

}  // namespace digits
