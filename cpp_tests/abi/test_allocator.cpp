// Rank allocators: what is refused at creation and at bind.

#include <functional>
#include <limits>

#include "refusal.hpp"
#include "support/model.hpp"

namespace boundary {
namespace {

using namespace support;

constexpr adalora_status_t invalid = ADALORA_ERROR_INVALID_ARGUMENT;
constexpr int64_t huge = std::numeric_limits<int64_t>::max();

Adapter make_adapter(adalora_context_t* context, int64_t in, int64_t out, int64_t rank) {
  adalora_adapter_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = in;
  desc.out_features = out;
  desc.rank = rank;
  desc.param_dtype = desc.activation_dtype = f32;
  adalora_adapter_t* handle = nullptr;
  require(adalora_adapter_create(context, &desc, &handle));
  return Adapter(handle);
}

// Two adapters of rank 4 and 2, and a descriptor that is valid.
struct Creation {
  Adapter first = make_adapter(host().context(), 7, 5, 4), second = make_adapter(host().context(), 3, 9, 2);
  std::vector<const adalora_adapter_t*> adapters{first.get(), second.get()};
  adalora_allocator_desc_t desc{};

  Creation() {
    desc.struct_size = sizeof desc;
    desc.n_adapters = 2;
    desc.adapters = adapters.data();
    desc.target_rank = 3;
    desc.tinit = 2;
    desc.tfinal = 3;
    desc.total_step = 10;
    desc.delta_t = 2;
    desc.beta1 = desc.beta2 = 0.85;
  }
};

struct BadCreation {
  Refusal refusal;
  void (*spoil)(Creation&);
};

const Adapter& elsewhere() {
  static const Context context = cpu_context(1);
  static const Adapter adapter = make_adapter(context.get(), 7, 5, 4);
  return adapter;
}

TEST(AllocatorCreate, RefusesWhatMakesNoSense) {
  const BadCreation cases[] = {
      {{"no adapter", invalid, {"desc.n_adapters", "found 0"}}, [](auto& c) { c.desc.n_adapters = 0; }},
      {{"a negative number of adapters", invalid, {"desc.n_adapters", "found -2"}},
       [](auto& c) { c.desc.n_adapters = -2; }},
      {{"a huge number of adapters", invalid, {"desc.n_adapters", std::to_string(huge)}},
       [](auto& c) { c.desc.n_adapters = huge; }},
      {{"no array", invalid, {"desc.adapters", "NULL"}}, [](auto& c) { c.desc.adapters = nullptr; }},
      {{"a hole in the array", ADALORA_ERROR_INVALID_HANDLE, {"desc.adapters[1]", "NULL"}},
       [](auto& c) { c.adapters[1] = nullptr; }},
      {{"a context in the array", ADALORA_ERROR_INVALID_HANDLE, {"desc.adapters[0]", "adalora_context_t"}},
       [](auto& c) { c.adapters[0] = reinterpret_cast<adalora_adapter_t*>(host().context()); }},
      {{"an adapter of another context", invalid, {"desc.adapters[1]", "context"}},
       [](auto& c) { c.adapters[1] = elsewhere().get(); }},
      {{"negative target", invalid, {"desc.target_rank", "found -1"}}, [](auto& c) { c.desc.target_rank = -1; }},
      {{"huge target", invalid, {"desc.target_rank", std::to_string(huge)}},
       [](auto& c) { c.desc.target_rank = huge; }},
      {{"target above the initial ranks", invalid, {"desc.target_rank", "found 4", "8", "6"}},
       [](auto& c) { c.desc.target_rank = 4; }},
      {{"target above the initial parameters", invalid, {"desc.target_rank", "found 4", "104", "78"}},
       [](auto& c) { c.desc.target_rank = 4, c.desc.budget_unit = ADALORA_BUDGET_PARAMETERS; }},
      {{"negative tinit", invalid, {"desc.tinit", "found -1"}}, [](auto& c) { c.desc.tinit = -1; }},
      {{"tinit at the end", invalid, {"desc.tinit", "found 7", "total_step - tfinal"}},
       [](auto& c) { c.desc.tinit = 7; }},
      {{"tinit after the end", invalid, {"desc.tinit", "found 8", "total_step - tfinal"}},
       [](auto& c) { c.desc.tinit = 8; }},
      {{"huge tinit", invalid, {"desc.tinit", std::to_string(huge)}}, [](auto& c) { c.desc.tinit = huge; }},
      {{"negative tfinal", invalid, {"desc.tfinal", "found -1"}}, [](auto& c) { c.desc.tfinal = -1; }},
      {{"huge tfinal", invalid, {"desc.tfinal", std::to_string(huge)}}, [](auto& c) { c.desc.tfinal = huge; }},
      {{"no steps", invalid, {"desc.total_step", "found 0"}}, [](auto& c) { c.desc.total_step = 0; }},
      {{"negative steps", invalid, {"desc.total_step", "found -10"}}, [](auto& c) { c.desc.total_step = -10; }},
      {{"huge steps", invalid, {"desc.total_step", std::to_string(huge)}}, [](auto& c) { c.desc.total_step = huge; }},
      {{"delta_t 0", invalid, {"desc.delta_t", "found 0"}}, [](auto& c) { c.desc.delta_t = 0; }},
      {{"negative delta_t", invalid, {"desc.delta_t", "found -2"}}, [](auto& c) { c.desc.delta_t = -2; }},
      {{"beta1 0", invalid, {"desc.beta1", "found 0"}}, [](auto& c) { c.desc.beta1 = 0; }},
      {{"beta1 1", invalid, {"desc.beta1", "found 1"}}, [](auto& c) { c.desc.beta1 = 1; }},
      {{"negative beta1", invalid, {"desc.beta1", "found -0.5"}}, [](auto& c) { c.desc.beta1 = -0.5; }},
      {{"beta1 that is no number", invalid, {"desc.beta1", "NaN"}}, [](auto& c) { c.desc.beta1 = std::nan(""); }},
      {{"infinite beta1", invalid, {"desc.beta1", "inf"}}, [](auto& c) { c.desc.beta1 = HUGE_VAL; }},
      {{"beta2 0", invalid, {"desc.beta2", "found 0"}}, [](auto& c) { c.desc.beta2 = 0; }},
      {{"beta2 1", invalid, {"desc.beta2", "found 1"}}, [](auto& c) { c.desc.beta2 = 1; }},
      {{"beta2 above 1", invalid, {"desc.beta2", "found 1.5"}}, [](auto& c) { c.desc.beta2 = 1.5; }},
      {{"beta2 that is no number", invalid, {"desc.beta2", "NaN"}}, [](auto& c) { c.desc.beta2 = std::nan(""); }},
      {{"another unit", invalid, {"desc.budget_unit", "found 3"}}, [](auto& c) { c.desc.budget_unit = 3; }},
      {{"no flag", invalid, {"desc.sharded", "found 2", "0 or 1"}}, [](auto& c) { c.desc.sharded = 2; }},
      {{"no size", invalid, {"desc.struct_size", "found 0"}}, [](auto& c) { c.desc.struct_size = 0; }},
      {{"a size without the betas", invalid, {"desc.struct_size"}},
       [](auto& c) { c.desc.struct_size = offsetof(adalora_allocator_desc_t, beta1); }},
  };
  std::vector<std::string> texts;
  for (const BadCreation& c : cases) {
    Creation creation;
    c.spoil(creation);
    auto* const before = reinterpret_cast<adalora_allocator_t*>(0x5a5a);
    adalora_allocator_t* allocator = before;
    expect_refused("adalora_allocator_create", c.refusal,
                   adalora_allocator_create(host().context(), &creation.desc, &allocator));
    EXPECT_EQ(allocator, before) << c.refusal.what << ": written on success alone";
    texts.emplace_back(adalora_last_error());
  }
  std::sort(texts.begin(), texts.end());
  EXPECT_EQ(std::adjacent_find(texts.begin(), texts.end()), texts.end()) << "two mistakes have one text";

  const Creation good;
  adalora_allocator_t* allocator = nullptr;
  expect_refused("adalora_allocator_create", {"no context", ADALORA_ERROR_INVALID_HANDLE, {"context", "NULL"}},
                 adalora_allocator_create(nullptr, &good.desc, &allocator));
  expect_refused("adalora_allocator_create", {"no descriptor", invalid, {"desc", "NULL"}},
                 adalora_allocator_create(host().context(), nullptr, &allocator));
  expect_refused("adalora_allocator_create", {"no output", invalid, {"allocator", "NULL"}},
                 adalora_allocator_create(host().context(), &good.desc, nullptr));
  EXPECT_EQ(allocator, nullptr);
}

TEST(AllocatorCreate, TakesWhatIsAtTheEdge) {
  const BadCreation cases[] = {
      {{"target of the initial ranks", 0, {}}, [](auto& c) { c.desc.target_rank = 3; }},
      {{"target 0", 0, {}}, [](auto& c) { c.desc.target_rank = 0; }},
      {{"one step of falling budget", 0, {}}, [](auto& c) { c.desc.tinit = 6; }},
      {{"no final phase", 0, {}}, [](auto& c) { c.desc.tfinal = 0; }},
      {{"no initial phase", 0, {}}, [](auto& c) { c.desc.tinit = 0; }},
      {{"delta_t beyond the run", 0, {}}, [](auto& c) { c.desc.delta_t = 1000; }},
      {{"an adapter twice", 0, {}}, [](auto& c) { c.adapters[1] = c.adapters[0]; }},
      {{"triplets by default", 0, {}}, [](auto& c) { c.desc.budget_unit = 0; }},
  };
  for (const BadCreation& c : cases) {
    Creation creation;
    c.spoil(creation);
    adalora_allocator_t* allocator = nullptr;
    EXPECT_EQ(adalora_allocator_create(host().context(), &creation.desc, &allocator), ADALORA_SUCCESS)
        << c.refusal.what << ": " << adalora_last_error();
    adalora_allocator_destroy(allocator);
  }
}

TEST(AllocatorCreate, ServesOlderAndNewerDescriptors) {
  Creation older;
  older.desc.struct_size = offsetof(adalora_allocator_desc_t, budget_unit);
  older.desc.budget_unit = older.desc.sharded = -1;  // beyond the caller's descriptor
  adalora_allocator_t* allocator = nullptr;
  ASSERT_EQ(adalora_allocator_create(host().context(), &older.desc, &allocator), ADALORA_SUCCESS)
      << adalora_last_error();
  int64_t budget = 0;
  EXPECT_EQ(adalora_allocator_budget(allocator, 0, &budget, nullptr), ADALORA_SUCCESS);
  EXPECT_EQ(budget, 6) << "in triplets";
  adalora_allocator_destroy(allocator);

  const Creation creation;
  struct {
    adalora_allocator_desc_t known;
    int64_t unknown;
  } newer{creation.desc, 0};
  newer.known.struct_size = sizeof newer;
  ASSERT_EQ(adalora_allocator_create(host().context(), &newer.known, &allocator), ADALORA_SUCCESS)
      << adalora_last_error();
  adalora_allocator_destroy(allocator);
  newer.unknown = -1;
  expect_refused("adalora_allocator_create", {"a newer field", invalid, {"desc", "struct_size"}},
                 adalora_allocator_create(host().context(), &newer.known, &allocator));
}

TEST(AllocatorDestroy, OfNullIsNothing) { adalora_allocator_destroy(nullptr); }

// Arguments of a bind, all valid: a model, its slices, memory.
struct Binding {
  Model model;
  std::vector<adalora_slice_t> slices;
  Value<double> lr{host(), 1e-3}, decay{host(), 0.0};
  std::vector<adalora_hyper_t> hypers;
  std::optional<Buffer> state_memory, workspace_memory;
  void *state, *workspace;
  adalora_slice_t* slices_pointer;
  size_t stride = sizeof(adalora_slice_t), hyper_stride = sizeof(adalora_hyper_t);
  int64_t n, n_hyper = 1;
  adalora_hyper_t* hypers_pointer;

