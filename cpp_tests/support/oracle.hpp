// AdaLoRA in plain C++, one element at a time: what every result of the library is held against.
//
// Templates over the number: double, or Bounded, which also says how exact a result can be asked to be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "bounded.hpp"
#include "dense.hpp"
#include "philox.hpp"

namespace support::oracle {

template <class T>
struct Triplets {
  Dense<T> A, E, B;  // [r, in], [1, r], [out, r]

  int64_t rank() const { return E.columns; }
  Dense<T>& operator[](int matrix) { return matrix == 0 ? A : matrix == 1 ? E : B; }
  const Dense<T>& operator[](int matrix) const { return matrix == 0 ? A : matrix == 1 ? E : B; }
};

template <class To, class From>
Triplets<To> as(const Triplets<From>& p) {
  return {support::as<To>(p.A), support::as<To>(p.E), support::as<To>(p.B)};
}

inline double scaling(double alpha, int64_t rank) {
  return (alpha > 0 ? alpha : static_cast<double>(rank)) / (static_cast<double>(rank) + 1e-5);
}

// a [m, k] times the transpose of b [n, k].
template <class T>
Dense<T> times_transposed(const Dense<T>& a, const Dense<T>& b) {
  Dense<T> c(a.rows, b.rows);
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < b.rows; ++j) {
      T sum{};
      for (int64_t k = 0; k < a.columns; ++k) sum += a(i, k) * b(j, k);
      c(i, j) = sum;
    }
  return c;
}

// The transpose of a [k, m] times b [k, n].
template <class T>
Dense<T> transposed_times(const Dense<T>& a, const Dense<T>& b) {
  return times_transposed(transposed(a), transposed(b));
}

template <class T>
Dense<T> times(const Dense<T>& a, const Dense<T>& b) {
  return times_transposed(a, transposed(b));
}

template <class T>
Dense<T> scaled(Dense<T> a, T factor) {
  for (T& value : a.values) value = factor * value;
  return a;
}

// Column j times values(0, j).
template <class T>
Dense<T> columns_scaled(Dense<T> a, const Dense<T>& values) {
  for (int64_t i = 0; i < a.rows; ++i)
    for (int64_t j = 0; j < a.columns; ++j) a(i, j) = a(i, j) * values(0, j);
  return a;
}

template <class T>
Dense<T> sum(Dense<T> a, const Dense<T>& b) {
  for (size_t i = 0; i < a.values.size(); ++i) a.values[i] += b.values[i];
  return a;
}

struct Dropout {
  double probability = 0;
  uint64_t seed = 0;
  uint64_t offset = 0;
  int64_t token0 = 0;
  int64_t column0 = 0;
};

// x with dropped elements zero and the others times 1 / (1 - probability): the adapter's input, and dx's way back.
template <class T>
Dense<T> dropped(Dense<T> x, const Dropout& d) {
  if (d.probability == 0) return x;
  for (int64_t t = 0; t < x.rows; ++t)
    for (int64_t c = 0; c < x.columns; ++c)
      x(t, c) = kept(d.seed, d.offset, d.token0 + t, d.column0 + c, d.probability)
                    ? x(t, c) * T(1 / (1 - d.probability))
                    : T{};
  return x;
}

template <class T>
Dense<T> project(const Dense<T>& x, const Triplets<T>& p) {
  return times_transposed(x, p.A);
}

template <class T>
Dense<T> expand(const Dense<T>& h, const Triplets<T>& p, double s) {
  return scaled(times_transposed(columns_scaled(h, p.E), p.B), T(s));
}

template <class T>
Dense<T> project_back(const Dense<T>& dy, const Triplets<T>& p, double s) {
  return scaled(times(dy, p.B), T(s));
}

template <class T>
Triplets<T> gradients(const Dense<T>& x, const Dense<T>& h, const Dense<T>& dy, const Dense<T>& g, const Triplets<T>& p,
                      double s) {
  Triplets<T> d;
  d.A = transposed(columns_scaled(transposed_times(x, g), p.E));
  d.E = Dense<T>(1, p.rank());
  for (int64_t t = 0; t < g.rows; ++t)
    for (int64_t i = 0; i < p.rank(); ++i) d.E(0, i) += g(t, i) * h(t, i);
  d.B = scaled(transposed_times(dy, columns_scaled(h, p.E)), T(s));
  return d;
}

template <class T>
Dense<T> input_gradient(const Dense<T>& g, const Triplets<T>& p) {
  return times(columns_scaled(g, p.E), p.A);
}

