#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace digits {

/// The base model is pretrained on the digits below this one; those from it on are new to the adapters.
inline constexpr std::size_t first_new_digit = 5;

struct Options {
  std::string data;
  std::uint64_t seed = 1;
  std::int64_t steps = 600;
  std::int64_t init_rank = 8;
  std::int64_t target_rank = 2;
  std::int32_t threads = 0;  // 0: as many as the process may run on
};

/// Where a run stands, every few steps.
struct Progress {
  std::int64_t step;
  double loss;  // the task's, mean since the last report
  std::int64_t budget;
  std::vector<std::int64_t> ranks;
};

/// Part of the held-out images that are recognised as one of ten digits.
struct Accuracy {
  double old_digits;
  double new_digits;
  double all_digits;
};

struct Result {
  Accuracy before;
  Accuracy after;
  std::size_t held_out_rows;
  std::vector<double> losses;  // the task's, of every step
  std::int64_t budget;
  std::vector<std::int64_t> ranks;
  std::int64_t base_parameters;
  std::int64_t live_parameters;
  double seconds;
};

/// Pretrains a small network on images of the old digits, freezes it, and trains adapters on every layer with images of
/// all ten digits: to learn the new ones without losing the old. A fifth of the images is held out from both. The same
/// result for the same options, whatever the number of threads (but for the seconds).
Result train(const Options& options, const std::function<void(const Progress&)>& report);

}  // namespace digits
