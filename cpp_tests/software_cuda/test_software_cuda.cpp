// That software CUDA computes what it should, and notices each mistake that it is there to notice.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda_api.hpp"
#include "software_cuda.hpp"

namespace {

const char* const ptx = R"(
.version 8.0
.target sm_75
.address_size 64
.visible .entry add(
	.param .align 8 .b8 add_param_0[32]
) {}
.visible .entry sum(.param .align 8 .b8 sum_param_0[16]) {}
.visible .entry operations(.param .align 8 .b8 p[8]) {}
.visible .entry unset_shared(.param .align 8 .b8 p[8]) {}
.visible .entry race(.param .align 8 .b8 p[8]) {}
.visible .entry divergent_barrier(.param .align 8 .b8 p[8]) {}
.visible .entry barrier_after_return(.param .align 8 .b8 p[8]) {}
.visible .entry shuffle_after_return(.param .align 8 .b8 p[8]) {}
.visible .entry shuffle_in_a_branch(.param .align 8 .b8 p[8]) {}
.visible .entry misaligned(.param .align 8 .b8 p[8]) {}
.visible .entry divides_by_zero(.param .align 8 .b8 p[8]) {}
.visible .entry past_an_array(.param .align 8 .b8 p[8]) {}
.visible .entry past_the_stack(.param .align 8 .b8 p[8]) {}
)";

struct Add {
  float* to;
  const float* from;
  int64_t count;
  float value;
  int32_t padding;
};
struct Sum {
  double* to;
  const double* from;
};
struct Plain {
  void* to;
};

class SoftwareCuda : public testing::Test {
 protected:
  void SetUp() override {
    setenv("SOFTWARE_CUDA_DEVICE", DEVICE, 1);
    software_cuda_reset();
    software_cuda_seed(1);
  }
  void TearDown() override { software_cuda_reset(); }

