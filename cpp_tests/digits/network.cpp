#include "network.hpp"

#include <algorithm>
#include <cmath>

namespace digits {

Linear::Linear(std::size_t in, std::size_t out, Random& random)
    : in_features(in), out_features(out), weight(out * in), bias(out) {
  const double limit = std::sqrt(6.0 / static_cast<double>(in + out));
  for (float& w : weight) w = random.uniform(limit);
}

void Linear::forward(const float* x, std::size_t rows, float* y) const {
  for (std::size_t t = 0; t < rows; ++t) {
    for (std::size_t o = 0; o < out_features; ++o) {
      float sum = bias[o];
      for (std::size_t i = 0; i < in_features; ++i) sum += x[t * in_features + i] * weight[o * in_features + i];
      y[t * out_features + o] = sum;
    }
  }
}

void Linear::backward(const float* dy, std::size_t rows, float* dx) const {
  std::fill_n(dx, rows * in_features, 0.0f);
  for (std::size_t t = 0; t < rows; ++t) {
    for (std::size_t o = 0; o < out_features; ++o) {
      const float d = dy[t * out_features + o];
      for (std::size_t i = 0; i < in_features; ++i) dx[t * in_features + i] += d * weight[o * in_features + i];
    }
  }
}

void activate(float* y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) y[i] = std::tanh(y[i]);
}

void activate_backward(const float* a, float* da, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) da[i] *= 1 - a[i] * a[i];
}

double cross_entropy(const float* logits, const std::size_t* labels, std::size_t rows, float* dlogits) {
  double loss = 0;
  for (std::size_t t = 0; t < rows; ++t) {
    const float* z = logits + t * n_classes;
    const double largest = *std::max_element(z, z + n_classes);
    double sum = 0;
    for (std::size_t c = 0; c < n_classes; ++c) sum += std::exp(z[c] - largest);
    loss += std::log(sum) + largest - z[labels[t]];
    for (std::size_t c = 0; c < n_classes; ++c) {
      const double probability = std::exp(z[c] - largest) / sum;
      const double wanted = c == labels[t] ? 1 : 0;
      dlogits[t * n_classes + c] = static_cast<float>((probability - wanted) / static_cast<double>(rows));
    }
  }
  return loss / static_cast<double>(rows);
}

Network pretrain(const Samples& samples, Random& random) {
  constexpr std::size_t hidden = 64, batch = 32, epochs = 15;
  constexpr float learning_rate = 0.1f;
  Network network;
  network.emplace_back(pixels_per_image, hidden, random);
  network.emplace_back(hidden, hidden, random);
  network.emplace_back(hidden, n_classes, random);

  std::vector<std::vector<float>> y, dy;
  for (const Linear& layer : network) {
    y.emplace_back(batch * layer.out_features);
    dy.emplace_back(batch * layer.out_features);
  }
  for (std::size_t epoch = 0; epoch < epochs; ++epoch) {
    const std::vector<std::size_t> order = random.permutation(samples.rows());
    for (std::size_t first = 0; first + batch <= order.size(); first += batch) {
      const Samples rows = samples.rows_at({order.begin() + static_cast<std::ptrdiff_t>(first),
                                            order.begin() + static_cast<std::ptrdiff_t>(first + batch)});
      const float* x = rows.pixels.data();
      for (std::size_t k = 0; k < network.size(); ++k) {
        network[k].forward(x, batch, y[k].data());
        if (k + 1 < network.size()) activate(y[k].data(), y[k].size());
        x = y[k].data();
      }
      cross_entropy(y.back().data(), rows.labels.data(), batch, dy.back().data());
      for (std::size_t k = network.size(); k-- > 0;) {
        Linear& layer = network[k];
        x = k > 0 ? y[k - 1].data() : rows.pixels.data();
        if (k > 0) {
          layer.backward(dy[k].data(), batch, dy[k - 1].data());
          activate_backward(y[k - 1].data(), dy[k - 1].data(), dy[k - 1].size());
        }
        for (std::size_t t = 0; t < batch; ++t) {
          for (std::size_t o = 0; o < layer.out_features; ++o) {
            const float change = learning_rate * dy[k][t * layer.out_features + o];
            layer.bias[o] -= change;
            for (std::size_t i = 0; i < layer.in_features; ++i) {
              layer.weight[o * layer.in_features + i] -= change * x[t * layer.in_features + i];
            }
          }
        }
      }
    }
  }
  return network;
}

}  // namespace digits
