// Initial triplets: normal A and B of deviation 0.02, E zero, each element a function of the seed and its place.

#include <algorithm>

#include "operations.hpp"
#include "support/compare.hpp"
#include "support/memory.hpp"
#include "support/oracle.hpp"

namespace operations {

using namespace support;

namespace {

struct Share {
  int64_t in_begin = 0, in = 0, out_begin = 0, out = 0;  // 0: the whole layer
};

struct Geometry {
  int64_t in, out, rank;
};

// What initialize writes into buffers of `type`, of the adapter of `param` elements.
oracle::Triplets<double> initialized(Backend& backend, Geometry size, adalora_dtype_t param, adalora_dtype_t type,
                                     uint64_t seed, Share share = {}, int64_t gap = 0) {
  adalora_adapter_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = size.in;
  desc.out_features = size.out;
  desc.rank = size.rank;
  desc.param_dtype = param;
  desc.activation_dtype = param;
  desc.in_local = share.in;
  desc.in_begin = share.in_begin;
  desc.out_local = share.out;
  desc.out_begin = share.out_begin;
  adalora_adapter_t* handle = nullptr;
  require(adalora_adapter_create(backend.context(), &desc, &handle));
  const Adapter adapter(handle);

  const Tensor A(backend, type, size.rank, share.in != 0 ? share.in : size.in, gap),
      E(backend, type, 1, size.rank, gap), B(backend, type, share.out != 0 ? share.out : size.out, size.rank, gap);
  const adalora_triplets_t triplets{A.matrix(), E.matrix(), B.matrix()};
  require(adalora_adapter_initialize(adapter.get(), &triplets, seed, backend.stream()));
  EXPECT_TRUE(A.gaps_untouched() && B.gaps_untouched());
  return {A.get(), E.get(), B.get()};
}

// Largest distance between the distribution of the values and the normal one of deviation 0.02 (Kolmogorov, Smirnov).
double distance_from_normal(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const auto n = static_cast<double>(values.size());
  double distance = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const double below = 0.5 * std::erfc(-values[i] / (0.02 * std::sqrt(2.0)));
    distance = std::max(
        {distance, std::fabs(below - static_cast<double>(i) / n), std::fabs(below - static_cast<double>(i + 1) / n)});
  }
  return distance;
}

double correlation(const std::vector<double>& a, const std::vector<double>& b) {
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    ab += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  return ab / std::sqrt(aa * bb);
}

void is_normal(Backend& backend, adalora_dtype_t type) {
  const oracle::Triplets<double> p = initialized(backend, {300, 257, 33}, type, type, 42);
  // Exceeded by one sample of 10^4 numbers in a million, where it is normal; rounding to bfloat16 moves it by less than
  // a quarter.
  const double allowed = 2.7 / std::sqrt(static_cast<double>(p.B.values.size()));
  EXPECT_LT(distance_from_normal(p.A.values), allowed) << "A";
  EXPECT_LT(distance_from_normal(p.B.values), allowed) << "B";
  for (double e : p.E.values) EXPECT_EQ(e, 0);

  const oracle::Triplets<double> other = initialized(backend, {300, 257, 33}, type, type, 43);
  EXPECT_LT(std::fabs(correlation(p.A.values, p.B.values)), 0.05) << "A and B";
  EXPECT_LT(std::fabs(correlation(p.A.values, other.A.values)), 0.05) << "two seeds";
  const std::vector<double> later(p.A.values.begin() + 1, p.A.values.end());
  EXPECT_LT(std::fabs(correlation(p.A.values, later)), 0.05) << "neighbours";
}

void depends_on_seed_and_place_alone(Backend& backend, adalora_dtype_t type) {
  const Geometry size{33, 13, 5};
  const uint64_t seed = 0xABCDEF0123456789;
  const oracle::Triplets<double> whole = initialized(backend, size, type, type, seed);
  const oracle::Triplets<double> gaps = initialized(backend, size, type, type, seed, {}, 3);
  EXPECT_EQ(whole.A.values, gaps.A.values);
  EXPECT_EQ(whole.B.values, gaps.B.values);
  const oracle::Triplets<double> share = initialized(backend, size, type, type, seed, {10, 9, 6, 7});
  EXPECT_EQ(share.A.values, block(whole.A, 0, 5, 10, 9).values);
  EXPECT_EQ(share.B.values, block(whole.B, 6, 7, 0, 5).values);
}

void low_precision_is_the_rounded_master(Backend& backend, adalora_dtype_t type) {
  const oracle::Triplets<double> low = initialized(backend, {33, 13, 5}, type, type, 9);
  const oracle::Triplets<double> master = initialized(backend, {33, 13, 5}, type, f32, 9);
  for (int m : {0, 1, 2})
    for (size_t i = 0; i < low[m].values.size(); ++i)
      ASSERT_EQ(low[m].values[i], rounded(master[m].values[i], type)) << m << " " << i;
}

void small(Backend& backend) {
  initialized(backend, {7, 5, 0}, f32, f32, 1);
  EXPECT_EQ(initialized(backend, {1, 1, 1}, f64, f64, 1).E.values, std::vector<double>{0});
}

}  // namespace

std::vector<Case> initialize_cases() {
  std::vector<Case> rows{{"initialize", "rank 0 and one feature", small}};
  for (adalora_dtype_t type : {f64, f32, bf16, f16}) {
    rows.push_back({"initialize", name_of(type) + " is normal", [type](Backend& b) { is_normal(b, type); }});
    rows.push_back({"initialize", name_of(type) + " shares fit together",
                    [type](Backend& b) { depends_on_seed_and_place_alone(b, type); }});
  }
  for (adalora_dtype_t type : {bf16, f16})
    rows.push_back({"initialize", name_of(type) + " is its rounded master",
                    [type](Backend& b) { low_precision_is_the_rounded_master(b, type); }});
  return rows;
}

}  // namespace operations
