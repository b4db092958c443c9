#include "pass.hpp"

namespace operations {

using namespace support;

namespace {

// The first `columns` of each adapter side by side.
Dense<double> side_by_side(const std::vector<AdapterContents>& adapters, Dense<double> AdapterContents::* part) {
  int64_t columns = 0;
  for (const AdapterContents& one : adapters) columns += (one.*part).columns;
  Dense<double> all((adapters.front().*part).rows, columns);
  int64_t first = 0;
  for (const AdapterContents& one : adapters) {
    const Dense<double>& own = one.*part;
    for (int64_t i = 0; i < own.rows; ++i)
      for (int64_t j = 0; j < own.columns; ++j) all(i, first + j) = own(i, j);
    first += own.columns;
  }
  return all;
}

Tensor vector(Backend& backend, adalora_dtype_t type, const Dense<double>& row, bool as_column, int64_t gap) {
  return as_column ? Tensor(backend, type, transposed(row), gap) : Tensor(backend, type, row, gap);
}

Dense<double> as_row(const Dense<double>& vector) { return {1, vector.rows * vector.columns, vector.values}; }

}  // namespace

Pass::Pass(Backend& backend, adalora_context_t* context, const LayerCase& layer, const LayerContents& contents)
    : backend_(backend),
      layer_(layer),
      x_(backend, layer.activation, contents.x, layer.gap),
      dx_(backend, layer.activation, contents.dx, layer.gap) {
  for (size_t k = 0; k < layer.adapters(); ++k) adapters_.push_back(make(context, k, contents.adapters[k]));
  if (layer.interleaved) {
    all_y_.emplace(backend, layer.activation, side_by_side(contents.adapters, &AdapterContents::y), layer.gap);
    all_dy_.emplace(backend, layer.activation, side_by_side(contents.adapters, &AdapterContents::dy), layer.gap);
  }

  auto all = calls();
  size_t workspace = 0;
  std::vector<size_t> saved(all.size());
  require(adalora_adapter_sizes(all.data(), sizeof all[0], static_cast<int64_t>(all.size()), layer.tokens, saved.data(),
                                &workspace));
  for (size_t k = 0; k < all.size(); ++k)
    EXPECT_EQ(saved[k], static_cast<size_t>(layer.tokens * layer.rank[k]) * size_of(compute_type(layer.param)))
        << "bytes of h";
  workspace_.emplace(backend, workspace);
}

Pass::One Pass::make(adalora_context_t* context, size_t k, const AdapterContents& contents) {
  adalora_adapter_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = layer_.whole_in != 0 ? layer_.whole_in : layer_.in;
  desc.out_features = layer_.whole_out != 0 ? layer_.whole_out : layer_.out[k];
  desc.rank = layer_.rank[k];
  desc.alpha = layer_.alpha;
  desc.dropout = layer_.dropout_of(k).probability;
  desc.param_dtype = layer_.param;
  desc.activation_dtype = layer_.activation;
  desc.operand_terms = layer_.operand_terms;
  if (layer_.whole_in != 0) desc.in_local = layer_.in, desc.in_begin = layer_.in_begin;
  if (layer_.whole_out != 0) desc.out_local = layer_.out[k], desc.out_begin = layer_.out_begin;
  adalora_adapter_t* adapter = nullptr;
  require(adalora_adapter_create(context, &desc, &adapter));

  const adalora_dtype_t grad = layer_.grad != 0 ? layer_.grad : layer_.param, compute = compute_type(layer_.param);
  const int64_t gap = layer_.gap;
  const auto& [params, grads, y, dy] = contents;
  std::vector<uint8_t> pattern;
  for (int64_t i = 0; i < layer_.rank[k]; ++i) pattern.push_back(layer_.keeps(i) ? 1 : 0);
  return {Adapter(adapter),
          Tensor(backend_, layer_.param, params.A, gap),
          vector(backend_, layer_.param, params.E, layer_.e_is_column, gap),
          Tensor(backend_, layer_.param, params.B, gap),
          Tensor(backend_, grad, grads.A, gap),
          vector(backend_, grad, grads.E, layer_.e_is_column, gap),
          Tensor(backend_, grad, grads.B, gap),
          Tensor(backend_, layer_.activation, y, gap),
          Tensor(backend_, layer_.activation, dy, gap),
          Tensor(backend_, compute, layer_.tokens, layer_.rank[k]),
          Tensor(backend_, compute, layer_.tokens, layer_.rank[k]),
          Values<uint8_t>(backend_, pattern),
          Value<uint64_t>(backend_, layer_.dropout_of(k).seed),
          Value<uint64_t>(backend_, layer_.dropout_of(k).offset)};
}

adalora_matrix_t Pass::outputs_of(size_t k, const std::optional<Tensor>& all, const Tensor& own) const {
  if (!all) return own.matrix();
  int64_t first = 0;
  for (size_t i = 0; i < k; ++i) first += layer_.out[i];
  return all->columns(first, layer_.out[k]);
}

std::vector<adalora_call_t> Pass::calls() {
  std::vector<adalora_call_t> all;
  for (size_t k = 0; k < adapters_.size(); ++k) {
    One& one = adapters_[k];
    adalora_call_t call{};
    call.struct_size = sizeof call;
    call.adapter = one.adapter.get();
    call.params = {one.A.matrix(), one.E.matrix(), one.B.matrix()};
    call.grads = {one.dA.matrix(), one.dE.matrix(), one.dB.matrix()};
    call.scaling = layer_.scaling;
    call.y = outputs_of(k, all_y_, one.y);
    call.dy = outputs_of(k, all_dy_, one.dy);
    call.h = layer_.keeps_h ? one.h.data() : nullptr;
    call.g = layer_.stages_apart ? one.g.data() : nullptr;
    call.pattern = layer_.pattern ? one.pattern.data() : nullptr;
    call.dropout = {one.seed.data(), one.offset.data(), layer_.dropout.token0};
    all.push_back(call);
  }
  return all;
}

void Pass::give(const LayerContents& contents) {
  x_.set(contents.x);
  if (all_y_) all_y_->set(side_by_side(contents.adapters, &AdapterContents::y));
  for (size_t k = 0; k < adapters_.size(); ++k) {
    const auto& [params, grads, y, dy] = contents.adapters[k];
    One& one = adapters_[k];
    one.A.set(params.A);
    one.E.set(layer_.e_is_column ? transposed(params.E) : params.E);
    one.B.set(params.B);
    if (!all_y_) one.y.set(y);
  }
}

void Pass::forward(int32_t stages) {
  auto all = calls();
  const adalora_matrix_t x = x_.matrix();
  if (stages == ADALORA_STAGE_PROJECT)
    for (adalora_call_t& call : all) call.y = {};  // it is not read
  require(adalora_adapter_forward(all.data(), sizeof all[0], static_cast<int64_t>(all.size()), stages,
                                  stages == ADALORA_STAGE_EXPAND ? nullptr : &x, workspace_->data(), workspace_->size(),
                                  backend_.stream()));
}

void Pass::backward(int32_t stages) {
  auto all = calls();
  const adalora_matrix_t x = x_.matrix(), dx = dx_.matrix();
  if (stages == ADALORA_STAGE_EXPAND)
    for (adalora_call_t& call : all) call.dy = {};
  require(adalora_adapter_backward(all.data(), sizeof all[0], static_cast<int64_t>(all.size()), stages,
                                   layer_.accumulates ? 1 : 0, stages == ADALORA_STAGE_PROJECT ? nullptr : &x,
                                   layer_.wants_dx ? &dx : nullptr, workspace_->data(), workspace_->size(),
                                   backend_.stream()));
}

void Pass::forward() {
  if (!layer_.stages_apart) return forward(ADALORA_STAGE_BOTH);
  forward(ADALORA_STAGE_PROJECT);
  forward(ADALORA_STAGE_EXPAND);
}

void Pass::backward() {
  if (!layer_.stages_apart) return backward(ADALORA_STAGE_BOTH);
  backward(ADALORA_STAGE_PROJECT);
  backward(ADALORA_STAGE_EXPAND);
}

Dense<double> Pass::y(size_t k) const {
  if (!all_y_) return adapters_[k].y.get();
  int64_t first = 0;
  for (size_t i = 0; i < k; ++i) first += layer_.out[i];
  return block(all_y_->get(), 0, layer_.tokens, first, layer_.out[k]);
}

Dense<double> Pass::gradient(size_t k, int matrix) const {
  const One& one = adapters_[k];
  return matrix == 0 ? one.dA.get() : matrix == 1 ? as_row(one.dE.get()) : one.dB.get();
}

std::string Pass::what(const std::string& tensor, size_t k) const {
  return layer_.name + ": " + tensor + " of adapter " + std::to_string(k);
}

void Pass::check_forward(const LayerResults& expected) const {
  const double eps = backend_.tolerance_of_products(layer_.activation, layer_.param, layer_.operand_terms);
  for (size_t k = 0; k < adapters_.size(); ++k) {
    const One& one = adapters_[k];
    expect_close(what("y", k), expected.adapters[k].y, y(k), eps, layer_.activation);
    EXPECT_EQ(one.seed.get(), layer_.dropout_of(k).seed);
    EXPECT_EQ(one.offset.get(), layer_.dropout_of(k).offset);
    EXPECT_TRUE(one.y.gaps_untouched()) << what("y", k);
    if (!layer_.keeps_h) continue;
    for (int64_t i = 0; i < layer_.rank[k]; ++i)
      if (layer_.keeps(i))
        expect_close(what("h of triplet " + std::to_string(i), k),
                     block(expected.adapters[k].h, 0, layer_.tokens, i, 1), block(one.h.get(), 0, layer_.tokens, i, 1),
                     eps, one.h.type());
  }
  EXPECT_TRUE(!all_y_ || all_y_->gaps_untouched()) << what("all y", 0);
}

void Pass::check_backward(const LayerResults& expected) const {
  const double eps = backend_.tolerance_of_products(layer_.activation, layer_.param, layer_.operand_terms);
  for (size_t k = 0; k < adapters_.size(); ++k) {
    const One& one = adapters_[k];
    const char* const names[] = {"dA", "dE", "dB"};
    const Tensor* const grads[] = {&one.dA, &one.dE, &one.dB};
    for (int m : {0, 1, 2}) {
      expect_close(what(names[m], k), expected.adapters[k].grads[m], gradient(k, m), eps, grads[m]->type());
      EXPECT_TRUE(grads[m]->gaps_untouched()) << what(names[m], k);
    }
  }
  if (layer_.wants_dx) expect_close(what("dx", 0), expected.dx, dx_.get(), eps, layer_.activation);
  EXPECT_TRUE(dx_.gaps_untouched()) << what("dx", 0);
}

std::vector<std::pair<std::string, const Tensor*>> Pass::rows_of_tokens() const {
  std::vector<std::pair<std::string, const Tensor*>> all{{"x", &x_}, {"dx", &dx_}};
  for (size_t k = 0; k < adapters_.size(); ++k) {
    const One& one = adapters_[k];
    const std::string number = std::to_string(k);
    all.insert(all.end(), {{"y" + number, &one.y}, {"dy" + number, &one.dy}});
    all.insert(all.end(), {{"h" + number, &one.h}, {"g" + number, &one.g}});
  }
  return all;
}

std::vector<Bytes> Pass::outputs() const {
  std::vector<Bytes> all{dx_.bytes()};
  if (all_y_) all.push_back(all_y_->bytes());
  for (const One& one : adapters_)
    for (const Tensor* tensor : {&one.y, &one.h, &one.g, &one.dA, &one.dE, &one.dB}) all.push_back(tensor->bytes());
  return all;
}

void check_both(Backend& backend, const LayerCase& layer, const LayerContents& contents) {
  const LayerResults expected = expected_results(layer, contents);
  Pass pass(backend, backend.context(), layer, contents);
  pass.forward();
  pass.check_forward(expected);
  pass.backward();
  pass.check_backward(expected);
}

void check_both(Backend& backend, const LayerCase& layer) { check_both(backend, layer, random_contents(layer)); }

}  // namespace operations
