// Ends in the way that its argument names, with a context whose pool has computed. Succeeds in silence.

#include <adalora.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

namespace {
bool is_child_of_fork = false;
}

#if ADALORA_SANITIZE
// A child of fork lacks the threads on whose stacks the last pointers lie: what they own looks leaked.
extern "C" int __lsan_is_turned_off() { return is_child_of_fork ? 1 : 0; }
#endif

namespace {

// A context and an adapter that has computed on its pool, and computes once more when it ends.
class Computation {
 public:
  Computation() {
    adalora_context_desc_t context{};
    context.struct_size = sizeof context;
    context.backend = ADALORA_BACKEND_CPU;
    context.threads = 3;
    check(adalora_context_create(&context, &context_) == ADALORA_SUCCESS);
    adalora_adapter_desc_t adapter{};
    adapter.struct_size = sizeof adapter;
    adapter.in_features = adapter.out_features = size;
    adapter.rank = 4;
    adapter.param_dtype = adapter.activation_dtype = ADALORA_FLOAT32;
    check(adalora_adapter_create(context_, &adapter, &adapter_) == ADALORA_SUCCESS);
    compute();
  }
  Computation(const Computation&) = delete;
  Computation& operator=(const Computation&) = delete;
  ~Computation() {
    compute();
    // An error at this time, too, is a status and not a message.
    check(adalora_context_prepare(nullptr, nullptr) == ADALORA_ERROR_INVALID_HANDLE);
    adalora_context_destroy(context_);
    adalora_adapter_destroy(adapter_);
  }

  void compute() {
    const adalora_triplets_t params{matrix(a_, 4, size), matrix(e_, 1, 4), matrix(b_, size, 4)};
    check(adalora_adapter_initialize(adapter_, &params, 1, nullptr) == ADALORA_SUCCESS);
    const adalora_matrix_t w = matrix(w_, size, size);
    check(adalora_adapter_delta_weight(adapter_, &params, 0, 0, 1, &w, nullptr) == ADALORA_SUCCESS);
  }

 private:
  static constexpr int64_t size = 512;

  static adalora_matrix_t matrix(std::vector<float>& values, int64_t rows, int64_t columns) {
    return {values.data(), rows, columns, 0, ADALORA_FLOAT32, 0};
  }
  static void check(bool good) {
    if (!good) std::_Exit(2);
  }

  adalora_context_t* context_ = nullptr;
  adalora_adapter_t* adapter_ = nullptr;
  std::vector<float> a_ = std::vector<float>(4 * size), e_ = std::vector<float>(4), b_ = std::vector<float>(4 * size),
                     w_ = std::vector<float>(size * size);
};

Computation* at_exit = nullptr;

int end(const std::string& how) {
  if (how == "static") {
    static Computation computation;
  } else if (how == "atexit") {
    at_exit = new Computation;
    std::atexit([] { delete at_exit; });
  } else if (how == "thread_local") {
    // Made on a thread whose own data end after the library's, and before them.
    std::thread([] {
      thread_local Computation computation;
      computation.compute();
    }).join();
    std::thread([] {
      adalora_context_prepare(nullptr, nullptr);  // the library's own data on this thread begin first
      thread_local Computation computation;
      computation.compute();
    }).join();
  } else if (how == "main_thread_local") {
    thread_local Computation computation;
    computation.compute();
  } else if (how == "never") {
    static Computation* const computation = new Computation;
    computation->compute();
  } else if (how == "child") {
    static Computation computation;
    const pid_t child = fork();
    if (child == 0) {
      is_child_of_fork = true;
      std::exit(0);  // as its parent ends, with static objects
    }
    int status = -1;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 3;
  } else {
    return 1;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return argc == 2 ? end(argv[1]) : 1; }
