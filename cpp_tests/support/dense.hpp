// A row-major matrix without gaps, for the oracle.
#pragma once

#include <cstdint>
#include <vector>

namespace support {

template <class T>
struct Dense {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<T> values;

  Dense() = default;
  Dense(int64_t r, int64_t c) : rows(r), columns(c), values(static_cast<size_t>(r * c)) {}
  Dense(int64_t r, int64_t c, std::vector<T> v) : rows(r), columns(c), values(std::move(v)) {}

  T& operator()(int64_t i, int64_t j) { return values[static_cast<size_t>(i * columns + j)]; }
  const T& operator()(int64_t i, int64_t j) const { return values[static_cast<size_t>(i * columns + j)]; }
};

// Of another element type.
template <class To, class From>
Dense<To> as(const Dense<From>& from) {
  return {from.rows, from.columns, std::vector<To>(from.values.begin(), from.values.end())};
}

template <class T>
Dense<T> transposed(const Dense<T>& from) {
  Dense<T> to(from.columns, from.rows);
  for (int64_t i = 0; i < from.rows; ++i)
    for (int64_t j = 0; j < from.columns; ++j) to(j, i) = from(i, j);
  return to;
}

// Rows [row, row + rows) and columns [column, column + columns).
template <class T>
Dense<T> block(const Dense<T>& from, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  Dense<T> to(rows, columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to(i, j) = from(row + i, column + j);
  return to;
}

}  // namespace support
