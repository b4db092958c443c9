// What goes wrong in AdaLoRA implementations in use, one test each: here it must not.

#include <numeric>

#include "operations/pass.hpp"
#include "support/compare.hpp"
#include "support/model.hpp"
#include "support/random.hpp"

namespace {

using namespace support;

std::string name_of_backend(Backend* backend) { return backend->name(); }

class Faults : public testing::TestWithParam<Backend*> {
 protected:
  Backend& backend = *GetParam();
};

INSTANTIATE_TEST_SUITE_P(On, Faults, testing::ValuesIn(backends()),
                         [](const auto& column) { return name_of_backend(column.param); });

int64_t live(const Model& model) { return model.report().live_triplets; }

std::vector<double> all_E(const Model& model) {
  std::vector<double> all;
  for (const oracle::Triplets<double>& p : model.contents(&Part::p))
    all.insert(all.end(), p.E.values.begin(), p.E.values.end());
  return all;
}

bool all_finite(const Contents& contents) {
  for (const oracle::Triplets<double>& q : contents)
    for (int m : {0, 1, 2})
      for (double value : q[m].values)
        if (!std::isfinite(value)) return false;
  return true;
}

TEST_P(Faults, EqualScoresKeepExactlyTheBudget) {
  ModelCase c;
  Model model(backend, backend.context(), c);
  model.set_gradients(1, 0.0);
  for (int64_t step = 0; step < c.schedule.total_step; ++step) {
    model.step(step);
    const auto [budget, masks] = oracle::budget(step, c.schedule, c.initial_budget(), c.target_budget());
    EXPECT_TRUE(!masks || live(model) == budget) << "step " << step << ": " << live(model) << " of " << budget;
  }
  EXPECT_EQ(live(model), c.target_budget());
  EXPECT_EQ(model.ranks(), (std::vector<int64_t>{4, 2, 0})) << "ties go to lower adapters and triplets";
  EXPECT_EQ(model.pattern(), (std::vector<uint8_t>{1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0}));
}

TEST_P(Faults, EqualRanksNeedNoMask) {
  ModelCase c;
  c.target_rank = 4;  // mean of 4, 3 and 5
  Model model(backend, backend.context(), c);
  for (int64_t step = 0; step < c.schedule.total_step; ++step) {
    model.set_gradients(static_cast<uint64_t>(step));
    model.step(step);
    EXPECT_EQ(model.report().budget, 12);
    EXPECT_EQ(model.pattern(), std::vector<uint8_t>(12, 1));
    for (double e : all_E(model)) EXPECT_NE(e, 0.0);
  }
  EXPECT_EQ(model.ranks(), (std::vector<int64_t>{4, 3, 5}));
}

class NonFinite : public testing::TestWithParam<std::tuple<Backend*, double, int, bool>> {};

// One gradient that is not finite costs one step: parameters and averages stay, the mask that falls on the step
// happens.
TEST_P(NonFinite, GradientCostsOneStep) {
  const auto [column, strange, matrix, flagged] = GetParam();
  Backend& backend = *column;
  const ModelCase c;
  Model model(backend, backend.context(), c);
  const int64_t masked = c.schedule.tinit + 2;
  for (int64_t step = 0; step < masked; ++step) {
    model.set_gradients(static_cast<uint64_t>(step));
    model.step(step);
  }
  EXPECT_EQ(model.report().has_pattern, 0);

  Tensor& g = model.part(1, matrix).g;
  Dense<double> values = g.get();
  values.values.back() = strange;
  g.set(values);
  adalora_step_t step = model.step_at(masked);
  Value<double> squares(backend, 0.0);
  Value<float> found_inf(backend, 0.0f);
  require(
      adalora_allocator_gradient_norm(model.allocator(), nullptr, squares.data(), found_inf.data(), backend.stream()));
  EXPECT_EQ(found_inf.get(), 1.0f);
  step.found_inf = flagged ? found_inf.data() : nullptr;  // NULL: the library looks itself

  const std::vector<uint8_t> stays = oracle::select(
      model.scores(), oracle::budget(masked, c.schedule, c.initial_budget(), c.target_budget()).first, c.costs());
  Contents expected = model.contents(&Part::p);
  size_t i = 0;
  for (oracle::Triplets<double>& p : expected)
    for (double& e : p.E.values)
      if (stays[i++] == 0) e = 0;
  const Contents ipt = model.contents(&Part::ipt), unc = model.contents(&Part::unc), m = model.contents(&Part::m);
  require(adalora_allocator_step(model.allocator(), &step, 1, backend.stream()));
  EXPECT_EQ(model.pattern(), stays) << "the mask falls all the same";
  EXPECT_EQ(model.report().skipped, 1);
  const Contents p = model.contents(&Part::p);
  for (size_t k = 0; k < p.size(); ++k)
    for (int q : {0, 1, 2}) {
      EXPECT_EQ(p[k][q].values, expected[k][q].values);
      EXPECT_EQ(model.contents(&Part::ipt)[k][q].values, ipt[k][q].values);
      EXPECT_EQ(model.contents(&Part::unc)[k][q].values, unc[k][q].values);
      EXPECT_EQ(model.contents(&Part::m)[k][q].values, m[k][q].values);
    }

  for (int64_t later = masked + 1; later < c.schedule.total_step; ++later) {
    model.set_gradients(static_cast<uint64_t>(later));
    model.step(later);
  }
  EXPECT_TRUE(all_finite(model.contents(&Part::p)));
  EXPECT_EQ(live(model), c.target_budget());
  EXPECT_EQ(model.report().skipped, 1);
  EXPECT_EQ(model.adam_steps(), std::vector<int64_t>(3, c.schedule.total_step - 1));
}

INSTANTIATE_TEST_SUITE_P(On, NonFinite,
                         testing::Combine(testing::ValuesIn(backends()),
                                          testing::Values(HUGE_VAL, -HUGE_VAL, std::nan("")), testing::Values(0, 1, 2),
                                          testing::Bool()),
                         [](const auto& row) {
                           return name_of_backend(std::get<0>(row.param)) + "_" + std::to_string(row.index);
                         });

TEST_P(Faults, AFactorThatIsNotFiniteCostsOneStep) {
  for (double factor : {HUGE_VAL, std::nan("")}) {
    Model model(backend, backend.context(), ModelCase{});
    model.step(1);
    const std::vector<Bytes> before = model.tensors();
    model.set_factor(factor);
    model.step(2);
    EXPECT_EQ(model.tensors(), before) << factor;
    EXPECT_EQ(model.report().skipped, 1) << factor;
  }
}

// A layer that the step did not use: its gradients are not even read.
TEST_P(Faults, AnIdleAdapterHasNoSensitivity) {
  const ModelCase c;
  Model model(backend, backend.context(), c);
  model.step(1);
  const Contents p = model.contents(&Part::p), ipt = model.contents(&Part::ipt);
  for (int m : {0, 1, 2}) {
    Tensor& g = model.part(1, m).g;
    g.set(Dense<double>(g.rows(), g.columns(), std::vector<double>(static_cast<size_t>(g.rows() * g.columns()), NAN)));
  }
  model.set_has_grad({1, 0, 1});
  for (bool looks_itself : {false, true}) {
    adalora_step_t step = model.step_at(looks_itself ? 3 : 2);
    if (looks_itself) step.found_inf = nullptr;
    require(adalora_allocator_step(model.allocator(), &step, 1, backend.stream()));
  }
  EXPECT_EQ(model.report().skipped, 0);
  EXPECT_EQ(model.adam_steps(), (std::vector<int64_t>{3, 1, 3}));
  for (int m : {0, 1, 2}) {
    EXPECT_EQ(model.contents(&Part::p)[1][m].values, p[1][m].values);
    Dense<double> decayed = ipt[1][m];
    for (double& value : decayed.values) value *= c.beta1 * c.beta1;
    expect_near("sensitivity", decayed, model.contents(&Part::ipt)[1][m], 1e-15);
  }
  EXPECT_TRUE(all_finite(model.contents(&Part::ipt)));
}

// |p g| of a typical step is below float16's smallest number, and so is every score.
TEST_P(Faults, ScoresOfFloat16ParametersDoNotUnderflow) {
  ModelCase c;
  c.param = f16;
  Model model(backend, backend.context(), c);
  for (size_t k = 0; k < c.layers.size(); ++k)
    for (int m : {0, 1, 2}) {
      Dense<double> values = model.part(k, m).p.get();
      for (double& value : values.values) value *= 1e-2;
      model.part(k, m).p.set(values);
    }
  model.set_gradients(7, 1e-4);
  for (int64_t step : {1, 2, 3}) model.step(step, false);
  std::vector<double> scores = model.scores();
  for (double score : scores) {
    EXPECT_GT(score, 0.0);
    EXPECT_LT(score, smallest_step(f16)) << "else this case shows nothing";
  }
  std::sort(scores.begin(), scores.end());
  EXPECT_EQ(std::adjacent_find(scores.begin(), scores.end()), scores.end()) << "all different";
}

struct Steps {
  const char* what;
  oracle::Schedule schedule;
  std::vector<int64_t> steps;
};

TEST_P(Faults, TheLastMaskIsTakenOnce) {
  const Steps cases[] = {
      {"no final phase, delta_t that misses the end", {2, 0, 11, 4}, {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}},
      {"a stride over the end", {4, 4, 20, 2}, {0, 5, 10, 15, 18, 19}},
      {"a stride over the whole final phase", {4, 4, 20, 2}, {0, 5, 10, 15, 25}},
      {"delta_t beyond the run", {4, 4, 20, 100}, {0, 8, 15, 16, 17, 18, 19}},
  };
  for (const Steps& run : cases) {
    ModelCase c;
    c.schedule = run.schedule;
    Model model(backend, backend.context(), c);
    int64_t selections = 0;
    for (int64_t step : run.steps) {
      model.set_gradients(static_cast<uint64_t>(step + 1));
      const bool was_final = model.report().is_final != 0;
      model.step(step);
      const adalora_report_t report = model.report();
      EXPECT_EQ(report.is_final, step >= c.schedule.end() ? 1 : 0) << run.what << ", step " << step;
      EXPECT_TRUE(!was_final || report.selections == selections) << run.what << ": a final pattern is not chosen again";
      selections = report.selections;
    }
    EXPECT_EQ(live(model), c.target_budget()) << run.what;
  }

  // A run that stops before the end takes it on demand.
  Model stopped(backend, backend.context(), ModelCase{});
  for (int64_t step = 0; step < 9; ++step) stopped.step(step);
  EXPECT_GT(live(stopped), stopped.model().target_budget());
  require(adalora_allocator_finalize(stopped.allocator(), nullptr, backend.stream()));
  EXPECT_EQ(live(stopped), stopped.model().target_budget());
}

TEST_P(Faults, ResumingInTheMiddleEndsAtTheTarget) {
  const ModelCase c;
  for (int64_t stop : {3, 6, 7, 12}) {
    Model first(backend, backend.context(), c);
    for (int64_t step = 0; step < stop; ++step) {
      first.set_gradients(static_cast<uint64_t>(step));
      first.step(step);
    }
    Model second(backend, backend.context(), c, 99);
    second.set_tensors(first.tensors());
    second.load(first.save());
    EXPECT_EQ(second.ranks(), first.ranks()) << "what is saved is what ran";
    for (int64_t step = stop; step < c.schedule.total_step; ++step) {
      second.set_gradients(static_cast<uint64_t>(step));
      second.step(step);
    }
    EXPECT_EQ(live(second), c.target_budget());
    EXPECT_EQ(second.report().irregular, 0);
  }
}

TEST_P(Faults, MergingManyTimesInBfloat16LeavesNoTrace) {
  adalora_adapter_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = 33;
  desc.out_features = 17;
  desc.rank = 4;
  desc.param_dtype = desc.activation_dtype = bf16;
  adalora_adapter_t* handle = nullptr;
  require(adalora_adapter_create(backend.context(), &desc, &handle));
  const Adapter adapter(handle);
  Random random(3);
  const Tensor A(backend, bf16, random.matrix(4, 33)), E(backend, bf16, random.matrix(1, 4)),
      B(backend, bf16, random.matrix(17, 4)), w(backend, bf16, random.matrix(17, 33)), backup(backend, bf16, 17, 33);
  const adalora_triplets_t params{A.matrix(), E.matrix(), B.matrix()};
  const adalora_matrix_t base = w.matrix(), kept = backup.matrix();
  const Bytes before = w.bytes();
  Bytes merged;
  for (int i = 0; i < 100; ++i) {
    require(adalora_adapter_merge(adapter.get(), &params, 0, 0, &base, &kept, nullptr, backend.stream()));
    if (i > 0) expect_same_bits("merged again", merged, w.bytes(), bf16);
    merged = w.bytes();
    require(adalora_adapter_unmerge(adapter.get(), nullptr, 0, 0, &base, &kept, backend.stream()));
    expect_same_bits("unmerged", before, w.bytes(), bf16);
  }
  EXPECT_NE(merged, before);
}

TEST_P(Faults, LayersMayHoldNoTriplet) {
  for (const std::vector<LayerShape>& layers :
       {std::vector<LayerShape>{{7, 5, 4}, {13, 8, 0}, {6, 9, 5}}, {{7, 5, 0}, {13, 8, 0}}}) {
    ModelCase c;
    c.layers = layers;
    c.target_rank = layers[0].rank > 0 ? 1 : 0;
    Model model(backend, backend.context(), c);
    const Value<double> penalty(backend), squares(backend, 0.0);
    for (int64_t step = 0; step < c.schedule.total_step; ++step) {
      require(
          adalora_allocator_orthogonality(model.allocator(), nullptr, 0.1, nullptr, penalty.data(), backend.stream()));
      require(adalora_allocator_gradient_norm(model.allocator(), nullptr, squares.data(), nullptr, backend.stream()));
      model.step(step);
    }
    EXPECT_EQ(live(model), c.target_budget());
    EXPECT_TRUE(std::isfinite(penalty.get()));
    Model resumed(backend, backend.context(), c);
    resumed.load(model.save());
    EXPECT_EQ(resumed.digest(), model.digest());
  }
}

TEST_P(Faults, IrregularStepsAreReported) {
  Model model(backend, backend.context(), ModelCase{});
  const std::pair<int64_t, int64_t> steps_and_reports[] = {{0, 0}, {1, 0}, {1, 1}, {5, 1},
                                                           {3, 2}, {4, 2}, {4, 3}, {9, 3}};
  for (const auto& [step, irregular] : steps_and_reports) {
    model.step(step);
    EXPECT_EQ(model.report().irregular, irregular) << "step " << step;
    EXPECT_EQ(model.report().last_step, step);
  }
}

class Overflow : public testing::TestWithParam<std::tuple<Backend*, adalora_dtype_t>> {};

// p * g beyond the largest number: averages and scores stay finite, and the run goes on.
TEST_P(Overflow, OfProductsStaysFinite) {
  const auto [column, param] = GetParam();
  Backend& backend = *column;
  ModelCase c;
  c.param = param;
  Model model(backend, backend.context(), c);
  const double large = c.param == f64 ? 1e200 : c.param == f16 ? 6e4 : 1e30;
  for (int m : {0, 1, 2}) {
    const auto all_large = [&](Tensor& tensor) {
      tensor.set(Dense<double>(tensor.rows(), tensor.columns(),
                               std::vector<double>(static_cast<size_t>(tensor.rows() * tensor.columns()), large)));
    };
    all_large(model.part(0, m).p);
    all_large(model.part(0, m).g);
  }
  for (int64_t step = 1; step < c.schedule.total_step; ++step) {
    model.step(step, false);
    EXPECT_TRUE(all_finite(model.contents(&Part::ipt))) << "step " << step;
    EXPECT_TRUE(all_finite(model.contents(&Part::unc))) << "step " << step;
    for (double score : model.scores()) EXPECT_TRUE(std::isfinite(score)) << "step " << step;
  }
  EXPECT_EQ(live(model), c.target_budget());
  EXPECT_EQ(model.ranks()[0], 4) << "the largest scores of all";
}

INSTANTIATE_TEST_SUITE_P(On, Overflow,
                         testing::Combine(testing::ValuesIn(backends()), testing::Values(f64, f32, bf16, f16)),
                         [](const auto& row) {
                           return name_of_backend(std::get<0>(row.param)) + "_" + name_of(std::get<1>(row.param));
                         });

// What a mask took may come back: the scores of a masked triplet go on, since its E still receives a gradient.
TEST_P(Faults, AMaskedTripletMayComeBack) {
  const ModelCase c;
  Model model(backend, backend.context(), c);
  std::vector<double> scores(12, 1.0);
  scores[0] = 0.0;
  model.select(10, scores);
  EXPECT_EQ(model.pattern()[0], 0);
  scores[0] = 2.0;
  model.select(12, scores);
  EXPECT_EQ(model.pattern()[0], 1);

  operations::LayerCase layer;
  operations::LayerContents contents = operations::random_contents(layer);
  std::fill(contents.adapters[0].params.E.values.begin(), contents.adapters[0].params.E.values.end(), 0.0);
  layer.accumulates = false;
  operations::Pass pass(backend, backend.context(), layer, contents);
  pass.forward();
  pass.backward();
  for (double slope : pass.gradient(0, 1).values) EXPECT_NE(slope, 0.0);
}

// A masked triplet whose vectors have gone astray does not reach the output.
TEST_P(Faults, AMaskedTripletAddsNothing) {
  for (adalora_dtype_t type : {f64, f32, bf16, f16}) {
    operations::LayerCase layer;
    layer.activation = layer.param = type;
    operations::LayerContents contents = operations::random_contents(layer);
    oracle::Triplets<double>& params = contents.adapters[0].params;
    params.E.values = {0.5, 0.0, 0.25};
    operations::Pass clean(backend, backend.context(), layer, contents);
    for (int64_t j = 0; j < layer.in; ++j) params.A(1, j) = j % 2 == 0 ? HUGE_VAL : 1.0;
    operations::Pass astray(backend, backend.context(), layer, contents);
    clean.forward();
    astray.forward();
    EXPECT_EQ(clean.y(0).values, astray.y(0).values) << name_of(type);
  }
}

}  // namespace
