// Comparisons that say what was wrong: the largest error, where it is, and both values.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <iomanip>
#include <sstream>
#include <string>

#include "bounded.hpp"
#include "dense.hpp"
#include "elements.hpp"
#include "memory.hpp"

namespace support {

// Rounding errors add up as in a random walk, whose steps `Bounded` adds up at their largest: a small multiple of one
// rounding serves sums of a thousand terms.
inline double tolerance(adalora_dtype_t type) { return 32 * roundoff(compute_type(type)); }

// Each element within `eps` times its condition, and the rounding to the type it is stored in.
inline void expect_close(const std::string& what, const Dense<Bounded>& expected, const Dense<double>& found,
                         double eps, adalora_dtype_t stored) {
  ASSERT_EQ(expected.rows, found.rows) << what;
  ASSERT_EQ(expected.columns, found.columns) << what;
  double worst = 0;
  size_t at = 0;
  for (size_t i = 0; i < found.values.size(); ++i) {
    const Bounded& e = expected.values[i];
    const double allowed = eps * e.condition + 1.01 * roundoff(stored) * std::fabs(e.value) + smallest_step(stored);
    double error = std::fabs(found.values[i] - e.value) / allowed;
    if (std::isnan(error)) error = INFINITY;
    if (error > worst) worst = error, at = i;
  }
  if (worst <= 1) return;
  const auto columns = static_cast<size_t>(expected.columns);
  ADD_FAILURE() << what << ": largest error " << std::fabs(found.values[at] - expected.values[at].value) << ", "
                << worst << " times what is allowed, at (" << at / columns << ", " << at % columns << "): expected "
                << std::setprecision(17) << expected.values[at].value << ", found " << found.values[at];
}

// The same to a fraction of the largest element, as a whole trajectory is compared.
inline void expect_near(const std::string& what, const Dense<double>& expected, const Dense<double>& found,
                        double fraction) {
  ASSERT_EQ(expected.values.size(), found.values.size()) << what;
  double largest = 0, worst = 0;
  size_t at = 0;
  for (size_t i = 0; i < found.values.size(); ++i) {
    largest = std::max(largest, std::fabs(expected.values[i]));
    double error = std::fabs(found.values[i] - expected.values[i]);
    if (std::isnan(error)) error = INFINITY;
    if (error > worst) worst = error, at = i;
  }
  if (worst <= fraction * largest) return;
  const auto columns = static_cast<size_t>(expected.columns);
  ADD_FAILURE() << what << ": largest error " << worst << ", allowed " << fraction * largest << ", at (" << at / columns
                << ", " << at % columns << "): expected " << std::setprecision(17) << expected.values[at] << ", found "
                << found.values[at];
}

inline void expect_same_bits(const std::string& what, const Bytes& expected, const Bytes& found, adalora_dtype_t type) {
  ASSERT_EQ(expected.size(), found.size()) << what;
  size_t different = 0, first = 0;
  const size_t element = size_of(type);
  for (size_t i = 0; i < found.size(); i += element)
    if (!std::equal(found.begin() + static_cast<ptrdiff_t>(i), found.begin() + static_cast<ptrdiff_t>(i + element),
                    expected.begin() + static_cast<ptrdiff_t>(i)) &&
        different++ == 0)
      first = i;
  if (different == 0) return;
  ADD_FAILURE() << what << ": " << different << " of " << found.size() / element
                << " elements have other bits, the first at " << first / element << ": expected "
                << std::setprecision(17) << load(&expected[first], type) << ", found " << load(&found[first], type);
}

inline void expect_same_bits(const std::string& what, const Tensor& expected, const Tensor& found) {
  expect_same_bits(what, expected.bytes(), found.bytes(), found.type());
}

}  // namespace support
