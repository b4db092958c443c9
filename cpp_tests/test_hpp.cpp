// adalora.hpp: what it adds to the C interface, and that every function is reached with its arguments in place. The
// arithmetic itself is tested elsewhere, through the C interface.
#include <gtest/gtest.h>

#include <adalora.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

adalora::Context context_from_second_unit();

namespace {

using adalora::View;

template <class Object>
constexpr bool is_move_only =
    std::is_nothrow_move_constructible_v<Object> && std::is_nothrow_move_assignable_v<Object> &&
    !std::is_copy_constructible_v<Object> && !std::is_copy_assignable_v<Object>;
static_assert(is_move_only<adalora::Context>);
static_assert(is_move_only<adalora::Adapter>);
static_assert(is_move_only<adalora::Allocator>);
static_assert(is_move_only<adalora::Buffer>);

static_assert(std::is_convertible_v<View<float>, adalora_matrix_t>);
static_assert(!std::is_convertible_v<View<const float>, adalora_matrix_t>);
static_assert(sizeof(adalora::bfloat16) == 2 && sizeof(adalora::float16) == 2);

/// The status of the error that `body` throws, whose text must hold `part`.
template <class Body>
adalora_status_t status_of(Body body, const std::string& part = "") {
  try {
    body();
  } catch (const adalora::Error& error) {
    EXPECT_NE(std::string(error.what()), "");
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    return error.status();
  }
  return ADALORA_SUCCESS;
}

constexpr std::int64_t in = 5, out = 3, rank = 2, tokens = 4;

adalora::AdapterDesc geometry() {
  adalora::AdapterDesc desc;
  desc.in_features = in;
  desc.out_features = out;
  desc.rank = rank;
  desc.param_dtype = ADALORA_FLOAT64;
  desc.activation_dtype = ADALORA_FLOAT64;
  return desc;
}

adalora::AllocatorDesc schedule() {
  adalora::AllocatorDesc desc;
  desc.target_rank = 1;
  desc.tinit = 2;
  desc.tfinal = 4;
  desc.total_step = 12;
  desc.delta_t = 2;
  desc.beta1 = 0.85;
  desc.beta2 = 0.85;
  return desc;
}

/// Different numbers without a pattern.
std::vector<double> numbers(std::int64_t n, double phase) {
  std::vector<double> values;
  for (std::int64_t i = 0; i < n; ++i) values.push_back(std::sin(phase + 1.7 * static_cast<double>(i)));
  return values;
}

/// A matrix of an adapter in every role, with numbers for parameters and gradients.
struct Trained {
  std::vector<double> p, g, m, v, ipt, unc;
  Trained(std::int64_t n, double phase)
      : p(numbers(n, phase)), g(numbers(n, phase + 0.5)), m(p.size()), v(p.size()), ipt(p.size()), unc(p.size()) {}
};

/// A layer's operands.
struct Layer {
  adalora::Adapter adapter;
  Trained A, E, B;
  std::vector<double> x, y, dy, dx, h, g;

  Layer(adalora::Context& context, double phase)
      : adapter(context, geometry()),
        A(rank * in, phase),
        E(rank, phase + 1),
        B(out * rank, phase + 2),
        x(numbers(tokens * in, phase + 3)),
        y(tokens * out),
        dy(numbers(tokens * out, phase + 4)),
        dx(tokens * in),
        h(tokens * rank),
        g(tokens * rank) {}

  adalora_triplets_t params() {
    return {View(A.p.data(), rank, in), View(E.p.data(), rank), View(B.p.data(), out, rank)};
  }

  View<const double> input() const { return {x.data(), tokens, in}; }

  adalora::Call call() {
    adalora::Call call;
    call.adapter = adapter.get();
    call.params = params();
    call.grads = {View(A.g.data(), rank, in), View(E.g.data(), rank), View(B.g.data(), out, rank)};
    call.y = View(y.data(), tokens, out);
    call.dy = View(dy.data(), tokens, out);
    call.h = h.data();
    call.g = g.data();
    return call;
  }

