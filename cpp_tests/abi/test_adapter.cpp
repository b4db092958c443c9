// Adapters: what is refused at creation, and by the calls on weights.

#include <functional>
#include <limits>

#include "refusal.hpp"
#include "support/memory.hpp"

namespace boundary {
namespace {

using namespace support;

constexpr adalora_status_t invalid = ADALORA_ERROR_INVALID_ARGUMENT;
constexpr int64_t huge = std::numeric_limits<int64_t>::max();

adalora_adapter_desc_t small() {
  adalora_adapter_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = 7;
  desc.out_features = 5;
  desc.rank = 3;
  desc.param_dtype = desc.activation_dtype = f32;
  return desc;
}

struct BadAdapter {
  Refusal refusal;
  void (*spoil)(adalora_adapter_desc_t&);
};

TEST(AdapterCreate, RefusesWhatMakesNoSense) {
  const BadAdapter cases[] = {
      {{"no input features", invalid, {"desc.in_features", "found 0"}}, [](auto& d) { d.in_features = 0; }},
      {{"negative input features", invalid, {"desc.in_features", "found -7"}}, [](auto& d) { d.in_features = -7; }},
      {{"huge input features", invalid, {"desc.in_features", std::to_string(huge)}},
       [](auto& d) { d.in_features = huge; }},
      {{"no output features", invalid, {"desc.out_features", "found 0"}}, [](auto& d) { d.out_features = 0; }},
      {{"negative output features", invalid, {"desc.out_features", "found -5"}}, [](auto& d) { d.out_features = -5; }},
      {{"huge output features", invalid, {"desc.out_features", std::to_string(huge)}},
       [](auto& d) { d.out_features = huge; }},
      {{"negative rank", invalid, {"desc.rank", "found -1"}}, [](auto& d) { d.rank = -1; }},
      {{"huge rank", invalid, {"desc.rank", std::to_string(huge)}}, [](auto& d) { d.rank = huge; }},
      {{"a matrix that overflows", invalid, {"desc.rank", std::to_string(int64_t{1} << 33)}},
       [](auto& d) { d.rank = int64_t{1} << 33, d.in_features = int64_t{1} << 33; }},
      {{"negative alpha", invalid, {"desc.alpha", "found -1"}}, [](auto& d) { d.alpha = -1; }},
      {{"alpha that is no number", invalid, {"desc.alpha", "NaN"}}, [](auto& d) { d.alpha = std::nan(""); }},
      {{"infinite alpha", invalid, {"desc.alpha", "inf"}}, [](auto& d) { d.alpha = HUGE_VAL; }},
      {{"dropout 1", invalid, {"desc.dropout", "found 1", "[0, 1)"}}, [](auto& d) { d.dropout = 1; }},
      {{"negative dropout", invalid, {"desc.dropout", "found -0.1", "[0, 1)"}}, [](auto& d) { d.dropout = -0.1; }},
      {{"dropout that is no number", invalid, {"desc.dropout", "NaN", "[0, 1)"}},
       [](auto& d) { d.dropout = std::nan(""); }},
      {{"no parameter type", invalid, {"desc.param_dtype", "found 0"}}, [](auto& d) { d.param_dtype = 0; }},
      {{"another parameter type", invalid, {"desc.param_dtype", "found 5"}}, [](auto& d) { d.param_dtype = 5; }},
      {{"no activation type", invalid, {"desc.activation_dtype", "found 0"}}, [](auto& d) { d.activation_dtype = 0; }},
      {{"another activation type", invalid, {"desc.activation_dtype", "found -1"}},
       [](auto& d) { d.activation_dtype = -1; }},
      {{"float64 activations with float32", invalid, {"desc.activation_dtype", "float64", "float32"}},
       [](auto& d) { d.activation_dtype = f64; }},
      {{"float64 parameters with bfloat16", invalid, {"float64", "bfloat16"}},
       [](auto& d) { d.param_dtype = f64, d.activation_dtype = bf16; }},
      {{"negative terms", invalid, {"desc.operand_terms", "found -1"}}, [](auto& d) { d.operand_terms = -1; }},
      {{"four terms", invalid, {"desc.operand_terms", "found 4"}}, [](auto& d) { d.operand_terms = 4; }},
      {{"reserved", invalid, {"desc.reserved", "found 1", "expected 0"}}, [](auto& d) { d.reserved = 1; }},
      {{"negative input share", invalid, {"desc.in_local", "found -1"}}, [](auto& d) { d.in_local = -1; }},
      {{"input share beyond the layer", invalid, {"desc.in_local", "found 8", "7"}}, [](auto& d) { d.in_local = 8; }},
      {{"negative beginning of the input", invalid, {"desc.in_begin", "found -1"}},
       [](auto& d) { d.in_local = 3, d.in_begin = -1; }},
      {{"an input share that ends beyond the layer", invalid, {"desc.in_begin", "found 5", "4"}},
       [](auto& d) { d.in_local = 3, d.in_begin = 5; }},
      {{"a whole input that does not begin at 0", invalid, {"desc.in_begin", "found 1"}},
       [](auto& d) { d.in_begin = 1; }},
      {{"huge beginning of the input", invalid, {"desc.in_begin", std::to_string(huge)}},
       [](auto& d) { d.in_local = 3, d.in_begin = huge; }},
      {{"negative output share", invalid, {"desc.out_local", "found -1"}}, [](auto& d) { d.out_local = -1; }},
      {{"output share beyond the layer", invalid, {"desc.out_local", "found 6", "5"}},
       [](auto& d) { d.out_local = 6; }},
      {{"an output share that ends beyond the layer", invalid, {"desc.out_begin", "found 4", "3"}},
       [](auto& d) { d.out_local = 2, d.out_begin = 4; }},
      {{"no size", invalid, {"desc.struct_size", "found 0"}}, [](auto& d) { d.struct_size = 0; }},
      {{"a size without the types", invalid, {"desc.struct_size"}},
       [](auto& d) { d.struct_size = offsetof(adalora_adapter_desc_t, param_dtype); }},
  };
  for (const BadAdapter& c : cases) {
    adalora_adapter_desc_t desc = small();
    c.spoil(desc);
    auto* const before = reinterpret_cast<adalora_adapter_t*>(0x5a5a);
    adalora_adapter_t* adapter = before;
    expect_refused("adalora_adapter_create", c.refusal, adalora_adapter_create(host().context(), &desc, &adapter));
    EXPECT_EQ(adapter, before) << c.refusal.what << ": written on success alone";
  }
  const adalora_adapter_desc_t good = small();
  adalora_adapter_t* adapter = nullptr;
  expect_refused("adalora_adapter_create", {"no context", ADALORA_ERROR_INVALID_HANDLE, {"context", "NULL"}},
                 adalora_adapter_create(nullptr, &good, &adapter));
  expect_refused("adalora_adapter_create", {"no descriptor", invalid, {"desc", "NULL"}},
                 adalora_adapter_create(host().context(), nullptr, &adapter));
  expect_refused("adalora_adapter_create", {"no output", invalid, {"adapter", "NULL"}},
                 adalora_adapter_create(host().context(), &good, nullptr));
}

TEST(AdapterCreate, ServesOlderAndNewerDescriptors) {
  adalora_adapter_desc_t older = small();
  older.struct_size = offsetof(adalora_adapter_desc_t, operand_terms);
  older.operand_terms = older.reserved = -1;
  older.in_local = -1;  // beyond the caller's descriptor
  adalora_adapter_t* adapter = nullptr;
  ASSERT_EQ(adalora_adapter_create(host().context(), &older, &adapter), ADALORA_SUCCESS) << adalora_last_error();
  adalora_adapter_destroy(adapter);

  struct {
    adalora_adapter_desc_t known;
    int64_t unknown;
  } newer{small(), 0};
  newer.known.struct_size = sizeof newer;
  ASSERT_EQ(adalora_adapter_create(host().context(), &newer.known, &adapter), ADALORA_SUCCESS) << adalora_last_error();
  adalora_adapter_destroy(adapter);
  newer.unknown = int64_t{1} << 40;
  expect_refused("adalora_adapter_create", {"a newer field", invalid, {"desc", "struct_size"}},
                 adalora_adapter_create(host().context(), &newer.known, &adapter));
}

TEST(AdapterDestroy, OfNullIsNothing) { adalora_adapter_destroy(nullptr); }

// Operands of every call on weights, all valid.
struct Weights {
  Adapter adapter;
  Tensor A, E, B, w, backup;
  Value<float> non_finite;
  adalora_triplets_t params;
  adalora_matrix_t w_matrix, backup_matrix;
  double scaling = 0;
  int32_t fan_in_fan_out = 0, accumulate = 0;
  const adalora_triplets_t* params_pointer = &params;
  const adalora_matrix_t* w_pointer = &w_matrix;
  const adalora_matrix_t* backup_pointer = &backup_matrix;
  float* non_finite_pointer = non_finite.data();

