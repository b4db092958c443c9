// Every function that takes a handle, given none, one of another kind, and memory that is no handle.

#include <functional>

#include "refusal.hpp"
#include "support/model.hpp"

namespace boundary {
namespace {

using namespace support;

enum class Kind { context, adapter, allocator };

const char* type_of(Kind kind) {
  switch (kind) {
    case Kind::context:
      return "adalora_context_t";
    case Kind::adapter:
      return "adalora_adapter_t";
    case Kind::allocator:
      return "adalora_allocator_t";
  }
  return "";
}

struct Function {
  std::string name;
  Kind kind;
  std::string argument;
  std::function<adalora_status_t(void*)> call;  // with everything but the handle left out: the handle comes first
};

template <class T>
T* as_handle(void* handle) {
  return static_cast<T*>(handle);
}

adalora_status_t with_context(void* handle, adalora_status_t (*call)(adalora_context_t*)) {
  return call(as_handle<adalora_context_t>(handle));
}
adalora_status_t with_adapter(void* handle, adalora_status_t (*call)(adalora_adapter_t*)) {
  return call(as_handle<adalora_adapter_t>(handle));
}
adalora_status_t with_allocator(void* handle, adalora_status_t (*call)(adalora_allocator_t*)) {
  return call(as_handle<adalora_allocator_t>(handle));
}

Function of_context(const std::string& name, adalora_status_t (*call)(adalora_context_t*)) {
  return {name, Kind::context, "context", [call](void* h) { return with_context(h, call); }};
}
Function of_adapter(const std::string& name, adalora_status_t (*call)(adalora_adapter_t*)) {
  return {name, Kind::adapter, "adapter", [call](void* h) { return with_adapter(h, call); }};
}
Function of_allocator(const std::string& name, adalora_status_t (*call)(adalora_allocator_t*)) {
  return {name, Kind::allocator, "allocator", [call](void* h) { return with_allocator(h, call); }};
}

// Other arguments are valid where the function reads them before it uses the handle.
double number = 1;
uint64_t hash = 0;
size_t size = 0;
int64_t step_number = 1, budget = 0;
uint8_t pattern = 1;
adalora_step_t step{sizeof step, &step_number, nullptr, nullptr, nullptr};
adalora_triplets_t triplets{{&number, 1, 1, 0, f64, 0}, {&number, 1, 1, 0, f64, 0}, {&number, 1, 1, 0, f64, 0}};
adalora_matrix_t matrix{&number, 1, 1, 0, f64, 0};
alignas(64) unsigned char memory[64];
adalora_adapter_t* new_adapter = nullptr;
adalora_allocator_t* new_allocator = nullptr;

adalora_adapter_desc_t adapter_desc() {
  adalora_adapter_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = desc.out_features = desc.rank = 1;
  desc.param_dtype = desc.activation_dtype = f64;
  return desc;
}

const std::vector<Function>& functions() {
  static const std::vector<Function> all = {
      of_context("adalora_context_prepare", [](auto* h) { return adalora_context_prepare(h, nullptr); }),
      of_context("adalora_context_describe", [](auto* h) { return adalora_context_describe(h, nullptr, &size); }),
      of_context("adalora_context_gradient_factor",
                 [](auto* h) {
                   return adalora_context_gradient_factor(h, &number, nullptr, 1, reinterpret_cast<double*>(memory),
                                                          nullptr);
                 }),
      of_context("adalora_adapter_create",
                 [](auto* h) {
                   const adalora_adapter_desc_t desc = adapter_desc();
                   return adalora_adapter_create(h, &desc, &new_adapter);
                 }),
      of_adapter("adalora_adapter_initialize",
                 [](auto* h) { return adalora_adapter_initialize(h, &triplets, 1, nullptr); }),
      of_adapter("adalora_adapter_delta_weight",
                 [](auto* h) { return adalora_adapter_delta_weight(h, &triplets, 0, 0, 0, &matrix, nullptr); }),
      of_adapter("adalora_adapter_merge",
                 [](auto* h) { return adalora_adapter_merge(h, &triplets, 0, 0, &matrix, nullptr, nullptr, nullptr); }),
      of_adapter("adalora_adapter_unmerge",
                 [](auto* h) { return adalora_adapter_unmerge(h, &triplets, 0, 0, &matrix, nullptr, nullptr); }),
      of_adapter("adalora_adapter_sizes",
                 [](auto* h) {
                   adalora_call_t call{};
                   call.struct_size = sizeof call;
                   call.adapter = h;
                   return adalora_adapter_sizes(&call, sizeof call, 1, 1, nullptr, &size);
                 }),
      of_adapter("adalora_adapter_forward",
                 [](auto* h) {
                   adalora_call_t call{};
                   call.struct_size = sizeof call;
                   call.adapter = h;
                   return adalora_adapter_forward(&call, sizeof call, 1, ADALORA_STAGE_BOTH, &matrix, memory,
                                                  sizeof memory, nullptr);
                 }),
      of_adapter("adalora_adapter_backward",
                 [](auto* h) {
                   adalora_call_t call{};
                   call.struct_size = sizeof call;
                   call.adapter = h;
                   return adalora_adapter_backward(&call, sizeof call, 1, ADALORA_STAGE_BOTH, 1, &matrix, nullptr,
                                                   memory, sizeof memory, nullptr);
                 }),
      {"adalora_allocator_create", Kind::adapter, "desc.adapters[0]",
       [](void* h) {
         const auto* adapter = static_cast<adalora_adapter_t*>(h);
         adalora_allocator_desc_t desc{};
         desc.struct_size = sizeof desc;
         desc.n_adapters = 1;
         desc.adapters = &adapter;
         desc.total_step = desc.delta_t = 1;
         desc.beta1 = desc.beta2 = 0.5;
         return adalora_allocator_create(host().context(), &desc, &new_allocator);
       }},
      of_context("adalora_allocator_create",
                 [](auto* h) {
                   adalora_allocator_desc_t desc{};
                   desc.struct_size = sizeof desc;
                   return adalora_allocator_create(h, &desc, &new_allocator);
                 }),
      of_allocator("adalora_allocator_sizes",
                   [](auto* h) { return adalora_allocator_sizes(h, 1, &size, nullptr, nullptr); }),
      of_allocator(
          "adalora_allocator_bind",
          [](auto* h) { return adalora_allocator_bind(h, memory, memory, nullptr, 8, 0, nullptr, 8, 0, nullptr); }),
      of_allocator("adalora_allocator_budget",
                   [](auto* h) { return adalora_allocator_budget(h, 1, &budget, nullptr); }),
      of_allocator("adalora_allocator_gram", [](auto* h) { return adalora_allocator_gram(h, &number, nullptr); }),
      of_allocator("adalora_allocator_orthogonality",
                   [](auto* h) { return adalora_allocator_orthogonality(h, nullptr, 1, nullptr, &number, nullptr); }),
      of_allocator("adalora_allocator_gradient_norm",
                   [](auto* h) { return adalora_allocator_gradient_norm(h, nullptr, &number, nullptr, nullptr); }),
      of_allocator("adalora_allocator_update", [](auto* h) { return adalora_allocator_update(h, &step, 1, nullptr); }),
      of_allocator("adalora_allocator_scores", [](auto* h) { return adalora_allocator_scores(h, &number, nullptr); }),
      of_allocator("adalora_allocator_select",
                   [](auto* h) { return adalora_allocator_select(h, &step, nullptr, nullptr); }),
      of_allocator("adalora_allocator_step", [](auto* h) { return adalora_allocator_step(h, &step, 1, nullptr); }),
      of_allocator("adalora_allocator_finalize",
                   [](auto* h) { return adalora_allocator_finalize(h, nullptr, nullptr); }),
      of_allocator("adalora_allocator_reset", [](auto* h) { return adalora_allocator_reset(h, nullptr); }),
      of_allocator("adalora_allocator_digest", [](auto* h) { return adalora_allocator_digest(h, &hash, nullptr); }),
      of_allocator("adalora_allocator_read_sync",
                   [](auto* h) { return adalora_allocator_read_sync(h, nullptr, nullptr, nullptr, nullptr, nullptr); }),
      of_allocator("adalora_allocator_set_pattern",
                   [](auto* h) { return adalora_allocator_set_pattern(h, &pattern, 0, nullptr); }),
      of_allocator("adalora_allocator_set_adam_steps_sync",
                   [](auto* h) { return adalora_allocator_set_adam_steps_sync(h, &step_number, nullptr); }),
      of_allocator("adalora_allocator_save_state_sync",
                   [](auto* h) { return adalora_allocator_save_state_sync(h, nullptr, &size, nullptr); }),
      of_allocator("adalora_allocator_load_state_sync",
                   [](auto* h) { return adalora_allocator_load_state_sync(h, memory, sizeof memory, nullptr); }),
  };
  return all;
}

// One live handle of each kind.
struct Handles {
  Context context = cpu_context(1);
  Adapter adapter;
  Allocator allocator;

