// The library's operations, one after the other on one thread, each of them a dump of callgrind's: see count.py.
#include <valgrind/callgrind.h>

#include <adalora.hpp>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using adalora::Buffer;
using adalora::View;

// The same values in every run, spread over [-1, 1).
class Values {
 public:
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<std::int64_t>(state_) >> 40) * 0x1p-23f;
  }

 private:
  std::uint64_t state_ = 1;
} values;

void assign(float& element, float value) { element = value; }

void assign(adalora::bfloat16& element, float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  element = static_cast<adalora::bfloat16>(bits >> 16);
}

// Elements on a cache line of their own, so that nothing depends on where the heap begins.
template <class T>
class Array {
 public:
  explicit Array(std::int64_t size) : size_(size), memory_(static_cast<std::size_t>(size) * sizeof(T)) {
    for (std::int64_t k = 0; k < size; ++k) assign(data()[k], values.next());
  }
  T* data() const { return static_cast<T*>(memory_.data()); }
  std::int64_t size() const { return size_; }

 private:
  std::int64_t size_;
  Buffer memory_;
};

// Counts what `operation` executes, and nothing around it.
void count(const std::string& name, const std::function<void()>& operation) {
  CALLGRIND_ZERO_STATS;
  CALLGRIND_TOGGLE_COLLECT;
  operation();
  CALLGRIND_TOGGLE_COLLECT;
  CALLGRIND_DUMP_STATS_AT(name.c_str());
}

struct Shape {
  std::int64_t tokens, in, out, rank;
  double dropout = 0;
  std::int64_t layers = 1;  // that read one x
  std::int64_t live = 0;    // triplets that a final pattern keeps; 0: there is none yet
};

template <class T>
constexpr const char* type_name = "float32";
template <>
constexpr const char* type_name<adalora::bfloat16> = "bfloat16";

// Forward and backward of layers with float32 parameters.
template <class Activation>
void passes(adalora::Context& context, const std::string& special, const Shape& s) {
  struct Layer {
    Layer(adalora::Context& context, const adalora::AdapterDesc& desc, const Shape& s)
        : adapter(context, desc),
          A(s.rank * s.in),
          E(s.rank),
          B(s.out * s.rank),
          dA(A.size()),
          dE(E.size()),
          dB(B.size()),
          y(s.tokens * s.out),
          dy(s.tokens * s.out),
          h(s.tokens * s.rank) {}
    adalora::Adapter adapter;
    Array<float> A, E, B, dA, dE, dB;
    Array<Activation> y, dy;
    Array<float> h;
  };
  adalora::AdapterDesc desc;
  desc.in_features = s.in, desc.out_features = s.out, desc.rank = s.rank, desc.dropout = s.dropout;
  desc.param_dtype = ADALORA_FLOAT32, desc.activation_dtype = adalora::dtype<Activation>;
  const Array<Activation> x(s.tokens * s.in), dx(s.tokens * s.in);
  const std::uint64_t seed = 1, offset = 2;
  std::vector<std::uint8_t> pattern(static_cast<std::size_t>(s.rank));
  for (std::int64_t k = 0; k < s.live; ++k) pattern[static_cast<std::size_t>(k * s.rank / s.live)] = 1;
  std::deque<Layer> layers;
  std::vector<adalora::Call> calls(static_cast<std::size_t>(s.layers));
  for (adalora::Call& call : calls) {
    const Layer& l = layers.emplace_back(context, desc, s);
    call.adapter = l.adapter.get();
    call.params = {View(l.A.data(), s.rank, s.in), View(l.E.data(), s.rank), View(l.B.data(), s.out, s.rank)};
    call.grads = {View(l.dA.data(), s.rank, s.in), View(l.dE.data(), s.rank), View(l.dB.data(), s.out, s.rank)};
    call.y = View(l.y.data(), s.tokens, s.out), call.dy = View(l.dy.data(), s.tokens, s.out);
    call.h = l.h.data();
    if (s.live > 0) call.pattern = pattern.data();
    if (s.dropout > 0) call.dropout = {&seed, &offset, 0};
  }
  const Buffer workspace(adalora::sizes(calls, s.tokens).workspace);
  const adalora_matrix_t input = View(x.data(), s.tokens, s.in), input_gradient = View(dx.data(), s.tokens, s.in);
  const std::string what = " " + std::to_string(s.tokens) + "x" + std::to_string(s.in) + "x" + std::to_string(s.out) +
                           " rank " + std::to_string(s.rank) + " " + type_name<Activation> + special;
  count("forward" + what,
        [&] { adalora::forward(calls, ADALORA_STAGE_BOTH, input, workspace.data(), workspace.size()); });
  count("backward" + what, [&] {
    adalora::backward(calls, ADALORA_STAGE_BOTH, false, input, input_gradient, workspace.data(), workspace.size());
  });
}

