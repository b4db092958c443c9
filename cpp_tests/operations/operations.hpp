// The table of operation tests. A row is a case; its column is the backend that it runs on.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "support/backend.hpp"

namespace operations {

struct Case {
  std::string operation;
  std::string name;  // what is special about it
  std::function<void(support::Backend&)> run;

  std::string title() const { return operation + ", " + name; }
};

// The rows, by what is tested; one file each.
std::vector<Case> initialize_cases();
std::vector<Case> forward_backward_cases();
std::vector<Case> dropout_cases();
std::vector<Case> tensor_parallel_cases();
std::vector<Case> weight_cases();         // delta_weight, merge, unmerge
std::vector<Case> regularizer_cases();    // gram, orthogonality
std::vector<Case> gradient_norm_cases();  // gradient_norm, gradient_factor
std::vector<Case> update_cases();
std::vector<Case> selection_cases();    // scores, select, finalize, budget, set_pattern, digest, reset
std::vector<Case> run_cases();          // step over whole runs, sharded runs, resumed runs
std::vector<Case> determinism_cases();  // the same bits on any team of threads

}  // namespace operations
