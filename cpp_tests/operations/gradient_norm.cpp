// The gradients' sum of squares, what is not finite in them, and the factor that unscales and clips them.

#include "operations.hpp"
#include "support/compare.hpp"
#include "support/model.hpp"

namespace operations {

using namespace support;

namespace {

ModelCase layers_of(adalora_dtype_t param, adalora_dtype_t gradient) {
  ModelCase c;
  c.param = param;
  c.gradient = gradient;
  c.layers = {{33, 13, 5}, {768, 513, 12}, {13, 13, 0}, {1, 1, 1}, {65, 100, 8}};
  c.target_rank = 1;
  return c;
}

void norm(Backend& backend, const ModelCase& c) {
  const Model model(backend, backend.context(), c);
  const std::vector<uint8_t> has_grad{1, 0, 1, 1, 1};
  const Values<uint8_t> given(backend, has_grad);
  for (bool all : {true, false}) {
    const Value<double> sum(backend, 3.5);
    const Value<float> found_inf(backend, 0.0f);
    require(adalora_allocator_gradient_norm(model.allocator(), all ? nullptr : given.data(), sum.data(),
                                            found_inf.data(), backend.stream()));
    Bounded expected = 3.5;
    const Contents g = model.contents(&Part::g);
    for (size_t k = 0; k < g.size(); ++k)
      for (int m : {0, 1, 2})
        for (double value : g[k][m].values)
          if (all || has_grad[k] != 0) expected += Bounded(value) * value;
    expect_close("sum of squares", {1, 1, {expected}}, {1, 1, {sum.get()}}, 1e-13, f64);
    EXPECT_EQ(found_inf.get(), 0.0f);
  }
}

void non_finite(Backend& backend, const ModelCase& c) {
  Model model(backend, backend.context(), c);
  const Values<uint8_t> without(backend, std::vector<uint8_t>{1, 0, 1, 1, 1});
  for (int m : {0, 1, 2})
    for (double strange : {HUGE_VAL, -HUGE_VAL, std::nan("")}) {
      Tensor& g = model.part(1, m).g;
      Dense<double> values = g.get();
      const Dense<double> finite = values;
      values.values.back() = strange;
      g.set(values);
      const Value<double> sum(backend, 0.0);
      const Value<float> found_inf(backend, 0.0f);
      require(adalora_allocator_gradient_norm(model.allocator(), without.data(), sum.data(), found_inf.data(),
                                              backend.stream()));
      EXPECT_EQ(found_inf.get(), 0.0f) << "an adapter without a gradient is not read";
      EXPECT_TRUE(std::isfinite(sum.get()));
      require(
          adalora_allocator_gradient_norm(model.allocator(), nullptr, sum.data(), found_inf.data(), backend.stream()));
      EXPECT_EQ(found_inf.get(), 1.0f) << strange << " in matrix " << m;
      require(adalora_allocator_gradient_norm(model.allocator(), without.data(), sum.data(), found_inf.data(),
                                              backend.stream()));
      EXPECT_EQ(found_inf.get(), 1.0f) << "left alone where all is finite";
      require(adalora_allocator_gradient_norm(model.allocator(), nullptr, sum.data(), nullptr, backend.stream()));
      g.set(finite);
    }
}

void factor(Backend& backend) {
  struct {
    double squares, scale, max_norm;
  } const cases[] = {{0, 1, 1},       {25, 1, 10},       {25, 1, 5},       {25, 1, 1},
                     {1e10, 1024, 2}, {25, 8, INFINITY}, {1e300, 1, 1e-3}, {1e-300, 1, 1e-3}};
  for (const auto& c : cases)
    for (bool scaled : {true, false}) {
      const Value<double> squares(backend, c.squares), scale(backend, c.scale), result(backend, -1.0);
      require(adalora_context_gradient_factor(backend.context(), squares.data(), scaled ? scale.data() : nullptr,
                                              c.max_norm, result.data(), backend.stream()));
      const double loss_scale = scaled ? c.scale : 1;
      const double norm = std::sqrt(c.squares) / loss_scale;
      EXPECT_DOUBLE_EQ(result.get(), std::min(1.0, c.max_norm / (norm + 1e-6)) / loss_scale)
          << c.squares << " " << loss_scale << " " << c.max_norm;
    }
}

}  // namespace

std::vector<Case> gradient_norm_cases() {
  std::vector<Case> rows{{"gradient factor", "unscales and clips", factor}};
  for (auto [param, gradient] : {std::pair{f64, f64}, {f32, f32}, {bf16, bf16}, {bf16, f32}, {f16, f16}, {f16, f32}}) {
    const ModelCase c = layers_of(param, gradient);
    const std::string what = name_of(param) + " gradients " + name_of(gradient);
    rows.push_back({"gradient norm", what, [c](Backend& b) { norm(b, c); }});
    rows.push_back({"gradient norm says what is not finite", what, [c](Backend& b) { non_finite(b, c); }});
  }
  return rows;
}

}  // namespace operations
