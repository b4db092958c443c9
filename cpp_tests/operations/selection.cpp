// Scores, the schedule, and which triplets stay.

#include <numeric>

#include "operations.hpp"
#include "support/compare.hpp"
#include "support/model.hpp"
#include "support/random.hpp"

namespace operations {

using namespace support;

namespace {

std::vector<double> all_scores(const Model& model) {
  const Contents ipt = model.contents(&Part::ipt), unc = model.contents(&Part::unc);
  std::vector<double> all;
  for (size_t k = 0; k < ipt.size(); ++k) {
    const std::vector<double> own = oracle::scores(ipt[k], unc[k]);
    all.insert(all.end(), own.begin(), own.end());
  }
  return all;
}

// E of every triplet, adapter by adapter.
std::vector<double> all_E(const Model& model) {
  std::vector<double> all;
  for (const oracle::Triplets<double>& p : model.contents(&Part::p))
    all.insert(all.end(), p.E.values.begin(), p.E.values.end());
  return all;
}

void expect_masked(const Model& model, const std::vector<double>& before, const std::vector<uint8_t>& stays) {
  const std::vector<double> after = all_E(model);
  for (size_t i = 0; i < stays.size(); ++i)
    EXPECT_EQ(after[i], stays[i] != 0 ? before[i] : 0.0) << "E of triplet " << i;
  if (!model.model().master) return;
  size_t i = 0;
  for (size_t k = 0; k < model.model().layers.size(); ++k)
    for (double low : model.part(k, 1).low->get().values) {
      EXPECT_EQ(low, rounded(after[i], model.model().param)) << "E of triplet " << i << " in half precision";
      ++i;
    }
}

bool averages_are_zero(const Model& model) {
  for (Tensor Part::* kind : {&Part::ipt, &Part::unc})
    for (const oracle::Triplets<double>& q : model.contents(kind))
      for (int m : {0, 1, 2})
        for (double value : q[m].values)
          if (value != 0) return false;
  return true;
}

ModelCase layers_of(adalora_dtype_t param, bool master) {
  ModelCase c;
  c.param = param;
  c.master = master;
  c.layers = {{33, 13, 5}, {7, 65, 3}, {13, 13, 0}, {1, 1, 1}, {100, 768, 12}};
  c.target_rank = 1;
  return c;
}

void scores(Backend& backend, const ModelCase& c) {
  Model model(backend, backend.context(), c);
  for (int64_t step : {1, 2, 3}) model.update(step);
  const std::vector<double> expected = all_scores(model), found = model.scores();
  expect_near("scores", {1, static_cast<int64_t>(expected.size()), expected},
              {1, static_cast<int64_t>(found.size()), found}, 1e-14);
}

// Products and sums beyond the largest number stay finite, and still rank above all others.
void scores_that_overflow(Backend& backend, adalora_dtype_t param) {
  const ModelCase c = layers_of(param, false);
  Model model(backend, backend.context(), c);
  model.update(1);
  const double huge = param == f64 ? 1e200 : 3e38;
  for (int m : {0, 1, 2})
    for (Tensor Part::* kind : {&Part::ipt, &Part::unc}) {
      Tensor& average = model.part(0, m).*kind;
      Dense<double> values = average.get();
      for (int64_t j = 0; j < (m == 0 ? values.columns : 1); ++j) values(0, j) = huge;
      average.set(values);
    }
  const std::vector<double> found = model.scores();
  for (double score : found) EXPECT_TRUE(std::isfinite(score)) << score;
  EXPECT_EQ(std::max_element(found.begin(), found.end()), found.begin());
  if (param != f64) {
    const std::vector<double> expected = all_scores(model);
    for (size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], 1e-14 * expected[i]);
  }
}

void selects(Backend& backend, const ModelCase& c) {
  // Random scores with ties, at every step of a run that starts there.
  Random random(3);
  for (int64_t step = 0; step <= c.schedule.end(); ++step) {
    Model model(backend, backend.context(), c);
    std::vector<double> given(static_cast<size_t>(c.total_rank()));
    for (double& score : given) score = std::floor(4 * (random.uniform() + 1)) * (random.uniform() < 0 ? -0.0 : 1.0);
    const auto [budget, masks] = oracle::budget(step, c.schedule, c.initial_budget(), c.target_budget());
    const std::vector<double> before = all_E(model);
    model.select(step, given);
    const adalora_report_t report = model.report();
    EXPECT_EQ(report.budget, budget) << "step " << step;
    EXPECT_EQ(report.last_step, step);
    const bool chosen = masks || step == c.schedule.end();
    EXPECT_EQ(report.selections, chosen ? 1 : 0) << "step " << step;
    EXPECT_EQ(report.is_final, step == c.schedule.end() ? 1 : 0);
    if (!chosen) {
      expect_masked(model, before, std::vector<uint8_t>(given.size(), 1));
      continue;
    }
    const std::vector<uint8_t> stays = oracle::select(given, budget, c.costs());
    EXPECT_EQ(model.pattern(), stays) << "step " << step;
    expect_masked(model, before, stays);
    EXPECT_EQ(report.live_triplets, std::accumulate(stays.begin(), stays.end(), int64_t{0}));
    if (c.budget_unit == ADALORA_BUDGET_TRIPLETS) {
      EXPECT_EQ(report.live_triplets, budget) << "exactly the budget";
    }
  }
}

void computes_scores_itself(Backend& backend, const ModelCase& c) {
  Model given(backend, backend.context(), c), own(backend, backend.context(), c);
  for (Model* model : {&given, &own}) model->update(1);
  given.select(c.schedule.tinit + 2, given.scores());
  own.select(c.schedule.tinit + 2);
  EXPECT_EQ(given.pattern(), own.pattern());
  EXPECT_EQ(given.tensors(), own.tensors());
}

// Scores that a broken reduction makes must not make a broken pattern: the budget holds.
void strange_scores(Backend& backend, const ModelCase& c) {
  Model model(backend, backend.context(), c);
  std::vector<double> given(static_cast<size_t>(c.total_rank()), NAN);
  given[7] = 1;
  given[9] = -0.0;
  given[11] = INFINITY;
  model.select(c.schedule.end(), given);
  const std::vector<uint8_t> stays = model.pattern();
  EXPECT_EQ(std::accumulate(stays.begin(), stays.end(), int64_t{0}), c.target_budget());
}

// Most scores tie, and the triplets' parameters together are more than 32 bits count. This process owns none of them.
void selects_of_a_million(Backend& backend, int32_t unit) {
  ModelCase c;
  c.budget_unit = unit;
  c.layers.clear();
  c.param = f32;
  c.whole = false;
  for (int64_t k = 0; k < 250'000; ++k) c.layers.push_back({1 + k % 7, 9000 + k % 11, 4});
  const std::vector<Adapter> adapters = adapters_of(backend.context(), c);
  const Allocator allocator = allocator_of(backend.context(), c, adapters);
  adalora_allocator_t* const made = allocator.get();
  size_t state_size = 0, workspace_size = 0;
  require(adalora_allocator_sizes(made, 0, &state_size, &workspace_size, nullptr));
  const Buffer state(backend, state_size, static_cast<unsigned char>(0)), workspace(backend, workspace_size);
  require(adalora_allocator_bind(made, state.data(), workspace.data(), nullptr, 0, 0, nullptr, 0, 0,
                                 backend.waiting_stream()));

  const std::vector<int64_t> costs = c.costs();
  ASSERT_EQ(costs.size(), 1'000'000u);
  Random random(11);
  std::vector<double> given(costs.size());
  for (double& score : given) score = std::floor(16 * (random.uniform() + 1)) / 3;
  const Values<double> scores(backend, given);
  const Value<int64_t> number(backend, c.schedule.tinit + c.schedule.delta_t);
  adalora_step_t step{};
  step.struct_size = sizeof step;
  step.step = number.data();
  require(adalora_allocator_select(made, &step, scores.data(), backend.stream()));
  std::vector<uint8_t> stays(given.size());
  require(adalora_allocator_read_sync(made, stays.data(), nullptr, nullptr, nullptr, backend.waiting_stream()));
  const int64_t budget = oracle::budget(number.get(), c.schedule, c.initial_budget(), c.target_budget()).first;
  EXPECT_TRUE(stays == oracle::select(given, budget, costs));
}

void schedule(Backend& backend) {
  ModelCase c;
  for (const oracle::Schedule& s :
       {oracle::Schedule{0, 0, 1, 1}, {4, 4, 20, 2}, {3, 0, 50, 7}, {0, 5, 1000, 1}, {10, 1, 300, 1000}}) {
    c.schedule = s;
    for (int32_t unit : {ADALORA_BUDGET_TRIPLETS, ADALORA_BUDGET_PARAMETERS}) {
      c.budget_unit = unit;
      const Model model(backend, backend.context(), c);
      for (int64_t step = 0; step <= s.total_step + 2; ++step) {
        int64_t budget = -1;
        int32_t masks = -1;
        require(adalora_allocator_budget(model.allocator(), step, &budget, &masks));
        const auto expected = oracle::budget(step, s, c.initial_budget(), c.target_budget());
        EXPECT_EQ(budget, expected.first) << "step " << step << " of " << s.total_step;
        EXPECT_EQ(masks, expected.second ? 1 : 0) << "step " << step << " of " << s.total_step;
        require(adalora_allocator_budget(model.allocator(), step, &budget, nullptr));
      }
    }
  }
}

void finalizes(Backend& backend, const ModelCase& c) {
  Model model(backend, backend.context(), c);
  model.update(1);
  const std::vector<uint8_t> stays = oracle::select(model.scores(), c.target_budget(), c.costs());
  const std::vector<double> before = all_E(model);
  require(adalora_allocator_finalize(model.allocator(), nullptr, backend.stream()));
  EXPECT_EQ(model.pattern(), stays);
  expect_masked(model, before, stays);
  EXPECT_TRUE(averages_are_zero(model));
  EXPECT_EQ(model.report().is_final, 1);

  const Values<double> others(backend, std::vector<double>(stays.size(), 1.0));
  require(adalora_allocator_finalize(model.allocator(), others.data(), backend.stream()));
  EXPECT_EQ(model.pattern(), stays) << "nothing where it is final already";
  EXPECT_EQ(model.report().selections, 1);
}

void set_pattern(Backend& backend, const ModelCase& c) {
  for (bool is_final : {false, true}) {
    Model model(backend, backend.context(), c);
    model.update(1);
    std::vector<uint8_t> given(static_cast<size_t>(c.total_rank()));
    for (size_t i = 0; i < given.size(); ++i)
      given[i] = i % 3 == 0 ? static_cast<uint8_t>(i + 1) : 0;  // any number but 0 keeps
    std::vector<uint8_t> stays(given.size());
    for (size_t i = 0; i < given.size(); ++i) stays[i] = given[i] != 0 ? 1 : 0;
    const std::vector<double> before = all_E(model);
    model.set_pattern(given, is_final);
    EXPECT_EQ(model.pattern(), stays);
    expect_masked(model, before, stays);
    EXPECT_EQ(averages_are_zero(model), is_final);
    const adalora_report_t report = model.report();
    EXPECT_EQ(report.has_pattern, 1);
    EXPECT_EQ(report.is_final, is_final ? 1 : 0);
    EXPECT_EQ(report.live_triplets, std::accumulate(stays.begin(), stays.end(), int64_t{0}));

    // A later mask chooses anew, or the pattern stays.
    model.update(2);
    const int64_t step = c.schedule.tinit + 2;
    const std::vector<uint8_t> anew = oracle::select(
        model.scores(), oracle::budget(step, c.schedule, c.initial_budget(), c.target_budget()).first, c.costs());
    model.select(step);
    EXPECT_EQ(model.pattern(), is_final ? stays : anew);
  }
}

void final_pattern_is_applied_again(Backend& backend, const ModelCase& c) {
  Model model(backend, backend.context(), c);
  model.update(1);
  model.select(c.schedule.end());
  const std::vector<uint8_t> stays = model.pattern();
  for (int64_t step = c.schedule.end() + 1; step < c.schedule.total_step; ++step) {
    for (size_t k = 0; k < c.layers.size(); ++k)
      model.part(k, 1).p.set(
          Dense<double>(1, c.layers[k].rank, std::vector<double>(static_cast<size_t>(c.layers[k].rank), 0.5)));
    const std::vector<double> before = all_E(model);
    model.select(step);
    expect_masked(model, before, stays);
    EXPECT_EQ(model.pattern(), stays);
  }
}

void digest(Backend& backend, const ModelCase& c) {
  Model a(backend, backend.context(), c, 1), b(backend, backend.context(), c, 2);
  EXPECT_EQ(a.digest(), b.digest()) << "it does not depend on parameters";
  std::vector<uint64_t> seen{a.digest()};
  const auto changed = [&](const char* what) {
    const uint64_t now = a.digest();
    EXPECT_EQ(now, a.digest());
    for (uint64_t before : seen) EXPECT_NE(before, now) << what;
    seen.push_back(now);
  };
  std::vector<uint8_t> stays(static_cast<size_t>(c.total_rank()), 1);
  a.set_pattern(stays, false);
  stays[0] = 0;
  a.set_pattern(stays, false);
  changed("another pattern");
  stays[0] = 1, stays[1] = 0;
  a.set_pattern(stays, false);
  changed("another triplet");
  a.select(1);
  changed("a step");
  a.set_pattern(stays, true);
  changed("a final pattern");
  b.set_pattern(stays, false);
  b.select(1);
  b.set_pattern(stays, true);
  EXPECT_EQ(a.digest(), b.digest());
}

void reset(Backend& backend, const ModelCase& c) {
  Model model(backend, backend.context(), c), fresh(backend, backend.context(), c);
  for (int64_t step = 0; step < c.schedule.total_step; ++step) model.step(step);
  const Contents p = model.contents(&Part::p);
  require(adalora_allocator_reset(model.allocator(), backend.stream()));
  for (Tensor Part::* kind : {&Part::m, &Part::v, &Part::ipt, &Part::unc})
    for (const oracle::Triplets<double>& q : model.contents(kind))
      for (int m : {0, 1, 2})
        for (double value : q[m].values) ASSERT_EQ(value, 0.0);
  const Contents after = model.contents(&Part::p);
  for (size_t k = 0; k < p.size(); ++k)
    for (int m : {0, 1, 2}) EXPECT_EQ(p[k][m].values, after[k][m].values);
  EXPECT_EQ(model.digest(), fresh.digest());
  EXPECT_EQ(model.save(), fresh.save());
  EXPECT_EQ(model.report().last_step, -1);
  EXPECT_EQ(model.report().has_pattern, 0);
  EXPECT_EQ(model.report().budget, c.initial_budget());

  fresh.set_tensors(model.tensors());
  for (int64_t step = 0; step < c.schedule.total_step; ++step) {
    model.step(step);
    fresh.step(step);
  }
  EXPECT_EQ(model.tensors(), fresh.tensors()) << "the second run is as the first";
}

}  // namespace

std::vector<Case> selection_cases() {
  std::vector<Case> rows{{"budget", "of every step", schedule}};
  for (adalora_dtype_t param : {f64, f32, bf16, f16})
    for (bool master : {false, true}) {
      if (master && compute_type(param) == param) continue;
      const ModelCase c = layers_of(param, master);
      const std::string what = name_of(param) + (master ? " master" : "");
      const auto add = [&](const std::string& operation, void (*check)(Backend&, const ModelCase&)) {
        rows.push_back({operation, what, [c, check](Backend& b) { check(b, c); }});
      };
      add("scores", scores);
      add("select", selects);
      add("select computes scores itself", computes_scores_itself);
      add("finalize", finalizes);
      add("set pattern", set_pattern);
      add("digest", digest);
      add("reset", reset);
    }
  // Rows of A beyond what one warp adds up on CUDA, some that no four elements begin with; more rows than a block.
  ModelCase wide = layers_of(f32, false);
  wide.layers = {{2052, 33, 5}, {1025, 7, 300}, {1024, 3, 1}, {3, 5000, 2}};
  rows.push_back({"scores", "f32 long rows", [wide](Backend& b) { scores(b, wide); }});
  ModelCase c = layers_of(f32, false);
  rows.push_back({"select", "scores that are no numbers", [c](Backend& b) { strange_scores(b, c); }});
  rows.push_back({"select", "after the end", [c](Backend& b) { final_pattern_is_applied_again(b, c); }});
  c.budget_unit = ADALORA_BUDGET_PARAMETERS;
  rows.push_back({"select", "budget in parameters", [c](Backend& b) { selects(b, c); }});
  for (const auto& [unit, name] : {std::pair{ADALORA_BUDGET_TRIPLETS, "a million triplets"},
                                   std::pair{ADALORA_BUDGET_PARAMETERS, "a million triplets, budget in parameters"}})
    rows.push_back({"select", name, [unit = unit](Backend& b) { selects_of_a_million(b, unit); }});
  for (adalora_dtype_t param : {f64, f32})
    rows.push_back({"scores", name_of(param) + " overflow", [param](Backend& b) { scores_that_overflow(b, param); }});
  return rows;
}

}  // namespace operations
