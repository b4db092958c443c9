// Delta weight, merging and unmerging, in both layouts and every type of weight.

#include <optional>

#include "layer.hpp"
#include "operations.hpp"
#include "support/memory.hpp"
#include "support/random.hpp"

namespace operations {

using namespace support;

namespace {

struct WeightCase {
  adalora_dtype_t param = f32, weight = f32;
  bool fan_in_fan_out = false;
  int64_t gap = 0;
  double scaling = 0;
  int64_t in = 33, out = 65, rank = 5;
  std::string name;
};

class Weights {
 public:
  Weights(Backend& backend, const WeightCase& c)
      : backend_(backend),
        case_(c),
        contents_(random_contents(layer(c))),
        A_(backend, c.param, contents_.adapters[0].params.A, c.gap),
        E_(backend, c.param, contents_.adapters[0].params.E, c.gap),
        B_(backend, c.param, contents_.adapters[0].params.B, c.gap),
        w(backend, c.weight, base(), c.gap),
        backup(backend, c.weight, base().rows, base().columns, c.gap) {
    adalora_adapter_desc_t desc{};
    desc.struct_size = sizeof desc;
    desc.in_features = c.in;
    desc.out_features = c.out;
    desc.rank = c.rank;
    desc.param_dtype = c.param;
    desc.activation_dtype = c.param;
    adalora_adapter_t* adapter = nullptr;
    require(adalora_adapter_create(backend.context(), &desc, &adapter));
    adapter_.reset(adapter);
  }

  void delta_weight(bool accumulate) {
    const adalora_triplets_t p = params();
    const adalora_matrix_t m = w.matrix();
    require(adalora_adapter_delta_weight(adapter_.get(), &p, case_.scaling, case_.fan_in_fan_out, accumulate, &m,
                                         backend_.stream()));
  }
  void merge(bool keeps_backup, float* non_finite) {
    const adalora_triplets_t p = params();
    const adalora_matrix_t m = w.matrix(), b = backup.matrix();
    require(adalora_adapter_merge(adapter_.get(), &p, case_.scaling, case_.fan_in_fan_out, &m,
                                  keeps_backup ? &b : nullptr, non_finite, backend_.stream()));
  }
  void unmerge(bool from_backup) {
    const adalora_triplets_t p = params();
    const adalora_matrix_t m = w.matrix(), b = backup.matrix();
    require(adalora_adapter_unmerge(adapter_.get(), from_backup ? nullptr : &p, case_.scaling, case_.fan_in_fan_out, &m,
                                    from_backup ? &b : nullptr, backend_.stream()));
  }

  // base + sign * delta weight, in the case's layout.
  Dense<Bounded> expected(double base_factor, double sign = 1) const {
    const auto p = oracle::as<Bounded>(contents_.adapters[0].params);
    const double s = case_.scaling != 0 ? case_.scaling : oracle::scaling(0, case_.rank);
    Dense<Bounded> delta = oracle::delta_weight(p, sign * s);
    if (case_.fan_in_fan_out) delta = transposed(delta);
    return oracle::sum(oracle::scaled(as<Bounded>(base()), Bounded(base_factor)), delta);
  }

  Dense<double> base() const {
    Dense<double> values =
        Random(5).matrix(case_.fan_in_fan_out ? case_.in : case_.out, case_.fan_in_fan_out ? case_.out : case_.in);
    for (double& value : values.values) value = rounded(value, case_.weight);
    return values;
  }

  void set_E(const Dense<double>& values) { E_.set(values); }

 private:
  static LayerCase layer(const WeightCase& c) {
    LayerCase layer;
    layer.param = layer.activation = c.param;
    layer.in = c.in;
    layer.out = {c.out};
    layer.rank = {c.rank};
    layer.tokens = 0;
    return layer;
  }
  adalora_triplets_t params() const { return {A_.matrix(), E_.matrix(), B_.matrix()}; }

  Backend& backend_;
  WeightCase case_;
  LayerContents contents_;
  Adapter adapter_;
  Tensor A_, E_, B_;

