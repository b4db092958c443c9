// Where CUDA's libraries are looked for, and what is said where something is missing: over libraries that have the
// names of CUDA's and answer as stub_cuda/CMakeLists.txt says.

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <functional>

#include "abi/refusal.hpp"
#include "support/backend.hpp"

namespace {

using boundary::expect_refused;
using boundary::Refusal;

constexpr adalora_status_t unavailable = ADALORA_ERROR_BACKEND_UNAVAILABLE;

std::string folder(const std::string& name) { return std::string(STUB_CUDA) + "/" + name; }

adalora_context_desc_t cuda(const char* folders) {
  adalora_context_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.backend = ADALORA_BACKEND_CUDA;
  desc.library_folder = folders;
  return desc;
}

void expect_refused(const Refusal& refusal, const adalora_context_desc_t& desc) {
  adalora_context_t* context = nullptr;
  expect_refused("adalora_context_create", refusal, adalora_context_create(&desc, &context));
  EXPECT_EQ(context, nullptr);
}

std::string described(const adalora_context_desc_t& desc) {
  adalora_context_t* made = nullptr;
  support::require(adalora_context_create(&desc, &made));
  const support::Context context(made);
  size_t bytes = 0;
  support::require(adalora_context_describe(made, nullptr, &bytes));
  std::string text(bytes, '\0');
  support::require(adalora_context_describe(made, text.data(), &bytes));
  return text;
}

void expect_words(const std::string& text, const std::vector<std::string>& words) {
  for (const std::string& word : words)
    EXPECT_NE(text.find(word), std::string::npos) << "no '" << word << "': " << text;
}

TEST(NamedFolder, DescribesWhatItTookAndTakesNothingElse) {
  const std::string place = folder("cuda13");
  expect_words(described(cuda(place.c_str())),
               {"device 0: Stub of a device", "compute capability 9.0", "132 multiprocessors", "driver of CUDA 13.0",
                "libcudart 13.0 (" + place + "/libcudart.so.13)", "libcublas 13.1.2 (" + place + "/libcublas.so.13)"});
}

TEST(NamedFolder, MayBeSeveral) {
  const std::string both = folder("nothing") + ":" + folder("cudart13") + "::" + folder("cublas13") + ":";
  expect_words(described(cuda(both.c_str())),
               {folder("cudart13") + "/libcudart.so.13", folder("cublas13") + "/libcublas.so.13"});
}

TEST(NamedFolder, SaysWhatIsMissing) {
  struct Case {
    const char* folders;
    std::vector<std::string> words;
  };
  const Case cases[] = {
      {"nothing", {"libcudart.so.13 (not there)", "libcublas.so.12 (not there)", folder("nothing"), "one version"}},
      {"cudart13", {folder("cudart13") + "/libcudart.so.13", "libcublas.so.13 (not there)"}},
      {"text", {"desc.library_folder", folder("text") + "/libcudart.so.13"}},
      {"misnamed", {"CUDA 12.4", "cuBLAS 13.1.2", folder("misnamed"), "expected both"}},
      {"too_old", {"CUDA 11.8", "cuBLAS 11.1.2", "expected both of CUDA 13 or both of CUDA 12"}},
      {"no_streams", {folder("no_streams") + "/libcudart.so.13 lacks cudaStreamSynchronize, cudaStreamIsCapturing"}},
      {"no_64", {folder("no_64") + "/libcublas.so.12 lacks cublasGemmEx_64"}},
      {"no_device",
       {"cudaGetDeviceCount: cudaErrorNoDevice (100): no CUDA-capable device is detected", "libcudart 13.0"}},
      {"no_driver", {"cudaErrorInsufficientDriver (35)", "no CUDA driver", folder("no_driver") + "/libcublas.so.13"}},
      {"old_driver", {"found a driver of CUDA 11.4, expected 12.0 or later", "libcudart 12.4"}},
      {"old_device", {"Stub of a device", "compute capability 7.5, expected 8.0 or later"}},
      {"poor_driver", {"the driver lacks cuLaunchKernel", "a driver of CUDA 12.4"}},
  };
  for (const Case& c : cases) {
    const std::string folders = folder(c.folders);
    expect_refused({c.folders, unavailable, c.words}, cuda(folders.c_str()));
  }
  const std::string crossed = folder("cudart13") + ":" + folder("cublas12");
  expect_refused({"of two versions", unavailable, {"libcublas.so.13 (not there)", "libcudart.so.12 (not there)"}},
                 cuda(crossed.c_str()));
}

TEST(NamedFolder, MayHaveNoName) {
  for (const char* none : {"", ":"})
    expect_refused({"no folder", unavailable, {"libcudart.so.13 (not there)"}}, cuda(none));
}

TEST(Device, MayBeTheOldestThatServes) {
  const std::string place = folder("oldest_device");
  expect_words(described(cuda(place.c_str())), {"compute capability 8.0", "driver of CUDA 12.0"});
}

TEST(Device, IsOneThatThereIs) {
  const std::string place = folder("two_devices");
  adalora_context_desc_t desc = cuda(place.c_str());
  desc.device = 1;
  expect_words(described(desc), {"device 1: Stub of a device", "driver of CUDA 13.0", "libcudart 12.9"});
  desc.device = 2;
  expect_refused({"one too many", unavailable, {"desc.device", "found 2", "expected 0 to 1"}}, desc);
  desc.device = -1;
  expect_refused({"a negative one", ADALORA_ERROR_INVALID_ARGUMENT, {"desc.device", "found -1"}}, desc);
}

// Runs the body in a new process that has loaded those files: what this process has loaded stays loaded.
void in_a_process_with(const std::vector<std::string>& files, const std::function<void()>& body) {
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  const auto run = [&] {
    for (const std::string& file : files)
      if (dlopen(folder(file).c_str(), RTLD_NOW) == nullptr) ADD_FAILURE() << dlerror();
    body();
    std::exit(testing::Test::HasFailure());
  };
  EXPECT_EXIT(run(), testing::ExitedWithCode(0), "");
}

TEST(NamedFolder, TakesTheNewestVersionThatIsWholeAndServed) {
  const std::string whole = folder("cuda12") + ":" + folder("cuda13"), half = folder("cuda12") + ":" + folder("cublas13");
  in_a_process_with({"driver13/libcuda.so.1"}, [&] {
    expect_words(described(cuda(whole.c_str())), {"libcudart 13.0", "libcublas 13."});
    expect_words(described(cuda(half.c_str())), {"libcudart 12.4", "libcublas 12."});
  });
  in_a_process_with({"driver12/libcuda.so.1"}, [&] {
    expect_words(described(cuda(whole.c_str())), {"libcudart 12.4", "libcublas 12."});
    expect_words(described(cuda(folder("cuda13").c_str())), {"libcudart 13.0", "libcublas 13."});
  });
}

TEST(LoadedLibraries, AreTaken) {
  in_a_process_with({"cuda12/libcudart.so.12", "cuda12/libcublas.so.12"}, [] {
    expect_words(described(cuda(nullptr)),
                 {"(" + folder("cuda12") + "/libcudart.so.12)", "(" + folder("cuda12") + "/libcublas.so.12)"});
  });
}

TEST(LoadedLibraries, SayWhichVersionTheOtherIsOf) {
  // Of both versions there is a library; of one, both.
  in_a_process_with({"cublas13/libcublas.so.13", "cuda12/libcudart.so.12", "cuda12/libcublas.so.12"},
                    [] { expect_words(described(cuda(nullptr)), {"libcudart 12.4", "libcublas 12."}); });
  // The other lies beside the one that is loaded.
  in_a_process_with({"cuda12/libcudart.so.12"}, [] {
    expect_words(described(cuda(nullptr)), {"libcudart 12.4", folder("cuda12") + "/libcublas.so.12"});
  });
  in_a_process_with({"cuda12/libcublas.so.12"}, [] {
    expect_words(described(cuda(nullptr)), {folder("cuda12") + "/libcudart.so.12", "libcublas 12."});
  });
}

TEST(LoadedLibraries, AreNotMixedWithAnotherVersion) {
  in_a_process_with({"cudart13/libcudart.so.13"}, [] {
    if (void* system = dlopen("libcublas.so.13", RTLD_NOW)) {
      dlclose(system);  // the machine has one
      return;
    }
    const std::string place = folder("cudart13"), other = folder("cublas12") + "/libcublas.so.12";
    const std::string tried = place + "/libcublas.so.13: ", held = "the process has " + place + "/libcudart.so.13";
    expect_refused({"half", unavailable, {"libcublas.so.13: ", tried, held + ", and needs both of one version"}},
                   cuda(nullptr));
    EXPECT_EQ(std::string(adalora_last_error()).find(".so.12"), std::string::npos) << adalora_last_error();
    ASSERT_NE(dlopen(other.c_str(), RTLD_NOW), nullptr) << dlerror();
    expect_refused({"halves of two", unavailable, {tried, held + " and " + other}}, cuda(nullptr));
  });
}

TEST(LoadedLibraries, OfALentHandleAreThoseOfItsVersion) {
  in_a_process_with({"cudart13/libcudart.so.13", "cuda12/libcublas.so.12"}, [] {
    adalora_context_desc_t desc = cuda(nullptr);
    desc.cublas_handle = &desc;
    expect_words(described(desc), {"libcudart 12.4", "libcublas 12."});
  });
}

TEST(LoadedLibraries, DoNotSayWhichOfTwoMadeALentHandle) {
  in_a_process_with({"cuda13/libcudart.so.13", "cuda13/libcublas.so.13", "cuda12/libcudart.so.12", "cuda12/libcublas.so.12"},
                    [] {
                      adalora_context_desc_t desc = cuda(nullptr);
                      desc.cublas_handle = &desc;
                      expect_refused({"two of cuBLAS",
                                      ADALORA_ERROR_INVALID_ARGUMENT,
                                      {"desc.cublas_handle", "CUDA 13 and of CUDA 12", "desc.library_folder"}},
                                     desc);
                      const std::string place = folder("cuda12");
                      desc.library_folder = place.c_str();
                      expect_words(described(desc), {"libcudart 12.4", "libcublas 12."});
                    });
}

TEST(LoadedLibraries, OfALentHandleAreNoOthersThatAFolderHas) {
  in_a_process_with({"cuda12/libcudart.so.12", "cuda12/libcublas.so.12"}, [] {
    const std::string other = folder("cuda13"), both = other + ":" + folder("cuda12");
    adalora_context_desc_t desc = cuda(other.c_str());
    desc.cublas_handle = &desc;
    expect_refused({"another", ADALORA_ERROR_INVALID_ARGUMENT,
                    {"desc.cublas_handle", other + "/libcublas.so.13", "has not loaded"}},
                   desc);
    desc.library_folder = both.c_str();
    expect_words(described(desc), {"libcudart 12.4", "libcublas 12."});
  });
}

TEST(LoadedLibraries, HaveTheLentHandle) {
  in_a_process_with({}, [] {
    adalora_context_desc_t desc = cuda(nullptr);
    desc.cublas_handle = &desc;
    expect_refused({"no cuBLAS", ADALORA_ERROR_INVALID_ARGUMENT, {"desc.cublas_handle", "no cuBLAS in this process"}},
                   desc);
  });
}

TEST(LoadedLibraries, AreNotAskedWhereAFolderIsNamed) {
  in_a_process_with({"cuda12/libcudart.so.12", "cuda12/libcublas.so.12"}, [] {
    const std::string other = folder("cuda13");
    expect_words(described(cuda(other.c_str())), {other + "/libcudart.so.13", other + "/libcublas.so.13"});
    const std::string none = folder("nothing");
    expect_refused({"nothing there", unavailable, {"not there"}}, cuda(none.c_str()));
  });
}

TEST(Nowhere, SaysEveryNameThatWasTried) {
  in_a_process_with({}, [] {
    for (const char* name : {"libcudart.so.13", "libcudart.so.12"})
      if (void* system = dlopen(name, RTLD_NOW)) {
        dlclose(system);  // the machine has one
        return;
      }
    const Refusal refusal{
        "nothing", unavailable, {"libcudart.so.13", "libcublas.so.13", "libcudart.so.12", "libcublas.so.12"}};
    expect_refused(refusal, cuda(nullptr));
  });
}

}  // namespace
