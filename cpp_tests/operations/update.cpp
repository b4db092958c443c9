// AdamW and importance in one pass: every element of every slice.

#include "operations.hpp"
#include "support/compare.hpp"
#include "support/model.hpp"

namespace operations {

using namespace support;

namespace {

struct UpdateCase {
  std::string name;
  ModelCase model;
  bool with_adamw = true;
  std::vector<uint8_t> has_grad;  // empty: all
  double factor = 1;
  double gradient_size = 1;
  int64_t first_step = 1;
};

ModelCase layers_of(adalora_dtype_t param, adalora_dtype_t gradient, bool master) {
  ModelCase c;
  c.param = param;
  c.gradient = gradient;
  c.master = master;
  c.layers = {{33, 13, 5}, {7, 65, 3}, {13, 13, 0}, {1, 1, 1}, {100, 768, 12}};
  c.target_rank = 1;
  return c;
}

// Everything before and after one update.
struct State {
  Contents p, g, m, v, ipt, unc;

  explicit State(const Model& model)
      : p(model.contents(&Part::p)),
        g(model.contents(&Part::g)),
        m(model.contents(&Part::m)),
        v(model.contents(&Part::v)),
        ipt(model.contents(&Part::ipt)),
        unc(model.contents(&Part::unc)) {}
};

// AdamW as the oracle computes it, from the state before.
void check_adamw(const Model& model, const UpdateCase& c, const State& before, const State& after, size_t k, int m,
                 const oracle::Hyper& hyper, int64_t applied) {
  auto p = as<Bounded>(before.p[k][m]), first = as<Bounded>(before.m[k][m]), second = as<Bounded>(before.v[k][m]);
  const Dense<double>& g = before.g[k][m];
  for (size_t i = 0; i < g.values.size(); ++i)
    oracle::adamw(p.values[i], Bounded(g.values[i]) * c.factor, first.values[i], second.values[i], applied, hyper);
  const std::string what = c.name + ": " + "AEB"[m] + std::to_string(k);
  const double eps = tolerance(c.model.param);
  expect_close(what, p, after.p[k][m], eps, c.model.stored());
  expect_close(what + "'s first moment", first, after.m[k][m], eps, c.model.state());
  expect_close(what + "'s second moment", second, after.v[k][m], eps, c.model.state());
  if (!c.model.master) return;
  const Tensor master_rounded(model.backend(), c.model.param, after.p[k][m]);
  expect_same_bits(what + " in half precision", master_rounded, *model.part(k, m).low);
}

// The averages, from the parameters after AdamW.
void check_importance(const UpdateCase& c, const State& before, const State& after, size_t k, int m, bool has_grad) {
  auto ipt = as<Bounded>(before.ipt[k][m]), unc = as<Bounded>(before.unc[k][m]);
  for (size_t i = 0; i < ipt.values.size(); ++i) {
    const Bounded sensitivity =
        has_grad ? abs(Bounded(after.p[k][m].values[i]) * before.g[k][m].values[i] * c.factor) : Bounded(0.0);
    oracle::smooth(sensitivity, ipt.values[i], unc.values[i], c.model.beta1, c.model.beta2);
  }
  const std::string what = c.name + ": " + "AEB"[m] + std::to_string(k);
  expect_close(what + "'s sensitivity", ipt, after.ipt[k][m], tolerance(c.model.param), c.model.state());
  expect_close(what + "'s uncertainty", unc, after.unc[k][m], tolerance(c.model.param), c.model.state());
}

void updates(Backend& backend, const UpdateCase& c) {
  Model model(backend, backend.context(), c.model);
  model.set_factor(c.factor);
  const std::vector<uint8_t> has_grad =
      c.has_grad.empty() ? std::vector<uint8_t>(c.model.layers.size(), 1) : c.has_grad;
  model.set_has_grad(has_grad);
  // Groups of hyperparameters by matrix, as far as there are several.
  std::vector<Owned> owned = model.everything();
  for (Owned& range : owned)
    range.hyper = static_cast<int32_t>(static_cast<size_t>(range.matrix) % c.model.hypers.size());
  model.bind(owned);

  for (int64_t applied = 1; applied <= 3; ++applied) {
    model.set_gradients(static_cast<uint64_t>(100 + applied), c.gradient_size);
    const State before(model);
    model.update(c.first_step + applied - 1, c.with_adamw);
    const State after(model);
    const std::vector<int64_t> clocks = model.adam_steps();
    for (size_t k = 0; k < c.model.layers.size(); ++k) {
      EXPECT_EQ(clocks[k], c.with_adamw && has_grad[k] != 0 ? applied : 0);
      for (int m : {0, 1, 2}) {
        const oracle::Hyper& hyper = c.model.hypers[static_cast<size_t>(m) % c.model.hypers.size()];
        if (c.with_adamw && has_grad[k] != 0)
          check_adamw(model, c, before, after, k, m, hyper, applied);
        else
          EXPECT_EQ(before.p[k][m].values, after.p[k][m].values) << c.name;
        if (c.first_step + applied - 1 < c.model.schedule.end())
          check_importance(c, before, after, k, m, has_grad[k] != 0);
        else
          EXPECT_EQ(before.ipt[k][m].values, after.ipt[k][m].values) << c.name;
        EXPECT_EQ(before.g[k][m].values, after.g[k][m].values) << "gradients are read alone";
      }
    }
  }
}

void not_finite(Backend& backend, const UpdateCase& c) {
  Model model(backend, backend.context(), c.model);
  model.update(1);
  model.part(0, 0).g.set(Dense<double>(5, 33, std::vector<double>(5 * 33, NAN)));
  model.set_found_inf(true);
  const std::vector<Bytes> before = model.tensors();
  const std::vector<int64_t> clocks = model.adam_steps();
  model.update(2);
  EXPECT_EQ(model.tensors(), before);
  EXPECT_EQ(model.adam_steps(), clocks);
  EXPECT_EQ(model.report().skipped, 1);
}

void after_the_last_mask(Backend& backend, const UpdateCase& c) {
  Model model(backend, backend.context(), c.model);
  model.set_pattern(std::vector<uint8_t>(static_cast<size_t>(c.model.total_rank()), 1), true);
  model.update(1);
  for (Tensor Part::* average : {&Part::ipt, &Part::unc})
    for (const oracle::Triplets<double>& q : model.contents(average))
      for (int m : {0, 1, 2})
        for (double value : q[m].values) ASSERT_EQ(value, 0.0) << "a final pattern needs no averages";
  EXPECT_EQ(model.adam_steps()[0], 1);
}

void without_moments(Backend& backend, const UpdateCase& c) {
  ModelCase bare = c.model;
  bare.moments = false;
  Model model(backend, backend.context(), bare);
  const std::vector<Bytes> before = model.tensors();
  const adalora_step_t step = model.step_at(1);
  EXPECT_EQ(adalora_allocator_update(model.allocator(), &step, 1, backend.stream()), ADALORA_ERROR_INVALID_STATE);
  EXPECT_EQ(model.tensors(), before);
  model.update(1, false);
}

}  // namespace

std::vector<Case> update_cases() {
  std::vector<Case> rows;
  struct Types {
    adalora_dtype_t param, gradient;
    bool master;
  };
  const std::vector<Types> all = {{f64, 0, false}, {f32, 0, false},   {bf16, 0, false}, {bf16, f32, false},
                                  {bf16, 0, true}, {bf16, f32, true}, {f16, 0, false},  {f16, f32, false},
                                  {f16, 0, true},  {f16, f32, true}};
  for (const Types& types : all) {
    UpdateCase c;
    c.model = layers_of(types.param, types.gradient, types.master);
    const std::string type =
        name_of(types.param) + " gradients " + name_of(c.model.grad()) + (types.master ? " master " : " ");
    const auto add = [&](const std::string& what, const UpdateCase& row) {
      UpdateCase named = row;
      named.name = type + what;
      rows.push_back({"update", named.name, [named](Backend& b) { updates(b, named); }});
    };
    add("AdamW and importance", c);

    UpdateCase importance = c;
    importance.with_adamw = false;
    add("importance alone", importance);

    UpdateCase unscaled = c;
    unscaled.factor = 0.125;
    unscaled.gradient_size = 64;
    add("unscaled gradients", unscaled);

    UpdateCase idle = c;
    idle.has_grad = {1, 0, 1, 0, 1};
    add("idle adapters", idle);

    UpdateCase groups = c;
    groups.model.hypers = {{1e-2, 0.1, 0.8, 0.99, 1e-6}, {1e-1, 0.0, 0.9, 0.999, 1e-8}, {0.0, 0.5, 0.0, 0.0, 1e-3}};
    add("a group for A E and B each", groups);

    UpdateCase late = c;
    late.first_step = c.model.schedule.end() - 1;
    add("over the end of the budget phase", late);

    rows.push_back({"update", type + "not finite", [c](Backend& b) { not_finite(b, c); }});
    rows.push_back({"update", type + "after the last mask", [c](Backend& b) { after_the_last_mask(b, c); }});
    rows.push_back({"update", type + "without moments", [c](Backend& b) { without_moments(b, c); }});
  }
  return rows;
}

}  // namespace operations
