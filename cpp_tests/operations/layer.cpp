#include "layer.hpp"

#include "support/random.hpp"

namespace operations {

using namespace support;

double LayerCase::scaling_of(size_t adapter) const {
  return scaling != 0 ? scaling : oracle::scaling(alpha, rank[adapter]);
}

oracle::Dropout LayerCase::dropout_of(size_t adapter) const {
  oracle::Dropout own = dropout;
  own.probability /= static_cast<double>(adapter + 1);
  if (every_other_drops && adapter % 2 == 0) own.probability = 0;
  own.seed += adapter;
  own.column0 = in_begin;
  return own;
}

namespace {

Dense<double> rounded_to(adalora_dtype_t type, Dense<double> m) {
  for (double& value : m.values) value = rounded(value, type);
  return m;
}

}  // namespace

LayerContents random_contents(const LayerCase& layer, uint64_t seed) {
  Random random(seed);
  const auto matrix = [&](adalora_dtype_t type, int64_t rows, int64_t columns) {
    return rounded_to(type, random.matrix(rows, columns));
  };
  const adalora_dtype_t grad = layer.grad != 0 ? layer.grad : layer.param;
  LayerContents all;
  all.x = matrix(layer.activation, layer.tokens, layer.in);
  all.dx = matrix(layer.activation, layer.tokens, layer.in);
  for (size_t k = 0; k < layer.adapters(); ++k) {
    const int64_t out = layer.out[k], rank = layer.rank[k];
    AdapterContents one;
    one.params = {matrix(layer.param, rank, layer.in), matrix(layer.param, 1, rank), matrix(layer.param, out, rank)};
    for (int64_t i = 0; i < rank; i += 3) one.params.E(0, i) = 0;
    one.grads = {matrix(grad, rank, layer.in), matrix(grad, 1, rank), matrix(grad, out, rank)};
    one.y = matrix(layer.activation, layer.tokens, out);
    one.dy = matrix(layer.activation, layer.tokens, out);
    all.adapters.push_back(std::move(one));
  }
  return all;
}

LayerResults expected_results(const LayerCase& layer, const LayerContents& contents) {
  LayerResults all;
  all.dx = as<Bounded>(contents.dx);
  for (size_t k = 0; k < layer.adapters(); ++k) {
    const AdapterContents& one = contents.adapters[k];
    const double s = layer.scaling_of(k);
    const Dense<Bounded> x = oracle::dropped(as<Bounded>(contents.x), layer.dropout_of(k));
    auto params = oracle::as<Bounded>(one.params);
    for (int64_t i = 0; i < layer.rank[k]; ++i)
      if (!layer.keeps(i)) params.E(0, i) = 0.0;
    const auto dy = as<Bounded>(one.dy);

    AdapterResults results;
    results.h = oracle::project(x, params);
    results.y = oracle::sum(as<Bounded>(one.y), oracle::expand(results.h, params, s));
    results.g = oracle::project_back(dy, params, s);
    results.grads = oracle::gradients(x, results.h, dy, results.g, params, s);
    for (int64_t i = 0; i < layer.rank[k]; ++i)
      if (!layer.keeps(i)) results.grads.E(0, i) = 0.0;
    if (layer.accumulates)
      for (int matrix : {0, 1, 2})
        results.grads[matrix] = oracle::sum(as<Bounded>(one.grads[matrix]), results.grads[matrix]);
    all.dx = oracle::sum(all.dx, oracle::dropped(oracle::input_gradient(results.g, params), layer.dropout_of(k)));
    all.adapters.push_back(std::move(results));
  }
  return all;
}

}  // namespace operations
