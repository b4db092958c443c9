// What the suites on CUDA share.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "operations/pass.hpp"
#include "support/cuda.hpp"
#include "support/training.hpp"

namespace cuda_tests {

namespace cuda = support::cuda;
using support::Bytes;

// Skipped where CUDA is not asked for.
class OnDevice : public testing::Test {
 protected:
  void SetUp() override {
    if (!cuda::wanted()) GTEST_SKIP() << "CUDA is not asked for";
  }

  // Context, stream and memory on device 0, which all tests share.
  static cuda::Device& device() {
    static cuda::Device shared("cuda");
    return shared;
  }
};

// Skipped on a GPU, which counts nothing and fails nothing on request.
class OnSoftware : public OnDevice {
 protected:
  void SetUp() override {
    OnDevice::SetUp();
    if (!IsSkipped() && !cuda::software::is_there()) GTEST_SKIP() << "needs software CUDA";
  }
};

// A layer whose passes use everything: dropout, several adapters, h kept.
inline operations::LayerCase three_adapters(adalora_dtype_t activation = support::f32,
                                            adalora_dtype_t param = support::f32) {
  operations::LayerCase layer;
  layer.name = "three adapters";
  layer.activation = activation;
  layer.param = param;
  layer.tokens = 33;
  layer.in = 65;
  layer.out = {13, 40, 7};
  layer.rank = {8, 3, 5};
  layer.dropout = {0.2, 3, 4, 0, 0};
  return layer;
}

inline std::vector<Bytes> results_of(operations::Pass& pass) {
  pass.forward();
  pass.backward();
  return pass.outputs();
}

// A step number, clipping, idle adapters and steps that are not finite, over the whole schedule and past its end.
inline std::vector<support::Training::Given> eventful(const support::oracle::Schedule& schedule) {
  std::vector<support::Training::Given> all;
  for (int64_t step = 0; step < schedule.total_step + 2; ++step) {
    support::Training::Given given;
    given.step = step;
    given.lr = 1e-2 / static_cast<double>(step + 1);
    given.weight_decay = step % 3 == 0 ? 0.1 : 0.0;
    given.loss_scale = step % 4 == 1 ? 64 : 1;
    given.found_inf = step == 1 || step == schedule.tinit + 2 || step == schedule.end();
    if (step % 5 == 3) given.has_grad = {0, 1};
    all.push_back(given);
  }
  return all;
}

}  // namespace cuda_tests
