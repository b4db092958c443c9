#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <numeric>
#include <stdexcept>

#include "digits.hpp"
#include "samples.hpp"

namespace {

digits::Options options_with(std::int32_t threads) {
  digits::Options options;
  options.data = DIGITS_DATA;
  options.threads = threads;
  return options;
}

double mean(const std::vector<double>& values, std::size_t first, std::size_t n) {
  const auto begin = values.begin() + static_cast<std::ptrdiff_t>(first);
  return std::accumulate(begin, begin + static_cast<std::ptrdiff_t>(n), 0.0) / static_cast<double>(n);
}

class Digits : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    result = digits::train(options_with(1), [](const digits::Progress& now) { reports.push_back(now); });
  }

  static digits::Result result;
  static std::vector<digits::Progress> reports;
};
digits::Result Digits::result;
std::vector<digits::Progress> Digits::reports;

TEST_F(Digits, LearnsTheNewDigitsAndKeepsTheOld) {
  EXPECT_GT(result.before.old_digits, 0.95);
  EXPECT_LT(result.before.new_digits, 0.05);
  EXPECT_GT(result.after.old_digits, 0.90);
  EXPECT_GT(result.after.new_digits, 0.85);
  EXPECT_GT(result.after.all_digits, 0.90);
  EXPECT_GT(result.after.all_digits, result.before.all_digits + 0.30);
}

TEST_F(Digits, LossFalls) {
  ASSERT_EQ(result.losses.size(), 600u);
  EXPECT_LT(mean(result.losses, 550, 50), 0.25 * mean(result.losses, 0, 20));
}

TEST_F(Digits, EndsAtTheTargetBudgetExactly) {
  EXPECT_EQ(result.budget, 3 * digits::Options{}.target_rank);
  EXPECT_EQ(std::accumulate(result.ranks.begin(), result.ranks.end(), std::int64_t{0}), result.budget);
}

TEST_F(Digits, BudgetFallsAndLiveRanksFollow) {
  ASSERT_EQ(reports.size(), 60u);
  EXPECT_EQ(reports.front().budget, 3 * digits::Options{}.init_rank);
  for (std::size_t i = 1; i < reports.size(); ++i) EXPECT_LE(reports[i].budget, reports[i - 1].budget);
  // Reports fall on steps that are masked, once the budget falls.
  for (const digits::Progress& now : reports) {
    EXPECT_EQ(std::accumulate(now.ranks.begin(), now.ranks.end(), std::int64_t{0}), now.budget) << "step " << now.step;
  }
  EXPECT_EQ(reports.back().ranks, result.ranks);
}

TEST_F(Digits, LayersGetDifferentRanks) {
  EXPECT_NE(*std::min_element(result.ranks.begin(), result.ranks.end()),
            *std::max_element(result.ranks.begin(), result.ranks.end()));
}

TEST_F(Digits, ThreadsDoNotChangeTheResult) {
  const digits::Result other = digits::train(options_with(2), [](const digits::Progress&) {});
  EXPECT_EQ(other.losses, result.losses);
  EXPECT_EQ(other.ranks, result.ranks);
  EXPECT_EQ(other.after.all_digits, result.after.all_digits);
}

TEST_F(Digits, SeedChangesTheResult) {
  digits::Options options = options_with(1);
  options.seed = 2;
  options.steps = 5;
  const digits::Result other = digits::train(options, [](const digits::Progress&) {});
  EXPECT_NE(other.losses.front(), result.losses.front());
}

TEST(Samples, AreWhatTheirDescriptionSays) {
  const digits::Samples samples = digits::read_samples(DIGITS_DATA);
  EXPECT_EQ(samples.rows(), 1797u);
  EXPECT_EQ(samples.pixels.size(), 1797u * digits::pixels_per_image);
  for (std::size_t digit = 0; digit < digits::n_classes; ++digit) {
    const std::size_t rows = samples.where([=](std::size_t label) { return label == digit; }).rows();
    EXPECT_GE(rows, 174u);
    EXPECT_LE(rows, 183u);
  }
}

TEST(Samples, DamageIsReported) {
  EXPECT_THROW(digits::read_samples("no such file"), std::runtime_error);
  const std::string file = testing::TempDir() + "damaged_digits.csv";
  for (const char* text : {"", "1,2,3\n", "a\n"}) {
    std::ofstream(file) << text;
    EXPECT_THROW(digits::read_samples(file), std::runtime_error) << text;
  }
  std::remove(file.c_str());
}

}  // namespace
