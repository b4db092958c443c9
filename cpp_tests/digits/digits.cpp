#include "digits.hpp"

#include <adalora.hpp>
#include <algorithm>
#include <chrono>
#include <functional>
#include <numeric>
#include <optional>
#include <stdexcept>

#include "network.hpp"
#include "random.hpp"
#include "samples.hpp"

namespace digits {
namespace {

constexpr std::size_t batch = 64;
constexpr std::int64_t steps_per_report = 10;
constexpr double learning_rate = 0.01;
constexpr double orthogonality_weight = 0.1;
constexpr double max_gradient_norm = 1.0;

/// One of the matrices A, E and B of an adapter, and what training keeps for each of its elements.
struct Trained {
  std::vector<float> parameters, gradients, first_moment, second_moment, exp_avg_ipt, exp_avg_unc;

  explicit Trained(std::size_t n)
      : parameters(n), gradients(n), first_moment(n), second_moment(n), exp_avg_ipt(n), exp_avg_unc(n) {}
};

/// A frozen linear layer, and the adapter on it. All memory is the trainer's: the library is told where it lies.
struct AdaptedLayer {
  const Linear& base;
  adalora::Adapter adapter;
  Trained A, E, B;
  std::vector<float> y, dy, h;

  AdaptedLayer(adalora::Context& context, const Linear& layer, std::int64_t rank, std::uint64_t seed)
      : base(layer),
        adapter(context, describe(layer, rank)),
        A(static_cast<std::size_t>(rank) * layer.in_features),
        E(static_cast<std::size_t>(rank)),
        B(layer.out_features * static_cast<std::size_t>(rank)),
        y(batch * layer.out_features),
        dy(batch * layer.out_features),
        h(batch * static_cast<std::size_t>(rank)) {
    adapter.initialize(triplets(&Trained::parameters), seed);
  }

  /// What a forward call reads and writes, and a backward call too: each ignores what only the other needs.
  adalora::Call call(std::size_t rows) {
    adalora::Call call;
    call.adapter = adapter.get();
    call.params = triplets(&Trained::parameters);
    call.grads = triplets(&Trained::gradients);
    call.y = matrix(y, rows, base.out_features);
    call.dy = matrix(dy, rows, base.out_features);
    call.h = h.data();
    return call;
  }

  static adalora::View<float> matrix(std::vector<float>& data, std::size_t rows, std::size_t columns) {
    return {data.data(), static_cast<std::int64_t>(rows), static_cast<std::int64_t>(columns)};
  }

 private:
  static adalora::AdapterDesc describe(const Linear& layer, std::int64_t rank) {
    adalora::AdapterDesc desc;
    desc.in_features = static_cast<std::int64_t>(layer.in_features);
    desc.out_features = static_cast<std::int64_t>(layer.out_features);
    desc.rank = rank;
    desc.param_dtype = ADALORA_FLOAT32;
    desc.activation_dtype = ADALORA_FLOAT32;
    return desc;
  }

  /// The parameters of A, E and B, or their gradients.
  adalora_triplets_t triplets(std::vector<float> Trained::* member) {
    const std::size_t rank = E.parameters.size();
    return {matrix(A.*member, rank, base.in_features), matrix(E.*member, 1, rank),
            matrix(B.*member, base.out_features, rank)};
  }
};

/// The frozen network with an adapter on every layer.
class AdaptedNetwork {
 public:
  AdaptedNetwork(adalora::Context& context, const Network& base, std::int64_t rank, Random& random) {
    std::size_t workspace_bytes = 0;
    for (const Linear& linear : base) {
      AdaptedLayer& layer = layers_.emplace_back(context, linear, rank, random.bits());
      workspace_bytes = std::max(workspace_bytes, adalora::sizes(layer.call(batch), batch).workspace);
    }
    workspace_ = adalora::Buffer(workspace_bytes);
  }

  std::vector<AdaptedLayer>& layers() { return layers_; }

  /// The logits of at most `batch` rows.
  const float* forward(const float* x, std::size_t rows) {
    for (AdaptedLayer& layer : layers_) {
      layer.base.forward(x, rows, layer.y.data());
      adalora::forward(layer.call(rows), ADALORA_STAGE_BOTH, input(x, rows, layer), workspace_.data(),
                       workspace_.size());
      if (&layer != &layers_.back()) activate(layer.y.data(), rows * layer.base.out_features);
      x = layer.y.data();
    }
    return x;
  }