  /// scaling * B diag(E) A, [out, in].
  std::vector<double> delta() const {
    const double scaling = static_cast<double>(rank) / (static_cast<double>(rank) + 1e-5);
    std::vector<double> w(out * in);
    for (std::size_t o = 0; o < out; ++o)
      for (std::size_t r = 0; r < rank; ++r)
        for (std::size_t i = 0; i < in; ++i) w[o * in + i] += scaling * B.p[o * rank + r] * E.p[r] * A.p[r * in + i];
    return w;
  }
};

void expect_near(const std::vector<double>& found, const std::vector<double>& expected, double tolerance = 1e-12) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) EXPECT_NEAR(found[i], expected[i], tolerance) << "element " << i;
}

/// Two layers and an allocator that is bound to them.
struct Model {
  adalora::Context context = context_from_second_unit();
  Layer first{context, 0.1}, second{context, 0.2};
  adalora::Allocator allocator{context, schedule(), {first.adapter, second.adapter}};
  double lr = 0.01, weight_decay = 0.1;
  adalora::Buffer state, workspace;
  std::vector<double> gram;

  Model() {
    std::vector<adalora::Slice> slices;
    for (std::int64_t k = 0; k < 2; ++k) {
      Layer& layer = k == 0 ? first : second;
      const std::pair<std::int32_t, Trained*> matrices[] = {
          {ADALORA_MATRIX_A, &layer.A}, {ADALORA_MATRIX_E, &layer.E}, {ADALORA_MATRIX_B, &layer.B}};
      for (const auto& [matrix, trained] : matrices) {
        adalora::Slice slice;
        slice.adapter = k;
        slice.matrix = matrix;
        slice.end = static_cast<std::int64_t>(trained->p.size());
        slice.p = trained->p.data();
        slice.g = trained->g.data();
        slice.m = trained->m.data();
        slice.v = trained->v.data();
        slice.exp_avg_ipt = trained->ipt.data();
        slice.exp_avg_unc = trained->unc.data();
        slices.push_back(slice);
      }
    }
    adalora::Hyper hyper;
    hyper.lr = &lr;
    hyper.weight_decay = &weight_decay;
    hyper.beta1 = 0.9;
    hyper.beta2 = 0.999;
    hyper.eps = 1e-8;
    const adalora::AllocatorSizes bytes = allocator.sizes(6);
    state = adalora::Buffer(bytes.state);
    workspace = adalora::Buffer(bytes.workspace);
    gram.resize(bytes.gram / sizeof(double));
    allocator.bind(state.data(), workspace.data(), slices, hyper);
  }

  void run(std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      adalora::Step step;
      step.step = &t;
      allocator.step(step, true);
    }
  }

  std::vector<Trained*> trained() { return {&first.A, &first.E, &first.B, &second.A, &second.E, &second.B}; }
};

void expect_equal(Model& one, Model& other) {
  for (std::size_t i = 0; i < one.trained().size(); ++i) {
    EXPECT_EQ(one.trained()[i]->p, other.trained()[i]->p) << "matrix " << i;
    EXPECT_EQ(one.trained()[i]->ipt, other.trained()[i]->ipt) << "matrix " << i;
    EXPECT_EQ(one.trained()[i]->unc, other.trained()[i]->unc) << "matrix " << i;
  }
  EXPECT_EQ(one.allocator.read_sync().pattern, other.allocator.read_sync().pattern);
}

// What the header adds -----------------------------------------------------------------------------------------------

