// Forward and backward: every argument wrong in every way, and what is legal though unusual.

#include <functional>
#include <limits>

#include "refusal.hpp"
#include "support/memory.hpp"

namespace boundary {
namespace {

using namespace support;

constexpr adalora_status_t invalid = ADALORA_ERROR_INVALID_ARGUMENT;
constexpr int64_t tokens = 4, in = 7;

Adapter make_adapter(adalora_context_t* context, int64_t in_features, int64_t out, int64_t rank, double dropout = 0,
                     adalora_dtype_t activation = f32) {
  adalora_adapter_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = in_features;
  desc.out_features = out;
  desc.rank = rank;
  desc.dropout = dropout;
  desc.param_dtype = f32;
  desc.activation_dtype = activation;
  adalora_adapter_t* handle = nullptr;
  require(adalora_adapter_create(context, &desc, &handle));
  return Adapter(handle);
}

Tensor ones(int64_t rows, int64_t columns) {
  return Tensor(host(), f32,
                Dense<double>(rows, columns, std::vector<double>(static_cast<size_t>(rows * columns), 1.0)));
}

// One adapter's operands.
struct Operands {
  Adapter adapter;
  Tensor A, E, B, dA, dE, dB, y, dy, h, g;
  Values<uint8_t> pattern;

  Operands(int64_t out, int64_t rank, double dropout)
      : adapter(make_adapter(host().context(), in, out, rank, dropout)),
        A(ones(rank, in)),
        E(ones(1, rank)),
        B(ones(out, rank)),
        dA(ones(rank, in)),
        dE(ones(1, rank)),
        dB(ones(out, rank)),
        y(ones(tokens, out)),
        dy(ones(tokens, out)),
        h(ones(tokens, rank)),
        g(ones(tokens, rank)),
        pattern(host(), std::vector<uint8_t>(static_cast<size_t>(rank), 1)) {}
};

// A call of two adapters, the second with dropout: all arguments valid.
struct Call {
  Operands first{5, 3, 0.0}, second{6, 2, 0.5};
  Tensor x_tensor = ones(tokens, in), dx_tensor = ones(tokens, in);
  Value<uint64_t> seed{host(), 1}, offset{host(), 2};
  std::vector<adalora_call_t> calls;
  adalora_call_t* calls_pointer;
  size_t stride = sizeof(adalora_call_t);
  int64_t n = 2;
  int32_t stages = ADALORA_STAGE_BOTH, accumulate = 1;
  adalora_matrix_t x = x_tensor.matrix(), dx = dx_tensor.matrix();
  const adalora_matrix_t *x_pointer = &x, *dx_pointer = &dx;
  Buffer memory;
  void* workspace;
  size_t bytes;

  Call() : memory(make_workspace()), workspace(memory.data()), bytes(memory.size()) {}

  adalora_status_t forward() {
    return adalora_adapter_forward(calls_pointer, stride, n, stages, x_pointer, workspace, bytes, nullptr);
  }
  adalora_status_t backward() {
    return adalora_adapter_backward(calls_pointer, stride, n, stages, accumulate, x_pointer, dx_pointer, workspace,
                                    bytes, nullptr);
  }

  std::vector<Bytes> contents() const {
    std::vector<Bytes> all{x_tensor.bytes(), dx_tensor.bytes()};
    for (const Operands* o : {&first, &second})
      for (const Tensor* t : {&o->A, &o->E, &o->B, &o->dA, &o->dE, &o->dB, &o->y, &o->dy, &o->h, &o->g})
        all.push_back(t->bytes());
    return all;
  }

