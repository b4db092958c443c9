// What is the caller's own, left as it was found: current device and context, last error, cuBLAS handle; and what the
// library holds itself, given back.

#include <algorithm>
#include <future>
#include <memory>

#include "cuda_test.hpp"

namespace cuda_tests {
namespace {

using namespace support;

class Borrowed : public OnDevice {};
class Released : public OnSoftware {};

// A call of each kind, what waits and what allocates included.
void call_everything(Training& training, adalora_context_t* context, void* stream, const std::function<void()>& check) {
  require(adalora_context_prepare(context, stream));
  check();
  for (const Training::Call& call : training.calls()) {
    require(call.run(stream));
    check();
  }
  training.model().bind(training.model().everything());
  check();
  training.model().load(training.model().save());
  check();
  const Context another = cuda::context();
  check();
}

TEST_F(Borrowed, CurrentDeviceAndContext) {
  for (int32_t current = 0; current < cuda::devices(); ++current) {
    cuda::set_device(current);
    Training training(device(), device().context(), training_types[1]);
    void* const before = cuda::current_context();
    call_everything(training, device().context(), device().stream(), [&] {
      EXPECT_EQ(cuda::current_device(), current);
      EXPECT_EQ(cuda::current_context(), before);
    });
  }
  cuda::set_device(0);
}

TEST_F(Borrowed, NoContextOnAThreadThatHasNone) {
  Training training(device(), device().context(), training_types[1]);
  std::async(std::launch::async, [&] {
    EXPECT_EQ(cuda::current_context(), nullptr) << "else this shows nothing";
    for (const Training::Call& call : training.calls()) {
      require(call.run(device().stream()));
      EXPECT_EQ(cuda::current_context(), nullptr) << call.name;
    }
    adalora_report_t report{};
    report.struct_size = sizeof report;
    require(adalora_allocator_read_sync(training.model().allocator(), nullptr, nullptr, nullptr, &report,
                                        device().waiting_stream()));
    EXPECT_EQ(cuda::current_context(), nullptr) << "read_sync";
    const Context another = cuda::context();
    require(adalora_context_prepare(another.get(), device().waiting_stream()));
    EXPECT_EQ(cuda::current_context(), nullptr) << "create and prepare";
  }).get();
}

TEST_F(Borrowed, LastErrorOfTheRuntime) {
  const auto peek = reinterpret_cast<int (*)()>(cuda::symbol("cudaPeekAtLastError"));
  const auto take = reinterpret_cast<int (*)()>(cuda::symbol("cudaGetLastError"));
  Training training(device(), device().context(), training_types[1]);
  take();
  training.enqueue(device().stream());
  EXPECT_EQ(peek(), 0);
  const int error = reinterpret_cast<int (*)(int)>(cuda::symbol("cudaSetDevice"))(cuda::devices());
  EXPECT_NE(error, 0);
  training.enqueue(device().stream());
  EXPECT_EQ(peek(), error) << "the trainer has not looked at it yet";
  take();
}

TEST_F(Borrowed, CublasHandle) {
  Training own(device(), device().context(), training_types[1]);
  own.enqueue(device().stream());
  const std::vector<Bytes> expected = own.buffers();
  const cuda::Blas blas;
  const cuda::Stream other;
  const Context context = cuda::context(0, blas.get());
  require(adalora_context_prepare(context.get(), device().waiting_stream()));
  const int pedantic = 2, tf32 = 3;
  for (int math : {0, pedantic, tf32})
    for (int pointers_on_device : {0, 1}) {
      cuda::call<void*, void*>("cublasSetStream_v2", blas.get(), other.get());
      cuda::call<void*, int>("cublasSetMathMode", blas.get(), math);
      cuda::call<void*, int>("cublasSetPointerMode_v2", blas.get(), pointers_on_device);
      Training training(device(), context.get(), training_types[1]);
      for (const Training::Call& call : training.calls()) {
        require(call.run(device().stream()));
        void* stream = nullptr;
        int found_math = -1, found_pointers = -1;
        cuda::call<void*, void**>("cublasGetStream_v2", blas.get(), &stream);
        cuda::call<void*, int*>("cublasGetMathMode", blas.get(), &found_math);
        cuda::call<void*, int*>("cublasGetPointerMode_v2", blas.get(), &found_pointers);
        EXPECT_EQ(stream, other.get()) << call.name;
        EXPECT_EQ(found_math, math) << call.name;
        EXPECT_EQ(found_pointers, pointers_on_device) << call.name;
      }
      EXPECT_EQ(training.buffers(), expected) << "the handle's modes are not the library's";
    }
}

TEST_F(Released, IsGivenBackInAnyOrder) {
  std::vector<int> order = {0, 1, 2};
  do {
    const std::vector<int64_t> before = cuda::software::living();
    {
      Context context = cuda::context();
      const operations::LayerCase layer = three_adapters();
      auto pass =
          std::make_unique<operations::Pass>(device(), context.get(), layer, operations::random_contents(layer));
      auto model = std::make_unique<Model>(device(), context.get(), ModelCase{});
      for (int which : order) {
        pass ? pass->forward() : void();
        model ? model->step(1) : void();
        if (which == 0) context.reset();
        if (which == 1) pass.reset();
        if (which == 2) model.reset();
      }
    }
    EXPECT_EQ(cuda::software::living(), before);
  } while (std::next_permutation(order.begin(), order.end()));
}

// From the first step after prepare, on a thread that has not called before.
TEST_F(Released, StepsOnlyEnqueue) {
  const char* const allowed[] = {
      "cuLaunchKernel",    "cuCtxPushCurrent",   "cuCtxPopCurrent",         "cudaMemsetAsync",
      "cudaMemset2DAsync", "cudaMemcpy2DAsync",  "cudaStreamIsCapturing",   "cublasGemmEx",
      "cublasGemmEx_64",   "cublasSetStream_v2", "cublasGetStream_v2",      "cublasSetWorkspace_v2",
      "cublasSetMathMode", "cublasGetMathMode",  "cublasSetPointerMode_v2", "cublasGetPointerMode_v2"};
  const auto others = [&] {
    int64_t calls = cuda::software::calls();
    for (const char* name : allowed) calls -= cuda::software::calls(name);
    return calls;
  };
  for (const TrainingTypes& types : training_types) {
    const Context context = cuda::context();
    Training training(device(), context.get(), types);
    require(adalora_context_prepare(context.get(), device().waiting_stream()));
    std::async(std::launch::async, [&] {
      for (const Training::Call& call : training.calls()) {
        const int64_t before = others(), all = cuda::software::calls();
        require(call.run(device().stream()));
        EXPECT_EQ(others(), before) << call.name << " of " << types.name;
        EXPECT_GT(cuda::software::calls(), all) << call.name << " of " << types.name << ": else this shows nothing";
      }
    }).get();
  }
}

}  // namespace
}  // namespace cuda_tests