TEST(Hpp, ViewsCarryShapeAndElementType) {
  std::vector<float> data(12);
  const adalora_matrix_t matrix = View(data.data(), 3, 2, 4);
  EXPECT_EQ(matrix.data, data.data());
  EXPECT_EQ(matrix.rows, 3);
  EXPECT_EQ(matrix.columns, 2);
  EXPECT_EQ(matrix.row_stride, 4);
  EXPECT_EQ(matrix.dtype, ADALORA_FLOAT32);
  EXPECT_EQ(matrix.reserved, 0);

  const adalora_matrix_t vector = View(data.data(), 12);
  EXPECT_EQ(vector.rows, 1);
  EXPECT_EQ(vector.columns, 12);
  EXPECT_EQ(vector.row_stride, 0);

  const std::vector<double> constant(4);
  EXPECT_EQ(View(constant.data(), 2, 2).read_only().data, constant.data());
  EXPECT_EQ(View(constant.data(), 2, 2).read_only().dtype, ADALORA_FLOAT64);
  std::array<adalora::bfloat16, 2> brain{};
  EXPECT_EQ(adalora_matrix_t(View(brain.data(), 2)).dtype, ADALORA_BFLOAT16);
  std::array<adalora::float16, 2> half{};
  EXPECT_EQ(adalora_matrix_t(View(half.data(), 2)).dtype, ADALORA_FLOAT16);
}

template <class Descriptor>
void expect_only_struct_size(const adalora::Sized<Descriptor>& sized) {
  Descriptor plain;
  std::memset(&plain, 0, sizeof plain);
  plain.struct_size = sizeof plain;
  const Descriptor& descriptor = sized;
  EXPECT_EQ(std::memcmp(&descriptor, &plain, sizeof plain), 0);
}

TEST(Hpp, DescriptorsBeginWithTheirSizeAndZeros) {
  expect_only_struct_size(adalora::ContextDesc());
  expect_only_struct_size(adalora::AdapterDesc());
  expect_only_struct_size(adalora::AllocatorDesc());
  expect_only_struct_size(adalora::Call());
  expect_only_struct_size(adalora::Slice());
  expect_only_struct_size(adalora::Hyper());
  expect_only_struct_size(adalora::Step());
  expect_only_struct_size(adalora::Report());
}

TEST(Hpp, SpansTakeOneDescriptorOrAContainer) {
  const adalora::Step one;
  EXPECT_EQ(adalora::Span<adalora::Step>(one).data(), &one);
  EXPECT_EQ(adalora::Span<adalora::Step>(one).size(), 1);
  const std::vector<adalora::Step> several(3);
  EXPECT_EQ(adalora::Span<adalora::Step>(several).data(), several.data());
  EXPECT_EQ(adalora::Span<adalora::Step>(several).size(), 3);
  EXPECT_EQ(adalora::Span<adalora::Step>().size(), 0);
  // The elements of a container have to be the descriptors themselves, or the stride would be wrong.
  struct Longer : adalora::Step {
    int more = 0;
  };
  static_assert(!std::is_constructible_v<adalora::Span<adalora::Step>, const std::vector<Longer>&>);
}

TEST(Hpp, BuffersAreAlignedAndZero) {
  const adalora::Buffer buffer(1000);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % 64, 0u);
  const auto* bytes = static_cast<const unsigned char*>(buffer.data());
  EXPECT_TRUE(std::all_of(bytes, bytes + buffer.size(), [](unsigned char byte) { return byte == 0; }));
  EXPECT_EQ(adalora::Buffer().data(), nullptr);
  EXPECT_EQ(adalora::Buffer(0).size(), 0u);
}

TEST(Hpp, AnotherAbiVersionIsRefused) {
  adalora::detail::require_abi_version(ADALORA_ABI_VERSION);
  const std::uint32_t other = ADALORA_ABI_VERSION + 41;
  const auto call = [&] { adalora::detail::require_abi_version(other); };
  EXPECT_EQ(status_of(call, std::to_string(other)), ADALORA_ERROR_UNSUPPORTED);
  status_of(call, std::to_string(ADALORA_ABI_VERSION));
}

TEST(Hpp, ErrorsCarryStatusAndText) {
  const adalora::ContextDesc empty;
  EXPECT_EQ(status_of([&] { adalora::Context context(empty); }, "backend"), ADALORA_ERROR_INVALID_ARGUMENT);
  adalora::Context context = context_from_second_unit();
  adalora::AdapterDesc desc = geometry();
  desc.in_features = 0;
  EXPECT_EQ(status_of([&] { adalora::Adapter(context, desc); }, "in_features"), ADALORA_ERROR_INVALID_ARGUMENT);
  const adalora::Adapter adapter(context, geometry());
  adalora::AllocatorDesc never = schedule();
  never.delta_t = 0;
  EXPECT_EQ(status_of([&] { adalora::Allocator(context, never, {adapter}); }, "delta_t"),
            ADALORA_ERROR_INVALID_ARGUMENT);
}

