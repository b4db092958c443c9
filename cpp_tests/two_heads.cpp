// A trainer of two frozen heads that read one input, in grouped calls. One head lacks a change of rank 3, the other one
// of rank 1; both begin with 6 triplets, and together they may keep 4. The run is also resumed from checkpoints of
// several steps, and in the end the adapters are merged. Returns 0 where all of it holds.
#include <adalora.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iostream>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <vector>

using adalora::View;
using Values = std::vector<float>;

constexpr std::int64_t in = 24, tokens = 48, rank = 6, target_rank = 2, steps = 400;
constexpr std::array<std::int64_t, 2> outs = {16, 8}, lacking = {3, 1};
constexpr std::array<const char*, 2> module_names = {"heads.wide", "heads.narrow"};

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

struct Trainer {
  explicit Trainer(adalora::Context& in_context) : context(in_context) {
    std::vector<adalora::Slice> slices;
    for (std::size_t k = 0; k < heads.size(); ++k) {
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

  /// What a run needs beside the adapters to go on, each with its name: AdamW's moments, the averages of importance,
  /// the allocator's state, the step.
  struct Part {
    std::string name;
    void* data;
    std::int64_t bytes;
  };
  std::vector<Part> parts(std::vector<std::byte>& of_allocator) {
    std::vector<Part> parts;
    for (std::size_t k = 0; k < heads.size(); ++k) {
      for (Trained& t : heads[k].triplets) {
        const std::string of = std::to_string(k) + "/" + std::to_string(t.matrix) + "/";
        const auto add = [&](const char* name, Values& values) {
          parts.push_back({of + name, values.data(), static_cast<std::int64_t>(values.size() * sizeof(float))});
        };
        add("m", t.m), add("v", t.v), add("ipt", t.ipt), add("unc", t.unc);
      }
    }
    parts.push_back({"allocator", of_allocator.data(), static_cast<std::int64_t>(of_allocator.size())});
    parts.push_back({"step", &step, sizeof step});
    return parts;
  }

  /// Where modules have these names, PEFT loads the adapters.
  void save(const std::string& folder) {
    std::vector<adalora::AdapterEntry> adapters(heads.size());
    for (std::size_t k = 0; k < heads.size(); ++k) {
      adapters[k].name = module_names[k], adapters[k].params = heads[k].matrices(&Trained::p), adapters[k].rank = rank;
    }
    std::vector<std::byte> of_allocator = allocator.save_state_sync();
    const std::vector<Part> state = parts(of_allocator);
    std::vector<adalora::Tensor> tensors;
    for (const Part& part : state) {
      adalora::Tensor& tensor = tensors.emplace_back();
      tensor.name = part.name.c_str(), tensor.data = part.data, tensor.dtype = ADALORA_UINT8;
      tensor.n_dims = 1, tensor.shape = &part.bytes;
    }
    adalora::CheckpointDesc desc;
    desc.folder = folder.c_str(), desc.state = "two heads";
    desc.config = R"({"lora_alpha": 0, "target_r": 2, "tinit": 40, "tfinal": 150, "deltaT": 10, "total_step": 400})";
    adalora::Checkpoint::write(desc, adapters, {}, tensors);
  }

  /// Goes on where `save` was called.
  void load(const std::string& folder) {
    const adalora::Checkpoint from(folder, ADALORA_FILES_ALL);
    const std::vector<adalora::AdapterInfo> adapters = from.adapters();
    for (std::size_t i = 0; i < adapters.size(); ++i) {
      const std::size_t k = adapters[i].name == std::string(module_names[1]);
      from.read_adapter(static_cast<std::int64_t>(i), heads[k].matrices(&Trained::p));
    }
    std::vector<std::byte> of_allocator(allocator.save_state_sync().size());
    const std::vector<Part> state = parts(of_allocator);
    const std::vector<adalora::Tensor> tensors = from.tensors(ADALORA_FILES_STATE);
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      for (const Part& part : state) {
        if (tensors[i].name != part.name) continue;
        from.read_tensor(ADALORA_FILES_STATE, static_cast<std::int64_t>(i), part.data,
                         static_cast<std::size_t>(part.bytes));
      }
    }
    allocator.load_state_sync(of_allocator);
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

int main(int argc, char** argv) try {
  int failures = 0;
  const auto check = [&](bool holds, const char* what) {
    if (!holds) std::cerr << "does not hold: " << what << "\n", ++failures;
  };
  adalora::ContextDesc cpu;
  cpu.backend = ADALORA_BACKEND_CPU;
  adalora::Context context(cpu);
  const Values x = normal(1, tokens * in);

  const std::filesystem::path folder = argc > 1 ? argv[1] : "two_heads_checkpoints";
  const std::array<std::int64_t, 6> stops = {1, 55, 105, 250, 251, steps};  // Before, while and after the budget falls.
  Trainer trainer(context);
  const double before = trainer.forward(x, trainer.calls(&Head::whole));
  for (const std::int64_t stop : stops) trainer.train_until(stop), trainer.save(folder / std::to_string(stop));
  const double after = trainer.forward(x, trainer.calls(&Head::whole));
  const adalora::Snapshot end = trainer.allocator.read_sync();
  std::cout << "loss " << before << " -> " << after << ", ranks " << end.ranks[0] << " and " << end.ranks[1] << "\n";
  check(after < before / 50, "the loss fell to a fiftieth");
  check(end.report.is_final && end.report.live_triplets == 2 * target_rank, "the budget is reached exactly");

  trainer.train_until(steps + 10);
  for (const std::int64_t stop : stops) {
    Trainer resumed(context);
    resumed.load(folder / std::to_string(stop));
    resumed.train_until(steps + 10);
    for (std::size_t k = 0; k < outs.size(); ++k) {
      for (std::size_t t = 0; t < 3; ++t) {
        const Trained &one = resumed.heads[k].triplets[t], &other = trainer.heads[k].triplets[t];
        check(one.p == other.p && one.v == other.v && one.unc == other.unc, "a resumed run ends with the same bits");
      }
    }
  }
  trainer.forward(x, trainer.calls(&Head::whole));
  for (std::size_t k = 0; k < outs.size(); ++k) {
    Head& head = trainer.heads[k];
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
