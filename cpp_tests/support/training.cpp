#include "training.hpp"

#include <algorithm>

#include "random.hpp"

namespace support {

namespace {

ModelCase model_case(const TrainingTypes& types, const TrainingShape& shape) {
  ModelCase c;
  c.param = types.param;
  c.master = types.master;
  c.layers = shape.layers;
  return c;
}

}  // namespace

Training::Training(Backend& backend, adalora_context_t* context, const TrainingTypes& types, const TrainingShape& shape)
    : shape_(shape),
      model_(std::make_unique<Model>(backend, context, model_case(types, shape))),
      x_(backend, types.activation, shape.tokens, shape.in),
      dx_(backend, types.activation, shape.tokens, shape.in),
      seed_(backend, 1),
      offset_(backend),
      digest_(backend),
      number_(backend),
      penalty_(backend),
      squares_(backend),
      loss_scale_(backend),
      factor_(backend),
      found_inf_(backend),
      has_grad_(backend, shape.layers.size()) {
  for (size_t k = 0; k < shape.layers.size(); ++k) {
    const LayerShape& layer = shape.layers[k];
    adalora_adapter_desc_t desc{};
    desc.struct_size = sizeof desc;
    desc.in_features = layer.in;
    desc.out_features = layer.out;
    desc.rank = layer.rank;
    desc.param_dtype = types.param;
    desc.activation_dtype = types.activation;
    desc.dropout = 0.1;
    adalora_adapter_t* adapter = nullptr;
    require(adalora_adapter_create(context, &desc, &adapter));
    adapters_.emplace_back(adapter);
    y_.emplace_back(backend, types.activation, shape.tokens, layer.out);
    dy_.emplace_back(backend, types.activation, shape.tokens, layer.out);
    h_.emplace_back(backend, compute_type(types.param), shape.tokens, layer.rank);

    const auto read_by_forward = [&](int m) {
      const Part& part = model_->part(k, m);
      return part.low ? part.low->matrix() : part.p.matrix();
    };
    adalora_call_t call{};
    call.struct_size = sizeof call;
    call.adapter = adapter;
    call.params = {read_by_forward(0), read_by_forward(1), read_by_forward(2)};
    call.grads = {model_->part(k, 0).g.matrix(), model_->part(k, 1).g.matrix(), model_->part(k, 2).g.matrix()};
    call.y = y_.back().matrix();
    call.dy = dy_.back().matrix();
    call.h = h_.back().data();
    call.dropout = {seed_.data(), offset_.data(), 0};
    passes_.push_back(call);
  }
  const auto n = static_cast<int64_t>(passes_.size());
  size_t bytes = 0;
  require(adalora_adapter_sizes(passes_.data(), sizeof passes_[0], n, shape.tokens, nullptr, &bytes));
  workspace_ = std::make_unique<Buffer>(backend, bytes);
  step_ = {sizeof step_, number_.data(), factor_.data(), found_inf_.data(), has_grad_.data()};

  calls_ = {
      {"forward",
       [=](void* stream) {
         const adalora_matrix_t x = x_.matrix();
         return adalora_adapter_forward(passes_.data(), sizeof passes_[0], n, ADALORA_STAGE_BOTH, &x,
                                        workspace_->data(), bytes, stream);
       }},
      {"backward",
       [=](void* stream) {
         const adalora_matrix_t x = x_.matrix(), dx = dx_.matrix();
         return adalora_adapter_backward(passes_.data(), sizeof passes_[0], n, ADALORA_STAGE_BOTH, 0, &x, &dx,
                                         workspace_->data(), bytes, stream);
       }},
      {"orthogonality",
       [=](void* stream) {
         return adalora_allocator_orthogonality(model_->allocator(), nullptr, 0.1, loss_scale_.data(), penalty_.data(),
                                                stream);
       }},
      {"gradient_norm",
       [=](void* stream) {
         return adalora_allocator_gradient_norm(model_->allocator(), has_grad_.data(), squares_.data(),
                                                found_inf_.data(), stream);
       }},
      {"gradient_factor",
       [=](void* stream) {
         return adalora_context_gradient_factor(context, squares_.data(), loss_scale_.data(), 1.0, factor_.data(),
                                                stream);
       }},
      {"step", [=](void* stream) { return adalora_allocator_step(model_->allocator(), &step_, 1, stream); }},
      {"digest", [=](void* stream) { return adalora_allocator_digest(model_->allocator(), digest_.data(), stream); }},
  };
  give({});
}

void Training::enqueue(void* stream) const {
  for (const Call& call : calls_) require(call.run(stream));
}

void Training::give(const Given& given) {
  Random random(static_cast<uint64_t>(1000 + given.step));
  const auto fill = [&](Tensor& tensor) { tensor.set(random.matrix(tensor.rows(), tensor.columns())); };
  fill(x_);
  fill(dx_);
  for (std::vector<Tensor>* all : {&y_, &dy_}) std::for_each(all->begin(), all->end(), fill);
  offset_.set(static_cast<uint64_t>(given.step));
  number_.set(given.step);
  squares_.set(0);
  loss_scale_.set(given.loss_scale);
  found_inf_.set(given.found_inf ? 1.0f : 0.0f);
  has_grad_.set(given.has_grad);
  model_->set_rates(given.lr, given.weight_decay);
}

template <class Self, class Visit>
void Training::each_tensor(Self& self, Visit visit) {
  visit(self.dx_);
  for (auto* all : {&self.y_, &self.h_})
    for (auto& tensor : *all) visit(tensor);
  for (size_t k = 0; k < self.shape_.layers.size(); ++k)
    for (int m : {0, 1, 2}) visit(self.model_->part(k, m).g);
  for (auto* value : {&self.penalty_, &self.squares_, &self.factor_}) visit(*value);
  visit(self.found_inf_);
  visit(self.digest_);
}

std::vector<Bytes> Training::buffers() const {
  std::vector<Bytes> all = model().tensors();
  each_tensor(*this, [&](const auto& tensor) { all.push_back(tensor.bytes()); });
  return all;
}

void Training::set_buffers(const std::vector<Bytes>& bytes) {
  const size_t of_model = model().tensors().size();
  auto next = bytes.begin() + static_cast<ptrdiff_t>(of_model);
  model().set_tensors({bytes.begin(), next});
  each_tensor(*this, [&](auto& tensor) { tensor.write(*next++); });
}

}  // namespace support