  /// From the last layer's dy, after `forward` on the same x: the gradients of all adapters, written over.
  void backward(const float* x0, std::size_t rows) {
    for (std::size_t k = layers_.size(); k-- > 0;) {
      AdaptedLayer& layer = layers_[k];
      const float* x = k > 0 ? layers_[k - 1].y.data() : x0;
      std::optional<adalora_matrix_t> dx;
      if (k > 0) {
        // The base layer writes its share of dx, and the adapter adds its own.
        layer.base.backward(layer.dy.data(), rows, layers_[k - 1].dy.data());
        dx = AdaptedLayer::matrix(layers_[k - 1].dy, rows, layer.base.in_features);
      }
      adalora::backward(layer.call(rows), ADALORA_STAGE_BOTH, false, input(x, rows, layer), dx, workspace_.data(),
                        workspace_.size());
      if (k > 0) activate_backward(x, layers_[k - 1].dy.data(), rows * layer.base.in_features);
    }
  }

 private:
  static adalora_matrix_t input(const float* x, std::size_t rows, const AdaptedLayer& layer) {
    return adalora::View(x, static_cast<std::int64_t>(rows), static_cast<std::int64_t>(layer.base.in_features))
        .read_only();
  }

  std::vector<AdaptedLayer> layers_;
  adalora::Buffer workspace_;
};

/// The allocator over all adapters of a network, and what it is bound to beside their matrices.
struct RankAllocation {
  adalora::Allocator allocator;
  adalora::Buffer state, workspace;
  double lr = learning_rate;  // Read at every step.
  double weight_decay = 0;

  RankAllocation(adalora::Context& context, AdaptedNetwork& network, const Options& options)
      : allocator(context, describe(options), adapters_of(network)) {
    std::vector<adalora::Slice> slices;
    for (std::size_t k = 0; k < network.layers().size(); ++k) {
      AdaptedLayer& layer = network.layers()[k];
      slices.push_back(slice(k, ADALORA_MATRIX_A, layer.A));
      slices.push_back(slice(k, ADALORA_MATRIX_E, layer.E));
      slices.push_back(slice(k, ADALORA_MATRIX_B, layer.B));
    }
    adalora::Hyper hyper;
    hyper.lr = &lr;
    hyper.weight_decay = &weight_decay;
    hyper.beta1 = 0.9;
    hyper.beta2 = 0.999;
    hyper.eps = 1e-8;
    const adalora::AllocatorSizes bytes = allocator.sizes(static_cast<std::int64_t>(slices.size()));
    state = adalora::Buffer(bytes.state);
    workspace = adalora::Buffer(bytes.workspace);
    allocator.bind(state.data(), workspace.data(), slices, hyper);
  }

  // The allocator knows where the members are, so that they have to stay there.
  RankAllocation(const RankAllocation&) = delete;
  RankAllocation& operator=(const RankAllocation&) = delete;

 private:
  static adalora::AllocatorDesc describe(const Options& options) {
    adalora::AllocatorDesc desc;
    desc.target_rank = options.target_rank;
    desc.total_step = options.steps;
    desc.tinit = options.steps / 10;
    desc.tfinal = options.steps / 3;
    desc.delta_t = 5;
    desc.beta1 = 0.85;
    desc.beta2 = 0.85;
    return desc;
  }

  static std::vector<std::reference_wrapper<const adalora::Adapter>> adapters_of(AdaptedNetwork& network) {
    std::vector<std::reference_wrapper<const adalora::Adapter>> adapters;
    for (const AdaptedLayer& layer : network.layers()) adapters.push_back(layer.adapter);
    return adapters;
  }