  Weights()
      : A(host(), f32, Dense<double>(3, 7)),
        E(host(), f32, Dense<double>(1, 3)),
        B(host(), f32, Dense<double>(5, 3)),
        w(host(), f32, Dense<double>(5, 7)),
        backup(host(), f32, 5, 7),
        non_finite(host(), 0.0f),
        params{A.matrix(), E.matrix(), B.matrix()},
        w_matrix(w.matrix()),
        backup_matrix(backup.matrix()) {
    const adalora_adapter_desc_t desc = small();
    adalora_adapter_t* handle = nullptr;
    require(adalora_adapter_create(host().context(), &desc, &handle));
    adapter.reset(handle);
  }

  adalora_status_t initialize() { return adalora_adapter_initialize(adapter.get(), params_pointer, 1, nullptr); }
  adalora_status_t delta_weight() {
    return adalora_adapter_delta_weight(adapter.get(), params_pointer, scaling, fan_in_fan_out, accumulate, w_pointer,
                                        nullptr);
  }
  adalora_status_t merge() {
    return adalora_adapter_merge(adapter.get(), params_pointer, scaling, fan_in_fan_out, w_pointer, backup_pointer,
                                 non_finite_pointer, nullptr);
  }
  adalora_status_t unmerge() {
    return adalora_adapter_unmerge(adapter.get(), params_pointer, scaling, fan_in_fan_out, w_pointer, backup_pointer,
                                   nullptr);
  }

