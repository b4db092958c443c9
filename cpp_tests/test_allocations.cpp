// Once the context is prepared, a training step asks for no memory: neither on the caller's thread nor on the pool's.

#include <atomic>
#include <cerrno>
#include <cstddef>

#include "support/training.hpp"

namespace {
std::atomic<bool> counting{false};
std::atomic<int> allocations{0};

void count() {
  if (counting) ++allocations;
}
}  // namespace

#if ADALORA_SANITIZE

// Declared here because GCC has the function without its header.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*allocated)(const volatile void*, size_t),
                                                         void (*freed)(const volatile void*));

namespace {
const int installed = __sanitizer_install_malloc_and_free_hooks([](const volatile void*, size_t) { count(); },
                                                                [](const volatile void*) {});
}  // namespace

#else

// The whole process, the library included, takes its memory through these.
extern "C" {
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t number, size_t bytes);
void* __libc_realloc(void* memory, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);

void* malloc(size_t bytes) {
  count();
  return __libc_malloc(bytes);
}
void* calloc(size_t number, size_t bytes) {
  count();
  return __libc_calloc(number, bytes);
}
void* realloc(void* memory, size_t bytes) {
  count();
  return __libc_realloc(memory, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  count();
  return __libc_memalign(alignment, bytes);
}
void* memalign(size_t alignment, size_t bytes) {
  count();
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** memory, size_t alignment, size_t bytes) {
  count();
  *memory = __libc_memalign(alignment, bytes);
  return *memory != nullptr ? 0 : ENOMEM;
}
}

#endif

namespace {

using namespace support;

class Allocations : public testing::TestWithParam<TrainingTypes> {};

TEST_P(Allocations, AreNoneInAStep) {
#if ADALORA_SANITIZE
  ASSERT_NE(installed, 0);
#endif
  const Context context = cpu_context(2);
  Training training(host(), context.get(), GetParam(), {200, 300, {{300, 257, 8}, {300, 130, 5}}});
  require(adalora_context_prepare(context.get(), nullptr));
  for (int64_t step = 0; step < training.model().model().schedule.total_step; ++step) {
    Training::Given given;
    given.step = step;
    training.give(given);
    adalora_status_t worst = ADALORA_SUCCESS;
    counting = true;
    for (const Training::Call& call : training.calls()) {
      const adalora_status_t status = call.run(nullptr);
      if (status != ADALORA_SUCCESS) worst = status;
    }
    counting = false;
    ASSERT_EQ(worst, ADALORA_SUCCESS) << adalora_last_error();
  }
  EXPECT_EQ(allocations.exchange(0), 0);
  EXPECT_EQ(training.model().report().is_final, 1);
}

INSTANTIATE_TEST_SUITE_P(Prepared, Allocations, testing::ValuesIn(training_types),
                         [](const auto& types) { return types.param.name; });

// The counter counts: else the test above would show nothing.
TEST(Allocations, AreCounted) {
  allocations = 0;
  counting = true;
  void* volatile memory = std::malloc(100);  // volatile, or the compiler takes both calls out
  adalora_context_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.backend = ADALORA_BACKEND_CPU;
  adalora_context_t* context = nullptr;
  const int by_this_program = allocations;
  const adalora_status_t status = adalora_context_create(&desc, &context);
  counting = false;
  std::free(memory);
  adalora_context_destroy(context);
  EXPECT_EQ(status, ADALORA_SUCCESS);
  EXPECT_GT(by_this_program, 0);
  EXPECT_GT(allocations.exchange(0), by_this_program) << "nor are the library's own seen";
}

}  // namespace