  explicit Binding(const ModelCase& c) : model(host(), host().context(), c) {
    for (const Owned& range : model.everything()) slices.push_back(model.slice(range));
    hypers.push_back({sizeof(adalora_hyper_t), lr.data(), decay.data(), 0.9, 0.999, 1e-8});
    n = static_cast<int64_t>(slices.size());
    size_t state_bytes = 0, workspace_bytes = 0;
    require(adalora_allocator_sizes(model.allocator(), n, &state_bytes, &workspace_bytes, nullptr));
    state_memory.emplace(host(), state_bytes, static_cast<unsigned char>(0));
    workspace_memory.emplace(host(), workspace_bytes + 64);
    state = state_memory->data();
    workspace = workspace_memory->data();
    slices_pointer = slices.data();
    hypers_pointer = hypers.data();
  }

  adalora_status_t bind() {
    return adalora_allocator_bind(model.allocator(), state, workspace, slices_pointer, stride, n, hypers_pointer,
                                  hyper_stride, n_hyper, nullptr);
  }
};

ModelCase two_layers(adalora_dtype_t param) {
  ModelCase c;
  c.param = param;
  c.layers = {{7, 5, 4}, {3, 9, 2}};
  c.master = param == bf16 || param == f16;
  return c;
}

struct BadBinding {
  Refusal refusal;
  std::function<void(Binding&)> spoil;
};

void* moved(void* p, ptrdiff_t bytes) { return static_cast<char*>(p) + bytes; }

const std::vector<BadBinding> bad_bindings = {
    {{"no state", invalid, {"state", "NULL"}}, [](Binding& b) { b.state = nullptr; }},
    {{"misaligned state", invalid, {"state", "64"}}, [](Binding& b) { b.state = moved(b.state, 32); }},
    {{"a state of other memory", invalid, {"state"}},
     [](Binding& b) { b.state_memory->write(Bytes(b.state_memory->size(), 0x3c)); }},
    {{"no workspace", invalid, {"workspace", "NULL"}}, [](Binding& b) { b.workspace = nullptr; }},
    {{"misaligned workspace", invalid, {"workspace", "64"}}, [](Binding& b) { b.workspace = moved(b.workspace, 16); }},
    {{"workspace over the state", invalid, {"overlaps", "state"}}, [](Binding& b) { b.workspace = b.state; }},

    {{"no slices", invalid, {"slices", "NULL"}}, [](Binding& b) { b.slices_pointer = nullptr; }},
    {{"a negative number of slices", invalid, {"slices", "found -1"}}, [](Binding& b) { b.n = -1; }},
    {{"no stride", invalid, {"stride of slices", "found 0"}}, [](Binding& b) { b.stride = 0; }},
    {{"a stride below the size", invalid, {"slices", "stride"}}, [](Binding& b) { b.stride -= 8; }},
    {{"no size", invalid, {"slices[2].struct_size", "found 0"}}, [](Binding& b) { b.slices[2].struct_size = 0; }},
    {{"negative adapter", invalid, {"slices[1].adapter", "found -1"}}, [](Binding& b) { b.slices[1].adapter = -1; }},
    {{"adapter beyond the model", invalid, {"slices[1].adapter", "found 2"}},
     [](Binding& b) { b.slices[1].adapter = 2; }},
    {{"no matrix", invalid, {"slices[0].matrix", "found 0"}}, [](Binding& b) { b.slices[0].matrix = 0; }},
    {{"another matrix", invalid, {"slices[0].matrix", "found 4"}}, [](Binding& b) { b.slices[0].matrix = 4; }},
    {{"negative beginning", invalid, {"slices[0].begin", "-1"}}, [](Binding& b) { b.slices[0].begin = -1; }},
    {{"an end before the beginning", invalid, {"slices[0]", "9", "8"}},
     [](Binding& b) { b.slices[0].begin = 9, b.slices[0].end = 8; }},
    {{"an end beyond the matrix", invalid, {"slices[0]", "29", "28"}}, [](Binding& b) { b.slices[0].end = 29; }},
    {{"a huge end", invalid, {"slices[0]", std::to_string(huge)}}, [](Binding& b) { b.slices[0].end = huge; }},
    {{"negative group", invalid, {"slices[5].hyper", "found -1"}}, [](Binding& b) { b.slices[5].hyper = -1; }},
    {{"a group beyond the table", invalid, {"slices[5].hyper", "found 1"}}, [](Binding& b) { b.slices[5].hyper = 1; }},
    {{"another type of p", invalid, {"slices[0].p_dtype", "float64", "float32"}},
     [](Binding& b) { b.slices[0].p_dtype = f64; }},
    {{"no type of p", invalid, {"slices[0].p_dtype", "found 17"}}, [](Binding& b) { b.slices[0].p_dtype = 17; }},
    {{"another type of g", invalid, {"slices[0].g_dtype", "float64"}}, [](Binding& b) { b.slices[0].g_dtype = f64; }},
    {{"no type of g", invalid, {"slices[0].g_dtype", "found -3"}}, [](Binding& b) { b.slices[0].g_dtype = -3; }},
    {{"no flag", invalid, {"slices[0].replica", "found 2", "0 or 1"}}, [](Binding& b) { b.slices[0].replica = 2; }},
    {{"reserved", invalid, {"slices[3].reserved", "found 1", "expected 0"}},
     [](Binding& b) { b.slices[3].reserved = 1; }},
    {{"no parameters", invalid, {"slices[0].p:", "NULL"}}, [](Binding& b) { b.slices[0].p = nullptr; }},
    {{"misaligned parameters", invalid, {"slices[0].p:", "multiple of 4"}},
     [](Binding& b) { b.slices[0].p = moved(b.slices[0].p, 2); }},
    {{"no gradients", invalid, {"slices[4].g:", "NULL"}}, [](Binding& b) { b.slices[4].g = nullptr; }},
    {{"misaligned gradients", invalid, {"slices[4].g:", "multiple of"}},
     [](Binding& b) { b.slices[4].g = moved(b.slices[4].g, 1); }},
    {{"one moment", invalid, {"slices[2].v", "NULL"}}, [](Binding& b) { b.slices[2].v = nullptr; }},
    {{"the other moment", invalid, {"slices[2].m", "NULL"}}, [](Binding& b) { b.slices[2].m = nullptr; }},
    {{"misaligned moment", invalid, {"slices[2].m", "multiple of 4"}},
     [](Binding& b) { b.slices[2].m = moved(b.slices[2].m, 2); }},
    {{"no average", invalid, {"slices[2].exp_avg_ipt", "NULL"}}, [](Binding& b) { b.slices[2].exp_avg_ipt = nullptr; }},
    {{"misaligned average", invalid, {"slices[2].exp_avg_ipt", "multiple of 4"}},
     [](Binding& b) { b.slices[2].exp_avg_ipt = moved(b.slices[2].exp_avg_ipt, 2); }},
    {{"no uncertainty", invalid, {"slices[2].exp_avg_unc", "NULL"}},
     [](Binding& b) { b.slices[2].exp_avg_unc = nullptr; }},
    {{"averages in one place", invalid, {"overlaps", "exp_avg_"}},
     [](Binding& b) { b.slices[2].exp_avg_unc = b.slices[2].exp_avg_ipt; }},
    {{"gradients over parameters", invalid, {"overlaps", ".p", ".g"}},
     [](Binding& b) { b.slices[2].g = b.slices[2].p, b.slices[2].g_dtype = f32; }},
    {{"moments of two slices in one place", invalid, {"overlaps", ".m"}},
     [](Binding& b) { b.slices[1].m = moved(b.slices[0].m, 8); }},
    {{"parameters over the state", invalid, {"overlaps", "state"}}, [](Binding& b) { b.slices[1].p = b.state; }},

    {{"an element twice", invalid, {"slices[", "27", "A", "adapter 0"}},
     [](Binding& b) {
       b.slices.push_back(b.model.slice({0, 0, 27, 28}));
       b.slices_pointer = b.slices.data();
       b.n += 1;
     }},
    {{"a slice twice", invalid, {"slices["}},
     [](Binding& b) {
       b.slices.push_back(b.slices[1]);
       b.slices_pointer = b.slices.data();
       b.n += 1;
     }},
    {{"a missing matrix", invalid, {"slices", "B", "adapter 1", "0", "18"}}, [](Binding& b) { b.n -= 1; }},
    {{"missing first elements", invalid, {"slices", "E", "adapter 0", "0", "1"}},
     [](Binding& b) { b.slices[1] = b.model.slice({0, 1, 1, 4}); }},
    {{"missing last elements", invalid, {"slices", "A", "adapter 0", "20", "28"}},
     [](Binding& b) { b.slices[0] = b.model.slice({0, 0, 0, 20}); }},
    {{"no slices at all", invalid, {"slices", "A", "adapter 0"}}, [](Binding& b) { b.n = 0; }},

    {{"no table", invalid, {"hypers", "NULL"}}, [](Binding& b) { b.hypers_pointer = nullptr; }},
    {{"a negative number of groups", invalid, {"hypers", "found -1"}}, [](Binding& b) { b.n_hyper = -1; }},
    {{"no stride of groups", invalid, {"stride of hypers", "found 0"}}, [](Binding& b) { b.hyper_stride = 0; }},
    {{"no size of a group", invalid, {"hypers[0].struct_size", "found 0"}},
     [](Binding& b) { b.hypers[0].struct_size = 0; }},
    {{"no learning rate", invalid, {"hypers[0].lr", "NULL"}}, [](Binding& b) { b.hypers[0].lr = nullptr; }},
    {{"misaligned learning rate", invalid, {"hypers[0].lr"}},
     [](Binding& b) { b.hypers[0].lr = static_cast<double*>(moved(b.lr.data(), 4)); }},
    {{"learning rate among the moments", invalid, {"hypers[0].lr", "overlaps", ".m"}},
     [](Binding& b) { b.hypers[0].lr = static_cast<double*>(b.slices[0].m); }},
    {{"no decay", invalid, {"hypers[0].weight_decay", "NULL"}}, [](Binding& b) { b.hypers[0].weight_decay = nullptr; }},
    {{"beta1 1", invalid, {"hypers[0].beta1", "found 1"}}, [](Binding& b) { b.hypers[0].beta1 = 1; }},
    {{"negative beta1", invalid, {"hypers[0].beta1", "found -0.1"}}, [](Binding& b) { b.hypers[0].beta1 = -0.1; }},
    {{"beta2 that is no number", invalid, {"hypers[0].beta2", "NaN"}},
     [](Binding& b) { b.hypers[0].beta2 = std::nan(""); }},
    {{"negative eps", invalid, {"hypers[0].eps", "found -1"}}, [](Binding& b) { b.hypers[0].eps = -1; }},
    {{"infinite eps", invalid, {"hypers[0].eps", "inf"}}, [](Binding& b) { b.hypers[0].eps = HUGE_VAL; }},
};

void expect_all_refused(const ModelCase& c, const std::vector<BadBinding>& cases) {
  {
    Binding good(c);
    ASSERT_EQ(good.bind(), ADALORA_SUCCESS) << adalora_last_error();
  }
  for (const BadBinding& bad : cases) {
    Binding binding(c);
    binding.model.step(1);
    const Bytes state = binding.model.save();
    bad.spoil(binding);
    const Bytes given = binding.state_memory->read();
    const std::vector<Bytes> tensors = binding.model.tensors();
    expect_refused("adalora_allocator_bind", bad.refusal, binding.bind());
    EXPECT_EQ(binding.model.tensors(), tensors) << bad.refusal.what;
    EXPECT_EQ(binding.state_memory->read(), given) << bad.refusal.what;
    EXPECT_EQ(binding.model.save(), state) << bad.refusal.what << ": the earlier binding stays";
  }
}

TEST(AllocatorBind, RefusesWhatMakesNoSense) {
  expect_all_refused(two_layers(f32), bad_bindings);
  expect_all_refused(two_layers(f32), {{{"a half-precision copy of float32", invalid, {"slices[0].p_low", "float32"}},
                                        [](Binding& b) { b.slices[0].p_low = b.slices[0].exp_avg_ipt; }}});
  expect_all_refused(two_layers(bf16),
                     {{{"a half-precision master", invalid, {"slices[0].p_dtype", "bfloat16", "float32"}},
                       [](Binding& b) { b.slices[0].p_dtype = bf16; }},
                      {{"misaligned copy", invalid, {"slices[0].p_low", "multiple of 2"}},
                       [](Binding& b) { b.slices[0].p_low = moved(b.slices[0].p_low, 1); }},
                      {{"a copy over the master", invalid, {"overlaps", "p_low"}},
                       [](Binding& b) { b.slices[0].p_low = b.slices[0].p; }},
                      {{"a master without its copy", invalid, {"slices[0].p_dtype", "float32", "bfloat16"}},
                       [](Binding& b) { b.slices[0].p_low = nullptr; }}});
}

TEST(AllocatorBind, RefusesTheStateOfOtherAdapters) {
  ModelCase other = two_layers(f32);
  other.layers[1].rank = 3;
  Binding mine(two_layers(f32)), theirs(other);
  require(theirs.bind());
  require(adalora_allocator_reset(theirs.model.allocator(), nullptr));
  Bytes state = theirs.state_memory->read();
  state.resize(mine.state_memory->size());
  mine.state_memory->write(state);
  expect_refused("adalora_allocator_bind", {"another model's state", invalid, {"state"}}, mine.bind());
}

TEST(AllocatorBind, ServesOlderAndNewerDescriptors) {
  struct NewerSlice {
    adalora_slice_t known;
    int64_t unknown;
  };
  struct NewerHyper {
    adalora_hyper_t known;
    double unknown;
  };
  Binding binding(two_layers(f32));
  std::vector<NewerSlice> slices;
  for (adalora_slice_t slice : binding.slices) {
    slice.struct_size = sizeof(NewerSlice);
    slices.push_back({slice, 0});
  }
  std::vector<NewerHyper> hypers{{binding.hypers[0], 0}};
  hypers[0].known.struct_size = sizeof(NewerHyper);
  binding.slices_pointer = &slices[0].known;
  binding.stride = sizeof(NewerSlice);
  binding.hypers_pointer = &hypers[0].known;
  binding.hyper_stride = sizeof(NewerHyper);
  EXPECT_EQ(binding.bind(), ADALORA_SUCCESS) << adalora_last_error();
  slices[4].unknown = 1;
  expect_refused("adalora_allocator_bind", {"a newer field", invalid, {"slices[4]", "struct_size"}}, binding.bind());
  slices[4].unknown = 0;
  hypers[0].unknown = 1;
  expect_refused("adalora_allocator_bind", {"a newer field", invalid, {"hypers[0]", "struct_size"}}, binding.bind());

  // The first version's descriptors end here: nothing that has no default may be missing.
  Binding shorter(two_layers(f32));
  shorter.slices[1].struct_size = offsetof(adalora_slice_t, exp_avg_unc);
  expect_refused("adalora_allocator_bind", {"a slice cut short", invalid, {"slices[1].struct_size"}}, shorter.bind());
  Binding without_eps(two_layers(f32));
  without_eps.hypers[0].struct_size = offsetof(adalora_hyper_t, eps);
  expect_refused("adalora_allocator_bind", {"a group cut short", invalid, {"hypers[0].struct_size"}},
                 without_eps.bind());
}

TEST(AllocatorBind, TakesSlicesInAnyOrderAndDefaultTypes) {
  Binding binding(two_layers(f32));
  std::reverse(binding.slices.begin(), binding.slices.end());
  for (adalora_slice_t& slice : binding.slices) slice.p_dtype = slice.g_dtype = 0;
  EXPECT_EQ(binding.bind(), ADALORA_SUCCESS) << adalora_last_error();
}

TEST(AllocatorBind, TakesNullForNoElements) {
  ModelCase c = two_layers(f32);
  c.layers[1].rank = 0;
  c.target_rank = 1;
  Binding binding(c);
  for (adalora_slice_t& slice : binding.slices)
    if (slice.adapter == 1) slice.p = slice.g = slice.m = slice.v = slice.exp_avg_ipt = slice.exp_avg_unc = nullptr;
  EXPECT_EQ(binding.bind(), ADALORA_SUCCESS) << adalora_last_error();
  binding.n = 3;  // nor are such slices needed
  EXPECT_EQ(binding.bind(), ADALORA_SUCCESS) << adalora_last_error();
}

TEST(AllocatorBind, TakesAPartWhereSharded) {
  ModelCase c = two_layers(f32);
  Binding whole(c);
  c.whole = false;
  Binding part(c);
  part.n = 1;
  EXPECT_EQ(part.bind(), ADALORA_SUCCESS) << adalora_last_error();
  part.n = 0;
  part.slices_pointer = nullptr;
  EXPECT_EQ(part.bind(), ADALORA_SUCCESS) << "a process that owns nothing: " << adalora_last_error();
}

TEST(AllocatorSizes, RefusesWhatMakesNoSense) {
  const Binding binding(two_layers(f32));
  size_t state = 7, workspace = 7, gram = 7;
  const auto sizes = [&](int64_t n) {
    return adalora_allocator_sizes(binding.model.allocator(), n, &state, &workspace, &gram);
  };
  expect_refused("adalora_allocator_sizes", {"a negative number", invalid, {"n_slices", "found -1"}}, sizes(-1));
  expect_refused("adalora_allocator_sizes", {"more than fit memory", invalid, {"n_slices"}}, sizes(huge));
  EXPECT_EQ(state, 7u);
  EXPECT_EQ(workspace, 7u);
  EXPECT_EQ(gram, 7u);
  EXPECT_EQ(sizes(6), ADALORA_SUCCESS);
  EXPECT_EQ(gram, sizeof(double) * 2 * (4 * 4 + 2 * 2));
  EXPECT_EQ(adalora_allocator_sizes(binding.model.allocator(), 6, nullptr, nullptr, nullptr), ADALORA_SUCCESS);
}

TEST(AllocatorBudget, NeedsSomewhereToWrite) {
  const Binding binding(two_layers(f32));
  int32_t masks = 7;
  expect_refused("adalora_allocator_budget", {"no output", invalid, {"budget", "NULL"}},
                 adalora_allocator_budget(binding.model.allocator(), 1, nullptr, &masks));
  EXPECT_EQ(masks, 7);
  int64_t budget = 0;
  for (int64_t step : {std::numeric_limits<int64_t>::min(), int64_t{-1}, huge}) {
    EXPECT_EQ(adalora_allocator_budget(binding.model.allocator(), step, &budget, &masks), ADALORA_SUCCESS) << step;
    EXPECT_EQ(budget, step < 0 ? 6 : 4);
  }
}

}  // namespace
}  // namespace boundary