TEST(Hpp, AMovedFromObjectIsRefusedAndTheOtherGoesOn) {
  adalora::Context context = context_from_second_unit();
  adalora::Context other = std::move(context);
  EXPECT_EQ(status_of([&] { context.prepare(); }), ADALORA_ERROR_INVALID_HANDLE);
  other.prepare();
  context = std::move(other);
  context.prepare();
}

TEST(Hpp, ObjectsMayBeDestroyedInAnyOrder) {
  auto context = std::make_unique<adalora::Context>(context_from_second_unit());
  auto adapter = std::make_unique<adalora::Adapter>(*context, geometry());
  adalora::Allocator allocator(*context, schedule(), {*adapter});
  adapter.reset();
  context.reset();
  EXPECT_EQ(allocator.budget(0).budget, rank);
}

// Context ------------------------------------------------------------------------------------------------------------

TEST(HppContext, DescribesItself) {
  const std::string text = context_from_second_unit().describe();
  EXPECT_FALSE(text.empty());
  EXPECT_EQ(text.find('\0'), std::string::npos);
}

TEST(HppContext, GradientFactorClipsAndUnscales) {
  const adalora::Context context = context_from_second_unit();
  const double sum_of_squares = 16 * 100, loss_scale = 4;
  double factor = 0;
  context.gradient_factor(&sum_of_squares, &loss_scale, 2.0, &factor);
  EXPECT_DOUBLE_EQ(factor, 2.0 / (10 + 1e-6) / 4);
  context.gradient_factor(&sum_of_squares, nullptr, std::numeric_limits<double>::infinity(), &factor);
  EXPECT_EQ(factor, 1);
}

// Adapter ------------------------------------------------------------------------------------------------------------

TEST(HppAdapter, InitializeLeavesEZero) {
  adalora::Context context = context_from_second_unit();
  Layer layer(context, 0);
  layer.adapter.initialize(layer.params(), 7);
  EXPECT_EQ(layer.E.p, std::vector<double>(rank));
  const std::vector<double> seven = layer.A.p;
  EXPECT_NE(seven, std::vector<double>(rank * in));
  layer.adapter.initialize(layer.params(), 8);
  EXPECT_NE(layer.A.p, seven);
}

TEST(HppAdapter, DeltaWeightInBothLayouts) {
  adalora::Context context = context_from_second_unit();
  Layer layer(context, 0);
  std::vector<double> w(out * in, 1), transposed(in * out), expected = layer.delta();
  layer.adapter.delta_weight(layer.params(), 0, true, false, View(transposed.data(), in, out));
  for (std::size_t o = 0; o < out; ++o)
    for (std::size_t i = 0; i < in; ++i) EXPECT_NEAR(transposed[i * out + o], expected[o * in + i], 1e-12);
  layer.adapter.delta_weight(layer.params(), 0, false, true, View(w.data(), out, in));
  for (double& value : expected) value += 1;
  expect_near(w, expected);
}

TEST(HppAdapter, MergeAndUnmerge) {
  adalora::Context context = context_from_second_unit();
  Layer layer(context, 0);
  const std::vector<double> base = numbers(out * in, 9);
  std::vector<double> w = base, backup(w.size()), expected = layer.delta();
  for (std::size_t i = 0; i < w.size(); ++i) expected[i] += base[i];
  const View<double> view(w.data(), out, in);
  float non_finite = 0;

  layer.adapter.merge(layer.params(), 0, false, view, View(backup.data(), out, in), &non_finite);
  expect_near(w, expected);
  EXPECT_EQ(backup, base);
  EXPECT_EQ(non_finite, 0);
  layer.adapter.unmerge(std::nullopt, 0, false, view, View(backup.data(), out, in));
  EXPECT_EQ(w, base);

  layer.adapter.merge(layer.params(), 0, false, view);
  layer.adapter.unmerge(layer.params(), 0, false, view);
  expect_near(w, base);
}

