// Forward and backward: shapes, strides, element types, groups, stages, patterns; gradients also by finite differences.

#include <array>
#include <cmath>

#include "operations.hpp"
#include "pass.hpp"
#include "support/random.hpp"

namespace operations {

using namespace support;

namespace {

struct Types {
  adalora_dtype_t activation, param;
};

const std::vector<Types> all_types = {{f64, f64}, {f32, f32},  {bf16, f32}, {f16, f32},  {bf16, bf16},
                                      {f16, f16}, {f32, bf16}, {f32, f16},  {bf16, f16}, {f16, bf16}};

// Every third E is 0: such triplets add nothing, whatever their vectors hold, and with them h and g.
void zero_stays_zero(Backend& backend, LayerCase layer) {
  layer.keeps_h = false;
  LayerContents contents = random_contents(layer);
  const LayerResults expected = expected_results(layer, contents);
  for (AdapterContents& one : contents.adapters) one.params.A(0, 0) = INFINITY, one.params.B(0, 0) = NAN;
  Pass pass(backend, backend.context(), layer, contents);
  pass.forward();
  pass.check_forward(expected);
  pass.backward();
  const double eps = backend.tolerance_of_products(layer.activation, layer.param, layer.operand_terms);
  expect_close(layer.name + ": dx", expected.dx, pass.dx(), eps, layer.activation);
  for (int m : {0, 2})
    expect_close(layer.name + ": gradient of " + "AEB"[m], expected.adapters[0].grads[m], pass.gradient(0, m), eps,
                 layer.param);
}

// What a pattern masks takes part in nothing, whatever it holds.
void masked_stays_out(Backend& backend, const LayerCase& layer) {
  LayerContents contents = random_contents(layer);
  const LayerResults expected = expected_results(layer, contents);
  for (AdapterContents& one : contents.adapters)
    for (int64_t i = 0; i < one.params.rank(); ++i) {
      if (layer.keeps(i)) continue;
      one.params.E(0, i) = NAN;
      for (int64_t j = 0; j < one.params.A.columns; ++j) one.params.A(i, j) = NAN;
      for (int64_t j = 0; j < one.params.B.rows; ++j) one.params.B(j, i) = NAN;
    }
  Pass pass(backend, backend.context(), layer, contents);
  pass.forward();
  pass.check_forward(expected);
  pass.backward();
  pass.check_backward(expected);
}

// Factors of unusual size, each multiplied by a power of two: no scale on the way to what comes of them is infinite.
using Sizes = std::array<int, 3>;  // of A, E and B

void of_unusual_factors(Backend& backend, const LayerCase& layer, Sizes sizes) {
  LayerContents contents = random_contents(layer);
  for (AdapterContents& one : contents.adapters)
    for (int m : {0, 1, 2})
      for (double& value : one.params[m].values)
        value = rounded(std::ldexp(value, sizes[static_cast<size_t>(m)]), layer.param);
  check_both(backend, layer, contents);
}

// sum(y * weights), whose gradient for y is `weights`.
double weighted_output(Pass& pass, const LayerCase& layer, const LayerContents& contents) {
  pass.give(contents);
  pass.forward();
  double sum = 0;
  for (size_t k = 0; k < layer.adapters(); ++k) {
    const Dense<double> y = pass.y(k);
    for (size_t i = 0; i < y.values.size(); ++i) sum += y.values[i] * contents.adapters[k].dy.values[i];
  }
  return sum;
}

// The output is linear in each single element, so a central difference over any distance is its derivative.
void against_finite_differences(Backend& backend, LayerCase layer) {
  layer.accumulates = false;
  LayerContents contents = random_contents(layer);
  std::fill(contents.dx.values.begin(), contents.dx.values.end(), 0.0);
  Pass pass(backend, backend.context(), layer, contents), other(backend, backend.context(), layer, contents);
  pass.forward();
  pass.backward();
  const double fraction = 1e-12;
  const auto slopes_of = [&](auto operand) {
    LayerContents moved = contents;
    Dense<double>& target = operand(moved);
    Dense<double> slopes(target.rows, target.columns);
    for (size_t i = 0; i < target.values.size(); ++i) {
      const double here = target.values[i];
      target.values[i] = here + 0.5;
      const double above = weighted_output(other, layer, moved);
      target.values[i] = here - 0.5;
      slopes.values[i] = above - weighted_output(other, layer, moved);
      target.values[i] = here;
    }
    return slopes;
  };
  expect_near(layer.name + ": dx", slopes_of([](LayerContents& c) -> Dense<double>& { return c.x; }), pass.dx(),
              fraction);
  for (size_t k = 0; k < layer.adapters(); ++k)
    for (int m : {0, 1, 2})
      expect_near(layer.name + ": gradient of " + "AEB"[m] + std::to_string(k),
                  slopes_of([&](LayerContents& c) -> Dense<double>& { return c.adapters[k].params[m]; }),
                  pass.gradient(k, m), fraction);
}

struct Size {
  int64_t tokens, in, out, rank;
};

std::string text(const Size& s) {
  return std::to_string(s.tokens) + " tokens " + std::to_string(s.in) + " to " + std::to_string(s.out) + " rank " +
         std::to_string(s.rank);
}

LayerCase of(Types types, Size size) {
  LayerCase layer;
  layer.activation = types.activation;
  layer.param = types.param;
  layer.tokens = size.tokens;
  layer.in = size.in;
  layer.out = {size.out};
  layer.rank = {size.rank};
  layer.name = name_of(types.activation) + " " + name_of(types.param) + " " + text(size);
  return layer;
}

LayerCase query_key_value(Types types, int64_t gap) {
  LayerCase layer = of(types, {33, 65, 12, 5});
  layer.out = {12, 12, 12};
  layer.rank = {5, 0, 8};
  layer.interleaved = true;
  layer.gap = gap;
  layer.name = name_of(types.activation) + " " + name_of(types.param) +
               " query key value as columns of one matrix, gap " + std::to_string(gap);
  return layer;
}

std::vector<LayerCase> layers() {
  std::vector<LayerCase> all;
  const std::vector<Size> sizes = {{5, 7, 13, 3},    {1, 33, 100, 5},  {64, 65, 33, 8}, {130, 13, 65, 12},
                                   {64, 100, 7, 17}, {5, 65, 100, 64}, {1, 1, 1, 1},    {5, 13, 1, 2},
                                   {5, 1, 7, 2},     {5, 7, 13, 0},    {0, 7, 13, 3},   {0, 1, 1, 0}};
  for (const Types& types : all_types) {
    for (const Size& size : sizes) all.push_back(of(types, size));

    LayerCase strided = of(types, {33, 13, 33, 5});
    strided.gap = 3;
    strided.name += " with gaps";
    all.push_back(strided);
    strided.e_is_column = true;
    strided.name += ", E a column";
    all.push_back(strided);

    LayerCase apart = of(types, {64, 33, 65, 8});
    apart.stages_apart = true;
    apart.name += " in two stages";
    all.push_back(apart);

    LayerCase overwritten = of(types, {5, 33, 13, 8});
    overwritten.accumulates = false;
    overwritten.name += " gradients overwritten";
    all.push_back(overwritten);

    all.push_back(query_key_value(types, 0));
    all.push_back(query_key_value(types, 5));

    if (types.param == bf16 || types.param == f16) {
      LayerCase wide_gradients = of(types, {64, 33, 65, 8});
      wide_gradients.grad = f32;
      wide_gradients.name += " with f32 gradients";
      all.push_back(wide_gradients);
    }
  }

  for (const Types& types : {Types{f64, f64}, Types{f32, f32}, Types{bf16, f32}, Types{bf16, bf16}, Types{f16, f32}})
    all.push_back(of(types, {130, 768, 100, 12}));
  all.push_back(of({f32, f32}, {513, 768, 768, 17}));
  all.push_back(of({bf16, bf16}, {513, 100, 768, 64}));

  // More tokens than backward takes at once, more triplets than features.
  for (const Types& types : {Types{f64, f64}, Types{f32, f32}, Types{bf16, bf16}}) {
    all.push_back(of(types, {2500, 13, 7, 3}));
    all.push_back(of(types, {33, 65, 13, 300}));
  }

  const Types types{f32, f32};
  for (bool accumulates : {false, true}) {
    LayerCase no_tokens = of(types, {0, 13, 7, 3});
    no_tokens.accumulates = accumulates;
    no_tokens.name += accumulates ? " gradients kept" : " gradients set to zero";
    all.push_back(no_tokens);

    LayerCase masked = of(types, {64, 33, 65, 17});
    masked.pattern = true;
    masked.accumulates = accumulates;
    masked.name += accumulates ? " with a pattern" : " with a pattern, gradients overwritten";
    all.push_back(masked);
    masked.stages_apart = true;
    masked.name += ", in two stages";
    all.push_back(masked);
  }

  for (const Types& mixed : {Types{bf16, f32}, Types{f16, f32}, Types{bf16, bf16}})
    for (int32_t terms : {1, 2, 3}) {
      LayerCase split = of(mixed, {33, 65, 13, 8});
      split.operand_terms = terms;
      split.name += " in " + std::to_string(terms) + " terms";
      all.push_back(split);
    }

  for (const Types& group : {Types{f64, f64}, Types{f32, f32}, Types{bf16, f32}, Types{f16, f32}}) {
    LayerCase most = of(group, {9, 24, 5, 3});
    most.out.clear();
    most.rank.clear();
    for (int64_t i = 0; i < 64; ++i) most.out.push_back(1 + i % 7), most.rank.push_back(i % 5);
    most.name = name_of(group.activation) + " " + name_of(group.param) + " 64 adapters";
    all.push_back(most);
  }

  LayerCase no_dx = of(types, {64, 33, 65, 8});
  no_dx.wants_dx = false;
  no_dx.name += " without dx";
  all.push_back(no_dx);

  LayerCase without_h = of(types, {64, 33, 65, 8});
  without_h.keeps_h = false;
  without_h.name += " without h";
  all.push_back(without_h);

  LayerCase scaled = of(types, {5, 33, 65, 8});
  scaled.scaling = -0.75;
  scaled.name += " scaled by the caller";
  all.push_back(scaled);
  scaled.scaling = 0;
  scaled.alpha = 32;
  scaled.name = "alpha 32";
  all.push_back(scaled);
  return all;
}

}  // namespace

std::vector<Case> forward_backward_cases() {
  std::vector<Case> rows;
  for (const LayerCase& layer : layers())
    rows.push_back({"forward and backward", layer.name, [layer](Backend& backend) { check_both(backend, layer); }});

  for (const Types& types : all_types) {
    const LayerCase layer = of(types, {33, 65, 13, 8});
    rows.push_back(
        {"a triplet whose E is 0 adds nothing", layer.name, [layer](Backend& b) { zero_stays_zero(b, layer); }});
  }

  for (const Types& types : {Types{f64, f64}, Types{f32, f32}, Types{bf16, f32}, Types{bf16, bf16}}) {
    LayerCase layer = of(types, {33, 65, 13, 17});
    layer.pattern = true;
    rows.push_back(
        {"a masked triplet takes part in nothing", layer.name, [layer](Backend& b) { masked_stays_out(b, layer); }});
    layer.keeps_h = false;
    rows.push_back({"a masked triplet takes part in nothing", layer.name + " without h",
                    [layer](Backend& b) { masked_stays_out(b, layer); }});
  }

  // Each number of triplets has tiles of its own.
  for (const Types& types : {Types{f64, f64}, Types{f32, f32}, Types{bf16, f32}})
    rows.push_back({"every rank from 1 to 128", name_of(types.activation) + " " + name_of(types.param),
                    [types](Backend& backend) {
                      for (int64_t rank = 1; rank <= 128; ++rank) check_both(backend, of(types, {9, 21, 19, rank}));
                    }});

  for (const Types& types : {Types{f64, f64}, Types{f32, f32}, Types{bf16, f32}, Types{f16, f32}, Types{bf16, bf16}}) {
    const LayerCase layer = of(types, {33, 65, 13, 8});
    for (const Sizes& sizes : {Sizes{-60, -60, -60}, Sizes{-100, 0, 100}, Sizes{100, 0, -100}})
      rows.push_back({"factors of unusual size", layer.name + ", A times 2^" + std::to_string(sizes[0]),
                      [layer, sizes](Backend& b) { of_unusual_factors(b, layer, sizes); }});
  }

  std::vector<LayerCase> small = {of({f64, f64}, {5, 7, 6, 3}), of({f64, f64}, {1, 1, 1, 1}),
                                  query_key_value({f64, f64}, 2)};
  small[2].tokens = 2;
  small[2].in = 3;
  LayerCase dropped = small[0];
  dropped.dropout = {0.4, 11, 5, 0, 0};
  dropped.name += " with dropout";
  small.push_back(dropped);
  for (const LayerCase& layer : small)
    rows.push_back({"gradients by finite differences", layer.name,
                    [layer](Backend& backend) { against_finite_differences(backend, layer); }});
  return rows;
}

}  // namespace operations
