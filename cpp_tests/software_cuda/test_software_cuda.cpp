// That software CUDA computes what it should, and notices each mistake that it is there to notice.
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
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
.target sm_80
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
  const std::string head = ".version 8.0\n.target sm_80\n.address_size 64\n";
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

// Large fills and uploads of equal bytes take another way.
TEST_F(SoftwareCuda, LargeFillsAreExact) {
  constexpr size_t bytes = (5 << 20) + 77;
  for (bool uploaded : {false, true})
    for (int byte : {0xff, 0x61}) {
      char* memory = device(std::vector<char>(bytes, 'b'));
      const std::vector<char> filling(bytes - 300, char(byte));
      ASSERT_EQ(uploaded ? cudaMemcpy(memory + 100, filling.data(), filling.size(), cudaMemcpyHostToDevice)
                         : cudaMemset(memory + 100, byte, filling.size()),
                cudaSuccess);
      std::vector<char> expected(bytes, 'b');
      std::copy(filling.begin(), filling.end(), expected.begin() + 100);
      EXPECT_TRUE(host(memory, bytes) == expected);
    }
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

// ---- Captures ----------------------------------------------------------------------------------------------------

class Captures : public SoftwareCuda {
 protected:
  void SetUp() override {
    SoftwareCuda::SetUp();
    memory = device(std::vector<float>(64, 1.0f));
    other = stream();
    origin = stream();
    ASSERT_EQ(cuFuncLoad(function("add")), cudaSuccess);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  void begin(int mode = cudaStreamCaptureModeGlobal) { ASSERT_EQ(cudaStreamBeginCapture(origin, mode), cudaSuccess); }
  int end() { return cudaStreamEndCapture(origin, &graph); }
  int status_of(cudaStream_t one) {
    int status = -1;
    EXPECT_EQ(cudaStreamIsCapturing(one, &status), cudaSuccess);
    return status;
  }
  cudaGraphExec_t instantiate() {
    cudaGraphExec_t exec = nullptr;
    EXPECT_EQ(cudaGraphInstantiateWithFlags(&exec, graph, 0), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    return exec;
  }
  float value() {
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    return host(memory, 1)[0];
  }

  float* memory;
  cudaStream_t origin, other;
  cudaGraph_t graph = nullptr;
};

TEST_F(Captures, FirstLaunchesLoadCode) {
  CUmodule fresh = nullptr;
  CUfunction add = nullptr;
  ASSERT_EQ(cuModuleLoadData(&fresh, ptx), cudaSuccess);
  ASSERT_EQ(cuModuleGetFunction(&add, fresh, "add"), cudaSuccess);
  Add args{memory, memory, 64, 1.0f, 0};
  void* params[] = {&args};
  const auto launch = [&] { return cuLaunchKernel(add, 1, 1, 1, 64, 1, 1, 0, origin, params, nullptr); };
  begin();
  EXPECT_EQ(launch(), cudaErrorStreamCaptureUnsupported);
  expect_words(problem(), {"add: loading its code, which a first launch does while a stream captures"});
  EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
  ASSERT_EQ(launch(), cudaSuccess);
  begin();
  EXPECT_EQ(launch(), cudaSuccess);
  EXPECT_EQ(end(), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
}

TEST_F(Captures, RecordAndReplay) {
  begin();
  EXPECT_EQ(status_of(origin), cudaStreamCaptureStatusActive);
  EXPECT_EQ(status_of(other), cudaStreamCaptureStatusNone);
  ASSERT_EQ(add(memory, memory, 64, 1.0f, origin), cudaSuccess);
  ASSERT_EQ(add(memory, memory, 64, 2.0f, origin), cudaSuccess);
  ASSERT_EQ(end(), cudaSuccess);
  EXPECT_EQ(status_of(origin), cudaStreamCaptureStatusNone);
  EXPECT_EQ(software_cuda_pending(), 0);
  EXPECT_EQ(value(), 1.0f) << "nothing ran";
  const cudaGraphExec_t exec = instantiate();
  for (int i = 0; i < 3; ++i) ASSERT_EQ(cudaGraphLaunch(exec, other), cudaSuccess);
  EXPECT_EQ(value(), 10.0f);
  EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(software_cuda_live(SOFTWARE_CUDA_GRAPHS) + software_cuda_live(SOFTWARE_CUDA_GRAPH_EXECS), 0);
}

TEST_F(Captures, ForkAndJoin) {
  const cudaEvent_t forks = event(), joins = event();
  float* second = device(std::vector<float>(64, 5.0f));
  for (bool joined : {false, true}) {
    begin();
    ASSERT_EQ(cudaEventRecord(forks, origin), cudaSuccess);
    ASSERT_EQ(cudaStreamWaitEvent(other, forks, 0), cudaSuccess);
    EXPECT_EQ(status_of(other), cudaStreamCaptureStatusActive);
    ASSERT_EQ(add(second, second, 64, 1.0f, other), cudaSuccess);
    ASSERT_EQ(cudaEventRecord(joins, other), cudaSuccess);
    if (joined) {
      ASSERT_EQ(cudaStreamWaitEvent(origin, joins, 0), cudaSuccess);
    }
    ASSERT_EQ(add(memory, second, 64, 1.0f, origin), cudaSuccess);
    if (!joined) {
      EXPECT_EQ(end(), cudaErrorStreamCaptureUnjoined);
      EXPECT_EQ(status_of(other), cudaStreamCaptureStatusNone);
    }
  }
  ASSERT_EQ(end(), cudaSuccess);
  const cudaGraphExec_t exec = instantiate();
  ASSERT_EQ(cudaGraphLaunch(exec, origin), cudaSuccess);
  EXPECT_EQ(value(), 7.0f);
}

struct Forbidden {
  const char* what;
  int error;
  int (*call)(float* memory, cudaStream_t origin, cudaStream_t other);
};
class ForbiddenInCapture : public Captures, public testing::WithParamInterface<Forbidden> {};

TEST_P(ForbiddenInCapture, InvalidatesIt) {
  const Forbidden& forbidden = GetParam();
  begin();
  ASSERT_EQ(add(memory, memory, 64, 1.0f, origin), cudaSuccess);
  EXPECT_EQ(forbidden.call(memory, origin, other), forbidden.error);
  EXPECT_EQ(status_of(origin), cudaStreamCaptureStatusInvalidated);
  EXPECT_EQ(add(memory, memory, 64, 1.0f, origin), cudaErrorStreamCaptureInvalidated);
  EXPECT_EQ(end(), cudaErrorStreamCaptureInvalidated);
  EXPECT_EQ(graph, nullptr);
  EXPECT_EQ(value(), 1.0f) << "and all works again";
}

float host_value = 1.0f;

INSTANTIATE_TEST_SUITE_P(
    Captures, ForbiddenInCapture,
    testing::Values(Forbidden{"malloc", cudaErrorStreamCaptureUnsupported,
                              [](float*, cudaStream_t, cudaStream_t) {
                                void* memory = nullptr;
                                return cudaMalloc(&memory, 16);
                              }},
                    Forbidden{"free", cudaErrorStreamCaptureUnsupported,
                              [](float* memory, cudaStream_t, cudaStream_t) { return cudaFree(memory); }},
                    Forbidden{"waiting_for_the_stream", cudaErrorStreamCaptureUnsupported,
                              [](float*, cudaStream_t origin, cudaStream_t) { return cudaStreamSynchronize(origin); }},
                    Forbidden{"waiting_for_the_device", cudaErrorStreamCaptureUnsupported,
                              [](float*, cudaStream_t, cudaStream_t) { return cudaDeviceSynchronize(); }},
                    Forbidden{"pageable_upload", cudaErrorStreamCaptureUnsupported,
                              [](float* memory, cudaStream_t origin, cudaStream_t) {
                                return cudaMemcpyAsync(memory, &host_value, 4, cudaMemcpyHostToDevice, origin);
                              }},
                    Forbidden{"pageable_download", cudaErrorStreamCaptureUnsupported,
                              [](float* memory, cudaStream_t origin, cudaStream_t) {
                                return cudaMemcpyAsync(&host_value, memory, 4, cudaMemcpyDeviceToHost, origin);
                              }},
                    Forbidden{"synchronous_copy", cudaErrorStreamCaptureUnsupported,
                              [](float* memory, cudaStream_t, cudaStream_t) {
                                return cudaMemcpy(&host_value, memory, 4, cudaMemcpyDeviceToHost);
                              }},
                    Forbidden{"legacy_stream", cudaErrorStreamCaptureImplicit,
                              [](float* memory, cudaStream_t, cudaStream_t) {
                                return cudaMemsetAsync(memory, 0, 4, nullptr);
                              }},
                    Forbidden{"module", cudaErrorStreamCaptureUnsupported,
                              [](float*, cudaStream_t, cudaStream_t) {
                                CUmodule loaded = nullptr;
                                return cuModuleLoadData(&loaded, ptx);
                              }},
                    Forbidden{"uncaptured_event", cudaErrorStreamCaptureIsolation,
                              [](float*, cudaStream_t origin, cudaStream_t other) {
                                cudaEvent_t event = nullptr;
                                cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
                                cudaEventRecord(event, other);
                                return cudaStreamWaitEvent(origin, event, 0);
                              }},
                    Forbidden{"waiting_for_a_captured_event", cudaErrorCapturedEvent,
                              [](float*, cudaStream_t origin, cudaStream_t) {
                                cudaEvent_t event = nullptr;
                                cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
                                cudaEventRecord(event, origin);
                                return cudaEventSynchronize(event);
                              }},
                    Forbidden{"cublas_handle", CUBLAS_STATUS_EXECUTION_FAILED,
                              [](float*, cudaStream_t, cudaStream_t) {
                                cublasHandle_t handle = nullptr;
                                return cublasCreate_v2(&handle);
                              }}),
    [](const auto& forbidden) { return std::string(forbidden.param.what); });

TEST_F(Captures, OfOtherThreadsForbidLess) {
  for (int mode : {cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed}) {
    begin(mode);
    const auto allocates = [&] {
      void* memory = nullptr;
      return cudaMalloc(&memory, 16);
    };
    int theirs = -1;
    std::thread([&] { theirs = allocates(); }).join();
    EXPECT_EQ(theirs, mode == cudaStreamCaptureModeGlobal ? cudaErrorStreamCaptureUnsupported : cudaSuccess);
    EXPECT_EQ(allocates(), mode == cudaStreamCaptureModeRelaxed ? cudaSuccess : cudaErrorStreamCaptureUnsupported);
    end();
  }
}

TEST_F(Captures, EndWhereTheyBegan) {
  EXPECT_EQ(end(), cudaErrorIllegalState);
  EXPECT_EQ(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal), cudaErrorStreamCaptureUnsupported);
  begin();
  EXPECT_EQ(cudaStreamBeginCapture(origin, cudaStreamCaptureModeGlobal), cudaErrorIllegalState);
  int theirs = -1;
  std::thread([&] { theirs = cudaStreamEndCapture(origin, &graph); }).join();
  EXPECT_EQ(theirs, cudaErrorStreamCaptureWrongThread);
  EXPECT_EQ(end(), cudaSuccess);
}

TEST_F(Captures, ReplayWhatWasFreedOrUnloaded) {
  begin();
  ASSERT_EQ(cudaMemsetAsync(memory, 0, 4, origin), cudaSuccess);
  ASSERT_EQ(end(), cudaSuccess);
  const cudaGraphExec_t exec = instantiate();
  ASSERT_EQ(cudaFree(memory), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(exec, origin), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
  expect_words(problem(), {"in no live allocation"});

  SetUp();
  begin();
  ASSERT_EQ(add(memory, memory, 64, 1.0f, origin), cudaSuccess);
  ASSERT_EQ(end(), cudaSuccess);
  const cudaGraphExec_t second = instantiate();
  ASSERT_EQ(cuModuleUnload(module_), cudaSuccess);
  ASSERT_EQ(cudaGraphLaunch(second, origin), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
  expect_words(problem(), {"module was unloaded"});
}

// ---- Contexts ----------------------------------------------------------------------------------------------------

TEST_F(SoftwareCuda, ContextsAreRetainedAndPushed) {
  int number = -1;
  CUdevice second = -1;
  CUcontext context = nullptr, popped = nullptr;
  EXPECT_EQ(cuDeviceGet(&second, 1), cudaSuccess);
  EXPECT_EQ(cuDeviceGet(&second, 2), cudaErrorInvalidDevice);
  CUmodule loaded = nullptr;
  EXPECT_EQ(cuModuleLoadData(&loaded, ptx), cudaErrorDeviceUninitialized) << "no context is current";
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&context, second), cudaSuccess);
  ASSERT_EQ(cuDevicePrimaryCtxRetain(&context, second), cudaSuccess);
  EXPECT_EQ(software_cuda_live(SOFTWARE_CUDA_RETAINED_CONTEXTS), 2);
  EXPECT_EQ(cudaGetDevice(&number), cudaSuccess);
  EXPECT_EQ(number, 0);
  ASSERT_EQ(cuCtxPushCurrent_v2(context), cudaSuccess);
  EXPECT_EQ(cudaGetDevice(&number), cudaSuccess);
  EXPECT_EQ(number, 1);
  EXPECT_EQ(cuModuleLoadData(&loaded, ptx), cudaSuccess);
  std::thread([&] {
    EXPECT_EQ(cudaGetDevice(&number), cudaSuccess);
    EXPECT_EQ(number, 0) << "each thread has its own";
    EXPECT_EQ(cuCtxPopCurrent_v2(&popped), cudaErrorDeviceUninitialized);
  }).join();
  ASSERT_EQ(cuCtxPopCurrent_v2(&popped), cudaSuccess);
  EXPECT_EQ(popped, context);
  EXPECT_EQ(cudaGetDevice(&number), cudaSuccess);
  EXPECT_EQ(number, 0);
  EXPECT_EQ(cuDevicePrimaryCtxRelease_v2(second), cudaSuccess);
  EXPECT_EQ(software_cuda_live(SOFTWARE_CUDA_MODULES), 1);
  EXPECT_EQ(cuDevicePrimaryCtxRelease_v2(second), cudaSuccess);
  EXPECT_EQ(software_cuda_live(SOFTWARE_CUDA_MODULES), 0) << "the last release ends the context";
  EXPECT_EQ(cuDevicePrimaryCtxRelease_v2(second), cudaErrorDeviceUninitialized);
  EXPECT_EQ(cuCtxPushCurrent_v2(context), cudaErrorDeviceUninitialized);
}

TEST_F(SoftwareCuda, DevicesAreApart) {
  const CUfunction first = function("add");
  const cudaStream_t one = stream();
  float* memory = device(64);
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  EXPECT_EQ(cudaSetDevice(2), cudaErrorInvalidDevice);
  Add args{memory, memory, 64, 1.0f, 0};
  void* params[] = {&args};
  EXPECT_EQ(cuLaunchKernel(first, 1, 1, 1, 64, 1, 1, 0, nullptr, params, nullptr), cudaErrorInvalidResourceHandle);
  EXPECT_EQ(cudaMemsetAsync(device(1), 0, 4, one), cudaErrorInvalidResourceHandle);
  expect_words(problem(), {"a stream of device 0, but device 1 is current"});
  ASSERT_EQ(cuModuleLoadData(&module_, ptx), cudaSuccess);
  CUfunction found = nullptr;
  ASSERT_EQ(cuModuleGetFunction(&found, module_, "add"), cudaSuccess);
  ASSERT_EQ(cuLaunchKernel(found, 1, 1, 1, 64, 1, 1, 0, nullptr, params, nullptr), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress) << "the other device's memory";
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << "each has its own errors";
}

// ---- cuBLAS ------------------------------------------------------------------------------------------------------

class Products : public SoftwareCuda {
 protected:
  void SetUp() override {
    SoftwareCuda::SetUp();
    ASSERT_EQ(cublasCreate_v2(&handle), CUBLAS_STATUS_SUCCESS);
  }
  // 2 rows and columns of everything.
  int multiply(const void* a, const void* b, void* c, int type = CUDA_R_32F, int c_type = CUDA_R_32F,
               int compute = CUBLAS_COMPUTE_32F) {
    return cublasGemmEx(handle, 0, 0, 2, 2, 2, &alpha, a, type, 2, b, type, 2, &beta, c, c_type, 2, compute, -1);
  }

  cublasHandle_t handle = nullptr;
  float alpha = 1.0f, beta = 0.0f;
};

TEST_F(Products, AreColumnMajor) {
  constexpr int m = 3, n = 4, k = 5, lda = 7, ldb = 8, ldc = 9;
  std::mt19937 random(1);
  for (int transa : {CUBLAS_OP_N, CUBLAS_OP_T})
    for (int transb : {CUBLAS_OP_N, CUBLAS_OP_T})
      for (double factor : {0.0, 0.5}) {
        const auto values = [&](int count) {
          std::vector<double> all(size_t(count), 0.0);
          for (double& value : all) value = double(random() % 9) - 4.0;
          return all;
        };
        const std::vector<double> a = values(lda * 5), b = values(ldb * 5), c = values(ldc * n);
        double *da = device(a), *db = device(b), *dc = device(c);
        const double scale = 2.0;
        ASSERT_EQ(cublasGemmEx_64(handle, transa, transb, m, n, k, &scale, da, CUDA_R_64F, lda, db, CUDA_R_64F, ldb,
                                  &factor, dc, CUDA_R_64F, ldc, CUBLAS_COMPUTE_64F, -1),
                  CUBLAS_STATUS_SUCCESS);
        std::vector<double> expected = c;
        for (int i = 0; i < m; ++i)
          for (int j = 0; j < n; ++j) {
            double sum = 0;
            for (int p = 0; p < k; ++p)
              sum += (transa == CUBLAS_OP_N ? a[size_t(i + p * lda)] : a[size_t(p + i * lda)]) *
                     (transb == CUBLAS_OP_N ? b[size_t(p + j * ldb)] : b[size_t(j + p * ldb)]);
            double& to = expected[size_t(i + j * ldc)];
            to = scale * sum + factor * to;
          }
        EXPECT_EQ(host(dc, c.size()), expected);
      }
}

TEST_F(Products, TakeEveryPairOfTypes) {
  const auto made = [&](int type, float value) -> void* {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    switch (type) {
      case CUDA_R_64F:
        return device(std::vector<double>(4, value));
      case CUDA_R_16BF:
        return device(std::vector<uint16_t>(4, uint16_t(bits >> 16)));
      case CUDA_R_16F:
        return device(
            std::vector<uint16_t>(4, uint16_t((bits >> 16 & 0x8000u) | (((bits & 0x7fffffffu) >> 13) - (112u << 10)))));
      default:
        return device(std::vector<float>(4, value));
    }
  };
  const int all[] = {CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF};
  const std::set<std::vector<int>> supported = {
      {CUBLAS_COMPUTE_64F, CUDA_R_64F, CUDA_R_64F},   {CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_32F},
      {CUBLAS_COMPUTE_32F, CUDA_R_16F, CUDA_R_16F},   {CUBLAS_COMPUTE_32F, CUDA_R_16F, CUDA_R_32F},
      {CUBLAS_COMPUTE_32F, CUDA_R_16BF, CUDA_R_16BF}, {CUBLAS_COMPUTE_32F, CUDA_R_16BF, CUDA_R_32F},
  };
  const double one = 1.0, zero = 0.0;
  for (int compute : {CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_64F})
    for (int type : all)
      for (int c_type : all) {
        const void *a = made(type, 1.5f), *b = made(type, -2.0f);
        void* c = made(c_type, 0.0f);
        const bool is_double = compute == CUBLAS_COMPUTE_64F;
        const void* first = is_double ? static_cast<const void*>(&one) : &alpha;
        const void* second = is_double ? static_cast<const void*>(&zero) : &beta;
        const int status =
            cublasGemmEx(handle, 0, 0, 2, 2, 2, first, a, type, 2, b, type, 2, second, c, c_type, 2, compute, -1);
        if (supported.count({compute, type, c_type}) == 0) {
          EXPECT_EQ(status, CUBLAS_STATUS_NOT_SUPPORTED) << compute << " " << type << " " << c_type;
          continue;
        }
        ASSERT_EQ(status, CUBLAS_STATUS_SUCCESS);
        const size_t bytes = c_type == CUDA_R_64F ? 8 : c_type == CUDA_R_32F ? 4 : 2;
        EXPECT_EQ(host(static_cast<char*>(c), 4 * bytes), host(static_cast<char*>(made(c_type, -6.0f)), 4 * bytes));
      }
}

TEST_F(Products, RoundToTf32WhereAsked) {
  const float fine = 1.0f + 1.0f / 4096;  // twelve bits
  float *a = device(std::vector<float>(4, fine)), *b = device(std::vector<float>(4, 1.0f)), *c = device(4);
  const auto result = [&](int compute) {
    EXPECT_EQ(multiply(a, b, c, CUDA_R_32F, CUDA_R_32F, compute), CUBLAS_STATUS_SUCCESS);
    return host(c, 1)[0];
  };
  EXPECT_EQ(result(CUBLAS_COMPUTE_32F), 2 * fine);
  EXPECT_EQ(result(CUBLAS_COMPUTE_32F_FAST_TF32), 2.0f);
  ASSERT_EQ(cublasSetMathMode(handle, CUBLAS_TF32_TENSOR_OP_MATH), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(result(CUBLAS_COMPUTE_32F), 2.0f);
  EXPECT_EQ(result(CUBLAS_COMPUTE_32F_PEDANTIC), 2 * fine);
}

TEST_F(Products, ReadHostScalarsAtOnce) {
  float *a = device(std::vector<float>(4, 1.0f)), *b = device(std::vector<float>(4, 1.0f)), *c = device(4);
  alpha = 3.0f;
  ASSERT_EQ(multiply(a, b, c), CUBLAS_STATUS_SUCCESS);
  alpha = 5.0f;
  EXPECT_EQ(host(c, 4), std::vector<float>(4, 6.0f));
  float* scalars = device(std::vector<float>{3.0f, 0.0f});
  const auto from = [&](const float* first, const float* second) {
    return cublasGemmEx(handle, 0, 0, 2, 2, 2, first, a, 0, 2, b, 0, 2, second, c, 0, 2, CUBLAS_COMPUTE_32F, -1);
  };
  EXPECT_EQ(from(scalars, scalars + 1), CUBLAS_STATUS_INVALID_VALUE);
  ASSERT_EQ(cublasSetPointerMode_v2(handle, CUBLAS_POINTER_MODE_DEVICE), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(from(&alpha, &beta), CUBLAS_STATUS_INVALID_VALUE);
  ASSERT_EQ(from(scalars, scalars + 1), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cudaMemset(scalars, 0, 4), cudaSuccess);
  EXPECT_EQ(host(c, 4), std::vector<float>(4, 6.0f)) << "in stream order";
}

TEST_F(Products, ZeroFactorsReadNothing) {
  float *nothing = device(4), *c = device(std::vector<float>(4, 3.0f));
  alpha = 0.0f;
  beta = 0.5f;
  ASSERT_EQ(multiply(nothing, nothing, c), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(host(c, 4), std::vector<float>(4, 1.5f)) << "NaN in A and B";
  float* ones = device(std::vector<float>(4, 1.0f));
  alpha = 1.0f;
  beta = 0.0f;
  ASSERT_EQ(multiply(ones, ones, nothing), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(host(nothing, 4), std::vector<float>(4, 2.0f)) << "NaN in C";
}

TEST_F(Products, CheckTheirArguments) {
  float *a = device(12), *b = device(12), *c = device(12);
  const auto tried = [&](int transa, int transb, int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb,
                         int64_t ldc) {
    return cublasGemmEx_64(handle, transa, transb, m, n, k, &alpha, a, 0, lda, b, 0, ldb, &beta, c, 0, ldc,
                           CUBLAS_COMPUTE_32F, -1);
  };
  EXPECT_EQ(tried(3, 0, 2, 3, 4, 2, 4, 2), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(tried(0, 0, -1, 3, 4, 2, 4, 2), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(tried(0, 0, 2, 3, 4, 1, 4, 2), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(tried(0, 0, 2, 3, 4, 2, 3, 2), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(tried(0, 0, 2, 3, 4, 2, 4, 1), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(tried(1, 0, 2, 3, 4, 2, 4, 2), CUBLAS_STATUS_INVALID_VALUE) << "transposed, A has k rows";
  EXPECT_EQ(tried(0, 1, 2, 3, 4, 2, 2, 2), CUBLAS_STATUS_INVALID_VALUE) << "transposed, B has n rows";
  EXPECT_EQ(tried(0, 0, 0, 3, 4, 1, 4, 1), CUBLAS_STATUS_SUCCESS) << "of no rows";
  EXPECT_EQ(tried(0, 0, 2, 3, 4, 2, 4, 2), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  EXPECT_EQ(tried(0, 0, 2, 3, 4, 5, 4, 2), CUBLAS_STATUS_SUCCESS) << "an error comes later";
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
  expect_words(problem(), {"cublasGemmEx_64: A, 68 bytes", "an allocation of 48", "past its end"});
  EXPECT_EQ(tried(0, 0, 2, 3, 4, 2, 4, 2), CUBLAS_STATUS_EXECUTION_FAILED);
}

TEST_F(Products, SpoilTheWorkspace) {
  float *a = device(std::vector<float>(4, 1.0f)), *c = device(4);
  constexpr size_t bytes = 1 << 16;
  char* workspace = device(std::vector<char>(bytes, 'a'));
  EXPECT_EQ(cublasSetWorkspace_v2(handle, workspace + 64, 1024), CUBLAS_STATUS_INVALID_VALUE);
  EXPECT_EQ(cublasSetWorkspace_v2(handle, workspace, bytes + 1), CUBLAS_STATUS_INVALID_VALUE);
  ASSERT_EQ(cublasSetWorkspace_v2(handle, workspace, bytes), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(multiply(workspace, a, c), CUBLAS_STATUS_INVALID_VALUE) << "an operand in the workspace";
  ASSERT_EQ(multiply(a, a, c), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(host(workspace, bytes), std::vector<char>(bytes, char(0xff)));

  ASSERT_EQ(cudaMemset(workspace, 'b', bytes), cudaSuccess);
  ASSERT_EQ(cublasSetStream_v2(handle, nullptr), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(multiply(a, a, c), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(host(workspace, bytes), std::vector<char>(bytes, 'b')) << "taken back with the stream";

  ASSERT_EQ(cublasSetWorkspace_v2(handle, workspace, bytes), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cudaFree(workspace), cudaSuccess);
  ASSERT_EQ(multiply(a, a, c), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaErrorIllegalAddress);
  expect_words(problem(), {"the workspace"});
}

TEST_F(Products, BelongToAContextAndAStream) {
  float *a = device(std::vector<float>(4, 1.0f)), *c = device(4);
  const cudaStream_t one = stream();
  ASSERT_EQ(cublasSetStream_v2(handle, one), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cudaStreamDestroy(one), cudaSuccess);
  EXPECT_EQ(multiply(a, a, c), CUBLAS_STATUS_EXECUTION_FAILED) << "a stream that was destroyed";
  ASSERT_EQ(cublasSetStream_v2(handle, nullptr), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cudaSetDevice(1), cudaSuccess);
  EXPECT_EQ(multiply(a, a, c), CUBLAS_STATUS_EXECUTION_FAILED);
  expect_words(problem(), {"the handle is of device 0"});
  ASSERT_EQ(cudaSetDevice(0), cudaSuccess);
  EXPECT_EQ(multiply(a, a, c), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(software_cuda_live(SOFTWARE_CUDA_HANDLES), 1);
  EXPECT_EQ(cublasDestroy_v2(handle), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(software_cuda_live(SOFTWARE_CUDA_HANDLES), 0);
  EXPECT_EQ(multiply(a, a, c), CUBLAS_STATUS_NOT_INITIALIZED);
}

TEST_F(Products, OfOneHandleComeFromOneThread) {
  float *a = device(std::vector<float>(4, 1.0f)), *c = device(4);
  std::atomic<int> refused{0};
  const auto work = [&] {
    for (int i = 0; i < 20000 && refused == 0; ++i)
      if (multiply(a, a, c) == CUBLAS_STATUS_INTERNAL_ERROR) ++refused;
  };
  std::thread one(work), two(work);
  one.join();
  two.join();
  EXPECT_GT(refused, 0);
}

// ---- Faults ------------------------------------------------------------------------------------------------------

TEST_F(SoftwareCuda, TheNthCallFailsOnce) {
  float* memory = device(64);
  function("add");
  const int64_t before = software_cuda_calls(), launches = software_cuda_calls_of("cuLaunchKernel");
  software_cuda_fail_call(3);
  EXPECT_EQ(cudaMemset(memory, 0, 256), cudaSuccess);
  EXPECT_STREQ(cudaGetErrorName(700), "cudaErrorIllegalAddress") << "does not count";
  EXPECT_STREQ(software_cuda_failed_call(), "");
  EXPECT_EQ(add(memory, memory, 64, 1.0f), cudaErrorLaunchOutOfResources);
  EXPECT_STREQ(software_cuda_failed_call(), "cuLaunchKernel");
  EXPECT_EQ(software_cuda_calls(), before + 3);
  EXPECT_EQ(software_cuda_calls_of("cuLaunchKernel"), launches + 1);
  EXPECT_EQ(host(memory, 64), std::vector<float>(64, 0.0f)) << "it did nothing";
  EXPECT_EQ(add(memory, memory, 64, 1.0f), cudaSuccess) << "once";
  EXPECT_EQ(host(memory, 64), std::vector<float>(64, 1.0f));
}

TEST_F(SoftwareCuda, NothingOutlivesAFork) {
  float* memory = device(64);
  const pid_t child = fork();
  if (child == 0) {
    void* other = nullptr;
    _exit(cudaMalloc(&other, 16) == cudaErrorInitializationError && cudaFree(memory) == cudaErrorInitializationError
              ? 0
              : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(cudaMemset(memory, 0, 256), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

TEST_F(SoftwareCuda, EntryPointsHaveBaseNames) {
  void* found = nullptr;
  int status = -1;
  EXPECT_EQ(cudaGetDriverEntryPoint("cuCtxPushCurrent", &found, 0, &status), cudaSuccess);
  EXPECT_EQ(found, reinterpret_cast<void*>(cuCtxPushCurrent_v2));
  EXPECT_EQ(status, 0);
  EXPECT_EQ(cudaGetDriverEntryPoint("cuCtxPushCurrent_v2", &found, 0, &status), cudaSuccess);
  EXPECT_EQ(found, nullptr);
  EXPECT_EQ(status, 1);
}

// What the library takes by its folder is what the tests link.
TEST_F(SoftwareCuda, IsOneInstance) {
  Dl_info cudart{}, cublas{};
  ASSERT_NE(dladdr(reinterpret_cast<void*>(cudaMalloc), &cudart), 0);
  ASSERT_NE(dladdr(reinterpret_cast<void*>(cublasCreate_v2), &cublas), 0);
  const std::string runtime = cudart.dli_fname, blas = cublas.dli_fname;
  EXPECT_EQ(runtime.substr(runtime.rfind('/')), "/libcudart.so.13");
  EXPECT_EQ(blas.substr(blas.rfind('/')), "/libcublas.so.13");
  void* opened = dlopen(runtime.c_str(), RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(opened, nullptr);
  EXPECT_EQ(dlsym(opened, "cudaMalloc"), reinterpret_cast<void*>(cudaMalloc));
  opened = dlopen("libcublas.so.13", RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
  ASSERT_NE(opened, nullptr);
  EXPECT_EQ(dlsym(opened, "cublasCreate_v2"), reinterpret_cast<void*>(cublasCreate_v2));
}

// Destroyed after main, and after the thread's own variables.
struct Late {
  ~Late() {
    cudaFree(nullptr);
    if (stream != nullptr && cudaStreamDestroy(stream) != cudaSuccess) _exit(1);
    _exit(7);
  }
  cudaStream_t stream = nullptr;
};

TEST_F(SoftwareCuda, AnswersAtTheEndOfTheProcess) {
  EXPECT_EXIT(
      {
        static Late late;
        software_cuda_reset();
        cudaStreamCreateWithFlags(&late.stream, 0);
        exit(0);
      },
      testing::ExitedWithCode(7), "");
}

}  // namespace
