// An adapter learns what a frozen layer's output lacks. It begins with 8 triplets, and 2 are enough.
#include <adalora.hpp>
#include <algorithm>
#include <iostream>
#include <random>
#include <vector>

using adalora::View;

// One of the adapter's matrices A, E and B: parameters, gradients, and what AdamW and the scores keep for each element.
struct Trained {
  Trained(std::int32_t which, std::size_t n) : matrix(which), p(n), g(n), m(n), v(n), ipt(n), unc(n) {}
  std::int32_t matrix;
  std::vector<float> p, g, m, v, ipt, unc;
};

int main() {
  constexpr std::int64_t in = 32, out = 16, tokens = 64, rank = 8, steps = 500;
  // Made-up data: the layer's input x, its frozen output, and what is wanted: that output with inputs added.
  std::mt19937 engine(1);
  std::normal_distribution<float> normal;
  std::vector<float> x(tokens * in), frozen(tokens * out);
  for (auto* values : {&x, &frozen}) std::generate(values->begin(), values->end(), [&] { return normal(engine); });
  std::vector<float> wanted = frozen, y(tokens * out), dy(tokens * out);
  for (std::size_t k = 0; k < wanted.size(); ++k) wanted[k] += x[k / out * in + k % 2];  // Row k / out, input 0 or 1.

  adalora::ContextDesc cpu;  // Descriptors begin as zeros, and zero means the default.
  cpu.backend = ADALORA_BACKEND_CPU;
  adalora::Context context(cpu);
  adalora::AdapterDesc geometry;
  geometry.in_features = in, geometry.out_features = out, geometry.rank = rank;
  geometry.param_dtype = geometry.activation_dtype = ADALORA_FLOAT32;
  adalora::Adapter adapter(context, geometry);

  // All memory is yours. A call says where the operands of forward and backward are.
  Trained A(ADALORA_MATRIX_A, rank * in), E(ADALORA_MATRIX_E, rank), B(ADALORA_MATRIX_B, out * rank);
  const adalora_matrix_t input = View(x.data(), tokens, in);
  adalora::Call call;
  call.adapter = adapter.get();
  call.params = {View(A.p.data(), rank, in), View(E.p.data(), rank), View(B.p.data(), out, rank)};
  call.grads = {View(A.g.data(), rank, in), View(E.g.data(), rank), View(B.g.data(), out, rank)};
  call.y = View(y.data(), tokens, out), call.dy = View(dy.data(), tokens, out);
  adapter.initialize(call.params, /*seed*/ 1);
  adalora::Buffer workspace(adalora::sizes(call, tokens).workspace);

  // The allocator shares a falling budget of triplets among all adapters of a model; here there is one.
  adalora::AllocatorDesc schedule;
  schedule.target_rank = 2, schedule.beta1 = schedule.beta2 = 0.85;
  schedule.tinit = 50, schedule.tfinal = 200, schedule.total_step = steps, schedule.delta_t = 10;
  adalora::Allocator allocator(context, schedule, {adapter});
  std::vector<adalora::Slice> slices;
  for (Trained* t : {&A, &E, &B}) {
    adalora::Slice& slice = slices.emplace_back();
    slice.matrix = t->matrix, slice.end = static_cast<std::int64_t>(t->p.size());
    slice.p = t->p.data(), slice.g = t->g.data(), slice.m = t->m.data(), slice.v = t->v.data();
    slice.exp_avg_ipt = t->ipt.data(), slice.exp_avg_unc = t->unc.data();
  }
  const double lr = 0.03, weight_decay = 0;
  adalora::Hyper adamw;
  adamw.lr = &lr, adamw.weight_decay = &weight_decay, adamw.beta1 = 0.9, adamw.beta2 = 0.999, adamw.eps = 1e-8;
  adalora::Buffer state(allocator.sizes(3).state), step_workspace(allocator.sizes(3).workspace);  // For 3 slices.
  allocator.bind(state.data(), step_workspace.data(), slices, adamw);

  for (std::int64_t step = 1; step <= steps; ++step) {
    y = frozen;  // The adapter adds to the layer's output.
    adalora::forward(call, ADALORA_STAGE_BOTH, input, workspace.data(), workspace.size());
    double loss = 0;
    for (std::size_t k = 0; k < y.size(); ++k) {
      dy[k] = 2 * (y[k] - wanted[k]) / static_cast<float>(y.size());
      loss += (y[k] - wanted[k]) * (y[k] - wanted[k]) / static_cast<double>(y.size());
    }
    adalora::backward(call, ADALORA_STAGE_BOTH, false, input, std::nullopt, workspace.data(), workspace.size());
    allocator.orthogonality(/*gram*/ nullptr, /*weight*/ 0.01);  // Holds A and B near orthonormal.
    adalora::Step now;
    now.step = &step;
    allocator.step(now, /*with_adamw*/ true);  // AdamW, scores, and a new choice of triplets where one is due.
    if (step % 50 == 0) std::cout << step << ": loss " << loss << ", rank " << allocator.read_sync().ranks[0] << "\n";
  }
}
