// The library's side of a forward and backward pass: adapters, buffers on a backend, calls.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "layer.hpp"
#include "support/backend.hpp"
#include "support/memory.hpp"

namespace operations {

class Pass {
 public:
  Pass(support::Backend& backend, adalora_context_t* context, const LayerCase& layer, const LayerContents& contents);

  // Input, parameters and y of a forward pass anew.
  void give(const LayerContents& contents);

  void forward(int32_t stages);
  void backward(int32_t stages);

  // As the case has it: in one call or in two.
  void forward();
  void backward();

  void check_forward(const LayerResults& expected) const;
  void check_backward(const LayerResults& expected) const;

  // Everything that a pass may have written.
  std::vector<support::Bytes> outputs() const;

  support::Dense<double> y(size_t adapter) const;
  support::Dense<double> dx() const { return dx_.get(); }
  support::Dense<double> gradient(size_t adapter, int matrix) const;
  // What the stages hand on: h of forward's, g of backward's.
  support::Tensor& h(size_t adapter) { return adapters_[adapter].h; }
  support::Tensor& g(size_t adapter) { return adapters_[adapter].g; }
  // What has a row for each token, by name.
  std::vector<std::pair<std::string, const support::Tensor*>> rows_of_tokens() const;

 private:
  struct One {
    support::Adapter adapter;
    support::Tensor A, E, B, dA, dE, dB, y, dy, h, g;
    support::Values<uint8_t> pattern;
    support::Value<uint64_t> seed, offset;
  };

  One make(adalora_context_t* context, size_t k, const AdapterContents& contents);
  std::vector<adalora_call_t> calls();
  adalora_matrix_t outputs_of(size_t k, const std::optional<support::Tensor>& all, const support::Tensor& own) const;
  std::string what(const std::string& tensor, size_t k) const;

  support::Backend& backend_;
  const LayerCase layer_;
  support::Tensor x_, dx_;
  std::vector<One> adapters_;
  std::optional<support::Tensor> all_y_, all_dy_;  // where outputs are interleaved
  std::optional<support::Buffer> workspace_;
};

// Forward, then backward, each beside what is expected of it.
void check_both(support::Backend& backend, const LayerCase& layer, const LayerContents& contents);
void check_both(support::Backend& backend, const LayerCase& layer);

}  // namespace operations