TEST(HppAdapter, ForwardAddsAndBackwardOverwritesOrAdds) {
  adalora::Context context = context_from_second_unit();
  Layer layer(context, 0);
  const adalora::Call call = layer.call();
  const adalora::CallSizes bytes = adalora::sizes(call, tokens);
  ASSERT_EQ(bytes.saved, std::vector<std::size_t>{tokens * rank * sizeof(double)});
  const adalora::Buffer workspace(bytes.workspace);
  const std::vector<double> delta = layer.delta();
  std::vector<double> y(tokens * out, 1), dx(tokens * in, 1);
  for (std::size_t t = 0; t < tokens; ++t)
    for (std::size_t o = 0; o < out; ++o)
      for (std::size_t i = 0; i < in; ++i) {
        y[t * out + o] += layer.x[t * in + i] * delta[o * in + i];
        dx[t * in + i] += layer.dy[t * out + o] * delta[o * in + i];
      }

  std::fill(layer.y.begin(), layer.y.end(), 1);
  adalora::forward(call, ADALORA_STAGE_BOTH, layer.input().read_only(), workspace.data(), workspace.size());
  expect_near(layer.y, y);

  std::fill(layer.dx.begin(), layer.dx.end(), 1);
  adalora::backward(call, ADALORA_STAGE_BOTH, false, layer.input().read_only(), View(layer.dx.data(), tokens, in),
                    workspace.data(), workspace.size());
  expect_near(layer.dx, dx);
  const std::vector<double> once = layer.A.g;
  adalora::backward(call, ADALORA_STAGE_BOTH, true, layer.input().read_only(), std::nullopt, workspace.data(),
                    workspace.size());
  std::vector<double> twice = once;
  for (double& value : twice) value *= 2;
  expect_near(layer.A.g, twice);
}

TEST(HppAdapter, StagesAndGroupsGiveWhatOneCallGives) {
  adalora::Context context = context_from_second_unit();
  Layer whole(context, 0), staged(context, 0), other(context, 0.3);
  const std::vector<adalora::Call> calls = {staged.call(), other.call()};
  const adalora::CallSizes bytes = adalora::sizes(calls, tokens);
  EXPECT_EQ(bytes.saved.size(), 2u);
  const adalora::Buffer workspace(bytes.workspace);
  const adalora_matrix_t x = whole.input().read_only();

  adalora::forward(whole.call(), ADALORA_STAGE_BOTH, x, workspace.data(), workspace.size());
  adalora::backward(whole.call(), ADALORA_STAGE_BOTH, false, x, std::nullopt, workspace.data(), workspace.size());
  adalora::forward(calls, ADALORA_STAGE_PROJECT, x, workspace.data(), workspace.size());
  adalora::forward(calls, ADALORA_STAGE_EXPAND, std::nullopt, workspace.data(), workspace.size());
  adalora::backward(calls, ADALORA_STAGE_PROJECT, false, std::nullopt, std::nullopt, workspace.data(),
                    workspace.size());
  adalora::backward(calls, ADALORA_STAGE_EXPAND, false, x, std::nullopt, workspace.data(), workspace.size());
  expect_near(staged.y, whole.y);
  expect_near(staged.A.g, whole.A.g);
  expect_near(staged.E.g, whole.E.g);
  expect_near(staged.B.g, whole.B.g);
}

TEST(HppAdapter, AShortWorkspaceIsRefused) {
  adalora::Context context = context_from_second_unit();
  Layer layer(context, 0);
  const adalora::Buffer workspace(64);
  const std::size_t needed = adalora::sizes(layer.call(), tokens).workspace;
  ASSERT_GT(needed, 0u);
  const auto call = [&] {
    adalora::forward(layer.call(), ADALORA_STAGE_BOTH, layer.input().read_only(), workspace.data(), needed - 1);
  };
  EXPECT_EQ(status_of(call, "workspace"), ADALORA_ERROR_INVALID_ARGUMENT);
}