// [out, in].
template <class T>
Dense<T> delta_weight(const Triplets<T>& p, double s) {
  return scaled(times(columns_scaled(p.B, p.E), p.A), T(s));
}

// M M^T for M [r, features].
template <class T>
Dense<T> gram(const Dense<T>& m) {
  return times_transposed(m, m);
}

// Norm of M M^T - I, and its gradient for M [r, features].
template <class T>
std::pair<T, Dense<T>> orthogonality(const Dense<T>& m) {
  Dense<T> c = gram(m);
  T squares{};
  for (int64_t i = 0; i < c.rows; ++i) {
    c(i, i) = c(i, i) - T(1);
    for (int64_t j = 0; j < c.columns; ++j) squares += c(i, j) * c(i, j);
  }
  using std::sqrt;
  const T norm = sqrt(squares);
  if (value_of(norm) == 0) return {norm, Dense<T>(m.rows, m.columns)};
  return {norm, scaled(times(c, m), T(2) / norm)};
}

struct Hyper {
  double lr = 1e-3, weight_decay = 1e-2, beta1 = 0.9, beta2 = 0.999, eps = 1e-8;
};

// PyTorch's AdamW for one element; `applied` counts from 1.
template <class T>
void adamw(T& p, T g, T& m, T& v, int64_t applied, const Hyper& c) {
  using std::sqrt;
  const auto k = static_cast<double>(applied);
  p = p * T(1 - c.lr * c.weight_decay);
  m = T(c.beta1) * m + T(1 - c.beta1) * g;
  v = T(c.beta2) * v + T(1 - c.beta2) * (g * g);
  p = p - T(c.lr / (1 - std::pow(c.beta1, k))) * m / (sqrt(v) / T(std::sqrt(1 - std::pow(c.beta2, k))) + T(c.eps));
}

// The two averages of one element from its sensitivity.
template <class T>
void smooth(T sensitivity, T& ipt, T& unc, double beta1, double beta2) {
  using std::abs;
  ipt = T(beta1) * ipt + T(1 - beta1) * sensitivity;
  unc = T(beta2) * unc + T(1 - beta2) * abs(sensitivity - ipt);
}

// Score of each triplet of one adapter.
inline std::vector<double> scores(const Triplets<double>& ipt, const Triplets<double>& unc) {
  const auto finite = [](double s) { return std::min(s, std::numeric_limits<double>::max()); };
  std::vector<double> score(static_cast<size_t>(ipt.rank()));
  for (int64_t i = 0; i < ipt.rank(); ++i) {
    double row = 0, column = 0;
    for (int64_t c = 0; c < ipt.A.columns; ++c)
      row += finite(ipt.A(i, c) * unc.A(i, c)) / static_cast<double>(ipt.A.columns);
    for (int64_t c = 0; c < ipt.B.rows; ++c)
      column += finite(ipt.B(c, i) * unc.B(c, i)) / static_cast<double>(ipt.B.rows);
    score[static_cast<size_t>(i)] = finite(finite(ipt.E(0, i) * unc.E(0, i)) + finite(row) + finite(column));
  }
  return score;
}

struct Schedule {
  int64_t tinit = 0, tfinal = 0, total_step = 0, delta_t = 1;

  int64_t end() const { return total_step - tfinal; }
};

// Budget for a step, and whether a mask falls on it.
inline std::pair<int64_t, bool> budget(int64_t step, const Schedule& c, int64_t initial, int64_t target) {
  if (step <= c.tinit) return {initial, false};
  if (step > c.end()) return {target, true};
  const double left = 1 - static_cast<double>(step - c.tinit) / static_cast<double>(c.end() - c.tinit);
  const double cube = std::pow(left, 3.0);
  const double fall = static_cast<double>(initial - target) * cube;
  return {static_cast<int64_t>(fall + static_cast<double>(target)), step % c.delta_t == 0};
}

// Which triplets stay: falling score, ties by place, the longest prefix whose cost fits.
inline std::vector<uint8_t> select(const std::vector<double>& score, int64_t budget, const std::vector<int64_t>& cost) {
  std::vector<size_t> order(score.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return score[a] > score[b]; });
  std::vector<uint8_t> stays(score.size());
  for (size_t i : order) {
    budget -= cost[i];
    if (budget < 0) break;
    stays[i] = 1;
  }
  return stays;
}

}  // namespace support::oracle
