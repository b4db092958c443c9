// Several streams, several devices, several threads.

#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <future>
#include <memory>

#include "cuda_test.hpp"

namespace cuda_tests {
namespace {

using namespace support;
using operations::LayerCase;
using operations::LayerContents;
using operations::Pass;

class Streams : public OnDevice {};
class Devices : public OnDevice {};
class Threads : public OnDevice {};

TEST_F(Streams, CarryOneAdapterEach) {
  const cuda::Stream first, second(cuda::Stream::blocking);
  cuda::Device a("first", first.get()), b("second", second.get());
  const LayerCase layers[] = {three_adapters(), three_adapters(bf16, f32)};
  const LayerContents contents[] = {operations::random_contents(layers[0]), operations::random_contents(layers[1])};
  Pass alone[] = {Pass(a, a.context(), layers[0], contents[0]), Pass(a, a.context(), layers[1], contents[1])};
  const std::vector<Bytes> expected[] = {results_of(alone[0]), results_of(alone[1])};

  Pass one(a, a.context(), layers[0], contents[0]), two(b, a.context(), layers[1], contents[1]);
  one.forward();
  two.forward();
  two.backward();
  one.backward();
  EXPECT_EQ(two.outputs(), expected[1]);
  EXPECT_EQ(one.outputs(), expected[0]);
}

TEST_F(Streams, CarryOneRunEach) {
  const cuda::Stream first, second;
  cuda::Device a("first", first.get()), b("second", second.get());
  Training alone(a, a.context(), training_types[1]), one(a, a.context(), training_types[1]),
      two(b, a.context(), training_types[1]);
  for (const Training::Given& given : eventful(alone.model().model().schedule)) {
    for (Training* training : {&alone, &one, &two}) training->give(given);
    alone.enqueue(first.get());
    for (size_t i = 0; i < one.calls().size(); ++i) {
      require(one.calls()[i].run(first.get()));
      require(two.calls()[i].run(second.get()));
    }
    const std::vector<Bytes> expected = alone.buffers();
    ASSERT_EQ(two.buffers(), expected);
    ASSERT_EQ(one.buffers(), expected);
  }
  EXPECT_EQ(one.model().save(), alone.model().save());
}

TEST_F(Devices, WorkBesideEachOther) {
  if (cuda::devices() < 2) GTEST_SKIP() << "there is one device";
  cuda::Device second("second", cuda::Capturing::no, 1);
  const LayerCase layer = three_adapters();
  const LayerContents contents = operations::random_contents(layer);
  for (int32_t current : {0, 1}) {
    cuda::set_device(current);
    Pass here(device(), device().context(), layer, contents), there(second, second.context(), layer, contents);
    here.forward();
    there.forward();
    there.backward();
    here.backward();
    EXPECT_EQ(here.outputs(), there.outputs());
    Training one(device(), device().context(), training_types[1]), two(second, second.context(), training_types[1]);
    for (size_t i = 0; i < one.calls().size(); ++i) {
      require(one.calls()[i].run(device().stream()));
      require(two.calls()[i].run(second.stream()));
    }
    EXPECT_EQ(one.buffers(), two.buffers());
    EXPECT_EQ(cuda::current_device(), current);
  }
  cuda::set_device(0);
}

TEST_F(Devices, OutOfRangeIsRefused) {
  adalora_context_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.backend = ADALORA_BACKEND_CUDA;
  desc.library_folder = std::getenv("ADALORA_CUDA_FOLDER");
  if (desc.library_folder != nullptr && *desc.library_folder == 0) desc.library_folder = nullptr;
  desc.device = cuda::devices();
  adalora_context_t* context = nullptr;
  EXPECT_NE(adalora_context_create(&desc, &context), ADALORA_SUCCESS);
  EXPECT_EQ(context, nullptr);
  EXPECT_NE(std::string(adalora_last_error()).find("device"), std::string::npos) << adalora_last_error();
}

// Nobody has chosen a device on the thread, or made a context current.
TEST_F(Threads, MayBeginWithACall) {
  Training here(device(), device().context(), training_types[2]),
      there(device(), device().context(), training_types[2]);
  here.enqueue(device().stream());
  std::async(std::launch::async, [&] { there.enqueue(device().stream()); }).get();
  EXPECT_EQ(here.buffers(), there.buffers());
}

TEST_F(Threads, MayUseAContextThatNobodyPrepared) {
  const Context fresh = cuda::context();
  Training prepared(device(), device().context(), training_types[1]),
      unprepared(device(), fresh.get(), training_types[1]);
  prepared.enqueue(device().stream());
  std::async(std::launch::async, [&] { unprepared.enqueue(device().stream()); }).get();
  EXPECT_EQ(prepared.buffers(), unprepared.buffers());
}

// More at once than a context has handles, on one context and on one adapter's geometry.
TEST_F(Threads, WorkAtOnce) {
  const LayerCase layer = three_adapters();
  const LayerContents contents = operations::random_contents(layer);
  Pass alone(device(), device().context(), layer, contents);
  const std::vector<Bytes> expected = results_of(alone);
  std::vector<std::future<int>> threads;
  for (int i = 0; i < 6; ++i)
    threads.push_back(std::async(std::launch::async, [&] {
      const cuda::Stream stream;
      cuda::Device own("own", stream.get());
      int wrong = 0;
      for (int round = 0; round < 3; ++round) {
        Pass pass(own, device().context(), layer, contents);
        if (results_of(pass) != expected) ++wrong;
      }
      return wrong;
    }));
  for (std::future<int>& thread : threads) EXPECT_EQ(thread.get(), 0);
}

TEST_F(Threads, ShareOneAllocatorInConstCalls) {
  Training training(device(), device().context(), training_types[1]);
  training.enqueue(device().stream());
  const std::vector<double> scores = training.model().scores();
  const uint64_t digest = training.model().digest();
  const Bytes state = training.model().save();
  std::vector<std::future<int>> threads;
  for (int i = 0; i < 3; ++i)
    threads.push_back(std::async(std::launch::async, [&] {
      const cuda::Stream stream;
      cuda::Device own("own", stream.get());
      const adalora_allocator_t* const allocator = training.model().allocator();
      int wrong = 0;
      for (int round = 0; round < 5; ++round) {
        const Values<double> found(own, scores.size());
        const Value<uint64_t> hash(own);
        require(adalora_allocator_scores(allocator, found.data(), stream.get()));
        require(adalora_allocator_digest(allocator, hash.data(), stream.get()));
        size_t size = state.size();
        Bytes bytes(size);
        require(adalora_allocator_save_state_sync(allocator, bytes.data(), &size, stream.get()));
        if (found.get() != scores || hash.get() != digest || bytes != state) ++wrong;
      }
      return wrong;
    }));
  for (std::future<int>& thread : threads) EXPECT_EQ(thread.get(), 0);
}

class Drivers : public OnSoftware {
 protected:
  void TearDown() override {
    if (!IsSkipped()) cuda::software::driver(13000);
  }
};

// Newer ones load it when the context is prepared: nothing is left to a launch, which a capture would not survive.
TEST_F(Drivers, OfCuda123LoadCodeAtFirstLaunches) {
  Training expected(device(), device().context(), training_types[1]);
  expected.enqueue(device().stream());
  const std::vector<Bytes> buffers = expected.buffers();
  for (const int version : {12030, 12040}) {
    cuda::software::driver(version);
    const int64_t loads = cuda::software::calls("cuFuncLoad");
    const Context context = cuda::context();
    require(adalora_context_prepare(context.get(), device().stream()));
    EXPECT_EQ(cuda::software::calls("cuFuncLoad") > loads, version == 12040) << version;
    Training found(device(), context.get(), training_types[1]);
    found.enqueue(device().stream());
    EXPECT_EQ(found.buffers(), buffers) << version;
  }
}

// CUDA does not survive a fork: the child is told so, and may destroy what its parent made.
TEST_F(Threads, AreNotForked) {
  Context context = cuda::context();
  require(adalora_context_prepare(context.get(), device().stream()));
  auto training = std::make_unique<Training>(device(), context.get(), training_types[1]);
  training->enqueue(device().stream());
  cuda::synchronize(device().stream());
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    int wrong = 0;
    const auto refused = [&](adalora_status_t status) {
      if (status != ADALORA_ERROR_BACKEND_UNAVAILABLE ||
          std::string(adalora_last_error()).find("fork") == std::string::npos)
        ++wrong;
    };
    for (const Training::Call& call : training->calls()) refused(call.run(device().stream()));
    refused(adalora_context_prepare(context.get(), nullptr));
    adalora_report_t report{};
    report.struct_size = sizeof report;
    refused(adalora_allocator_read_sync(training->model().allocator(), nullptr, nullptr, nullptr, &report, nullptr));
    context.reset();
    _exit(wrong);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0) << "calls that did not say what is wrong";
  training->enqueue(device().stream());
  EXPECT_EQ(training->model().report().irregular, 1) << "the parent goes on";
}

}  // namespace
}  // namespace cuda_tests