  std::vector<Bytes> contents() const {
    return {A.bytes(), E.bytes(),      B.bytes(),
            w.bytes(), backup.bytes(), Bytes{static_cast<unsigned char>(non_finite.get())}};
  }
};

struct BadWeights {
  Refusal refusal;
  std::function<void(Weights&)> spoil;
};

void* moved(void* p, ptrdiff_t bytes) { return static_cast<char*>(p) + bytes; }

void expect_all_refused(const std::string& call, adalora_status_t (Weights::*run)(),
                        const std::vector<BadWeights>& cases) {
  {
    Weights weights;
    EXPECT_EQ((weights.*run)(), ADALORA_SUCCESS) << call << " with good arguments: " << adalora_last_error();
  }
  for (const BadWeights& c : cases) {
    Weights weights;
    const std::vector<Bytes> before = weights.contents();
    c.spoil(weights);
    expect_refused(call, c.refusal, (weights.*run)());
    EXPECT_EQ(weights.contents(), before) << call << ": " << c.refusal.what;
  }
}

const std::vector<BadWeights> bad_params = {
    {{"no parameters", invalid, {"params", "NULL"}}, [](Weights& w) { w.params_pointer = nullptr; }},
    {{"A without data", invalid, {"params.A", "NULL"}}, [](Weights& w) { w.params.A.data = nullptr; }},
    {{"misaligned A", invalid, {"params.A", "multiple of 4"}},
     [](Weights& w) { w.params.A.data = moved(w.params.A.data, 2); }},
    {{"A of other rows", invalid, {"params.A", "[4, 7]", "[3, 7]"}}, [](Weights& w) { w.params.A.rows = 4; }},
    {{"A of other columns", invalid, {"params.A", "[3, 6]", "[3, 7]"}}, [](Weights& w) { w.params.A.columns = 6; }},
    {{"negative rows", invalid, {"params.A.rows", "-3"}}, [](Weights& w) { w.params.A.rows = -3; }},
    {{"negative columns", invalid, {"params.A.columns", "-7"}}, [](Weights& w) { w.params.A.columns = -7; }},
    {{"rows closer than their columns", invalid, {"params.A.row_stride", "found 6"}},
     [](Weights& w) { w.params.A.row_stride = 6; }},
    {{"negative row stride", invalid, {"params.A.row_stride", "found -7"}},
     [](Weights& w) { w.params.A.row_stride = -7; }},
    {{"a matrix beyond memory", invalid, {"params.A"}}, [](Weights& w) { w.params.A.row_stride = huge; }},
    {{"A of another type", invalid, {"params.A", "bfloat16", "float32"}}, [](Weights& w) { w.params.A.dtype = bf16; }},
    {{"A of no type", invalid, {"params.A.dtype", "found 0"}}, [](Weights& w) { w.params.A.dtype = 0; }},
    {{"A with reserved", invalid, {"params.A.reserved", "found 1"}}, [](Weights& w) { w.params.A.reserved = 1; }},
    {{"E of other length", invalid, {"params.E", "[1, 4]", "3"}},
     [](Weights& w) { w.params.E.columns = w.params.E.row_stride = 4; }},
    {{"E a matrix", invalid, {"params.E", "[3, 3]"}}, [](Weights& w) { w.params.E = w.params.B, w.params.E.rows = 3; }},
    {{"E without data", invalid, {"params.E", "NULL"}}, [](Weights& w) { w.params.E.data = nullptr; }},
    {{"E of another type", invalid, {"params.E", "float64"}},
     [](Weights& w) {
       w.params.E.dtype = f64;
       w.params.E.data = w.params.A.data;
     }},
    {{"B of other rows", invalid, {"params.B", "[4, 3]", "[5, 3]"}}, [](Weights& w) { w.params.B.rows = 4; }},
    {{"B of another type", invalid, {"params.B", "float16"}}, [](Weights& w) { w.params.B.dtype = f16; }},
};

const std::vector<BadWeights> bad_weight = {
    {{"no weight", invalid, {": w", "NULL"}}, [](Weights& w) { w.w_pointer = nullptr; }},
    {{"weight without data", invalid, {": w", "NULL"}}, [](Weights& w) { w.w_matrix.data = nullptr; }},
    {{"misaligned weight", invalid, {": w", "multiple of 4"}},
     [](Weights& w) { w.w_matrix.data = moved(w.w_matrix.data, 1); }},
    {{"weight of the other layout", invalid, {": w", "[5, 7]", "[7, 5]"}}, [](Weights& w) { w.fan_in_fan_out = 1; }},
    {{"weight of other rows", invalid, {": w", "[6, 7]", "[5, 7]"}}, [](Weights& w) { w.w_matrix.rows = 6; }},
    {{"weight of no type", invalid, {": w.dtype", "found 9"}}, [](Weights& w) { w.w_matrix.dtype = 9; }},
    {{"no layout", invalid, {"fan_in_fan_out", "found 2"}}, [](Weights& w) { w.fan_in_fan_out = 2; }},
};

const std::vector<BadWeights> bad_delta = {
    {{"scaling that is no number", invalid, {"scaling", "NaN"}}, [](Weights& w) { w.scaling = std::nan(""); }},
    {{"infinite scaling", invalid, {"scaling", "inf"}}, [](Weights& w) { w.scaling = HUGE_VAL; }},
    {{"weight over A", invalid, {": w", "overlaps", "params.A"}},
     [](Weights& w) { w.params.A.data = w.w_matrix.data; }},
    {{"weight over the end of B", invalid, {": w", "overlaps", "params.B"}},
     [](Weights& w) { w.params.B.data = moved(w.w_matrix.data, 4 * 34); }},
};

const std::vector<BadWeights> bad_backup = {
    {{"backup of another shape", invalid, {"backup", "[5, 6]", "[5, 7]"}},
     [](Weights& w) { w.backup_matrix.columns = 6; }},
    {{"backup of another type", invalid, {"backup", "float16", "float32"}},
     [](Weights& w) { w.backup_matrix.dtype = f16; }},
    {{"backup without data", invalid, {"backup", "NULL"}}, [](Weights& w) { w.backup_matrix.data = nullptr; }},
    {{"backup over the weight", invalid, {"overlaps", "backup"}},
     [](Weights& w) { w.backup_matrix.data = moved(w.w_matrix.data, 8); }},
};

std::vector<BadWeights> joined(std::initializer_list<std::vector<BadWeights>> parts) {
  std::vector<BadWeights> all;
  for (const std::vector<BadWeights>& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

TEST(AdapterInitialize, RefusesWhatMakesNoSense) {
  std::vector<BadWeights> cases = bad_params;
  cases.push_back({{"A over B", invalid, {"params.A", "overlaps", "params.B"}},
                   [](Weights& w) { w.params.B.data = w.params.A.data; }});
  cases.push_back({{"a float64 master", invalid, {"params.A", "float64", "float32"}}, [](Weights& w) {
                     w.params.A = w.w.matrix();
                     w.params.A.rows = 3;
                     w.params.A.dtype = f64;
                   }});
  expect_all_refused("adalora_adapter_initialize", &Weights::initialize, cases);
}

TEST(AdapterDeltaWeight, RefusesWhatMakesNoSense) {
  std::vector<BadWeights> cases = joined({bad_params, bad_weight, bad_delta});
  cases.push_back({{"no flag", invalid, {"accumulate", "found 2", "0 or 1"}}, [](Weights& w) { w.accumulate = 2; }});
  expect_all_refused("adalora_adapter_delta_weight", &Weights::delta_weight, cases);
}

TEST(AdapterMerge, RefusesWhatMakesNoSense) {
  std::vector<BadWeights> cases = joined({bad_params, bad_weight, bad_delta, bad_backup});
  cases.push_back({{"backup over A", invalid, {"backup", "overlaps", "params.A"}},
                   [](Weights& w) { w.params.A.data = w.backup_matrix.data; }});
  cases.push_back({{"misaligned flag", invalid, {"non_finite"}},
                   [](Weights& w) { w.non_finite_pointer = static_cast<float*>(moved(w.w.data(), 2)); }});
  cases.push_back({{"flag in the weight", invalid, {"non_finite", "overlaps"}},
                   [](Weights& w) { w.non_finite_pointer = static_cast<float*>(moved(w.w.data(), 4)); }});
  cases.push_back({{"flag in the backup", invalid, {"non_finite", "overlaps"}},
                   [](Weights& w) { w.non_finite_pointer = static_cast<float*>(moved(w.backup.data(), 4)); }});
  cases.push_back({{"flag in E", invalid, {"non_finite", "overlaps"}},
                   [](Weights& w) { w.non_finite_pointer = static_cast<float*>(w.E.data()); }});
  expect_all_refused("adalora_adapter_merge", &Weights::merge, cases);
}

TEST(AdapterUnmerge, RefusesWhatMakesNoSense) {
  expect_all_refused("adalora_adapter_unmerge", &Weights::unmerge, joined({bad_weight, bad_backup}));
  std::vector<BadWeights> subtracting = joined({bad_params, bad_weight, bad_delta});
  for (BadWeights& c : subtracting)
    c.spoil = [spoil = c.spoil](Weights& w) {
      w.backup_pointer = nullptr;
      spoil(w);
    };
  expect_all_refused("adalora_adapter_unmerge", &Weights::unmerge, subtracting);
}

TEST(AdapterInitialize, TakesNullForNoElements) {
  adalora_adapter_desc_t desc = small();
  desc.rank = 0;
  adalora_adapter_t* handle = nullptr;
  require(adalora_adapter_create(host().context(), &desc, &handle));
  const Adapter adapter(handle);
  const adalora_triplets_t none{{nullptr, 0, 7, 0, f32, 0}, {nullptr, 0, 1, 0, f32, 0}, {nullptr, 5, 0, 0, f32, 0}};
  EXPECT_EQ(adalora_adapter_initialize(adapter.get(), &none, 1, nullptr), ADALORA_SUCCESS) << adalora_last_error();
  Tensor w(host(), f32, Dense<double>(5, 7, std::vector<double>(35, 2.0)));
  const adalora_matrix_t matrix = w.matrix();
  EXPECT_EQ(adalora_adapter_merge(adapter.get(), &none, 0, 0, &matrix, nullptr, nullptr, nullptr), ADALORA_SUCCESS)
      << adalora_last_error();
  EXPECT_EQ(w.get().values, std::vector<double>(35, 2.0));
  EXPECT_EQ(adalora_adapter_delta_weight(adapter.get(), &none, 0, 0, 0, &matrix, nullptr), ADALORA_SUCCESS)
      << adalora_last_error();
  EXPECT_EQ(w.get().values, std::vector<double>(35, 0.0));
}

}  // namespace
}  // namespace boundary