 public:
  Tensor w, backup;
};

void delta_weight(Backend& backend, const WeightCase& c, bool accumulate) {
  Weights weights(backend, c);
  weights.delta_weight(accumulate);
  expect_close(c.name + ": delta weight", weights.expected(accumulate ? 1 : 0), weights.w.get(), tolerance(c.param),
               c.weight);
  EXPECT_TRUE(weights.w.gaps_untouched());
}

void merging(Backend& backend, const WeightCase& c) {
  Weights weights(backend, c);
  Value<float> non_finite(backend, 0.0f);
  const Bytes before = weights.w.bytes();
  weights.merge(true, non_finite.data());
  expect_close(c.name + ": merged", weights.expected(1), weights.w.get(), tolerance(c.param), c.weight);
  EXPECT_EQ(weights.backup.get().values, weights.base().values) << "backup";
  EXPECT_TRUE(weights.w.gaps_untouched() && weights.backup.gaps_untouched());
  EXPECT_EQ(non_finite.get(), 0.0f);
  weights.unmerge(true);
  expect_same_bits(c.name + ": unmerged from the backup", before, weights.w.bytes(), c.weight);
  EXPECT_TRUE(weights.w.gaps_untouched());

  Weights without(backend, c);
  without.merge(false, nullptr);
  expect_close(c.name + ": merged without a backup", without.expected(1), without.w.get(), tolerance(c.param),
               c.weight);
  without.w.set(without.base());
  without.unmerge(false);
  expect_close(c.name + ": delta weight subtracted", without.expected(1, -1), without.w.get(), tolerance(c.param),
               c.weight);
}

void non_finite_is_reported(Backend& backend, const WeightCase& c) {
  Weights weights(backend, c);
  weights.set_E(Dense<double>(1, c.rank, std::vector<double>(static_cast<size_t>(c.rank), INFINITY)));
  Value<float> non_finite(backend, 0.0f);
  const Bytes before = weights.w.bytes();
  weights.merge(true, non_finite.data());
  EXPECT_EQ(non_finite.get(), 1.0f);
  EXPECT_NE(weights.w.bytes(), before) << "w is written all the same";
  weights.unmerge(true);
  EXPECT_EQ(weights.w.bytes(), before);

  Weights fine(backend, c);
  Value<float> already(backend, 1.0f);
  fine.merge(true, already.data());
  EXPECT_EQ(already.get(), 1.0f) << "left alone where all is finite";
}

}  // namespace

std::vector<Case> weight_cases() {
  std::vector<WeightCase> cases;
  for (adalora_dtype_t param : {f64, f32, bf16, f16})
    for (adalora_dtype_t weight : {f64, f32, bf16, f16})
      for (bool fan_in_fan_out : {false, true}) {
        WeightCase c;
        c.param = param;
        c.weight = weight;
        c.fan_in_fan_out = fan_in_fan_out;
        if (fan_in_fan_out) c.gap = 3, c.scaling = -1.5;
        c.name = name_of(param) + " to " + name_of(weight) +
                 (fan_in_fan_out ? " in to out, gaps, own scaling" : " out to in");
        cases.push_back(c);
      }
  for (bool fan_in_fan_out : {false, true}) {
    const std::string layout = fan_in_fan_out ? " in to out" : " out to in";
    cases.push_back({f32, f32, fan_in_fan_out, 0, 0, 768, 100, 12, "768 to 100" + layout});
    cases.push_back({f32, bf16, fan_in_fan_out, 0, 0, 1, 1, 1, "one feature" + layout});
    cases.push_back({f64, f64, fan_in_fan_out, 2, 0, 7, 13, 0, "rank 0" + layout});
    cases.push_back({f32, f32, fan_in_fan_out, 0, 0, 13, 7, 64, "rank 64" + layout});
  }

  std::vector<Case> rows;
  for (const WeightCase& c : cases) {
    rows.push_back({"delta weight", c.name, [c](Backend& b) { delta_weight(b, c, false); }});
    rows.push_back({"delta weight added", c.name, [c](Backend& b) { delta_weight(b, c, true); }});
    rows.push_back({"merge and unmerge", c.name, [c](Backend& b) { merging(b, c); }});
    if (c.rank > 0)
      rows.push_back({"merge says what is not finite", c.name, [c](Backend& b) { non_finite_is_reported(b, c); }});
  }
  return rows;
}

}  // namespace operations
