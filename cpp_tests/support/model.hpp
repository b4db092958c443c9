// The adapters of a model with all that training keeps for them, on a backend, under one rank allocator.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "backend.hpp"
#include "memory.hpp"
#include "oracle.hpp"

namespace support {

struct LayerShape {
  int64_t in, out, rank;
};

struct ModelCase {
  std::vector<LayerShape> layers = {{7, 5, 4}, {13, 8, 3}, {6, 9, 5}};
  std::vector<int64_t> ranknums = {};  // triplets at creation, of compacted adapters; empty: as many as there are
  adalora_dtype_t param = f64;
  adalora_dtype_t gradient = 0;  // 0: as param
  bool master = false;           // float32 parameters beside the half-precision ones
  bool moments = true;           // AdamW may be asked for
  bool whole = true;             // this process owns every element
  int64_t target_rank = 2;
  oracle::Schedule schedule = {4, 4, 20, 2};
  double beta1 = 0.85, beta2 = 0.8;
  int32_t budget_unit = ADALORA_BUDGET_TRIPLETS;
  std::vector<oracle::Hyper> hypers = {oracle::Hyper{}};

  adalora_dtype_t stored() const { return master ? f32 : param; }
  adalora_dtype_t grad() const { return gradient != 0 ? gradient : param; }
  adalora_dtype_t state() const { return compute_type(param); }
  int64_t total_rank() const;
  std::vector<int64_t> costs() const;  // of every triplet, in the budget's unit
  int64_t initial_budget() const;
  int64_t target_budget() const;
};

// One for each layer, and the allocator of all.
std::vector<Adapter> adapters_of(adalora_context_t* context, const ModelCase& c);
Allocator allocator_of(adalora_context_t* context, const ModelCase& c, const std::vector<Adapter>& adapters);

// Elements of a matrix (0: A, 1: E, 2: B) that a process owns.
struct Owned {
  int64_t adapter;
  int matrix;
  int64_t begin, end;
  bool replica = false;
  int32_t hyper = 0;
};

// One matrix and what belongs to it.
struct Part {
  Tensor p, g, m, v, ipt, unc;
  std::optional<Tensor> low;
};

// Values of one kind of tensor, by adapter.
using Contents = std::vector<oracle::Triplets<double>>;

class Model {
 public:
  // Random parameters and gradients, everything else zero, all elements bound.
  Model(Backend& backend, adalora_context_t* context, const ModelCase& c, uint64_t seed = 1);

  void bind(const std::vector<Owned>& owned) { require(try_to_bind(owned)); }
  adalora_status_t try_to_bind(const std::vector<Owned>& owned);
  // In a workspace that the test keeps.
  adalora_status_t bind_in(const Buffer& workspace, const std::vector<Owned>& owned, void* stream);
  // Everything, with all buffers at other addresses.
  void move();
  // Everything, with gradients alone at other addresses: enqueued, as a step is.
  void move_gradients();
  // A new run with the parameters, moments and averages that there are, in the same memory.
  void forget();
  std::vector<Owned> everything() const;
  adalora_slice_t slice(const Owned& range) const;

  void set_gradients(uint64_t seed, double size = 1.0);
  void set_factor(double factor) { factor_.set(factor); }
  void set_rates(double lr, double weight_decay);  // of every group
  void set_found_inf(bool found) { found_inf_.set(found ? 1.0f : 0.0f); }
  void set_has_grad(const std::vector<uint8_t>& has_grad) { has_grad_.set(has_grad); }

  void update(int64_t step, bool with_adamw = true);
  std::vector<double> scores() const;
  void select(int64_t step);
  void select(int64_t step, const std::vector<double>& scores);
  void step(int64_t step, bool with_adamw = true);
  void set_pattern(const std::vector<uint8_t>& pattern, bool is_final);

  uint64_t digest() const;
  adalora_report_t report() const;
  std::vector<uint8_t> pattern() const;
  std::vector<int64_t> ranks() const;
  std::vector<int64_t> adam_steps() const;
  Bytes save() const;
  void load(const Bytes& state);

  Contents contents(Tensor Part::* kind) const;
  // All that a run resumed elsewhere needs from the caller.
  std::vector<Bytes> tensors() const;
  void set_tensors(const std::vector<Bytes>& tensors);

  Part& part(size_t adapter, int matrix) { return parts_[adapter * 3 + static_cast<size_t>(matrix)]; }
  const Part& part(size_t adapter, int matrix) const { return parts_[adapter * 3 + static_cast<size_t>(matrix)]; }
  adalora_allocator_t* allocator() const { return allocator_.get(); }
  const adalora_adapter_t* adapter(size_t k) const { return adapters_[k].get(); }
  const ModelCase& model() const { return case_; }
  Backend& backend() const { return backend_; }
  // Its pointers stay valid as long as the model.
  adalora_step_t step_at(int64_t step) const;

 private:
  Backend& backend_;
  ModelCase case_;
  std::vector<Adapter> adapters_;
  std::vector<Part> parts_;
  std::vector<Tensor> left_gradients_;  // A call that is enqueued may still read them.
  Allocator allocator_;
  mutable Value<int64_t> step_;
  Value<double> factor_;
  Value<float> found_inf_;
  Values<uint8_t> has_grad_;
  std::vector<Value<double>> rates_;  // learning rate and decay of each group, alternating
  std::optional<Buffer> state_, workspace_;
};

}  // namespace support
