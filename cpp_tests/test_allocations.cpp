// Once the context is prepared, a training step asks for no memory: neither on the caller's thread nor on the pool's.

#include <atomic>
#include <cerrno>
#include <cstddef>

#include "support/model.hpp"
#include "support/random.hpp"

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

struct Types {
  const char* name;
  adalora_dtype_t activation, param;
  bool master;
};

class Allocations : public testing::TestWithParam<Types> {};

TEST_P(Allocations, AreNoneInAStep) {
#if ADALORA_SANITIZE
  ASSERT_NE(installed, 0);
#endif
  const Types types = GetParam();
  const int64_t tokens = 200;
  ModelCase c;
  c.param = types.param;
  c.master = types.master;
  c.layers = {{300, 257, 8}, {300, 130, 5}};
  const Context context = cpu_context(2);
  Model model(host(), context.get(), c);

  // The first layer's forward and backward with the adapters' shared input, through adapters with dropout.
  adalora_adapter_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = 300;
  desc.param_dtype = types.param;
  desc.activation_dtype = types.activation;
  desc.dropout = 0.1;
  Random random(1);
  const Tensor x(host(), types.activation, random.matrix(tokens, 300)),
      dx(host(), types.activation, random.matrix(tokens, 300));
  const Value<uint64_t> seed(host(), 1), offset(host(), 2);
  std::vector<Adapter> adapters;
  std::vector<Tensor> outputs;
  std::vector<adalora_call_t> calls;
  for (size_t k = 0; k < c.layers.size(); ++k) {
    desc.out_features = c.layers[k].out;
    desc.rank = c.layers[k].rank;
    adalora_adapter_t* adapter = nullptr;
    require(adalora_adapter_create(context.get(), &desc, &adapter));
    adapters.emplace_back(adapter);
    const auto forward_copy = [&](int m) {
      return types.master ? model.part(k, m).low->matrix() : model.part(k, m).p.matrix();
    };
    adalora_call_t call{};
    call.struct_size = sizeof call;
    call.adapter = adapter;
    call.params = {forward_copy(0), forward_copy(1), forward_copy(2)};
    call.grads = {model.part(k, 0).g.matrix(), model.part(k, 1).g.matrix(), model.part(k, 2).g.matrix()};
    for (adalora_matrix_t* output : {&call.y, &call.dy}) {
      outputs.emplace_back(host(), types.activation, random.matrix(tokens, c.layers[k].out));
      *output = outputs.back().matrix();
    }
    outputs.emplace_back(host(), compute_type(types.param), tokens, c.layers[k].rank);
    call.h = outputs.back().data();
    call.dropout = {seed.data(), offset.data(), 0};
    calls.push_back(call);
  }
  size_t bytes = 0;
  require(adalora_adapter_sizes(calls.data(), sizeof calls[0], 2, tokens, nullptr, &bytes));
  const Buffer workspace(host(), bytes);
  const adalora_matrix_t input = x.matrix(), input_gradient = dx.matrix();
  const Value<double> penalty(host()), squares(host()), factor(host());
  Value<float> found_inf(host(), 0.0f);
  const Value<uint64_t> digest(host());
  Value<int64_t> number(host(), 0);
  const adalora_step_t step{sizeof step, number.data(), factor.data(), found_inf.data(), nullptr};

  const auto train = [&] {
    adalora_status_t worst = ADALORA_SUCCESS;
    const auto run = [&](adalora_status_t status) {
      if (status != ADALORA_SUCCESS) worst = status;
    };
    run(adalora_adapter_forward(calls.data(), sizeof calls[0], 2, ADALORA_STAGE_BOTH, &input, workspace.data(), bytes,
                                nullptr));
    run(adalora_adapter_backward(calls.data(), sizeof calls[0], 2, ADALORA_STAGE_BOTH, 0, &input, &input_gradient,
                                 workspace.data(), bytes, nullptr));
    run(adalora_allocator_orthogonality(model.allocator(), nullptr, 0.1, nullptr, penalty.data(), nullptr));
    run(adalora_allocator_gradient_norm(model.allocator(), nullptr, squares.data(), found_inf.data(), nullptr));
    run(adalora_context_gradient_factor(context.get(), squares.data(), nullptr, 1.0, factor.data(), nullptr));
    run(adalora_allocator_step(model.allocator(), &step, 1, nullptr));
    run(adalora_allocator_digest(model.allocator(), digest.data(), nullptr));
    return worst;
  };
  require(adalora_context_prepare(context.get(), nullptr));
  for (int64_t t = 0; t < c.schedule.total_step; ++t) {
    number.set(t);
    counting = true;
    const adalora_status_t status = train();
    counting = false;
    ASSERT_EQ(status, ADALORA_SUCCESS) << adalora_last_error();
  }
  EXPECT_EQ(allocations.exchange(0), 0);
  EXPECT_EQ(model.report().is_final, 1);
}

INSTANTIATE_TEST_SUITE_P(Prepared, Allocations,
                         testing::Values(Types{"f64", f64, f64, false}, Types{"f32", f32, f32, false},
                                         Types{"bf16_with_f32", bf16, f32, false}, Types{"bf16", bf16, bf16, false},
                                         Types{"bf16_master", bf16, bf16, true}, Types{"f16_master", f16, f16, true}),
                         [](const auto& types) { return std::string(types.param.name); });

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
