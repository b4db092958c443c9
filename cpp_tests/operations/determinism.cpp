// The same bits however the work is spread: any number of threads, the caller's own, any stream, a graph.

#include <future>

#include "operations.hpp"
#include "pass.hpp"
#include "support/model.hpp"

namespace operations {

using namespace support;

namespace {

using Results = std::function<std::vector<Bytes>(Backend&, adalora_context_t*)>;

std::vector<Bytes> results_of(Backend& backend, const Team& team, const Results& results) {
  Backend& own = team.own ? *team.own : backend;
  if (!team.on_another_thread) return results(own, team.context.get());
  return std::async(std::launch::async, [&] { return results(own, team.context.get()); }).get();
}

void expect_all_the_same(Backend& backend, const Results& results) {
  const std::vector<Team> teams = backend.teams();
  const std::vector<Bytes> first = results_of(backend, teams.front(), results);
  for (size_t i = 1; i < teams.size(); ++i) {
    const std::vector<Bytes> other = results_of(backend, teams[i], results);
    ASSERT_EQ(first.size(), other.size());
    for (size_t j = 0; j < first.size(); ++j)
      EXPECT_TRUE(first[j] == other[j]) << "output " << j << " has other bits with " << teams[i].name << " than with "
                                        << teams.front().name;
  }
}

std::vector<Bytes> passes(Backend& backend, adalora_context_t* context, const LayerCase& layer,
                          const LayerContents& contents) {
  Pass pass(backend, context, layer, contents);
  pass.forward();
  pass.backward();
  return pass.outputs();
}

std::vector<Bytes> run(Backend& backend, adalora_context_t* context, const ModelCase& c) {
  Model model(backend, context, c);
  std::vector<Bytes> results;
  for (int64_t step = 3; step < 8; ++step) {
    model.set_gradients(static_cast<uint64_t>(step));
    const Value<double> penalty(backend), squares(backend, 0.0);
    const Value<float> found_inf(backend, 0.0f);
    require(
        adalora_allocator_orthogonality(model.allocator(), nullptr, 0.1, nullptr, penalty.data(), backend.stream()));
    require(adalora_allocator_gradient_norm(model.allocator(), nullptr, squares.data(), found_inf.data(),
                                            backend.stream()));
    model.step(step);
    results.push_back(model.save());
    for (double value : {penalty.get(), squares.get()}) {
      Bytes bytes(sizeof value);
      std::memcpy(bytes.data(), &value, sizeof value);
      results.push_back(bytes);
    }
    for (const Bytes& tensor : model.tensors()) results.push_back(tensor);
  }
  return results;
}

std::vector<Bytes> weights(Backend& backend, adalora_context_t* context, adalora_dtype_t param,
                           adalora_dtype_t weight) {
  adalora_adapter_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = 768;
  desc.out_features = 513;
  desc.rank = 12;
  desc.param_dtype = desc.activation_dtype = param;
  adalora_adapter_t* handle = nullptr;
  require(adalora_adapter_create(context, &desc, &handle));
  const Adapter adapter(handle);
  const Tensor A(backend, param, 12, 768), E(backend, param, Dense<double>(1, 12, std::vector<double>(12, 0.7))),
      B(backend, param, 513, 12), w(backend, weight, Dense<double>(513, 768));
  const adalora_triplets_t triplets{A.matrix(), E.matrix(), B.matrix()};
  const Tensor ignored(backend, param, 1, 12);
  const adalora_triplets_t written{A.matrix(), ignored.matrix(), B.matrix()};
  require(adalora_adapter_initialize(adapter.get(), &written, 7, backend.stream()));
  const adalora_matrix_t m = w.matrix();
  require(adalora_adapter_merge(adapter.get(), &triplets, 0, 0, &m, nullptr, nullptr, backend.stream()));
  return {A.bytes(), B.bytes(), w.bytes()};
}

}  // namespace

std::vector<Case> determinism_cases() {
  std::vector<Case> rows;
  struct Types {
    adalora_dtype_t activation, param, grad;
  };
  for (const Types& types : {Types{f64, f64, f64},
                             {f32, f32, f32},
                             {bf16, f32, f32},
                             {f16, f32, f32},
                             {bf16, bf16, bf16},
                             {bf16, bf16, f32},
                             {f16, f16, f16},
                             {f16, f16, f32}}) {
    LayerCase layer;
    layer.activation = types.activation;
    layer.param = types.param;
    layer.grad = types.grad;
    layer.tokens = 513;
    layer.in = 300;
    layer.out = {130, 257, 31, 64};
    layer.rank = {12, 5, 17, 33};
    layer.dropout = {0.1, 3, 4, 5, 0};
    layer.every_other_drops = true;
    layer.name = name_of(types.activation) + " " + name_of(types.param) + " " + name_of(types.grad);
    const LayerContents contents = random_contents(layer);
    rows.push_back({"any team gives the same bits", layer.name + ", forward and backward", [=](Backend& b) {
                      expect_all_the_same(b, [&](Backend& own, adalora_context_t* context) {
                        return passes(own, context, layer, contents);
                      });
                    }});
  }
  struct Kept {
    adalora_dtype_t param, gradient;
    bool master;
  };
  for (const Kept& kept : {Kept{f64, f64, false},
                           {f32, f32, false},
                           {bf16, bf16, false},
                           {bf16, f32, true},
                           {f16, f16, true},
                           {f16, f32, false}}) {
    ModelCase c;
    c.param = kept.param;
    c.gradient = kept.gradient;
    c.master = kept.master;
    c.layers = {{768, 300, 12}, {65, 1030, 5}, {7, 5, 4}, {13, 13, 0}, {130, 130, 8}, {301, 259, 17}, {65, 67, 33}};
    c.schedule = {2, 3, 10, 2};
    const std::string name =
        name_of(kept.param) + " " + name_of(kept.gradient) + (kept.master ? " with master" : "") + ", steps of a run";
    rows.push_back({"any team gives the same bits", name, [=](Backend& b) {
                      expect_all_the_same(
                          b, [&](Backend& own, adalora_context_t* context) { return run(own, context, c); });
                    }});
  }
  for (adalora_dtype_t param : {f64, f32, bf16, f16})
    rows.push_back({"any team gives the same bits", name_of(param) + ", weights", [=](Backend& b) {
                      expect_all_the_same(b, [&](Backend& own, adalora_context_t* context) {
                        return weights(own, context, param, param);
                      });
                    }});
  return rows;
}

}  // namespace operations
