// What the device is given to do: how many calls, and in which precision.

#include <cmath>
#include <functional>
#include <utility>

#include "cuda_test.hpp"
#include "support/model.hpp"

namespace cuda_tests {
namespace {

using namespace support;

class Work : public OnSoftware {};

// Calls of CUDA and cuBLAS that each call of the allocator makes over so many adapters, on a step that masks.
std::vector<std::pair<std::string, int64_t>> calls_of_the_allocator(cuda::Device& device, int32_t adapters) {
  ModelCase c;
  c.param = f32;
  c.layers.clear();
  for (int32_t k = 0; k < adapters; ++k) c.layers.push_back({40 + k, 30, 3 + k % 3});
  const Model model(device, device.context(), c);
  adalora_allocator_t* const allocator = model.allocator();
  const Value<int64_t> number(device, c.schedule.tinit + c.schedule.delta_t);
  const Value<double> value(device), squares(device, 0.0);
  const Value<float> found_inf(device, 0.0f);
  const Value<uint64_t> digest(device);
  const Values<double> scores(device, static_cast<size_t>(c.total_rank()));
  adalora_step_t step{};
  step.struct_size = sizeof step;
  step.step = number.data();
  void* const stream = device.stream();
  const std::pair<const char*, std::function<adalora_status_t()>> calls[] = {
      {"orthogonality",
       [&] { return adalora_allocator_orthogonality(allocator, nullptr, 0.1, nullptr, value.data(), stream); }},
      {"gradient_norm",
       [&] { return adalora_allocator_gradient_norm(allocator, nullptr, squares.data(), found_inf.data(), stream); }},
      {"update", [&] { return adalora_allocator_update(allocator, &step, 1, stream); }},
      {"scores", [&] { return adalora_allocator_scores(allocator, scores.data(), stream); }},
      {"select", [&] { return adalora_allocator_select(allocator, &step, scores.data(), stream); }},
      {"step", [&] { return adalora_allocator_step(allocator, &step, 1, stream); }},
      {"digest", [&] { return adalora_allocator_digest(allocator, digest.data(), stream); }}};
  std::vector<std::pair<std::string, int64_t>> counts;
  for (const auto& [name, call] : calls) {
    const int64_t before = cuda::software::calls();
    require(call());
    counts.emplace_back(name, cuda::software::calls() - before);
  }
  EXPECT_EQ(model.report().selections, 2);
  return counts;
}

TEST_F(Work, OfTheAllocatorIsAsManyCallsForAnyNumberOfAdapters) {
  const auto few = calls_of_the_allocator(device(), 2);
  EXPECT_EQ(calls_of_the_allocator(device(), 60), few);
}

// In bfloat16 kernels add to y and dx, and cuBLAS does the rest: in forward a product of x; in backward one of x, and
// another where h is computed again, and two of each dy.
TEST_F(Work, ReadsXOnceForAllAdapters) {
  for (const bool keeps_h : {true, false}) {
    operations::LayerCase layer = three_adapters(bf16, f32);
    layer.dropout = {};
    layer.keeps_h = keeps_h;
    operations::Pass pass(device(), device().context(), layer, operations::random_contents(layer));
    const auto products = [] { return cuda::software::calls("cublasGemmEx"); };
    int64_t before = products();
    pass.forward();
    EXPECT_EQ(products() - before, 1);
    before = products();
    pass.backward();
    EXPECT_EQ(products() - before, 3 * 2 + (keeps_h ? 1 : 2));
  }
}

// Numbers that TF32 does not have reach the products as they are, but where TF32 was asked for.
TEST_F(Work, RoundsToTf32WhereAsked) {
  operations::LayerCase layer;
  layer.activation = layer.param = f32;
  layer.tokens = 5;
  layer.in = 1;
  layer.out = {1};
  layer.rank = {1};
  layer.scaling = 1;
  operations::LayerContents contents = operations::random_contents(layer);
  const double x = 1 + std::ldexp(1.0, -12);
  for (double& value : contents.x.values) value = x;
  operations::AdapterContents& adapter = contents.adapters[0];
  adapter.params.A.values = adapter.params.E.values = adapter.params.B.values = {1.0};
  for (double& value : adapter.y.values) value = 0;
  for (const bool tf32 : {false, true}) {
    const Context context = cuda::context(0, nullptr, tf32);
    operations::Pass pass(device(), context.get(), layer, contents);
    pass.forward();
    for (const double y : pass.y(0).values) EXPECT_EQ(y, tf32 ? 1.0 : x) << "tf32 " << tf32;
  }
}

}  // namespace
}  // namespace cuda_tests