// Merging of one layer, and what an allocator does with several in a step that masks. Low: the type that the forward
// pass reads; where it is half precision, the optimiser keeps a float32 master.
template <class Low>
void updates(adalora::Context& context, std::int64_t in, std::int64_t out, std::int64_t rank) {
  constexpr bool has_master = adalora::dtype<Low> != ADALORA_FLOAT32;
  constexpr std::int64_t layers = 4;
  struct Trained {
    explicit Trained(std::int64_t n) : p(n), m(n), v(n), ipt(n), unc(n), low(n), g(n) {
      for (const Array<float>* of_squares : {&v, &ipt, &unc})
        for (std::int64_t k = 0; k < n; ++k) of_squares->data()[k] *= of_squares->data()[k];
    }
    Array<float> p, m, v, ipt, unc;
    Array<Low> low, g;
  };
  adalora::AdapterDesc desc;
  desc.in_features = in, desc.out_features = out, desc.rank = rank;
  desc.param_dtype = desc.activation_dtype = adalora::dtype<Low>;
  std::deque<adalora::Adapter> adapters;
  std::deque<Trained> tensors;
  std::vector<adalora::Slice> slices;
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    adapters.emplace_back(context, desc);
    for (const std::int32_t matrix : {ADALORA_MATRIX_A, ADALORA_MATRIX_E, ADALORA_MATRIX_B}) {
      const Trained& t = tensors.emplace_back(rank * (matrix == ADALORA_MATRIX_A   ? in
                                                      : matrix == ADALORA_MATRIX_E ? 1
                                                                                   : out));
      adalora::Slice& slice = slices.emplace_back();
      slice.adapter = layer, slice.matrix = matrix, slice.end = t.p.size();
      slice.p = t.p.data(), slice.g = t.g.data(), slice.m = t.m.data(), slice.v = t.v.data();
      slice.exp_avg_ipt = t.ipt.data(), slice.exp_avg_unc = t.unc.data();
      if (has_master) slice.p_low = t.low.data();
    }
  }
  adalora::AllocatorDesc schedule;
  schedule.target_rank = rank / 2, schedule.beta1 = schedule.beta2 = 0.85;
  schedule.tinit = 1, schedule.tfinal = 10, schedule.total_step = 100, schedule.delta_t = 1;
  adalora::Allocator allocator(context, schedule, {adapters.begin(), adapters.end()});
  const adalora::AllocatorSizes bytes = allocator.sizes(static_cast<std::int64_t>(slices.size()));
  const Buffer state(bytes.state), workspace(bytes.workspace);
  const double lr = 1e-4, weight_decay = 0.01;
  adalora::Hyper adamw;
  adamw.lr = &lr, adamw.weight_decay = &weight_decay, adamw.beta1 = 0.9, adamw.beta2 = 0.999, adamw.eps = 1e-8;
  allocator.bind(state.data(), workspace.data(), slices, adamw);

  const std::string what = " " + std::to_string(layers) + " of " + std::to_string(in) + "x" + std::to_string(out) +
                           " rank " + std::to_string(rank) + " " + type_name<Low>;
  double penalty = 0, squares = 0;
  float found_inf = 0;
  count("orthogonality" + what, [&] { allocator.orthogonality(nullptr, 0.1, nullptr, &penalty); });
  count("gradient norm" + what, [&] { allocator.gradient_norm(nullptr, &squares, &found_inf); });
  if (found_inf != 0) throw std::runtime_error("a gradient is not finite: the step would do nothing");
  const std::int64_t number = 50;
  const double factor = 0.5;
  adalora::Step step;
  step.step = &number, step.grad_factor = &factor, step.found_inf = &found_inf;
  count("step with AdamW and mask" + what, [&] { allocator.step(step, true); });

  const Array<Low> w(out * in), backup(out * in);
  adalora_triplets_t params{View(tensors[0].low.data(), rank, in), View(tensors[1].low.data(), rank),
                            View(tensors[2].low.data(), out, rank)};
  count("merge 1 of" + what.substr(what.find(" of ") + 3),
        [&] { adapters[0].merge(params, 0, false, View(w.data(), out, in), View(backup.data(), out, in)); });
}

}  // namespace

int main() {
  adalora::ContextDesc desc;
  desc.backend = ADALORA_BACKEND_CPU, desc.threads = 1;
  adalora::Context context(desc);
  context.prepare();
  std::cout << context.describe() << std::endl;
  using adalora::bfloat16;
  passes<float>(context, "", {512, 768, 768, 12});
  passes<float>(context, "", {64, 768, 768, 12});
  passes<float>(context, "", {128, 768, 768, 5});
  passes<float>(context, "", {128, 768, 768, 64});
  passes<bfloat16>(context, "", {128, 768, 768, 12});
  passes<bfloat16>(context, "", {128, 768, 768, 7});
  passes<float>(context, ", dropout", {128, 768, 768, 12, 0.1});
  passes<float>(context, ", 3 layers", {128, 768, 768, 12, 0, 3});
  passes<float>(context, ", 4 live", {128, 768, 768, 12, 0, 1, 4});
  updates<float>(context, 768, 768, 12);
  updates<float>(context, 384, 384, 64);
  updates<bfloat16>(context, 768, 768, 12);
}
