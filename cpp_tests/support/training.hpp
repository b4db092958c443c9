// A training step from forward to digest, call by call: two layers with dropout on one input, clipping, AdamW, masks.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "model.hpp"

namespace support {

struct TrainingTypes {
  std::string name;
  adalora_dtype_t activation, param;
  bool master = false;
};

inline const std::vector<TrainingTypes> training_types = {{"f64", f64, f64},
                                                          {"f32", f32, f32},
                                                          {"bf16_with_f32", bf16, f32},
                                                          {"bf16", bf16, bf16},
                                                          {"bf16_master", bf16, bf16, true},
                                                          {"f16_master", f16, f16, true}};

struct TrainingShape {
  int64_t tokens = 40, in = 60;
  std::vector<LayerShape> layers = {{60, 33, 8}, {60, 21, 5}};
};

class Training {
 public:
  struct Call {
    std::string name;
    std::function<adalora_status_t(void* stream)> run;
  };

  // What the trainer writes into the memory that a step reads.
  struct Given {
    int64_t step = 0;
    bool found_inf = false;  // by another part of the model
    double loss_scale = 1;
    double lr = 1e-2, weight_decay = 1e-2;
    std::vector<uint8_t> has_grad = {1, 1};
  };

  Training(Backend& backend, adalora_context_t* context, const TrainingTypes& types, const TrainingShape& shape = {});
  Training(const Training&) = delete;  // the calls refer to it
  Training& operator=(const Training&) = delete;

  // The step's calls in their order.
  const std::vector<Call>& calls() const { return calls_; }
  void enqueue(void* stream) const;

  // Input and gradients of its own for each step, sums at zero.
  void give(const Given& given);

  // Everything that a step may write but the allocator's state, which is the library's.
  std::vector<Bytes> buffers() const;
  void set_buffers(const std::vector<Bytes>& bytes);

  Model& model() { return *model_; }
  const Model& model() const { return *model_; }

 private:
  template <class Self, class Visit>
  static void each_tensor(Self& self, Visit visit);

  TrainingShape shape_;
  std::unique_ptr<Model> model_;
  Tensor x_, dx_;
  std::vector<Tensor> y_, dy_, h_;
  std::vector<Adapter> adapters_;
  Value<uint64_t> seed_, offset_, digest_;
  Value<int64_t> number_;
  Value<double> penalty_, squares_, loss_scale_, factor_;
  Value<float> found_inf_;
  Values<uint8_t> has_grad_;
  std::vector<adalora_call_t> passes_;
  std::unique_ptr<Buffer> workspace_;
  adalora_step_t step_;
  std::vector<Call> calls_;
};

}  // namespace support
