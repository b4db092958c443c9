// Loads the library that its argument names, computes, unloads it, several times; succeeds in silence where the process
// is then as it was.

#include <adalora.h>
#include <dlfcn.h>

#include <cfenv>
#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <thread>
#include <vector>

namespace {

// What a library has no business to change.
struct Process {
  std::vector<struct sigaction> handlers;
  stack_t signal_stack{};
  sigset_t blocked{};
  int rounding = 0;
  int exceptions = 0;

  Process() {
    for (int signal = 1; signal < 65; ++signal) {
      struct sigaction handler;
      std::memset(&handler, 0, sizeof handler);
      sigaction(signal, nullptr, &handler);
      handlers.push_back(handler);
    }
    sigaltstack(nullptr, &signal_stack);
    sigprocmask(SIG_BLOCK, nullptr, &blocked);
    rounding = std::fegetround();
    exceptions = fegetexcept();
  }

  bool operator==(const Process& other) const {
    for (size_t i = 0; i < handlers.size(); ++i)
      if (handlers[i].sa_handler != other.handlers[i].sa_handler || handlers[i].sa_flags != other.handlers[i].sa_flags)
        return false;
    return signal_stack.ss_sp == other.signal_stack.ss_sp &&
           std::memcmp(&blocked, &other.blocked, sizeof blocked) == 0 && rounding == other.rounding &&
           exceptions == other.exceptions;
  }
};

bool soon_single_threaded() {
  for (int i = 0; i < 500; ++i) {
    const std::filesystem::directory_iterator tasks("/proc/self/task");
    if (std::distance(begin(tasks), end(tasks)) == 1) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

template <class Function>
Function* function(void* library, const char* name) {
  return reinterpret_cast<Function*>(dlsym(library, name));
}

// Two pools that compute, and an error.
bool computes(void* library) {
  const auto create = function<decltype(adalora_context_create)>(library, "adalora_context_create");
  const auto create_adapter = function<decltype(adalora_adapter_create)>(library, "adalora_adapter_create");
  const auto delta_weight = function<decltype(adalora_adapter_delta_weight)>(library, "adalora_adapter_delta_weight");
  const auto destroy = function<decltype(adalora_context_destroy)>(library, "adalora_context_destroy");
  const auto destroy_adapter = function<decltype(adalora_adapter_destroy)>(library, "adalora_adapter_destroy");
  constexpr int64_t size = 512;
  std::vector<float> values(4 * size, 0.5f), w(size * size);
  bool good = true;
  for (int i = 0; i < 2; ++i) {
    adalora_context_desc_t desc{};
    desc.struct_size = sizeof desc;
    desc.backend = ADALORA_BACKEND_CPU;
    desc.threads = 3;
    adalora_context_t* context = nullptr;
    good = good && create(&desc, &context) == ADALORA_SUCCESS;
    adalora_adapter_desc_t geometry{};
    geometry.struct_size = sizeof geometry;
    geometry.in_features = geometry.out_features = size;
    geometry.rank = 4;
    geometry.param_dtype = geometry.activation_dtype = ADALORA_FLOAT32;
    adalora_adapter_t* adapter = nullptr;
    good = good && create_adapter(context, &geometry, &adapter) == ADALORA_SUCCESS;
    const adalora_triplets_t params{{values.data(), 4, size, 0, ADALORA_FLOAT32, 0},
                                    {values.data(), 1, 4, 0, ADALORA_FLOAT32, 0},
                                    {values.data(), size, 4, 0, ADALORA_FLOAT32, 0}};
    const adalora_matrix_t weight{w.data(), size, size, 0, ADALORA_FLOAT32, 0};
    good = good && delta_weight(adapter, &params, 0, 0, 0, &weight, nullptr) == ADALORA_SUCCESS;
    good = good && delta_weight(adapter, &params, 0, 2, 0, &weight, nullptr) == ADALORA_ERROR_INVALID_ARGUMENT;
    destroy_adapter(adapter);
    destroy(context);
  }
  return good;
}

int run(const char* path) {
  const Process before;
  for (int i = 0; i < 3; ++i) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return 2;
    if (!(Process() == before)) return 3;
    if (!computes(library)) return 4;
    if (!(Process() == before)) return 5;
    if (dlclose(library) != 0) return 6;
    if (!soon_single_threaded()) return 7;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return argc == 2 ? run(argv[1]) : 1; }