// Allocator ----------------------------------------------------------------------------------------------------------

TEST(HppAllocator, Budget) {
  const Model model;
  EXPECT_EQ(model.allocator.total_rank(), 2 * rank);
  EXPECT_EQ(model.allocator.budget(0).budget, 4);
  EXPECT_FALSE(model.allocator.budget(0).masks);
  EXPECT_EQ(model.allocator.budget(4).budget, 2);  // trunc(2 * (1 - 2 / 6)^3 + 2)
  EXPECT_TRUE(model.allocator.budget(4).masks);
  EXPECT_EQ(model.allocator.budget(11).budget, 2);
}

TEST(HppAllocator, OrthogonalityWithAndWithoutGram) {
  Model computed, given;
  double penalty = 0, same = 0;
  const double factor = 8;
  computed.allocator.orthogonality(nullptr, 0.1, &factor, &penalty);
  given.allocator.gram(given.gram.data());
  given.allocator.orthogonality(given.gram.data(), 0.1, &factor, &same);
  EXPECT_GT(penalty, 0);
  EXPECT_DOUBLE_EQ(same, penalty);
  expect_near(given.first.A.g, computed.first.A.g);
  EXPECT_NE(computed.first.A.g, numbers(rank * in, 0.1 + 0.5));

  double expected = 0;  // of the first adapter's A A^T
  for (std::size_t i = 0; i < in; ++i) expected += computed.first.A.p[i] * computed.first.A.p[i];
  EXPECT_NEAR(given.gram[0], expected, 1e-12);
}

TEST(HppAllocator, GradientNorm) {
  Model model;
  double expected = 1, first = 0;
  for (const Trained* trained : model.trained())
    for (const double value : trained->g) expected += value * value;
  for (const Trained* trained : {&model.first.A, &model.first.E, &model.first.B})
    for (const double value : trained->g) first += value * value;

  double sum = 1;
  model.allocator.gradient_norm(nullptr, &sum);
  EXPECT_NEAR(sum, expected, 1e-12);
  const std::uint8_t has_grad[] = {1, 0};
  double part = 0;
  float found_inf = 0;
  model.second.A.g[0] = std::numeric_limits<double>::infinity();
  model.allocator.gradient_norm(has_grad, &part, &found_inf);
  EXPECT_NEAR(part, first, 1e-12);
  EXPECT_EQ(found_inf, 0);
  model.allocator.gradient_norm(nullptr, &part, &found_inf);
  EXPECT_EQ(found_inf, 1);
}

TEST(HppAllocator, ThePartsOfAStepGiveTheStep) {
  Model whole, parts;
  std::vector<double> scores(static_cast<std::size_t>(parts.allocator.total_rank()));
  whole.run(1, 7);
  for (std::int64_t t = 1; t < 7; ++t) {
    adalora::Step step;
    step.step = &t;
    parts.allocator.update(step, true);
    parts.allocator.scores(scores.data());
    parts.allocator.select(step, scores.data());
  }
  EXPECT_GT(*std::max_element(scores.begin(), scores.end()), 0);
  expect_equal(whole, parts);
}

TEST(HppAllocator, StepWithoutAdamwLeavesParametersAlone) {
  Model model;
  const std::int64_t t = 1;
  adalora::Step step;
  step.step = &t;
  const std::vector<double> before = model.first.A.p;
  model.allocator.step(step, false);
  EXPECT_EQ(model.first.A.p, before);
  EXPECT_NE(model.first.A.ipt, std::vector<double>(before.size()));
  EXPECT_EQ(model.allocator.read_sync().adam_steps, (std::vector<std::int64_t>{0, 0}));
}