  Handles() {
    const adalora_adapter_desc_t desc = adapter_desc();
    adalora_adapter_t* a = nullptr;
    require(adalora_adapter_create(context.get(), &desc, &a));
    adapter.reset(a);
    const adalora_adapter_t* const adapters[] = {a};
    adalora_allocator_desc_t all{};
    all.struct_size = sizeof all;
    all.n_adapters = 1;
    all.adapters = adapters;
    all.total_step = all.delta_t = 1;
    all.beta1 = all.beta2 = 0.5;
    adalora_allocator_t* b = nullptr;
    require(adalora_allocator_create(context.get(), &all, &b));
    allocator.reset(b);
  }

  void* of(Kind kind) const {
    switch (kind) {
      case Kind::context:
        return context.get();
      case Kind::adapter:
        return adapter.get();
      case Kind::allocator:
        return allocator.get();
    }
    return nullptr;
  }
};

TEST(Handles, OfNoneAreRefused) {
  for (const Function& f : functions())
    expect_refused(f.name, {f.name + " of NULL", ADALORA_ERROR_INVALID_HANDLE, {f.argument, "found NULL"}},
                   f.call(nullptr));
}

TEST(Handles, OfAnotherKindAreRefused) {
  const Handles handles;
  for (const Function& f : functions())
    for (Kind other : {Kind::context, Kind::adapter, Kind::allocator})
      if (other != f.kind)
        expect_refused(
            f.name,
            {f.name + " of another kind",
             ADALORA_ERROR_INVALID_HANDLE,
             {f.argument, std::string("found an ") + type_of(other), std::string("expected an ") + type_of(f.kind)}},
            f.call(handles.of(other)));
}

TEST(Handles, OfOtherMemoryAreRefused) {
  alignas(64) unsigned char nothing[256] = {};
  for (const Function& f : functions())
    expect_refused(f.name, {f.name + " of other memory", ADALORA_ERROR_INVALID_HANDLE, {f.argument, type_of(f.kind)}},
                   f.call(nothing));
}

// A handle given to the wrong destroy function stays alive, and the text says so.
TEST(Handles, SurviveTheWrongDestroy) {
  const Handles handles;
  adalora_context_destroy(static_cast<adalora_context_t*>(handles.of(Kind::adapter)));
  EXPECT_NE(std::string(adalora_last_error()).find("adalora_context_destroy: context: found an adalora_adapter_t"),
            std::string::npos)
      << adalora_last_error();
  adalora_adapter_destroy(static_cast<adalora_adapter_t*>(handles.of(Kind::allocator)));
  EXPECT_NE(std::string(adalora_last_error()).find("adalora_adapter_destroy: adapter: found an adalora_allocator_t"),
            std::string::npos)
      << adalora_last_error();
  adalora_allocator_destroy(static_cast<adalora_allocator_t*>(handles.of(Kind::context)));
  EXPECT_NE(std::string(adalora_last_error()).find("adalora_allocator_destroy: allocator: found an adalora_context_t"),
            std::string::npos)
      << adalora_last_error();
  EXPECT_EQ(adalora_context_prepare(handles.context.get(), nullptr), ADALORA_SUCCESS);
  EXPECT_EQ(adalora_adapter_initialize(handles.adapter.get(), &triplets, 1, nullptr), ADALORA_ERROR_INVALID_ARGUMENT)
      << "A, E and B overlap";
  EXPECT_EQ(adalora_allocator_budget(handles.allocator.get(), 1, &budget, nullptr), ADALORA_SUCCESS);
}

TEST(Allocator, ThatIsNotBoundComputesNothing) {
  const Handles handles;
  for (const Function& f : functions()) {
    if (f.kind != Kind::allocator) continue;
    const bool needs_no_buffers = f.name == "adalora_allocator_sizes" || f.name == "adalora_allocator_bind" ||
                                  f.name == "adalora_allocator_budget";
    if (needs_no_buffers) continue;
    expect_refused(f.name, {f.name + " before bind", ADALORA_ERROR_INVALID_STATE, {"adalora_allocator_bind"}},
                   f.call(handles.of(Kind::allocator)));
  }
}

}  // namespace
}  // namespace boundary
