// A trainer of two frozen heads that read one input, in grouped calls. One head lacks a change of rank 3, the other one
// of rank 1; both begin with 6 triplets, and together they may keep 4. The run is also resumed from a checkpoint, and
// in the end the adapters are merged. Returns 0 where all of it holds.
#include <adalora.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

using adalora::View;
using Values = std::vector<float>;

constexpr std::int64_t in = 24, tokens = 48, rank = 6, target_rank = 2, steps = 400;
constexpr std::array<std::int64_t, 2> outs = {16, 8}, lacking = {3, 1};

Values normal(std::uint64_t seed, std::int64_t n) {
  std::mt19937_64 engine(seed);
  std::normal_distribution<float> distribution;
  Values values(n);
  std::generate(values.begin(), values.end(), [&] { return distribution(engine); });
  return values;
}

/// y = x W^T, for W of shape [out, in].
void linear(const Values& x, const Values& weight, Values& y) {
  const std::size_t out = weight.size() / in;
  for (std::size_t k = 0; k < y.size(); ++k) {
    const float* row = weight.data() + k % out * in;
    y[k] = std::inner_product(row, row + in, x.data() + k / out * in, 0.0f);
  }
}

/// One of the matrices A, E and B, and what training keeps for its elements.
struct Trained {
  Trained(std::int32_t which, std::int64_t n) : matrix(which), p(n), g(n), m(n), v(n), ipt(n), unc(n) {}
  std::int32_t matrix;
  Values p, g, m, v, ipt, unc;
};
using Triplets = std::array<Trained, 3>;

struct Head {
  Head(adalora::Context& context, std::size_t k)
      : base(normal(10 + k, outs[k] * in)),
        wanted(base),
        y(tokens * outs[k]),
        dy(y),
        dropout_seed(30 + k),
        dropping(context, desc(outs[k], 0.02)),
        whole(context, desc(outs[k], 0)),
        out(outs[k]) {
    const Values left = normal(20 + k, out * lacking[k]), right = normal(25 + k, lacking[k] * in);
    for (std::int64_t i = 0; i < out * lacking[k] * in; ++i) {  // wanted = base + 0.2 left right, product by product.
      const std::int64_t row = i / in / lacking[k], r = i / in % lacking[k], column = i % in;
      wanted[row * in + column] += 0.2f * left[row * lacking[k] + r] * right[r * in + column];
    }
    dropping.initialize(matrices(&Trained::p), 40 + k);
  }

  static adalora::AdapterDesc desc(std::int64_t out, double dropout) {
    adalora::AdapterDesc desc;
    desc.in_features = in, desc.out_features = out, desc.rank = rank, desc.dropout = dropout;
    desc.param_dtype = desc.activation_dtype = ADALORA_FLOAT32;
    return desc;
  }

  adalora_triplets_t matrices(Values Trained::* of) {
    auto& [A, E, B] = triplets;
    return {View((A.*of).data(), rank, in), View((E.*of).data(), rank), View((B.*of).data(), out, rank)};
  }

  adalora::Call call(const adalora::Adapter& adapter, const std::uint64_t* offset) {
    adalora::Call call;
    call.adapter = adapter.get(), call.params = matrices(&Trained::p), call.grads = matrices(&Trained::g);
    call.y = View(y.data(), tokens, out), call.dy = View(dy.data(), tokens, out);
    call.dropout.seed = &dropout_seed, call.dropout.offset = offset;
    return call;
  }

  Values base, wanted, y, dy;
  std::uint64_t dropout_seed;        // Its own, so that the heads drop different elements of x.
  adalora::Adapter dropping, whole;  // An adapter has its dropout for good: one for training, one for evaluation.
  std::int64_t out;
  Triplets triplets{Trained(ADALORA_MATRIX_A, rank* in), Trained(ADALORA_MATRIX_E, rank),
                    Trained(ADALORA_MATRIX_B, out* rank)};
};

/// With AdamW's moments and the averages of importance, which are in the triplets, a run goes on from here.
struct Checkpoint {
  std::vector<std::byte> allocator;
  std::array<Triplets, 2> triplets;
  std::int64_t step;
};

struct Trainer {
  explicit Trainer(adalora::Context& in_context, const Checkpoint* from = nullptr) : context(in_context) {
    std::vector<adalora::Slice> slices;
    for (std::size_t k = 0; k < heads.size(); ++k) {
      if (from) heads[k].triplets = from->triplets[k];
      for (Trained& t : heads[k].triplets) {
        adalora::Slice& slice = slices.emplace_back();
        slice.adapter = k, slice.matrix = t.matrix, slice.end = t.p.size();
        slice.p = t.p.data(), slice.g = t.g.data(), slice.m = t.m.data(), slice.v = t.v.data();
        slice.exp_avg_ipt = t.ipt.data(), slice.exp_avg_unc = t.unc.data();
      }
    }
    adalora::Hyper adamw;
    adamw.lr = &lr, adamw.weight_decay = &weight_decay, adamw.beta1 = 0.9, adamw.beta2 = 0.999, adamw.eps = 1e-8;
    const adalora::AllocatorSizes bytes = allocator.sizes(slices.size());
    state = adalora::Buffer(bytes.state), step_workspace = adalora::Buffer(bytes.workspace);
    allocator.bind(state.data(), step_workspace.data(), slices, adamw);
    if (from) allocator.load_state_sync(from->allocator), step = from->step;
    workspace = adalora::Buffer(adalora::sizes(calls(&Head::dropping), tokens).workspace);
  }
  Trainer(const Trainer&) = delete;  // The allocator keeps the members' addresses.