TEST(HppAllocator, SnapshotSaysWhereTheRunStands) {
  Model model;
  const adalora::Snapshot fresh = model.allocator.read_sync();
  EXPECT_EQ(fresh.pattern, (std::vector<std::uint8_t>{1, 1, 1, 1}));
  EXPECT_EQ(fresh.ranks, (std::vector<std::int64_t>{rank, rank}));
  EXPECT_EQ(fresh.report.last_step, -1);

  model.run(1, 12);
  const adalora::Snapshot end = model.allocator.read_sync();
  EXPECT_EQ(end.report.last_step, 11);
  EXPECT_EQ(end.report.budget, 2);
  EXPECT_EQ(end.report.is_final, 1);
  EXPECT_EQ(end.ranks[0] + end.ranks[1], 2);
  EXPECT_EQ(end.adam_steps, (std::vector<std::int64_t>{11, 11}));
  for (std::size_t r = 0; r < rank; ++r) EXPECT_EQ(model.first.E.p[r] == 0, end.pattern[r] == 0);
}

TEST(HppAllocator, FinalizeTakesTheLastMaskNow) {
  Model model;
  model.run(1, 3);
  model.allocator.finalize();
  const adalora::Snapshot now = model.allocator.read_sync();
  EXPECT_EQ(now.report.is_final, 1);
  EXPECT_EQ(now.report.live_triplets, 2);
}

TEST(HppAllocator, ResetBeginsANewRun) {
  Model model;
  model.run(1, 12);
  model.allocator.reset();
  const adalora::Snapshot now = model.allocator.read_sync();
  EXPECT_EQ(now.report.last_step, -1);
  EXPECT_EQ(now.report.has_pattern, 0);
  EXPECT_EQ(model.first.A.m, std::vector<double>(rank * in));
}

TEST(HppAllocator, SetPatternAndDigest) {
  Model one, other;
  const std::vector<std::uint8_t> pattern = {1, 0, 0, 1};
  std::uint64_t before = 0, after = 0, same = 0;
  one.allocator.digest(&before);
  one.allocator.set_pattern(pattern.data(), true);
  one.allocator.digest(&after);
  EXPECT_NE(after, before);
  other.allocator.set_pattern(pattern.data(), true);
  other.allocator.digest(&same);
  EXPECT_EQ(same, after);
  EXPECT_EQ(one.allocator.read_sync().pattern, pattern);
  EXPECT_EQ(one.first.E.p[1], 0);
  EXPECT_EQ(one.allocator.read_sync().report.is_final, 1);
}

TEST(HppAllocator, AResumedRunContinuesBitForBit) {
  Model straight, resumed;
  straight.run(1, 12);
  {
    Model interrupted;
    interrupted.run(1, 5);
    const std::vector<std::byte> bytes = interrupted.allocator.save_state_sync();
    for (std::size_t i = 0; i < resumed.trained().size(); ++i) *resumed.trained()[i] = *interrupted.trained()[i];
    resumed.allocator.load_state_sync(bytes);
  }
  resumed.run(5, 12);
  expect_equal(straight, resumed);
}

TEST(HppAllocator, DamagedStateIsRefused) {
  Model model;
  std::vector<std::byte> bytes = model.allocator.save_state_sync();
  ASSERT_FALSE(bytes.empty());
  bytes[bytes.size() / 2] ^= std::byte{1};
  EXPECT_EQ(status_of([&] { model.allocator.load_state_sync(bytes); }), ADALORA_ERROR_CORRUPT_DATA);
  bytes = model.allocator.save_state_sync();
  bytes.pop_back();
  EXPECT_EQ(status_of([&] { model.allocator.load_state_sync(bytes); }), ADALORA_ERROR_CORRUPT_DATA);
  EXPECT_THROW(model.allocator.load_state_sync({}), adalora::Error);
}

TEST(HppAllocator, UnboundIsAnErrorOfState) {
  adalora::Context context = context_from_second_unit();
  const adalora::Adapter adapter(context, geometry());
  adalora::Allocator allocator(context, schedule(), {adapter});
  const std::int64_t t = 1;
  adalora::Step step;
  step.step = &t;
  EXPECT_EQ(status_of([&] { allocator.step(step, true); }, "bind"), ADALORA_ERROR_INVALID_STATE);
}

}  // namespace
