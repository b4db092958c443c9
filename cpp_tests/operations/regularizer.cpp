// Gram matrices and the orthogonality penalty with its gradient.

#include "operations.hpp"
#include "support/compare.hpp"
#include "support/model.hpp"

namespace operations {

using namespace support;

namespace {

const ModelCase& shapes(const std::string& name) {
  static const ModelCase several = [] {
    ModelCase c;
    c.layers = {{33, 13, 5}, {7, 65, 1}, {100, 7, 17}, {13, 13, 0}, {1, 1, 1}, {64, 130, 12}, {33, 65, 300}};
    c.target_rank = 1;
    return c;
  }();
  static const ModelCase large = [] {
    ModelCase c;
    c.layers = {{768, 768, 12}, {1100, 513, 64}};
    return c;
  }();
  return name == "several" ? several : large;
}

ModelCase typed(const std::string& name, adalora_dtype_t param, adalora_dtype_t gradient, bool master) {
  ModelCase c = shapes(name);
  c.param = param;
  c.gradient = gradient;
  c.master = master;
  return c;
}

// The two matrices of an adapter that are to be orthogonal, [rank, features].
std::vector<Dense<Bounded>> bases(const oracle::Triplets<double>& p) {
  return {as<Bounded>(p.A), transposed(as<Bounded>(p.B))};
}

std::vector<double> gram_of(const Model& model) {
  size_t bytes = 0;
  require(adalora_allocator_sizes(model.allocator(), 0, nullptr, nullptr, &bytes));
  const Values<double> gram(model.backend(), bytes / sizeof(double));
  require(adalora_allocator_gram(model.allocator(), gram.data(), model.backend().stream()));
  return gram.get();
}

double penalty(const Model& model, const std::vector<double>* gram, double weight, const Value<double>* factor) {
  const Value<double> value(model.backend(), -1.0);
  const Values<double> given(model.backend(), gram != nullptr ? *gram : std::vector<double>{});
  require(adalora_allocator_orthogonality(model.allocator(), gram != nullptr ? given.data() : nullptr, weight,
                                          factor != nullptr ? factor->data() : nullptr, value.data(),
                                          model.backend().stream()));
  return value.get();
}

void gram(Backend& backend, const ModelCase& c) {
  const Model model(backend, backend.context(), c);
  const Contents p = model.contents(&Part::p);
  const std::vector<double> found = gram_of(model);
  size_t at = 0;
  for (size_t k = 0; k < p.size(); ++k) {
    const int64_t rank = p[k].rank();
    for (const Dense<Bounded>& basis : bases(p[k])) {
      ASSERT_LE(at + static_cast<size_t>(rank * rank), found.size());
      const auto begin = found.begin() + static_cast<ptrdiff_t>(at);
      expect_close("Gram matrix of adapter " + std::to_string(k), oracle::gram(basis),
                   {rank, rank, std::vector<double>(begin, begin + rank * rank)}, tolerance(c.param), f64);
      at += static_cast<size_t>(rank * rank);
    }
  }
  EXPECT_EQ(at, found.size());
}

void orthogonality(Backend& backend, const ModelCase& c, bool from_gram) {
  Model model(backend, backend.context(), c);
  const double weight = 0.3, scale = 8;
  const auto n = static_cast<double>(c.layers.size());
  const Value<double> factor(backend, scale);
  const Contents p = model.contents(&Part::p), before = model.contents(&Part::g);
  const std::vector<Bytes> others = model.tensors();
  const std::vector<double> gram = gram_of(model);
  const double found = penalty(model, from_gram ? &gram : nullptr, weight, &factor);
  const Contents after = model.contents(&Part::g);

  Bounded expected;
  for (size_t k = 0; k < p.size(); ++k) {
    const std::vector<Dense<Bounded>> both = bases(p[k]);
    for (int m : {0, 2}) {
      const auto [norm, slope] = oracle::orthogonality(both[m == 0 ? 0 : 1]);
      expected += norm;
      const Dense<Bounded> added =
          oracle::scaled(m == 0 ? slope : transposed(slope), Bounded(scale * weight / (2 * n)));
      expect_close("gradient of " + std::string(m == 0 ? "A" : "B") + std::to_string(k),
                   oracle::sum(as<Bounded>(before[k][m]), added), after[k][m], tolerance(c.param), c.grad());
    }
    EXPECT_EQ(before[k].E.values, after[k].E.values) << "the penalty has no gradient for E";
  }
  expect_close("penalty", {1, 1, {Bounded(weight / (2 * n)) * expected}}, {1, 1, {found}}, tolerance(c.param), f64);
  EXPECT_EQ(model.tensors(), others) << "only gradients change";
}

void orthogonality_by_finite_differences(Backend& backend) {
  ModelCase c;
  c.layers = {{4, 3, 2}, {3, 5, 3}};
  c.target_rank = 1;
  Model model(backend, backend.context(), c);
  model.set_gradients(1, 0.0);
  const double weight = 0.7, distance = 1e-5;
  penalty(model, nullptr, weight, nullptr);
  const Contents slope = model.contents(&Part::g);
  for (size_t k = 0; k < c.layers.size(); ++k)
    for (int m : {0, 2}) {
      Tensor& p = model.part(k, m).p;
      Dense<double> values = p.get(), differences(values.rows, values.columns);
      for (size_t i = 0; i < values.values.size(); ++i) {
        const double here = values.values[i];
        const auto at = [&](double place) {
          values.values[i] = place;
          p.set(values);
          return penalty(model, nullptr, weight, nullptr);
        };
        differences.values[i] = (at(here + distance) - at(here - distance)) / (2 * distance);
        at(here);
      }
      expect_near("slope of the penalty", differences, slope[k][m], 1e-8);
    }
}

void orthonormal_has_no_gradient(Backend& backend, adalora_dtype_t param) {
  ModelCase c;
  c.param = param;
  c.layers = {{7, 5, 3}};
  Model model(backend, backend.context(), c);
  Dense<double> rows(3, 7), columns(5, 3);
  for (int64_t i = 0; i < 3; ++i) rows(i, 2 * i) = columns(i + 1, i) = 1.0;
  model.part(0, 0).p.set(rows);
  model.part(0, 2).p.set(columns);
  const Contents before = model.contents(&Part::g);
  EXPECT_EQ(penalty(model, nullptr, 0.5, nullptr), 0.0);
  const Contents after = model.contents(&Part::g);
  EXPECT_EQ(before[0].A.values, after[0].A.values);
  EXPECT_EQ(before[0].B.values, after[0].B.values);
}

void weight_zero_changes_nothing(Backend& backend) {
  Model model(backend, backend.context(), shapes("several"));
  const Contents before = model.contents(&Part::g);
  EXPECT_EQ(penalty(model, nullptr, 0.0, nullptr), 0.0);
  const Contents after = model.contents(&Part::g);
  for (size_t k = 0; k < before.size(); ++k)
    for (int m : {0, 1, 2}) EXPECT_EQ(before[k][m].values, after[k][m].values);
}

}  // namespace

std::vector<Case> regularizer_cases() {
  std::vector<Case> rows;
  const auto add = [&](const std::string& name, adalora_dtype_t param, adalora_dtype_t gradient, bool master) {
    const ModelCase c = typed(name, param, gradient, master);
    const std::string what =
        name + " layers, " + name_of(param) + " gradients " + name_of(c.grad()) + (master ? " with master" : "");
    rows.push_back({"gram", what, [c](Backend& b) { gram(b, c); }});
    rows.push_back({"orthogonality", what, [c](Backend& b) { orthogonality(b, c, false); }});
    rows.push_back({"orthogonality from Gram matrices", what, [c](Backend& b) { orthogonality(b, c, true); }});
  };
  for (adalora_dtype_t param : {f64, f32, bf16, f16}) add("several", param, 0, false);
  for (adalora_dtype_t param : {bf16, f16})
    for (adalora_dtype_t gradient : {adalora_dtype_t{0}, f32}) add("several", param, gradient, true);
  add("large", f64, 0, false);
  add("large", f32, 0, false);
  add("large", bf16, f32, true);
  rows.push_back({"orthogonality", "by finite differences", orthogonality_by_finite_differences});
  rows.push_back({"orthogonality", "weight 0", weight_zero_changes_nothing});
  for (adalora_dtype_t param : {f64, f32, bf16})
    rows.push_back({"orthogonality", name_of(param) + " orthonormal",
                    [param](Backend& b) { orthonormal_has_no_gradient(b, param); }});
  return rows;
}

}  // namespace operations
