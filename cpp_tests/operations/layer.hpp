// A forward and backward pass of one or several adapters on one input: the case, its contents, and what must come out.
#pragma once

#include <string>
#include <vector>

#include "support/compare.hpp"
#include "support/oracle.hpp"

namespace operations {

struct LayerCase {
  std::string name;
  adalora_dtype_t activation = support::f64;
  adalora_dtype_t param = support::f64;
  adalora_dtype_t grad = 0;  // 0: as param
  int32_t operand_terms = 0;
  int64_t tokens = 5;
  int64_t in = 7;
  std::vector<int64_t> out = {13};  // one entry an adapter
  std::vector<int64_t> rank = {3};
  int64_t gap = 0;           // elements between the rows of every matrix
  bool e_is_column = false;  // E and its gradient as rank x 1
  bool interleaved = false;  // the adapters' y are columns of one matrix, and so are their dy
  bool stages_apart = false;
  bool keeps_h = true;  // else backward computes h again
  bool wants_dx = true;
  bool accumulates = true;
  bool pattern = false;  // masks every other triplet
  double scaling = 0;    // 0: the adapter's own
  double alpha = 0;
  support::oracle::Dropout dropout;    // of the first adapter; each further one has its own
  bool every_other_drops = false;      // the first, the third and so on have none
  int64_t whole_in = 0, in_begin = 0;  // where the case is a tensor-parallel share
  int64_t whole_out = 0, out_begin = 0;

  size_t adapters() const { return out.size(); }
  bool keeps(int64_t triplet) const { return !pattern || triplet % 2 == 0; }
  double scaling_of(size_t adapter) const;
  support::oracle::Dropout dropout_of(size_t adapter) const;
};

struct AdapterContents {
  support::oracle::Triplets<double> params, grads;
  support::Dense<double> y, dy;
};

// Contents of all operands before a pass, as their element types hold them.
struct LayerContents {
  support::Dense<double> x, dx;
  std::vector<AdapterContents> adapters;
};

// A third of E is 0, as all of it is when training starts.
LayerContents random_contents(const LayerCase& layer, uint64_t seed = 1);

struct AdapterResults {
  support::Dense<support::Bounded> h, y, g;
  support::oracle::Triplets<support::Bounded> grads;
};

struct LayerResults {
  support::Dense<support::Bounded> dx;
  std::vector<AdapterResults> adapters;
};

LayerResults expected_results(const LayerCase& layer, const LayerContents& contents);

}  // namespace operations
