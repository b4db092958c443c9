// A training step as one CUDA graph: captured once, it serves every step of the schedule.

#include <functional>
#include <utility>

#include "cuda_test.hpp"

namespace cuda_tests {
namespace {

using namespace support;

class Graphs : public OnDevice, public testing::WithParamInterface<TrainingTypes> {};

void expect_same(const Training& expected, const Training& found, const std::string& when) {
  const std::vector<Bytes> a = expected.buffers(), b = found.buffers();
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) ASSERT_EQ(a[i], b[i]) << "buffer " << i << " " << when;
  ASSERT_EQ(expected.model().save(), found.model().save()) << when;
}

TEST_P(Graphs, OneStepServesTheWholeSchedule) {
  Training eager(device(), device().context(), GetParam()), replayed(device(), device().context(), GetParam());
  void* const stream = device().stream();
  const std::vector<Bytes> before = replayed.buffers();
  cuda::begin_capture(stream);
  replayed.enqueue(stream);
  const cuda::Graph graph(stream);
  EXPECT_EQ(replayed.buffers(), before) << "a capture runs nothing";

  int64_t not_finite = 0;
  const oracle::Schedule schedule = eager.model().model().schedule;
  for (const Training::Given& given : eventful(schedule)) {
    for (Training* training : {&eager, &replayed}) training->give(given);
    eager.enqueue(stream);
    graph.launch(stream);
    expect_same(eager, replayed, "at step " + std::to_string(given.step));
    not_finite += given.found_inf ? 1 : 0;
  }
  const adalora_report_t report = replayed.model().report();
  EXPECT_EQ(report.is_final, 1);
  EXPECT_EQ(report.live_triplets, replayed.model().model().target_budget());
  EXPECT_EQ(report.skipped, not_finite);
  EXPECT_EQ(report.irregular, 0);
}

// Over mask steps, over the end of the budget phase, and back.
TEST_P(Graphs, StepNumbersMayJump) {
  Training eager(device(), device().context(), GetParam()), replayed(device(), device().context(), GetParam());
  void* const stream = device().stream();
  cuda::begin_capture(stream);
  replayed.enqueue(stream);
  const cuda::Graph graph(stream);
  for (const std::vector<int64_t>& run : {std::vector<int64_t>{1, 4, 7, 8, 8, 11, 3, 19, 22, 5}, {0, 9, 15, 16, 17}}) {
    for (int64_t step : run) {
      Training::Given given;
      given.step = step;
      for (Training* training : {&eager, &replayed}) training->give(given);
      eager.enqueue(stream);
      graph.launch(stream);
      expect_same(eager, replayed, "at step " + std::to_string(step));
    }
    for (Training* training : {&eager, &replayed})
      require(adalora_allocator_reset(training->model().allocator(), stream));
  }
}

TEST_P(Graphs, MayFollowEachOtherWithoutWaiting) {
  Training eager(device(), device().context(), GetParam()), replayed(device(), device().context(), GetParam());
  const cuda::Stream other;
  cuda::begin_capture(other.get());
  replayed.enqueue(other.get());
  const cuda::Graph graph(other.get());
  for (int i = 0; i < 3; ++i) {
    eager.enqueue(device().stream());
    graph.launch(device().stream());
  }
  expect_same(eager, replayed, "after three steps");
}

INSTANTIATE_TEST_SUITE_P(Of, Graphs, testing::ValuesIn(training_types),
                         [](const auto& types) { return types.param.name; });

// What waits cannot be captured: a status, and the capture of the rest goes on.
TEST_F(OnDevice, ACaptureIsNoPlaceToWait) {
  Training training(device(), device().context(), training_types[1]),
      other(device(), device().context(), training_types[1]);
  Model& model = training.model();
  adalora_allocator_t* const allocator = model.allocator();
  Bytes state = model.save();
  size_t size = state.size();
  const std::vector<int64_t> steps(2);
  int64_t ranks[2];
  const std::vector<Owned> everything = model.everything();
  size_t bytes = 0, workspace = 0;
  require(adalora_allocator_sizes(allocator, static_cast<int64_t>(everything.size()), &bytes, &workspace, nullptr));
  const support::Buffer elsewhere(device(), workspace);
  const Context unprepared = cuda::context();
  const Value<double> squares(device(), 1.0), factor(device());
  const cuda::Stream stream;
  void* const at = stream.get();
  const std::pair<const char*, std::function<adalora_status_t()>> calls[] = {
      {"a first call",
       [&] {
         return adalora_context_gradient_factor(unprepared.get(), squares.data(), nullptr, 1, factor.data(), at);
       }},
      {"prepare", [&] { return adalora_context_prepare(device().context(), at); }},
      {"bind", [&] { return model.bind_in(elsewhere, everything, at); }},
      {"read_sync", [&] { return adalora_allocator_read_sync(allocator, nullptr, ranks, nullptr, nullptr, at); }},
      {"set_adam_steps_sync", [&] { return adalora_allocator_set_adam_steps_sync(allocator, steps.data(), at); }},
      {"compact_sync", [&] { return adalora_allocator_compact_sync(allocator, other.model().allocator(), at); }},
      {"save_state_sync", [&] { return adalora_allocator_save_state_sync(allocator, state.data(), &size, at); }},
      {"load_state_sync", [&] { return adalora_allocator_load_state_sync(allocator, state.data(), size, at); }}};
  cuda::begin_capture(at);
  for (const auto& [name, call] : calls) {
    EXPECT_EQ(call(), ADALORA_ERROR_INVALID_STATE) << name;
    EXPECT_NE(std::string(adalora_last_error()).find("captur"), std::string::npos)
        << name << ": " << adalora_last_error();
  }
  training.enqueue(at);
  const cuda::Graph graph(at);
  graph.launch(at);
  cuda::synchronize(at);
  EXPECT_EQ(model.report().last_step, 0);
}

}  // namespace
}  // namespace cuda_tests