  static adalora::AllocatorDesc schedule() {
    adalora::AllocatorDesc desc;
    desc.target_rank = target_rank, desc.beta1 = desc.beta2 = 0.85;
    desc.tinit = 40, desc.tfinal = 150, desc.total_step = steps, desc.delta_t = 10;
    return desc;
  }

  std::vector<adalora::Call> calls(adalora::Adapter Head::* adapter, const std::uint64_t* offset = nullptr) {
    return {heads[0].call(heads[0].*adapter, offset), heads[1].call(heads[1].*adapter, offset)};
  }

  /// Leaves outputs in y and their gradients in dy; returns the sum of the heads' mean squared errors.
  double forward(const Values& x, const std::vector<adalora::Call>& group) {
    for (Head& head : heads) linear(x, head.base, head.y);
    adalora::forward(group, ADALORA_STAGE_BOTH, View(x.data(), tokens, in).read_only(), workspace.data(),
                     workspace.size());
    double loss = 0;
    for (Head& head : heads) {
      linear(x, head.wanted, head.dy);
      for (std::size_t k = 0; k < head.y.size(); ++k) {
        const float error = head.y[k] - head.dy[k];
        head.dy[k] = 2 * error / static_cast<float>(head.y.size()), loss += error * error / head.y.size();
      }
    }
    return loss;
  }

  void train_until(std::int64_t last) {
    while (step < last) {
      const std::uint64_t offset = ++step;  // Another step drops other elements.
      const Values x = normal(1000 + offset, tokens * in);
      const auto group = calls(&Head::dropping, &offset);
      forward(x, group);
      adalora::backward(group, ADALORA_STAGE_BOTH, /*accumulate*/ false, View(x.data(), tokens, in).read_only(),
                        std::nullopt, workspace.data(), workspace.size());

      allocator.orthogonality(/*gram*/ nullptr, /*weight*/ 0.02);
      double sum_of_squares = 0, grad_factor = 1;
      float found_inf = 0;
      allocator.gradient_norm(/*has_grad*/ nullptr, &sum_of_squares, &found_inf);
      context.gradient_factor(&sum_of_squares, /*loss_scale*/ nullptr, /*max_norm*/ 1, &grad_factor);
      lr = 0.03 * std::min(1.0, step / 20.0) * (1 + std::cos(std::acos(-1.0) * step / steps)) / 2;  // Up, then down.
      adalora::Step now;
      now.step = &step, now.grad_factor = &grad_factor, now.found_inf = &found_inf;
      allocator.step(now, /*with_adamw*/ true);
    }
  }

  adalora::Context& context;
  std::array<Head, 2> heads{Head(context, 0), Head(context, 1)};
  adalora::Allocator allocator{context, schedule(), {heads[0].dropping, heads[1].dropping}};
  adalora::Buffer state, step_workspace, workspace;
  double lr = 0, weight_decay = 0;
  std::int64_t step = 0;
};

int main() try {
  int failures = 0;
  const auto check = [&](bool holds, const char* what) {
    if (!holds) std::cerr << "does not hold: " << what << "\n", ++failures;
  };
  adalora::ContextDesc cpu;
  cpu.backend = ADALORA_BACKEND_CPU;
  adalora::Context context(cpu);
  const Values x = normal(1, tokens * in);

  Trainer trainer(context);
  const double before = trainer.forward(x, trainer.calls(&Head::whole));
  trainer.train_until(105);  // Between two masks, with the budget on its way down.
  const Checkpoint middle{
      trainer.allocator.save_state_sync(), {trainer.heads[0].triplets, trainer.heads[1].triplets}, trainer.step};
  trainer.train_until(steps);
  const double after = trainer.forward(x, trainer.calls(&Head::whole));
  const adalora::Snapshot end = trainer.allocator.read_sync();
  std::cout << "loss " << before << " -> " << after << ", ranks " << end.ranks[0] << " and " << end.ranks[1] << "\n";
  check(after < before / 50, "the loss fell to a fiftieth");
  check(end.report.is_final && end.report.live_triplets == 2 * target_rank, "the budget is reached exactly");

  Trainer resumed(context, &middle);
  resumed.train_until(steps);
  for (std::size_t k = 0; k < outs.size(); ++k) {
    Head& head = trainer.heads[k];
    for (std::size_t t = 0; t < head.triplets.size(); ++t) {
      check(resumed.heads[k].triplets[t].p == head.triplets[t].p, "a resumed run ends with the same bits");
    }
    Values weight = head.base, merged(head.y.size());
    head.whole.merge(head.matrices(&Trained::p), /*scaling*/ 0, false, View(weight.data(), head.out, in));
    linear(x, weight, merged);  // Beside head.y, which base and adapter computed from the same x.
    check(std::equal(merged.begin(), merged.end(), head.y.begin(),
                     [](float a, float b) { return std::abs(a - b) < 1e-4f; }),
          "the merged head computes what base and adapter did");
  }
  return failures == 0 ? 0 : 1;
} catch (const adalora::Error& error) {
  std::cerr << error.what() << "\n";
  return 1;
}
