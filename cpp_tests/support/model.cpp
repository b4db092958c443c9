#include "model.hpp"

#include <numeric>
#include <utility>

#include "random.hpp"

namespace support {

int64_t ModelCase::total_rank() const {
  return std::accumulate(layers.begin(), layers.end(), int64_t{0},
                         [](int64_t sum, const LayerShape& l) { return sum + l.rank; });
}

namespace {

int64_t cost(const LayerShape& layer, int32_t unit) {
  return unit == ADALORA_BUDGET_PARAMETERS ? layer.in + layer.out + 1 : 1;
}

Part zeros(Backend& backend, const ModelCase& c, int64_t rows, int64_t columns) {
  const Dense<double> zero(rows, columns);
  const auto state = [&] { return Tensor(backend, c.state(), zero); };
  return {Tensor(backend, c.stored(), zero),
          Tensor(backend, c.grad(), zero),
          state(),
          state(),
          state(),
          state(),
          c.master ? std::optional<Tensor>(Tensor(backend, c.param, zero)) : std::nullopt};
}

void* at(const Tensor& tensor, int64_t element) {
  return static_cast<unsigned char*>(tensor.data()) + static_cast<size_t>(element) * size_of(tensor.type());
}

}  // namespace

std::vector<int64_t> ModelCase::costs() const {
  std::vector<int64_t> all;
  for (const LayerShape& layer : layers)
    all.insert(all.end(), static_cast<size_t>(layer.rank), cost(layer, budget_unit));
  return all;
}

int64_t ModelCase::initial_budget() const {
  const std::vector<int64_t> all = costs();
  return std::accumulate(all.begin(), all.end(), int64_t{0});
}

int64_t ModelCase::target_budget() const {
  int64_t sum = 0;
  for (const LayerShape& layer : layers) sum += target_rank * cost(layer, budget_unit);
  return sum;
}

std::vector<Adapter> adapters_of(adalora_context_t* context, const ModelCase& c) {
  std::vector<Adapter> adapters;
  for (const LayerShape& layer : c.layers) {
    adalora_adapter_desc_t desc{};
    desc.struct_size = sizeof desc;
    desc.in_features = layer.in;
    desc.out_features = layer.out;
    desc.rank = layer.rank;
    desc.param_dtype = desc.activation_dtype = c.param;
    if (!c.ranknums.empty()) desc.ranknum = c.ranknums[adapters.size()];
    adalora_adapter_t* adapter = nullptr;
    require(adalora_adapter_create(context, &desc, &adapter));
    adapters.emplace_back(adapter);
  }
  return adapters;
}

Allocator allocator_of(adalora_context_t* context, const ModelCase& c, const std::vector<Adapter>& adapters) {
  std::vector<const adalora_adapter_t*> order;
  for (const Adapter& adapter : adapters) order.push_back(adapter.get());
  adalora_allocator_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.n_adapters = static_cast<int64_t>(order.size());
  desc.adapters = order.data();
  desc.target_rank = c.target_rank;
  desc.tinit = c.schedule.tinit;
  desc.tfinal = c.schedule.tfinal;
  desc.total_step = c.schedule.total_step;
  desc.delta_t = c.schedule.delta_t;
  desc.beta1 = c.beta1;
  desc.beta2 = c.beta2;
  desc.budget_unit = c.budget_unit;
  desc.sharded = c.whole ? 0 : 1;
  adalora_allocator_t* allocator = nullptr;
  require(adalora_allocator_create(context, &desc, &allocator));
  return Allocator(allocator);
}

Model::Model(Backend& backend, adalora_context_t* context, const ModelCase& c, uint64_t seed)
    : backend_(backend),
      case_(c),
      adapters_(adapters_of(context, c)),
      allocator_(allocator_of(context, c, adapters_)),
      step_(backend),
      factor_(backend, 1.0),
      found_inf_(backend, 0.0f),
      has_grad_(backend, std::vector<uint8_t>(c.layers.size(), 1)) {
  for (const LayerShape& layer : c.layers) {
    parts_.push_back(zeros(backend, c, layer.rank, layer.in));
    parts_.push_back(zeros(backend, c, 1, layer.rank));
    parts_.push_back(zeros(backend, c, layer.out, layer.rank));
  }
  Random random(seed);
  for (Part& part : parts_) {
    const Dense<double> values = random.matrix(part.p.rows(), part.p.columns());
    part.p.set(values);
    if (part.low) part.low->set(part.p.get());
  }
  set_gradients(seed + 1);

  for (const oracle::Hyper& hyper : c.hypers) {
    rates_.emplace_back(backend, hyper.lr);
    rates_.emplace_back(backend, hyper.weight_decay);
  }
  if (c.whole) bind(everything());
}

std::vector<Owned> Model::everything() const {
  std::vector<Owned> all;
  for (size_t k = 0; k < adapters_.size(); ++k)
    for (int m : {0, 1, 2}) {
      const Tensor& p = part(k, m).p;
      all.push_back({static_cast<int64_t>(k), m, 0, p.rows() * p.columns()});
    }
  return all;
}

adalora_slice_t Model::slice(const Owned& range) const {
  const Part& own = part(static_cast<size_t>(range.adapter), range.matrix);
  const int32_t codes[] = {ADALORA_MATRIX_A, ADALORA_MATRIX_E, ADALORA_MATRIX_B};
  adalora_slice_t slice{};
  slice.struct_size = sizeof slice;
  slice.adapter = range.adapter;
  slice.begin = range.begin;
  slice.end = range.end;
  slice.matrix = codes[range.matrix];
  slice.hyper = range.hyper;
  slice.p_dtype = own.p.type();
  slice.g_dtype = own.g.type();
  slice.replica = range.replica ? 1 : 0;
  slice.p = at(own.p, range.begin);
  slice.p_low = own.low ? at(*own.low, range.begin) : nullptr;
  slice.g = at(own.g, range.begin);
  slice.m = case_.moments ? at(own.m, range.begin) : nullptr;
  slice.v = case_.moments ? at(own.v, range.begin) : nullptr;
  slice.exp_avg_ipt = at(own.ipt, range.begin);
  slice.exp_avg_unc = at(own.unc, range.begin);
  return slice;
}

adalora_status_t Model::try_to_bind(const std::vector<Owned>& owned) {
  size_t state = 0, workspace = 0;
  require(adalora_allocator_sizes(allocator_.get(), static_cast<int64_t>(owned.size()), &state, &workspace, nullptr));
  if (!state_) state_.emplace(backend_, state, static_cast<unsigned char>(0));
  // The earlier workspace is the allocator's until it is bound again.
  Buffer own(backend_, workspace);
  const adalora_status_t status = bind_in(own, owned, backend_.waiting_stream());
  if (status == ADALORA_SUCCESS) workspace_ = std::move(own);
  return status;
}

adalora_status_t Model::bind_in(const Buffer& workspace, const std::vector<Owned>& owned, void* stream) {
  std::vector<adalora_slice_t> slices;
  for (const Owned& range : owned) slices.push_back(slice(range));
  std::vector<adalora_hyper_t> hypers;
  for (size_t i = 0; i < case_.hypers.size(); ++i) {
    const oracle::Hyper& h = case_.hypers[i];
    hypers.push_back(
        {sizeof(adalora_hyper_t), rates_[2 * i].data(), rates_[2 * i + 1].data(), h.beta1, h.beta2, h.eps});
  }
  return adalora_allocator_bind(allocator_.get(), state_->data(), workspace.data(), slices.data(),
                                sizeof(adalora_slice_t), static_cast<int64_t>(slices.size()),
                                case_.moments ? hypers.data() : nullptr, sizeof(adalora_hyper_t),
                                case_.moments ? static_cast<int64_t>(hypers.size()) : 0, stream);
}

void Model::move() {
  const auto moved = [&](Tensor& tensor) {
    Tensor other(backend_, tensor.type(), tensor.rows(), tensor.columns());
    other.write(tensor.bytes());
    tensor.write(Bytes(tensor.bytes().size(), canary));
    return other;
  };
  // The old buffers live until the new ones are bound: a bind may still read the state from its old place.
  std::vector<Part> before = std::move(parts_);
  parts_.clear();
  for (Part& part : before)
    parts_.push_back({moved(part.p), moved(part.g), moved(part.m), moved(part.v), moved(part.ipt), moved(part.unc),
                      part.low ? std::optional<Tensor>(moved(*part.low)) : std::nullopt});
  Buffer state(backend_, state_->size());
  state.write(state_->read());
  std::swap(*state_, state);
  bind(everything());
}

void Model::move_gradients() {
  for (Part& part : parts_) {
    Tensor g(backend_, part.g.type(), part.g.rows(), part.g.columns());
    g.write(part.g.bytes());
    part.g.write(Bytes(g.bytes().size(), canary));
    left_gradients_.push_back(std::exchange(part.g, std::move(g)));
  }
  require(bind_in(*workspace_, everything(), backend_.stream()));
}

void Model::forget() {
  state_->write(Bytes(state_->size(), 0));
  move_gradients();
}

void Model::set_gradients(uint64_t seed, double size) {
  Random random(seed);
  for (Part& part : parts_) part.g.set(random.matrix(part.g.rows(), part.g.columns(), size));
}

void Model::set_rates(double lr, double weight_decay) {
  for (size_t i = 0; i < rates_.size(); ++i) rates_[i].set(i % 2 == 0 ? lr : weight_decay);
}

adalora_step_t Model::step_at(int64_t step) const {
  step_.set(step);
  return {sizeof(adalora_step_t), step_.data(), factor_.data(), found_inf_.data(), has_grad_.data()};
}

void Model::update(int64_t step, bool with_adamw) {
  const adalora_step_t at = step_at(step);
  require(adalora_allocator_update(allocator_.get(), &at, with_adamw ? 1 : 0, backend_.stream()));
}

std::vector<double> Model::scores() const {
  const Values<double> scores(backend_, static_cast<size_t>(case_.total_rank()));
  require(adalora_allocator_scores(allocator_.get(), scores.data(), backend_.stream()));
  return scores.get();
}

void Model::select(int64_t step) {
  const adalora_step_t at = step_at(step);
  require(adalora_allocator_select(allocator_.get(), &at, nullptr, backend_.stream()));
}

void Model::select(int64_t step, const std::vector<double>& scores) {
  const adalora_step_t at = step_at(step);
  const Values<double> given(backend_, scores);
  require(adalora_allocator_select(allocator_.get(), &at, given.data(), backend_.stream()));
}

void Model::step(int64_t step, bool with_adamw) {
  const adalora_step_t at = step_at(step);
  require(adalora_allocator_step(allocator_.get(), &at, with_adamw ? 1 : 0, backend_.stream()));
}

void Model::set_pattern(const std::vector<uint8_t>& pattern, bool is_final) {
  const Values<uint8_t> given(backend_, pattern);
  require(adalora_allocator_set_pattern(allocator_.get(), given.data(), is_final ? 1 : 0, backend_.stream()));
}

uint64_t Model::digest() const {
  const Value<uint64_t> digest(backend_);
  require(adalora_allocator_digest(allocator_.get(), digest.data(), backend_.stream()));
  return digest.get();
}

adalora_report_t Model::report() const {
  adalora_report_t report{};
  report.struct_size = sizeof report;
  require(adalora_allocator_read_sync(allocator_.get(), nullptr, nullptr, nullptr, &report, backend_.waiting_stream()));
  return report;
}

std::vector<uint8_t> Model::pattern() const {
  std::vector<uint8_t> pattern(static_cast<size_t>(case_.total_rank()));
  require(adalora_allocator_read_sync(allocator_.get(), pattern.data(), nullptr, nullptr, nullptr,
                                      backend_.waiting_stream()));
  return pattern;
}

std::vector<int64_t> Model::ranks() const {
  std::vector<int64_t> ranks(adapters_.size());
  require(adalora_allocator_read_sync(allocator_.get(), nullptr, ranks.data(), nullptr, nullptr,
                                      backend_.waiting_stream()));
  return ranks;
}

std::vector<int64_t> Model::adam_steps() const {
  std::vector<int64_t> steps(adapters_.size());
  require(adalora_allocator_read_sync(allocator_.get(), nullptr, nullptr, steps.data(), nullptr,
                                      backend_.waiting_stream()));
  return steps;
}

Bytes Model::save() const {
  size_t size = 0;
  require(adalora_allocator_save_state_sync(allocator_.get(), nullptr, &size, backend_.waiting_stream()));
  Bytes bytes(size);
  require(adalora_allocator_save_state_sync(allocator_.get(), bytes.data(), &size, backend_.waiting_stream()));
  EXPECT_EQ(size, bytes.size());
  return bytes;
}

void Model::load(const Bytes& state) {
  require(adalora_allocator_load_state_sync(allocator_.get(), state.data(), state.size(), backend_.waiting_stream()));
}

Contents Model::contents(Tensor Part::* kind) const {
  Contents all;
  for (size_t k = 0; k < adapters_.size(); ++k)
    all.push_back({(part(k, 0).*kind).get(), (part(k, 1).*kind).get(), (part(k, 2).*kind).get()});
  return all;
}

std::vector<Bytes> Model::tensors() const {
  std::vector<Bytes> all;
  for (const Part& part : parts_) {
    for (const Tensor* tensor : {&part.p, &part.m, &part.v, &part.ipt, &part.unc}) all.push_back(tensor->bytes());
    if (part.low) all.push_back(part.low->bytes());
  }
  return all;
}

void Model::set_tensors(const std::vector<Bytes>& tensors) {
  auto next = tensors.begin();
  for (Part& part : parts_) {
    for (Tensor* tensor : {&part.p, &part.m, &part.v, &part.ipt, &part.unc}) tensor->write(*next++);
    if (part.low) part.low->write(*next++);
  }
}

}  // namespace support