  static adalora::Slice slice(std::size_t adapter, std::int32_t matrix, Trained& trained) {
    adalora::Slice slice;
    slice.adapter = static_cast<std::int64_t>(adapter);
    slice.matrix = matrix;
    slice.end = static_cast<std::int64_t>(trained.parameters.size());
    slice.p = trained.parameters.data();
    slice.g = trained.gradients.data();
    slice.m = trained.first_moment.data();
    slice.v = trained.second_moment.data();
    slice.exp_avg_ipt = trained.exp_avg_ipt.data();
    slice.exp_avg_unc = trained.exp_avg_unc.data();
    return slice;
  }
};

Accuracy measure(AdaptedNetwork& network, const Samples& samples) {
  double right[2] = {0, 0}, rows[2] = {0, 0};  // of the old digits, of the new ones
  for (std::size_t first = 0; first < samples.rows(); first += batch) {
    const std::size_t n = std::min(batch, samples.rows() - first);
    const float* logits = network.forward(samples.pixels.data() + first * pixels_per_image, n);
    for (std::size_t t = 0; t < n; ++t) {
      const float* z = logits + t * n_classes;
      const std::size_t label = samples.labels[first + t];
      const std::size_t is_new = label >= first_new_digit ? 1 : 0;
      rows[is_new] += 1;
      if (z + label == std::max_element(z, z + n_classes)) right[is_new] += 1;
    }
  }
  return {right[0] / rows[0], right[1] / rows[1], (right[0] + right[1]) / (rows[0] + rows[1])};
}

}  // namespace

Result train(const Options& options, const std::function<void(const Progress&)>& report) {
  const auto start = std::chrono::steady_clock::now();
  Random random(options.seed);

  // No training sees the held-out rows, and they alone are what accuracy is measured on.
  const Samples samples = read_samples(options.data);
  const std::vector<std::size_t> shuffled = random.permutation(samples.rows());
  const auto cut = shuffled.begin() + static_cast<std::ptrdiff_t>(shuffled.size() / 5);
  const Samples held_out = samples.rows_at({shuffled.begin(), cut});
  const Samples training = samples.rows_at({cut, shuffled.end()});
  if (training.rows() < batch) throw std::runtime_error(options.data + ": holds too few rows to train on");

  const Network base = pretrain(training.where([](std::size_t label) { return label < first_new_digit; }), random);

  adalora::ContextDesc context_desc;
  context_desc.backend = ADALORA_BACKEND_CPU;
  context_desc.threads = options.threads;
  adalora::Context context(context_desc);
  AdaptedNetwork network(context, base, options.init_rank, random);
  RankAllocation ranks(context, network, options);

  Result result{};
  result.held_out_rows = held_out.rows();
  for (const Linear& layer : base) {
    result.base_parameters += static_cast<std::int64_t>(layer.weight.size() + layer.bias.size());
  }
  result.before = measure(network, held_out);  // The adapters add nothing yet: this is the base model.

  std::vector<std::size_t> epoch;
  std::size_t next = 0;
  for (std::int64_t step = 1; step <= options.steps; ++step) {
    if (next + batch > epoch.size()) {
      epoch = random.permutation(training.rows());
      next = 0;
    }
    const auto first = epoch.begin() + static_cast<std::ptrdiff_t>(next);
    const Samples rows = training.rows_at({first, first + static_cast<std::ptrdiff_t>(batch)});
    next += batch;

    const float* logits = network.forward(rows.pixels.data(), batch);
    result.losses.push_back(cross_entropy(logits, rows.labels.data(), batch, network.layers().back().dy.data()));
    network.backward(rows.pixels.data(), batch);

    // Orthogonality adds to the gradients; their norm, with it, gives the factor that clips them in the update.
    ranks.allocator.orthogonality(nullptr, orthogonality_weight);
    double sum_of_squares = 0;
    float found_inf = 0;
    ranks.allocator.gradient_norm(nullptr, &sum_of_squares, &found_inf);
    double grad_factor = 1;
    context.gradient_factor(&sum_of_squares, nullptr, max_gradient_norm, &grad_factor);

    // AdamW, importance, and where the schedule says so a new choice of the triplets that are kept.
    ranks.lr = learning_rate * static_cast<double>(options.steps - step + 1) / static_cast<double>(options.steps);
    adalora::Step values;
    values.step = &step;
    values.grad_factor = &grad_factor;
    values.found_inf = &found_inf;
    ranks.allocator.step(values, true);

    if (step % steps_per_report == 0) {
      const adalora::Snapshot now = ranks.allocator.read_sync();
      const double sum = std::accumulate(result.losses.end() - steps_per_report, result.losses.end(), 0.0);
      report({step, sum / static_cast<double>(steps_per_report), now.report.budget, now.ranks});
    }
  }

  result.after = measure(network, held_out);
  const adalora::Snapshot end = ranks.allocator.read_sync();
  result.budget = end.report.budget;
  result.ranks = end.ranks;
  result.live_parameters = end.report.live_parameters;
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return result;
}

}  // namespace digits