 private:
  Buffer make_workspace() {
    for (const Operands* o : {&first, &second}) {
      adalora_call_t call{};
      call.struct_size = sizeof call;
      call.adapter = o->adapter.get();
      call.params = {o->A.matrix(), o->E.matrix(), o->B.matrix()};
      call.grads = {o->dA.matrix(), o->dE.matrix(), o->dB.matrix()};
      call.y = o->y.matrix();
      call.dy = o->dy.matrix();
      call.h = o->h.data();
      call.g = o->g.data();
      call.pattern = o->pattern.data();
      calls.push_back(call);
    }
    calls[1].dropout = {seed.data(), offset.data(), 0};
    calls_pointer = calls.data();
    size_t needed = 0;
    require(adalora_adapter_sizes(calls.data(), stride, n, tokens, nullptr, &needed));
    return Buffer(host(), needed);
  }
};

struct BadCall {
  Refusal refusal;
  std::function<void(Call&)> spoil;
};

void* moved(void* p, ptrdiff_t bytes) { return static_cast<char*>(p) + bytes; }

void expect_all_refused(const std::string& call, adalora_status_t (Call::*run)(), const std::vector<BadCall>& cases) {
  {
    Call good;
    ASSERT_EQ((good.*run)(), ADALORA_SUCCESS) << call << " with good arguments: " << adalora_last_error();
  }
  for (const BadCall& c : cases) {
    Call bad;
    const std::vector<Bytes> before = bad.contents();
    c.spoil(bad);
    expect_refused(call, c.refusal, (bad.*run)());
    EXPECT_EQ(bad.contents(), before) << call << ": " << c.refusal.what;
  }
}

const Adapter& wider() {
  static const Adapter adapter = make_adapter(host().context(), in + 1, 6, 2);
  return adapter;
}
const Adapter& half_precision() {
  static const Adapter adapter = make_adapter(host().context(), in, 6, 2, 0, bf16);
  return adapter;
}
const Adapter& elsewhere() {
  static const Context context = cpu_context(1);
  static const Adapter adapter = make_adapter(context.get(), in, 6, 2);
  return adapter;
}

const std::vector<BadCall> bad_groups = {
    {{"no calls", invalid, {"calls", "NULL"}}, [](Call& c) { c.calls_pointer = nullptr; }},
    {{"none", invalid, {": n", "found 0", "1 to 64"}}, [](Call& c) { c.n = 0; }},
    {{"a negative number", invalid, {": n", "found -1", "1 to 64"}}, [](Call& c) { c.n = -1; }},
    {{"too many", invalid, {": n", "found 65", "1 to 64"}}, [](Call& c) { c.n = 65; }},
    {{"no stride", invalid, {"stride", "found 0"}}, [](Call& c) { c.stride = 0; }},
    {{"a stride below the size", invalid, {"calls", "stride", std::to_string(sizeof(adalora_call_t) - 8)}},
     [](Call& c) { c.stride -= 8; }},
    {{"no size", invalid, {"calls[1].struct_size", "found 0"}}, [](Call& c) { c.calls[1].struct_size = 0; }},
    {{"no adapter", ADALORA_ERROR_INVALID_HANDLE, {"calls[0].adapter", "NULL"}},
     [](Call& c) { c.calls[0].adapter = nullptr; }},
    {{"a context for an adapter",
      ADALORA_ERROR_INVALID_HANDLE,
      {"calls[1].adapter", "adalora_context_t", "adalora_adapter_t"}},
     [](Call& c) { c.calls[1].adapter = reinterpret_cast<adalora_adapter_t*>(host().context()); }},
    {{"another input", invalid, {"calls[1].adapter", "8", "7"}}, [](Call& c) { c.calls[1].adapter = wider().get(); }},
    {{"another activation type", invalid, {"calls[1].adapter", "bfloat16", "float32"}},
     [](Call& c) { c.calls[1].adapter = half_precision().get(); }},
    {{"another context", invalid, {"calls[1].adapter", "context"}},
     [](Call& c) { c.calls[1].adapter = elsewhere().get(); }},
};

const std::vector<BadCall> bad_passes = {
    {{"an adapter twice", invalid, {"calls[1].adapter", "calls[0]"}},
     [](Call& c) { c.calls[1].adapter = c.calls[0].adapter; }},
    {{"no stage", invalid, {"stages", "found 0"}}, [](Call& c) { c.stages = 0; }},
    {{"another stage", invalid, {"stages", "found 4"}}, [](Call& c) { c.stages = 4; }},

    {{"no input", invalid, {": x", "NULL"}}, [](Call& c) { c.x_pointer = nullptr; }},
    {{"input without data", invalid, {": x", "NULL"}}, [](Call& c) { c.x.data = nullptr; }},
    {{"misaligned input", invalid, {": x", "multiple of 4"}}, [](Call& c) { c.x.data = moved(c.x.data, 1); }},
    {{"input of other columns", invalid, {": x", "[4, 6]", "7"}}, [](Call& c) { c.x.columns = 6; }},
    {{"input of another type", invalid, {": x", "float16", "float32"}}, [](Call& c) { c.x.dtype = f16; }},
    {{"input with overlapping rows", invalid, {"x.row_stride", "found 6"}}, [](Call& c) { c.x.row_stride = 6; }},

    {{"A of another shape", invalid, {"calls[1].params.A", "[3, 7]", "[2, 7]"}},
     [](Call& c) { c.calls[1].params.A = c.calls[0].params.A; }},
    {{"A without data", invalid, {"calls[0].params.A", "NULL"}}, [](Call& c) { c.calls[0].params.A.data = nullptr; }},
    {{"E of another length", invalid, {"calls[0].params.E", "2", "3"}},
     [](Call& c) { c.calls[0].params.E.columns = 2; }},
    {{"B of another shape", invalid, {"calls[0].params.B", "[5, 2]", "[5, 3]"}},
     [](Call& c) { c.calls[0].params.B.columns = 2; }},
    {{"B of another type", invalid, {"calls[0].params.B", "bfloat16", "float32"}},
     [](Call& c) { c.calls[0].params.B.dtype = bf16; }},
    {{"reserved", invalid, {"calls[1].params.B.reserved", "found 2"}},
     [](Call& c) { c.calls[1].params.B.reserved = 2; }},
    {{"scaling that is no number", invalid, {"calls[0].scaling", "NaN"}},
     [](Call& c) { c.calls[0].scaling = std::nan(""); }},
    {{"scaling beyond the compute type", invalid, {"calls[0].scaling", "-3.5e38", "float32"}},
     [](Call& c) { c.calls[0].scaling = -3.5e38; }},
    {{"misaligned h", invalid, {"calls[0].h", "multiple of 4"}},
     [](Call& c) { c.calls[0].h = moved(c.calls[0].h, 2); }},

    {{"no seed", invalid, {"calls[1].dropout", "seed", "NULL"}}, [](Call& c) { c.calls[1].dropout.seed = nullptr; }},
    {{"no offset", invalid, {"calls[1].dropout", "offset", "NULL"}},
     [](Call& c) { c.calls[1].dropout.offset = nullptr; }},
    {{"misaligned seed", invalid, {"calls[1].dropout.seed"}},
     [](Call& c) { c.calls[1].dropout.seed = static_cast<uint64_t*>(moved(c.seed.data(), 4)); }},
    {{"negative tokens", invalid, {"calls[1].dropout.token0", "found -1"}},
     [](Call& c) { c.calls[1].dropout.token0 = -1; }},
    {{"tokens beyond 2^32", invalid, {"calls[1].dropout.token0", "4294967293"}},
     [](Call& c) { c.calls[1].dropout.token0 = (int64_t{1} << 32) - 3; }},

    {{"no workspace", invalid, {"workspace", "NULL"}}, [](Call& c) { c.workspace = nullptr; }},
    {{"misaligned workspace", invalid, {"workspace", "64"}}, [](Call& c) { c.workspace = moved(c.workspace, 32); }},
    {{"too little workspace", invalid, {"workspace"}}, [](Call& c) { c.bytes -= 1; }},
    {{"workspace beyond memory", invalid, {"workspace"}},
     [](Call& c) { c.bytes = std::numeric_limits<size_t>::max(); }},
    {{"workspace over the input", invalid, {"workspace", "overlaps", "x"}},
     [](Call& c) { c.x.data = moved(c.workspace, 4); }},
};

const std::vector<BadCall> bad_forwards = {
    {{"no output", invalid, {"calls[1].y"}}, [](Call& c) { c.calls[1].y = {}; }},
    {{"output of other rows", invalid, {"calls[0].y", "[3, 5]", "[4, 5]"}}, [](Call& c) { c.calls[0].y.rows = 3; }},
    {{"output of other columns", invalid, {"calls[0].y", "[4, 6]", "[4, 5]"}},
     [](Call& c) { c.calls[0].y.columns = c.calls[0].y.row_stride = 6; }},
    {{"output of another type", invalid, {"calls[0].y", "float16"}}, [](Call& c) { c.calls[0].y.dtype = f16; }},
    {{"misaligned output", invalid, {"calls[0].y", "multiple of 4"}},
     [](Call& c) { c.calls[0].y.data = moved(c.calls[0].y.data, 2); }},
    {{"output over the input", invalid, {"calls[0].y", "overlaps", "x"}},
     [](Call& c) { c.calls[0].y.data = c.x.data; }},
    {{"output over the other's", invalid, {".y:", "overlaps"}}, [](Call& c) { c.calls[1].y.data = c.calls[0].y.data; }},
    {{"output over the other's B", invalid, {"overlaps", "calls[0].y", "calls[1].params.B"}},
     [](Call& c) { c.calls[0].y.data = c.calls[1].params.B.data; }},
    {{"h over the input", invalid, {".h:", "overlaps", "x"}}, [](Call& c) { c.calls[0].h = c.x.data; }},
    {{"h over the other's h", invalid, {".h:", "overlaps"}}, [](Call& c) { c.calls[0].h = c.calls[1].h; }},
    {{"h over the workspace", invalid, {".h:", "overlaps", "workspace"}}, [](Call& c) { c.calls[0].h = c.workspace; }},
    {{"h over the seed", invalid, {"overlaps", "calls[0].h", "calls[1].dropout.seed"}},
     [](Call& c) { c.calls[0].h = c.seed.data(); }},
    {{"output over the pattern", invalid, {"overlaps", "pattern"}},
     [](Call& c) { c.calls[1].pattern = static_cast<uint8_t*>(c.calls[0].y.data); }},
    {{"h left out between stages", invalid, {"calls[0].h", "NULL"}},
     [](Call& c) { c.stages = ADALORA_STAGE_PROJECT, c.calls[0].h = nullptr; }},
    {{"h left out in the second stage", invalid, {"calls[1].h", "NULL"}},
     [](Call& c) { c.stages = ADALORA_STAGE_EXPAND, c.calls[1].h = nullptr; }},
};

const std::vector<BadCall> bad_backwards = {
    {{"no flag", invalid, {"accumulate", "found 2", "0 or 1"}}, [](Call& c) { c.accumulate = 2; }},
    {{"no dy", invalid, {"calls[1].dy"}}, [](Call& c) { c.calls[1].dy = {}; }},
    {{"dy of other rows", invalid, {"calls[0].dy", "[3, 5]", "[4, 5]"}}, [](Call& c) { c.calls[0].dy.rows = 3; }},
    {{"dy of another type", invalid, {"calls[0].dy", "bfloat16"}}, [](Call& c) { c.calls[0].dy.dtype = bf16; }},
    {{"dx of other rows", invalid, {": dx", "[5, 7]", "[4, 7]"}}, [](Call& c) { c.dx.rows = 5; }},
    {{"dx of another type", invalid, {": dx", "float16"}}, [](Call& c) { c.dx.dtype = f16; }},
    {{"dx without data", invalid, {": dx", "NULL"}}, [](Call& c) { c.dx.data = nullptr; }},
    {{"dx over dy", invalid, {"overlaps", "dx", "calls[0].dy"}}, [](Call& c) { c.dx.data = c.calls[0].dy.data; }},
    {{"dx over the input", invalid, {": dx", "overlaps", "x"}}, [](Call& c) { c.dx.data = c.x.data; }},
    {{"no gradients", invalid, {"calls[1].grads.A"}}, [](Call& c) { c.calls[1].grads = {}; }},
    {{"dA of another shape", invalid, {"calls[0].grads.A", "[2, 7]", "[3, 7]"}},
     [](Call& c) { c.calls[0].grads.A.rows = 2; }},
    {{"dE of another length", invalid, {"calls[0].grads.E", "4", "3"}},
     [](Call& c) { c.calls[0].grads.E.columns = c.calls[0].grads.E.row_stride = 4; }},
    {{"dB of another type", invalid, {"calls[0].grads.B", "bfloat16", "float32"}},
     [](Call& c) { c.calls[0].grads.B.dtype = bf16; }},
    {{"dA over A", invalid, {"grads.A", "overlaps", "params.A"}},
     [](Call& c) { c.calls[0].grads.A.data = c.calls[0].params.A.data; }},
    {{"dA over the other's dA", invalid, {"grads.A", "overlaps"}},
     [](Call& c) { c.calls[1].grads.A.data = c.calls[0].grads.A.data; }},
    {{"dE over dy", invalid, {"grads.E", "overlaps", "dy"}},
     [](Call& c) { c.calls[0].grads.E.data = c.calls[1].dy.data; }},
    {{"dB over h", invalid, {"grads.B", "overlaps", "h"}}, [](Call& c) { c.calls[0].grads.B.data = c.calls[0].h; }},
    {{"misaligned g", invalid, {"calls[0].g", "multiple of 4"}},
     [](Call& c) { c.calls[0].g = moved(c.calls[0].g, 2); }},
    {{"g over h", invalid, {".g:", "overlaps", "h"}}, [](Call& c) { c.calls[0].g = c.calls[0].h; }},
    {{"g left out between stages", invalid, {"calls[0].g", "NULL"}},
     [](Call& c) { c.stages = ADALORA_STAGE_PROJECT, c.calls[0].g = nullptr; }},
    {{"g left out in the second stage", invalid, {"calls[1].g", "NULL"}},
     [](Call& c) { c.stages = ADALORA_STAGE_EXPAND, c.calls[1].g = nullptr; }},
    {{"h left out between stages", invalid, {"calls[0].h", "NULL"}},
     [](Call& c) { c.stages = ADALORA_STAGE_PROJECT, c.calls[0].h = nullptr; }},
};

std::vector<BadCall> joined(std::initializer_list<std::vector<BadCall>> parts) {
  std::vector<BadCall> all;
  for (const std::vector<BadCall>& part : parts) all.insert(all.end(), part.begin(), part.end());
  return all;
}

TEST(AdapterForward, RefusesWhatMakesNoSense) {
  expect_all_refused("adalora_adapter_forward", &Call::forward, joined({bad_groups, bad_passes, bad_forwards}));
}

TEST(AdapterBackward, RefusesWhatMakesNoSense) {
  expect_all_refused("adalora_adapter_backward", &Call::backward, joined({bad_groups, bad_passes, bad_backwards}));
}

TEST(AdapterSizes, RefusesWhatMakesNoSense) {
  for (const BadCall& c : bad_groups) {
    Call bad;
    c.spoil(bad);
    size_t saved[64] = {77}, workspace = 77;
    expect_refused("adalora_adapter_sizes", c.refusal,
                   adalora_adapter_sizes(bad.calls_pointer, bad.stride, bad.n, tokens, saved, &workspace));
    EXPECT_EQ(saved[0], 77u);
    EXPECT_EQ(workspace, 77u);
  }
  Call good;
  size_t saved[2] = {77, 77}, workspace = 77;
  const auto sizes = [&](int64_t t, size_t* s, size_t* w) {
    return adalora_adapter_sizes(good.calls_pointer, good.stride, 2, t, s, w);
  };
  expect_refused("adalora_adapter_sizes", {"negative tokens", invalid, {"tokens", "found -1"}},
                 sizes(-1, saved, &workspace));
  expect_refused("adalora_adapter_sizes", {"tokens beyond memory", invalid, {"tokens"}},
                 sizes(std::numeric_limits<int64_t>::max(), saved, &workspace));
  expect_refused("adalora_adapter_sizes", {"no output", invalid, {"workspace", "NULL"}}, sizes(tokens, saved, nullptr));
  EXPECT_EQ(saved[0], 77u);
  EXPECT_EQ(workspace, 77u);
  EXPECT_EQ(sizes(tokens, nullptr, &workspace), ADALORA_SUCCESS);
  EXPECT_EQ(sizes(tokens, saved, &workspace), ADALORA_SUCCESS);
  EXPECT_EQ(saved[0], tokens * 3 * sizeof(float));
  EXPECT_EQ(saved[1], tokens * 2 * sizeof(float));
  EXPECT_EQ(sizes(0, saved, &workspace), ADALORA_SUCCESS);
  EXPECT_EQ(saved[0], 0u);
}

// Callers compiled against an older and a newer header, in arrays of their own strides.
TEST(AdapterForward, ServesOlderAndNewerDescriptors) {
  Call expected;
  expected.calls[1].adapter = expected.calls[0].adapter;  // not read: n is 1
  expected.n = 1;
  expected.calls[0].pattern = nullptr;
  ASSERT_EQ(expected.forward(), ADALORA_SUCCESS);

  Call older;
  older.n = 1;
  older.calls[0].struct_size = offsetof(adalora_call_t, pattern);
  ASSERT_EQ(older.forward(), ADALORA_SUCCESS) << adalora_last_error();
  EXPECT_EQ(older.first.y.bytes(), expected.first.y.bytes());

  struct Newer {
    adalora_call_t known;
    int64_t unknown[3];
  };
  Call call;
  std::vector<Newer> newer;
  for (adalora_call_t c : call.calls) {
    c.struct_size = sizeof(Newer);
    newer.push_back({c, {0, 0, 0}});
  }
  call.calls_pointer = &newer[0].known;
  call.stride = sizeof(Newer);
  ASSERT_EQ(call.forward(), ADALORA_SUCCESS) << adalora_last_error();
  EXPECT_EQ(call.first.y.bytes(), expected.first.y.bytes());
  newer[1].unknown[2] = 1;
  expect_refused("adalora_adapter_forward", {"a newer field", invalid, {"calls[1]", "struct_size"}}, call.forward());
}

TEST(AdapterForward, TakesNullForNoElements) {
  const Adapter rank_zero = make_adapter(host().context(), in, 5, 0);
  const Operands operands(5, 3, 0.0);
  const Tensor x = ones(tokens, in), y = ones(tokens, 5);
  const auto both_passes = [](const adalora_call_t& call, const adalora_matrix_t& input, const adalora_matrix_t* dx) {
    size_t bytes = 0;
    require(adalora_adapter_sizes(&call, sizeof call, 1, input.rows, nullptr, &bytes));
    const Buffer workspace(host(), bytes);
    EXPECT_EQ(
        adalora_adapter_forward(&call, sizeof call, 1, ADALORA_STAGE_BOTH, &input, workspace.data(), bytes, nullptr),
        ADALORA_SUCCESS)
        << adalora_last_error();
    EXPECT_EQ(adalora_adapter_backward(&call, sizeof call, 1, ADALORA_STAGE_BOTH, 0, &input, dx, workspace.data(),
                                       bytes, nullptr),
              ADALORA_SUCCESS)
        << adalora_last_error();
  };
  adalora_call_t call{};
  call.struct_size = sizeof call;
  call.adapter = rank_zero.get();
  call.params = {{nullptr, 0, in, 0, f32, 0}, {nullptr, 0, 1, 0, f32, 0}, {nullptr, 5, 0, 0, f32, 0}};
  call.grads = call.params;
  call.y = call.dy = y.matrix();
  both_passes(call, x.matrix(), nullptr);
  EXPECT_EQ(y.get().values, std::vector<double>(tokens * 5, 1.0));

  call.adapter = operands.adapter.get();
  call.params = {operands.A.matrix(), operands.E.matrix(), operands.B.matrix()};
  call.grads = {operands.dA.matrix(), operands.dE.matrix(), operands.dB.matrix()};
  call.y = call.dy = {nullptr, 0, 5, 0, f32, 0};
  const adalora_matrix_t nothing{nullptr, 0, in, 0, f32, 0};
  both_passes(call, nothing, &nothing);
  EXPECT_EQ(operands.dA.get().values, std::vector<double>(21, 0.0)) << "zeros where there is no token";
}

// Operands that are read may share memory: a tied parameter, the same rows for dy as for another adapter.
TEST(AdapterBackward, LetsInputsShareMemory) {
  Call call;
  call.calls[0].dy.data = call.x.data;
  call.calls[0].dy.row_stride = in;
  EXPECT_EQ(call.backward(), ADALORA_SUCCESS) << adalora_last_error();
}

TEST(AdapterForward, ServesTheLargestGroup) {
  std::vector<Operands> all;
  std::vector<adalora_call_t> calls;
  for (int i = 0; i < 64; ++i) all.emplace_back(5, 2, 0.0);
  for (const Operands& o : all) {
    adalora_call_t call{};
    call.struct_size = sizeof call;
    call.adapter = o.adapter.get();
    call.params = {o.A.matrix(), o.E.matrix(), o.B.matrix()};
    call.y = o.y.matrix();
    calls.push_back(call);
  }
  size_t bytes = 0;
  ASSERT_EQ(adalora_adapter_sizes(calls.data(), sizeof calls[0], 64, tokens, nullptr, &bytes), ADALORA_SUCCESS);
  const Buffer workspace(host(), bytes);
  const Tensor x = ones(tokens, in);
  const adalora_matrix_t input = x.matrix();
  ASSERT_EQ(adalora_adapter_forward(calls.data(), sizeof calls[0], 64, ADALORA_STAGE_BOTH, &input, workspace.data(),
                                    bytes, nullptr),
            ADALORA_SUCCESS)
      << adalora_last_error();
  for (const Operands& o : all) EXPECT_EQ(o.y.bytes(), all[0].y.bytes());
}

}  // namespace
}  // namespace boundary
