#pragma once

#include <cstddef>
#include <vector>

#include "random.hpp"
#include "samples.hpp"

namespace digits {

/// A linear layer: y = x W^T + bias. Matrices are row-major.
struct Linear {
  std::size_t in_features;
  std::size_t out_features;
  std::vector<float> weight;  // [out_features, in_features]
  std::vector<float> bias;    // [out_features]

  Linear(std::size_t in, std::size_t out, Random& random);

  void forward(const float* x, std::size_t rows, float* y) const;

  /// dx = dy W, written over.
  void backward(const float* dy, std::size_t rows, float* dx) const;
};

/// What stands between the layers; in place.
void activate(float* y, std::size_t n);

/// From the gradient for an activation to the gradient for what went into it; in place. `a` is the activation.
void activate_backward(const float* a, float* da, std::size_t n);

/// Softmax cross entropy, averaged over the rows; writes its gradient for the logits.
double cross_entropy(const float* logits, const std::size_t* labels, std::size_t rows, float* dlogits);

/// The base model, a multilayer perceptron, with no adapter anywhere.
using Network = std::vector<Linear>;

/// Trains a new network on the samples by plain stochastic gradient descent, all of its parameters.
Network pretrain(const Samples& samples, Random& random);

}  // namespace digits
