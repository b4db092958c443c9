// Every operation against an independent computation: the rows of operations/ on each backend.

#include <gtest/gtest.h>

#include <cctype>

#include "operations/operations.hpp"

namespace operations {
namespace {

const std::vector<Case>& table() {
  static const std::vector<Case> rows = [] {
    std::vector<Case> all;
    for (auto part :
         {initialize_cases, forward_backward_cases, dropout_cases, tensor_parallel_cases, weight_cases,
          regularizer_cases, gradient_norm_cases, update_cases, selection_cases, run_cases, determinism_cases})
      for (Case& row : part()) all.push_back(std::move(row));
    return all;
  }();
  return rows;
}

std::string identifier(std::string text) {
  for (char& c : text)
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  return text;
}

void add_row(support::Backend& backend, const Case& row) {
  struct Row : testing::Test {
    support::Backend& backend;
    const Case& row;
    Row(support::Backend& b, const Case& r) : backend(b), row(r) {}
    void TestBody() override {
      SCOPED_TRACE(row.title() + " on " + backend.name());
      row.run(backend);
    }
  };
  testing::RegisterTest(identifier(backend.name() + "_" + row.operation).c_str(), identifier(row.name).c_str(), nullptr,
                        nullptr, __FILE__, __LINE__,
                        [&backend, &row]() -> testing::Test* { return new Row(backend, row); });
}

}  // namespace
}  // namespace operations

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (support::Backend* backend : support::backends())
    for (const operations::Case& row : operations::table()) operations::add_row(*backend, row);
  return RUN_ALL_TESTS();
}
