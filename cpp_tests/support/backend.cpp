#include "backend.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

#include "compare.hpp"
#include "cuda.hpp"

namespace support {

void require(adalora_status_t status) {
  if (status != ADALORA_SUCCESS)
    throw std::runtime_error(std::string(adalora_status_name(status)) + ": " + adalora_last_error());
}

Context cpu_context(int32_t threads, adalora_parallel_fn parallel) {
  adalora_context_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.backend = ADALORA_BACKEND_CPU;
  desc.threads = threads;
  desc.parallel = parallel;
  adalora_context_t* context = nullptr;
  require(adalora_context_create(&desc, &context));
  return Context(context);
}

namespace {

extern "C" void on_new_threads(void (*body)(void*), void* data, uint32_t threads, uint32_t) {
  std::vector<std::thread> others;
  for (uint32_t i = 1; i < threads; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

// What OpenMP does in a nested region: fewer threads than asked for, here the calling one alone.
extern "C" void on_this_thread_alone(void (*body)(void*), void* data, uint32_t, uint32_t) { body(data); }

extern "C" void on_two_threads_at_most(void (*body)(void*), void* data, uint32_t threads, uint32_t flags) {
  on_new_threads(body, data, threads < 2 ? threads : 2, flags);
}

class Cpu final : public Backend {
 public:
  std::string name() const override { return "cpu"; }
  adalora_context_t* context() override { return context_.get(); }
  void* stream() override { return nullptr; }

  std::vector<Team> teams() override {
    std::vector<Team> teams;
    const auto add = [&](const std::string& name, Context context) {
      teams.push_back({name, nullptr, nullptr, std::move(context)});
    };
    for (int32_t threads : {1, 2, 3, 5, 7}) add("pool_of_" + std::to_string(threads), cpu_context(threads));
    add("new_threads", cpu_context(3, on_new_threads));
    add("this_thread_alone", cpu_context(5, on_this_thread_alone));
    add("fewer_threads", cpu_context(7, on_two_threads_at_most));
    if (void* openmp = dlopen("libgomp.so.1", RTLD_NOW)) {  // stays loaded: OpenMP's threads do not end
      const auto parallel = reinterpret_cast<adalora_parallel_fn>(dlsym(openmp, "GOMP_parallel"));
      add("openmp", cpu_context(3, parallel));
    }
    return teams;
  }

  double tolerance_of_products(adalora_dtype_t, adalora_dtype_t param, int32_t) const override {
    return tolerance(param);
  }

  void* allocate(size_t bytes) override {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes) != 0) throw std::bad_alloc();
    return memory;
  }
  void release(void* memory) override { std::free(memory); }
  void fill(void* to, unsigned char byte, size_t bytes) override { std::memset(to, byte, bytes); }
  void upload(void* to, const void* from, size_t bytes) override { copy(to, from, bytes); }
  void download(void* to, const void* from, size_t bytes) override { copy(to, from, bytes); }

 private:
  static void copy(void* to, const void* from, size_t bytes) {
    if (bytes > 0) std::memcpy(to, from, bytes);
  }

  Context context_ = cpu_context(2);
};

}  // namespace

const std::vector<Backend*>& backends() {
  static Cpu cpu;
  static const std::vector<std::unique_ptr<cuda::Device>> devices = [] {
    std::vector<std::unique_ptr<cuda::Device>> some;
    if (!cuda::wanted()) return some;
    some.push_back(std::make_unique<cuda::Device>("cuda"));
    some.push_back(std::make_unique<cuda::Device>("cuda_graph", cuda::Capturing::everything));
    return some;
  }();
  static const std::vector<Backend*> all = [] {
    std::vector<Backend*> some{&cpu};
    for (const auto& device : devices) some.push_back(device.get());
    return some;
  }();
  return all;
}

Backend& host() { return *backends().front(); }

}  // namespace support
