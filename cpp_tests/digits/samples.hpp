#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace digits {

inline constexpr std::size_t pixels_per_image = 64;
inline constexpr std::size_t n_classes = 10;

/// Images and the digits that they show.
struct Samples {
  /// [rows, pixels_per_image], from 0 to 1.
  std::vector<float> pixels;
  std::vector<std::size_t> labels;

  std::size_t rows() const { return labels.size(); }

  /// The given rows, in the given order.
  Samples rows_at(const std::vector<std::size_t>& rows) const;

  /// The rows whose label is `wanted`.
  Samples where(const std::function<bool(std::size_t label)>& wanted) const;
};

/// Reads the format that DATA.md describes; throws std::runtime_error for anything else.
Samples read_samples(const std::string& file);

}  // namespace digits
