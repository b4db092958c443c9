// A number that knows how large an error its computation may have: run the oracle on it, and every result carries its
// own tolerance.
#pragma once

#include <algorithm>
#include <cmath>

namespace support {

// `value` is exact up to float64's rounding. `condition * eps` bounds, to first order, what a computation in the same
// order of operations loses where each of them and each input is off by `eps` of itself.
struct Bounded {
  double value = 0;
  double condition = 0;

  Bounded() = default;
  Bounded(double exact) : value(exact), condition(std::fabs(exact)) {}  // NOLINT: numbers turn into it by themselves
  Bounded(double exact, double bound) : value(exact), condition(bound) {}

  Bounded& operator+=(Bounded b) { return *this = Bounded(value + b.value, condition + b.condition); }
};

inline Bounded operator+(Bounded a, Bounded b) { return a += b; }
inline Bounded operator-(Bounded a, Bounded b) { return {a.value - b.value, a.condition + b.condition}; }
inline Bounded operator*(Bounded a, Bounded b) {
  return {a.value * b.value, std::fabs(a.value) * b.condition + std::fabs(b.value) * a.condition};
}
inline Bounded operator/(Bounded a, Bounded b) {
  return {a.value / b.value, a.condition / std::fabs(b.value) + std::fabs(a.value) * b.condition / (b.value * b.value)};
}
inline Bounded sqrt(Bounded a) {
  const double root = std::sqrt(a.value);
  return {root, root > 0 ? a.condition / root : std::sqrt(a.condition)};
}
inline Bounded abs(Bounded a) { return {std::fabs(a.value), a.condition}; }

inline double value_of(double a) { return a; }
inline double value_of(Bounded a) { return a.value; }

}  // namespace support