  template <class T = float>
  T* device(size_t count) {
    void* memory = nullptr;
    EXPECT_EQ(cudaMalloc(&memory, count * sizeof(T)), cudaSuccess);
    return static_cast<T*>(memory);
  }
  template <class T>
  T* device(const std::vector<T>& values) {
    T* memory = device<T>(values.size());
    EXPECT_EQ(cudaMemcpy(memory, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
    return memory;
  }
  template <class T>
  std::vector<T> host(const T* memory, size_t count) {
    std::vector<T> values(count);
    EXPECT_EQ(cudaMemcpy(values.data(), memory, count * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return values;
  }
  cudaStream_t stream(unsigned flags = cudaStreamNonBlocking) {
    cudaStream_t made = nullptr;
    EXPECT_EQ(cudaStreamCreateWithFlags(&made, flags), cudaSuccess);
    return made;
  }
  cudaEvent_t event() {
    cudaEvent_t made = nullptr;
    EXPECT_EQ(cudaEventCreateWithFlags(&made, cudaEventDisableTiming), cudaSuccess);
    return made;
  }
  CUfunction function(const char* name) {
    if (module_ == nullptr || software_cuda_live(SOFTWARE_CUDA_MODULES) == 0) {
      EXPECT_EQ(cudaFree(nullptr), cudaSuccess);
      EXPECT_EQ(cuModuleLoadData(&module_, ptx), cudaSuccess);
    }
    CUfunction found = nullptr;
    EXPECT_EQ(cuModuleGetFunction(&found, module_, name), cudaSuccess) << name;
    return found;
  }
  template <class Arguments>
  int launch(const char* name, unsigned blocks, unsigned threads, Arguments args, cudaStream_t on = nullptr) {
    void* params[] = {&args};
    const CUfunction found = function(name);
    const int status = cuLaunchKernel(found, blocks, 1, 1, threads, 1, 1, 0, on, params, nullptr);
    memset(&args, 0xee, sizeof args);  // it was copied
    return status;
  }
  // to[i] = from[i] + value
  int add(float* to, const float* from, size_t count, float value, cudaStream_t on = nullptr) {
    return launch("add", unsigned((count + 63) / 64), 64, Add{to, from, int64_t(count), value, 0}, on);
  }
  // What a call says, told on stderr.
  static std::string problem() { return software_cuda_problem(); }

  CUmodule module_ = nullptr;
};

void expect_words(const std::string& text, const std::vector<const char*>& parts) {
  for (const char* part : parts) EXPECT_NE(text.find(part), std::string::npos) << part << " in: " << text;
}

// ---- Kernels -----------------------------------------------------------------------------------------------------

TEST_F(SoftwareCuda, RunsKernels) {
  std::vector<float> values(1000);
  std::iota(values.begin(), values.end(), 0.0f);
  float *from = device(values), *to = device(values.size());
  ASSERT_EQ(add(to, from, values.size(), 0.5f), cudaSuccess);
  const std::vector<float> sums = host(to, values.size());
  for (size_t i = 0; i < values.size(); ++i) EXPECT_EQ(sums[i], values[i] + 0.5f);
}

TEST_F(SoftwareCuda, SumsOverABlock) {
  std::vector<double> values(3 * 256);
  std::mt19937 random(1);
  for (double& value : values) value = double(random() % 1000);
  double *from = device(values), *to = device<double>(3);
  ASSERT_EQ(launch("sum", 3, 256, Sum{to, from}), cudaSuccess);
  const std::vector<double> sums = host(to, 3);
  for (int block = 0; block < 3; ++block)
    EXPECT_EQ(sums[block], std::accumulate(&values[block * 256], &values[block * 256] + 256, 0.0));
}

TEST_F(SoftwareCuda, RunsTheOperationsOfWarpsAndBlocks) {
  uint32_t* to = device<uint32_t>(64 * 8);
  ASSERT_EQ(launch("operations", 1, 64, Plain{to}), cudaSuccess);
  const std::vector<uint32_t> all = host(to, 64 * 8);
  for (uint32_t i = 0; i < 64; ++i) {
    const uint32_t* at = &all[i * 8];
    const uint32_t lane = i % 32, warp = i - lane;
    EXPECT_EQ(at[0], 63u * 64 / 2);
    EXPECT_EQ(at[1], i ^ 1);
    EXPECT_EQ(at[2], warp + 3);
    EXPECT_EQ(at[3], lane < 2 ? i : i - 2);
    EXPECT_EQ(at[4], 0x49249249u);
    EXPECT_EQ(at[5], 5u);
    EXPECT_EQ(at[6], lane >= 16 ? 0 : lane % 8 == 7 ? i : i + 1);
    EXPECT_EQ(at[7], 1u);
  }
}

TEST_F(SoftwareCuda, NothingIsSetBeforeItIsWritten) {
  uint32_t* to = device<uint32_t>(64);
  EXPECT_EQ(host(to, 64), std::vector<uint32_t>(64, 0xffffffffu)) << "memory";
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(launch("unset_shared", 1, 64, Plain{to}), cudaSuccess);
    for (uint32_t k = 0; k < 64; ++k) EXPECT_EQ(host(to, 64)[k], k % 2 == 0 ? 7 : 0xffffffffu) << "shared memory";
  }
}

TEST_F(SoftwareCuda, ThreadsRunInManyOrders) {
  uint32_t* to = device<uint32_t>(1);
  std::set<uint32_t> last;
  for (int i = 0; i < 20; ++i) {
    ASSERT_EQ(launch("race", 3, 64, Plain{to}), cudaSuccess);
    last.insert(host(to, 1)[0]);
  }
  EXPECT_GT(last.size(), 5u);
}

struct Broken {
  const char* kernel;
  int error;
  std::vector<const char*> words;
};
class BrokenKernel : public SoftwareCuda, public testing::WithParamInterface<Broken> {};

TEST_P(BrokenKernel, IsAnErrorThatStays) {
  const Broken& broken = GetParam();
  uint32_t* to = device(std::vector<uint32_t>(64, 2));
  ASSERT_EQ(launch(broken.kernel, 2, 64, Plain{to}), cudaSuccess) << "an error comes later";
  EXPECT_EQ(cudaDeviceSynchronize(), broken.error);
  expect_words(problem(), {broken.kernel, "block", "thread", cudaGetErrorName(broken.error)});
  expect_words(problem(), broken.words);
  void* memory = nullptr;
  EXPECT_EQ(cudaMalloc(&memory, 16), broken.error);
  EXPECT_EQ(cudaFree(to), broken.error);
  EXPECT_EQ(cudaGetLastError(), broken.error);
  EXPECT_EQ(cudaGetLastError(), broken.error);
}

INSTANTIATE_TEST_SUITE_P(
    SoftwareCuda, BrokenKernel,
    testing::Values(Broken{"divergent_barrier", cudaErrorLaunchFailure, {"different barriers: lines"}},
                    Broken{"barrier_after_return", cudaErrorLaunchFailure, {"a barrier that 1 of 64 threads"}},
                    Broken{"shuffle_after_return", cudaErrorLaunchFailure, {"lane 5, which has returned"}},
                    Broken{"shuffle_in_a_branch", cudaErrorLaunchFailure, {"has returned"}},
                    Broken{"misaligned", cudaErrorMisalignedAddress, {}},
                    Broken{"divides_by_zero", cudaErrorMisalignedAddress, {}},
                    Broken{"past_an_array", cudaErrorMisalignedAddress, {}},
                    Broken{"past_the_stack", cudaErrorIllegalAddress, {}}),
    [](const auto& broken) { return std::string(broken.param.kernel); });

TEST_F(SoftwareCuda, AKernelBeyondItsMemoryIsAnError) {
  struct Case {
    const char* what;
    ptrdiff_t offset;
    size_t count;
  };
  // 100 floats take 400 bytes of 512: what lies beyond is nobody's.
  for (const Case& c : {Case{"past the end, in the page", 0, 101}, Case{"past the page", 0, 4000},
                        Case{"before the start", -1, 1}, Case{"a page before", -1100, 1}}) {
    software_cuda_reset();
    module_ = nullptr;
    float *from = device(std::vector<float>(8192, 1.0f)), *to = device(100);
    ASSERT_EQ(add(to + c.offset, from, c.count, 1.0f), cudaSuccess) << c.what;
    EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress) << c.what;
    expect_words(problem(), {"add"});
  }
}

TEST_F(SoftwareCuda, AFreedPointerIsAnError) {
  float *from = device(std::vector<float>(64, 1.0f)), *to = device(64);
  ASSERT_EQ(cudaFree(from), cudaSuccess);
  float* other = device(64);
  EXPECT_NE(other, from) << "addresses are not used again";
  ASSERT_EQ(add(to, from, 64, 1.0f), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
}

TEST_F(SoftwareCuda, LaunchesAreChecked) {
  float* to = device(64);
  Add args{to, to, 64, 1.0f, 0};
  void* params[] = {&args};
  const CUfunction found = function("add");
  const auto launched = [&](unsigned blocks, unsigned threads, unsigned shared, cudaStream_t on, void** with) {
    return cuLaunchKernel(found, blocks, 1, 1, threads, 1, 1, shared, on, with, nullptr);
  };
  EXPECT_EQ(launched(0, 64, 0, nullptr, params), cudaErrorInvalidValue);
  EXPECT_EQ(launched(1, 0, 0, nullptr, params), cudaErrorInvalidValue);
  EXPECT_EQ(launched(1, 512, 0, nullptr, params), cudaErrorLaunchOutOfResources);
  EXPECT_EQ(launched(1, 2048, 0, nullptr, params), cudaErrorInvalidValue);
  EXPECT_EQ(launched(1, 64, 16, nullptr, params), cudaErrorInvalidValue);
  EXPECT_EQ(launched(1, 64, 0, nullptr, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(launched(1, 64, 0, reinterpret_cast<cudaStream_t>(&args), params), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cuLaunchKernel(reinterpret_cast<CUfunction>(&args), 1, 1, 1, 64, 1, 1, 0, nullptr, params, nullptr),
            cudaErrorInvalidResourceHandle);
  EXPECT_EQ(launched(1, 64, 0, nullptr, params), cudaSuccess);
}

TEST_F(SoftwareCuda, ModulesAreChecked) {
  ASSERT_EQ(cudaFree(nullptr), cudaSuccess);
  CUmodule loaded = nullptr;
  const std::string head = ".version 8.0\n.target sm_75\n.address_size 64\n";
  EXPECT_EQ(cuModuleLoadData(&loaded,
                             "\x7f"
                             "ELF"),
            cudaErrorInvalidKernelImage);
  EXPECT_EQ(cuModuleLoadData(&loaded, (head + ".visible .entry nobody(.param .align 8 .b8 p[8])").c_str()),
            cudaErrorInvalidPtx);
  expect_words(problem(), {"no kernel nobody"});
  EXPECT_EQ(cuModuleLoadData(&loaded, (head + ".visible .entry sum(.param .align 8 .b8 p[24])").c_str()),
            cudaErrorInvalidPtx);
  expect_words(problem(), {"sum takes 24 bytes in PTX and 16 in the device program"});
  ASSERT_EQ(cuModuleLoadData(&loaded, (head + ".visible .entry sum(.param .align 8 .b8 p[16])").c_str()), cudaSuccess);
  CUfunction found = nullptr;
  EXPECT_EQ(cuModuleGetFunction(&found, loaded, "sum"), cudaSuccess);
  EXPECT_EQ(cuModuleGetFunction(&found, loaded, "add"), cudaErrorSymbolNotFound);
  EXPECT_EQ(software_cuda_live(SOFTWARE_CUDA_MODULES), 1);
  EXPECT_EQ(cuModuleUnload(loaded), cudaSuccess);
  EXPECT_EQ(cuModuleUnload(loaded), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(software_cuda_live(SOFTWARE_CUDA_MODULES), 0);
}

// ---- Memory ------------------------------------------------------------------------------------------------------

TEST_F(SoftwareCuda, TheHostHasNoAccess) {
  float* memory = device(64);
  EXPECT_DEATH(*reinterpret_cast<volatile float*>(memory) = 1.0f, "");
  int pipes[2];
  ASSERT_EQ(pipe(pipes), 0);
  EXPECT_EQ(write(pipes[1], memory, 4), -1);
  EXPECT_EQ(errno, EFAULT);
  close(pipes[0]);
  close(pipes[1]);
}

TEST_F(SoftwareCuda, MemoryIsAlignedAndCounted) {
  for (size_t bytes : {1, 255, 256, 257, 4096, 5000}) {
    const size_t used = size_t(software_cuda_live(SOFTWARE_CUDA_BYTES));
    char* memory = device<char>(bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(memory) % 256, 0u);
    EXPECT_EQ(size_t(software_cuda_live(SOFTWARE_CUDA_BYTES)), used + bytes);
    cudaPointerAttributes attributes{};
    ASSERT_EQ(cudaPointerGetAttributes(&attributes, memory + bytes - 1), cudaSuccess);
    EXPECT_EQ(attributes.type, cudaMemoryTypeDevice);
    EXPECT_EQ(attributes.device, 0);
    EXPECT_EQ(cudaFree(memory + 256), cudaErrorInvalidValue);
    EXPECT_EQ(cudaFree(memory), cudaSuccess);
    EXPECT_EQ(cudaFree(memory), cudaErrorInvalidValue) << "twice";
    EXPECT_EQ(size_t(software_cuda_live(SOFTWARE_CUDA_BYTES)), used);
  }
  void* memory = &memory;
  EXPECT_EQ(cudaMalloc(&memory, size_t(1) << 40), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaMalloc(&memory, 0), cudaSuccess);
  EXPECT_EQ(memory, nullptr);
  EXPECT_EQ(cudaFree(nullptr), cudaSuccess);
}

TEST_F(SoftwareCuda, CopiesAreChecked) {
  std::vector<char> values(100, 'a');
  char *from = device<char>(100), *to = device<char>(100);
  EXPECT_EQ(cudaMemcpy(from, values.data(), 100, cudaMemcpyDeviceToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(values.data(), from, 100, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(from, values.data(), 100, 7), cudaErrorInvalidMemcpyDirection);
  EXPECT_EQ(cudaMemcpyAsync(from + 1, from, 50, cudaMemcpyDeviceToDevice, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy2DAsync(to, 9, from, 20, 10, 3, cudaMemcpyDeviceToDevice, nullptr), cudaErrorInvalidPitchValue);
  EXPECT_EQ(cudaMemset(values.data(), 0, 1), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(from, values.data(), 100, cudaMemcpyDefault), cudaSuccess);

  ASSERT_EQ(cudaMemset(to, 'b', 100), cudaSuccess);
  ASSERT_EQ(cudaMemcpy2DAsync(to + 1, 30, from, 20, 10, 3, cudaMemcpyDeviceToDevice, nullptr), cudaSuccess);
  std::vector<char> expected(100, 'b');
  for (size_t row = 0; row < 3; ++row) std::fill_n(&expected[1 + row * 30], 10, 'a');
  EXPECT_EQ(host(to, 100), expected);

  EXPECT_EQ(cudaMemcpy(to + 50, from, 51, cudaMemcpyDeviceToDevice), cudaSuccess) << "an error comes later";
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
  expect_words(problem(), {"the destination, 51 bytes from", "byte 50 of an allocation of 100", "past its end"});
}

TEST_F(SoftwareCuda, PageableMemoryIsReadByTheCall) {
  std::vector<float> values(8, 1.0f);
  float* memory = device(8);
  ASSERT_EQ(cudaMemcpyAsync(memory, values.data(), 32, cudaMemcpyHostToDevice, nullptr), cudaSuccess);
  values.assign(8, 2.0f);
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(host(memory, 8), std::vector<float>(8, 1.0f));
}

// ---- Streams -----------------------------------------------------------------------------------------------------

TEST_F(SoftwareCuda, NothingRunsBeforeSomebodyWaits) {
  float* memory = device(std::vector<float>(64, 1.0f));
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  const cudaStream_t one = stream();
  ASSERT_EQ(add(memory, memory, 64, 1.0f, one), cudaSuccess);
  EXPECT_EQ(software_cuda_pending(), 1);
  ASSERT_EQ(cudaStreamSynchronize(one), cudaSuccess);
  EXPECT_EQ(software_cuda_pending(), 0);
  EXPECT_EQ(host(memory, 64), std::vector<float>(64, 2.0f));
}

// What comes of two kernels in two streams, over many orders.
class Orders : public SoftwareCuda {
 protected:
  template <class Enqueue>
  std::set<float> results(unsigned flags_one, unsigned flags_two, Enqueue enqueue) {
    std::set<float> seen;
    for (uint64_t seed = 0; seed < 30; ++seed) {
      software_cuda_seed(seed);
      float* memory = device(std::vector<float>(1, 1.0f));
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      enqueue(memory, stream(flags_one), stream(flags_two));
      EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      seen.insert(host(memory, 1)[0]);
    }
    return seen;
  }
  void set(float* memory, unsigned char byte, cudaStream_t on) {
    EXPECT_EQ(cudaMemsetAsync(memory, byte, 4, on), cudaSuccess);
  }
};

TEST_F(Orders, OfOneStreamIsOne) {
  EXPECT_EQ(results(cudaStreamNonBlocking, cudaStreamNonBlocking,
                    [&](float* memory, cudaStream_t one, cudaStream_t) {
                      add(memory, memory, 1, 1.0f, one);
                      set(memory, 0, one);
                      add(memory, memory, 1, 5.0f, one);
                    }),
            std::set<float>{5.0f});
}
TEST_F(Orders, OfTwoStreamsAreMany) {
  EXPECT_EQ(results(cudaStreamNonBlocking, cudaStreamDefault,
                    [&](float* memory, cudaStream_t one, cudaStream_t two) {
                      set(memory, 0, one);
                      add(memory, memory, 1, 5.0f, two);
                    }),
            (std::set<float>{0.0f, 5.0f}));
}
TEST_F(Orders, FollowEvents) {
  EXPECT_EQ(results(cudaStreamNonBlocking, cudaStreamNonBlocking,
                    [&](float* memory, cudaStream_t one, cudaStream_t two) {
                      const cudaEvent_t done = event();
                      set(memory, 0, one);
                      EXPECT_EQ(cudaEventRecord(done, one), cudaSuccess);
                      EXPECT_EQ(cudaStreamWaitEvent(two, done, 0), cudaSuccess);
                      add(memory, memory, 1, 5.0f, two);
                      EXPECT_EQ(cudaEventDestroy(done), cudaSuccess);
                    }),
            std::set<float>{5.0f});
}
TEST_F(Orders, FollowTheLegacyStreamWhereStreamsBlock) {
  const auto enqueue = [&](float* memory, cudaStream_t one, cudaStream_t two) {
    set(memory, 0, one);
    add(memory, memory, 1, 5.0f, nullptr);
    add(memory, memory, 1, 5.0f, two);
  };
  EXPECT_EQ(results(cudaStreamDefault, cudaStreamDefault, enqueue), std::set<float>{10.0f});
  EXPECT_GT(results(cudaStreamNonBlocking, cudaStreamDefault, enqueue).size(), 1u);
}
TEST_F(Orders, WaitingForAnEventRunsWhatItFollows) {
  const cudaStream_t one = stream();
  const cudaEvent_t done = event();
  float* memory = device(std::vector<float>(1, 1.0f));
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  add(memory, memory, 1, 5.0f, one);
  ASSERT_EQ(cudaEventRecord(done, one), cudaSuccess);
  ASSERT_EQ(cudaEventSynchronize(done), cudaSuccess);
  EXPECT_EQ(software_cuda_pending(), 0);
}

TEST_F(SoftwareCuda, HandlesAreChecked) {
  const cudaStream_t one = stream();
  const cudaEvent_t done = event();
  ASSERT_EQ(cudaStreamDestroy(one), cudaSuccess);
  ASSERT_EQ(cudaEventDestroy(done), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(one), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaStreamSynchronize(one), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaEventRecord(done, nullptr), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaStreamWaitEvent(nullptr, done, 0), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaStreamDestroy(nullptr), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaGetLastError(), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(software_cuda_live(SOFTWARE_CUDA_STREAMS), 0);
  EXPECT_EQ(software_cuda_live(SOFTWARE_CUDA_EVENTS), 0);
}

}  // namespace
