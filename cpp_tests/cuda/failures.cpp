// Every call of CUDA or cuBLAS that the library makes fails once: a status that names the error, nothing leaked, the
// library's own state as it was (or what the text says of it), and the same bits when the call is repeated.

#include <algorithm>
#include <functional>
#include <iterator>

#include "cuda_test.hpp"

namespace cuda_tests {
namespace {

using namespace support;
namespace software = cuda::software;

class Failures : public OnSoftware {
 protected:
  void TearDown() override {
    if (!IsSkipped()) software::fail(0);
  }
};

// Objects of CUDA's that live, and whether the thread has a current context.
struct Living {
  std::vector<int64_t> objects = software::living();
  void* context = cuda::current_context();
};

void expect_nothing_leaked(const Living& before, const std::string& what) {
  const Living now;
  EXPECT_EQ(now.objects, before.objects) << what;
  EXPECT_EQ(now.context, before.context) << what;
}

// What failed, and the status that came of it.
struct Failed {
  std::string what;
  adalora_status_t status;

  bool says(const char* words) const { return what.find(words) != std::string::npos; }
};

// Makes the first, the second, ... call of CUDA fail within `attempt`, until there are no more; `afterwards` learns
// what failed. How many there were.
int64_t fail_each(const std::function<adalora_status_t()>& attempt,
                  const std::function<void(const Failed& failed)>& afterwards) {
  for (int64_t n = 1; n < 1000; ++n) {
    software::fail(n);
    const adalora_status_t status = attempt();
    const std::string text = status != ADALORA_SUCCESS ? adalora_last_error() : "";
    const std::string function = software::failed();
    software::fail(0);
    if (function.empty()) {
      EXPECT_EQ(status, ADALORA_SUCCESS) << text;
      return n - 1;
    }
    const std::string what = "call " + std::to_string(n) + ", " + function + ": " + text;
    const Failed failed{what, status};
    const adalora_status_t expected[] = {ADALORA_ERROR_INCOMPLETE, ADALORA_ERROR_BACKEND_UNAVAILABLE,
                                         ADALORA_ERROR_OUT_OF_MEMORY};
    EXPECT_NE(std::find(std::begin(expected), std::end(expected), status), std::end(expected)) << what;
    const char* const names[] = {"cudaError", "CUDA_ERROR_", "CUBLAS_STATUS_"};
    EXPECT_TRUE(std::any_of(std::begin(names), std::end(names), [&](const char* name) { return failed.says(name); }))
        << "no error's name: " << what;
    afterwards(failed);
    if (testing::Test::HasFailure()) return n;
  }
  ADD_FAILURE() << "there is no end of calls";
  return 0;
}

TEST_F(Failures, OfCreate) {
  device();
  const Living before;
  Context context;
  const int64_t calls = fail_each(
      [&] {
        adalora_context_desc_t desc{};
        desc.struct_size = sizeof desc;
        desc.backend = ADALORA_BACKEND_CUDA;
        desc.library_folder = std::getenv("ADALORA_CUDA_FOLDER");
        adalora_context_t* made = nullptr;
        const adalora_status_t status = adalora_context_create(&desc, &made);
        context.reset(made);
        return status;
      },
      [&](const Failed& failed) {
        EXPECT_EQ(context, nullptr);
        expect_nothing_leaked(before, failed.what);
      });
  EXPECT_GT(calls, 0);
  context.reset();
  expect_nothing_leaked(before, "after its end");
}

TEST_F(Failures, OfPrepare) {
  device();
  const Living before;
  Context context = cuda::context();
  const int64_t calls = fail_each([&] { return adalora_context_prepare(context.get(), device().waiting_stream()); },
                                  [&](const Failed& failed) {
                                    // A part may be kept for the next attempt; what is kept ends with the context.
                                    EXPECT_EQ(cuda::current_context(), before.context) << failed.what;
                                    context = cuda::context();
                                  });
  EXPECT_GT(calls, 0);
  context.reset();
  expect_nothing_leaked(before, "after its end");

  // On one context: what the failed attempts left serves the next one.
  context = cuda::context();
  fail_each([&] { return adalora_context_prepare(context.get(), device().waiting_stream()); }, [](const Failed&) {});
  Training expected(device(), device().context(), training_types[1]), found(device(), context.get(), training_types[1]);
  for (Training* training : {&expected, &found}) training->enqueue(device().stream());
  EXPECT_EQ(found.buffers(), expected.buffers());
}

class FailuresOf : public Failures, public testing::WithParamInterface<TrainingTypes> {};

// A binding that could not be made leaves the earlier one in place; so does one that only enqueues, as the second in
// the same memory does.
TEST_P(FailuresOf, Bind) {
  Training expected(device(), device().context(), GetParam()), found(device(), device().context(), GetParam());
  for (Training* training : {&expected, &found}) training->enqueue(device().stream());
  const Bytes state = found.model().save();
  const std::vector<Bytes> buffers = found.buffers();
  const std::vector<Owned> everything = found.model().everything();
  size_t size = 0, workspace = 0;
  require(adalora_allocator_sizes(found.model().allocator(), static_cast<int64_t>(everything.size()), &size, &workspace,
                                  nullptr));
  const support::Buffer own(device(), workspace);
  for (void* stream : {device().waiting_stream(), device().stream()}) {
    const int64_t calls = fail_each([&] { return found.model().bind_in(own, everything, stream); },
                                    [&](const Failed& failed) {
                                      EXPECT_EQ(found.model().save(), state) << failed.what;
                                      EXPECT_EQ(found.buffers(), buffers) << failed.what;
                                    });
    EXPECT_GT(calls, 0);
  }
  for (Training* training : {&expected, &found}) {
    Training::Given given;
    given.step = 1;
    training->give(given);
    training->enqueue(device().stream());
  }
  EXPECT_EQ(found.buffers(), expected.buffers());
  EXPECT_EQ(found.model().save(), expected.model().save());
}

// In the memory of the earlier binding, that one is lost: the text says so, and a later bind takes nothing for granted that
// lies there.
TEST_P(FailuresOf, BindInTheSameMemory) {
  Training expected(device(), device().context(), GetParam()), found(device(), device().context(), GetParam());
  const std::vector<Owned> everything = found.model().everything();
  std::vector<Owned> halves = everything;  // of each E
  for (Owned& part : halves)
    if (part.matrix == 1) part.end = part.end / 2;
  for (const Owned& part : everything)
    if (part.matrix == 1) halves.push_back({part.adapter, 1, part.end / 2, part.end});
  size_t size = 0;
  require(adalora_allocator_sizes(found.model().allocator(), static_cast<int64_t>(halves.size()), nullptr, &size,
                                  nullptr));
  const support::Buffer own(device(), size);
  void* const stream = device().waiting_stream();
  int64_t step = 0;
  const auto advance = [&](const std::string& what) {
    Training::Given given;
    given.step = step++;
    for (Training* training : {&expected, &found}) {
      training->give(given);
      training->enqueue(device().stream());
    }
    ASSERT_EQ(found.buffers(), expected.buffers()) << what;
    ASSERT_EQ(found.model().save(), expected.model().save()) << what;
  };
  require(found.model().bind_in(own, everything, stream));
  advance("bound anew");
  const int64_t calls = fail_each([&] { return found.model().bind_in(own, halves, stream); },
                                  [&](const Failed& failed) {
                                    int64_t ranks[2];
                                    const bool is_bound =
                                        adalora_allocator_read_sync(found.model().allocator(), nullptr, ranks, nullptr,
                                                                    nullptr, stream) == ADALORA_SUCCESS;
                                    EXPECT_NE(is_bound, failed.says("nothing is bound now")) << failed.what;
                                    EXPECT_TRUE(!is_bound || failed.status != ADALORA_ERROR_INCOMPLETE) << failed.what;
                                    require(found.model().bind_in(own, everything, stream));
                                    advance(failed.what);
                                  });
  EXPECT_GT(calls, 0);
}

// Each call of a step on which a mask falls, and of the one that takes the last mask.
TEST_P(FailuresOf, EachCallOfAStep) {
  const ModelCase c;
  for (int64_t step : {c.schedule.tinit + 2, c.schedule.end()}) {
    Training expected(device(), device().context(), GetParam()), found(device(), device().context(), GetParam());
    Training::Given given;
    given.step = step - 1;
    for (Training* training : {&expected, &found}) {
      training->give(given);
      training->enqueue(device().stream());
      cuda::synchronize(device().stream());
    }
    given.step = step;
    for (Training* training : {&expected, &found}) training->give(given);
    for (size_t i = 0; i < found.calls().size(); ++i) {
      const Training::Call& call = found.calls()[i];
      SCOPED_TRACE(call.name + " of step " + std::to_string(step));
      require(expected.calls()[i].run(device().stream()));
      const std::vector<Bytes> before = found.buffers(), after = expected.buffers();
      const Bytes state_before = found.model().save(), state_after = expected.model().save();
      const Living alive;
      const int64_t calls = fail_each([&] { return call.run(device().stream()); },
                                      [&](const Failed& failed) {
                                        expect_nothing_leaked(alive, failed.what);
                                        const bool enqueued = failed.says("the call's work is enqueued");
                                        EXPECT_EQ(enqueued, failed.says("cuCtxPopCurrent")) << failed.what;
                                        EXPECT_EQ(found.model().save(), enqueued ? state_after : state_before)
                                            << failed.what;
                                        if (failed.status == ADALORA_ERROR_INCOMPLETE) {
                                          EXPECT_TRUE(failed.says("undefined")) << failed.what;
                                        } else {
                                          EXPECT_EQ(found.buffers(), before) << failed.what;
                                        }
                                        if (enqueued) {
                                          EXPECT_EQ(found.buffers(), after) << failed.what;
                                        }
                                        found.set_buffers(before);
                                        found.model().load(state_before);
                                        require(call.run(device().stream()));
                                        EXPECT_EQ(found.buffers(), after) << failed.what;
                                        EXPECT_EQ(found.model().save(), state_after) << failed.what;
                                        found.set_buffers(before);
                                        found.model().load(state_before);
                                      });
      EXPECT_GT(calls, 0);
      EXPECT_EQ(found.buffers(), after);
      EXPECT_EQ(found.model().save(), state_after);
      if (HasFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(With, FailuresOf, testing::Values(training_types[1], training_types[4]),
                         [](const auto& types) { return types.param.name; });

// What waits for the stream.
TEST_F(Failures, OfReadingAndWriting) {
  Training training(device(), device().context(), training_types[1]);
  training.enqueue(device().stream());
  Model& model = training.model();
  const adalora_allocator_t* const allocator = model.allocator();
  void* const stream = device().waiting_stream();
  const Bytes state = model.save();
  const Living alive;
  const auto unchanged = [&](const Failed& failed) {
    expect_nothing_leaked(alive, failed.what);
    if (failed.says("undefined now: the state")) {
      model.load(state);
    } else {
      EXPECT_EQ(model.save(), state) << failed.what;
    }
  };
  adalora_report_t report{};
  report.struct_size = sizeof report;
  std::vector<uint8_t> pattern(13);
  const int64_t steps[] = {5, 7};
  Bytes bytes(state.size());
  const std::pair<const char*, std::function<adalora_status_t()>> calls[] = {
      {"read_sync",
       [&] { return adalora_allocator_read_sync(allocator, pattern.data(), nullptr, nullptr, &report, stream); }},
      {"save_state_sync",
       [&] {
         size_t size = bytes.size();
         return adalora_allocator_save_state_sync(allocator, bytes.data(), &size, stream);
       }},
      {"load_state_sync",
       [&] { return adalora_allocator_load_state_sync(model.allocator(), state.data(), state.size(), stream); }},
      {"set_adam_steps_sync", [&] { return adalora_allocator_set_adam_steps_sync(model.allocator(), steps, stream); }}};
  for (const auto& [name, call] : calls) {
    SCOPED_TRACE(name);
    EXPECT_GT(fail_each(call, unchanged), 0);
  }
  EXPECT_EQ(model.adam_steps(), (std::vector<int64_t>{5, 7}));
}

// Adapters' calls outside a step.
TEST_F(Failures, OfWeights) {
  adalora_adapter_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = 33;
  desc.out_features = 17;
  desc.rank = 4;
  desc.param_dtype = desc.activation_dtype = f32;
  adalora_adapter_t* handle = nullptr;
  require(adalora_adapter_create(device().context(), &desc, &handle));
  const Adapter adapter(handle);
  const Tensor A(device(), f32, 4, 33), E(device(), f32, 1, 4), B(device(), f32, 17, 4),
      w(device(), f32, Dense<double>(17, 33)), backup(device(), f32, 17, 33);
  const Value<float> non_finite(device());
  const adalora_triplets_t params{A.matrix(), E.matrix(), B.matrix()};
  const adalora_matrix_t base = w.matrix(), kept = backup.matrix();
  const Living alive;
  const auto nothing_leaked = [&](const Failed& failed) { expect_nothing_leaked(alive, failed.what); };
  void* const stream = device().stream();
  const std::pair<const char*, std::function<adalora_status_t()>> calls[] = {
      {"initialize", [&] { return adalora_adapter_initialize(adapter.get(), &params, 7, stream); }},
      {"delta_weight", [&] { return adalora_adapter_delta_weight(adapter.get(), &params, 0, 0, 0, &base, stream); }},
      {"merge",
       [&] { return adalora_adapter_merge(adapter.get(), &params, 0, 0, &base, &kept, non_finite.data(), stream); }},
      {"unmerge", [&] { return adalora_adapter_unmerge(adapter.get(), nullptr, 0, 0, &base, &kept, stream); }}};
  for (const auto& [name, call] : calls) {
    SCOPED_TRACE(name);
    EXPECT_GT(fail_each(call, nothing_leaked), 0);
  }
}

}  // namespace
}  // namespace cuda_tests
