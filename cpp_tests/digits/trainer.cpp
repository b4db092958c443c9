// The digits trainer's command line: options in, progress and result out. The training itself is digits.cpp.

#include <unistd.h>

#include <charconv>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>

#include "digits.hpp"

namespace {

constexpr char usage[] =
    "usage: digits_trainer [--seed N] [--steps N] [--init-rank N] [--target-rank N] [--threads N] [--data FILE]\n";

template <class Number>
void parse(const std::string& name, std::string_view text, Number& number) {
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || stop != end) {
    throw std::invalid_argument(name + ": '" + std::string(text) + "' is not a number in range");
  }
}

digits::Options parse_options(int argc, char** argv) {
  digits::Options options;
  options.data = DIGITS_DATA;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    if (i + 1 == argc) throw std::invalid_argument(name + ": its value is missing, or it is no option");
    const std::string_view value = argv[i + 1];
    if (name == "--seed") {
      parse(name, value, options.seed);
    } else if (name == "--steps") {
      parse(name, value, options.steps);
    } else if (name == "--init-rank") {
      parse(name, value, options.init_rank);
    } else if (name == "--target-rank") {
      parse(name, value, options.target_rank);
    } else if (name == "--threads") {
      parse(name, value, options.threads);
    } else if (name == "--data") {
      options.data = value;
    } else {
      throw std::invalid_argument(name + ": no such option");
    }
  }
  return options;
}

/// One line that is written over on a terminal; a dozen lines elsewhere.
class ProgressLine {
 public:
  explicit ProgressLine(std::int64_t steps) : steps_(steps), terminal_(isatty(STDOUT_FILENO) == 1) {}

  void show(const digits::Progress& progress) {
    if (!terminal_ && progress.step < next_) return;
    next_ = progress.step + steps_ / 12;
    std::string ranks;
    for (const std::int64_t rank : progress.ranks) ranks += " " + std::to_string(rank);
    std::printf("%sstep %*lld of %lld   loss %.4f   budget %3lld   ranks%s%s", terminal_ ? "\r\x1b[K" : "",
                static_cast<int>(std::to_string(steps_).size()), static_cast<long long>(progress.step),
                static_cast<long long>(steps_), progress.loss, static_cast<long long>(progress.budget), ranks.c_str(),
                terminal_ ? "" : "\n");
    std::fflush(stdout);
  }

  void finish() const {
    if (terminal_) std::printf("\n");
  }

 private:
  std::int64_t steps_;
  std::int64_t next_ = 0;
  bool terminal_;
};

void print(const char* digits, double before, double after) {
  std::printf("  digits %-4s %6.1f %%  %6.1f %%\n", digits, 100 * before, 100 * after);
}

void print(const digits::Result& result, std::int64_t init_rank) {
  std::printf("\naccuracy on %zu held-out images\n               before     after\n", result.held_out_rows);
  print("0-4", result.before.old_digits, result.after.old_digits);
  print("5-9", result.before.new_digits, result.after.new_digits);
  print("0-9", result.before.all_digits, result.after.all_digits);

  std::printf("\nranks by layer, of %lld at the beginning\n", static_cast<long long>(init_rank));
  for (std::size_t k = 0; k < result.ranks.size(); ++k) {
    const std::string bar(static_cast<std::size_t>(result.ranks[k]), '#');
    const std::string rest(static_cast<std::size_t>(init_rank - result.ranks[k]), '.');
    std::printf("  layer %zu  %s%s %lld\n", k, bar.c_str(), rest.c_str(), static_cast<long long>(result.ranks[k]));
  }
  std::printf("\n%lld triplets, %lld parameters, beside %lld frozen ones; %.2f seconds\n",
              static_cast<long long>(result.budget), static_cast<long long>(result.live_parameters),
              static_cast<long long>(result.base_parameters), result.seconds);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const digits::Options options = parse_options(argc, argv);
    std::printf("A network that was pretrained on the digits 0-4, and frozen, is adapted to all ten.\n\n");
    ProgressLine line(options.steps);
    const digits::Result result = digits::train(options, [&](const digits::Progress& now) { line.show(now); });
    line.finish();
    print(result, options.init_rank);
    return 0;
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n%s", error.what(), usage);
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
