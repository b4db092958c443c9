// Dropout: the mask bit for bit, and the passes with it.

#include "operations.hpp"
#include "pass.hpp"

namespace operations {

using namespace support;

namespace {

// The vectors that Random123 publishes (kat_vectors), so that the oracle's own generator is the right one.
void known_answers(Backend&) {
  using Counter = std::array<uint32_t, 4>;
  EXPECT_EQ(philox4x32_10({0, 0, 0, 0}, {0, 0}), (Counter{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox4x32_10({~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}), (Counter{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox4x32_10({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Counter{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

// With x all ones and A the identity, h is the mask.
void mask_is_philox(Backend& backend, const LayerCase& layer) {
  LayerContents contents = random_contents(layer);
  std::fill(contents.x.values.begin(), contents.x.values.end(), 1.0);
  Dense<double>& A = contents.adapters[0].params.A;
  for (int64_t i = 0; i < A.rows; ++i)
    for (int64_t j = 0; j < A.columns; ++j) A(i, j) = i == j ? 1.0 : 0.0;
  Pass pass(backend, backend.context(), layer, contents);
  pass.forward();

  const oracle::Dropout d = layer.dropout_of(0);
  const Dense<double> h = pass.h(0).get();
  int64_t wrong = 0;
  for (int64_t t = 0; t < h.rows; ++t)
    for (int64_t c = 0; c < h.columns; ++c)
      if (kept(d.seed, d.offset, d.token0 + t, d.column0 + c, d.probability) != (h(t, c) != 0) && wrong++ == 0)
        ADD_FAILURE() << "mask of token " << d.token0 + t << ", column " << d.column0 + c << ": found " << h(t, c);
  EXPECT_EQ(wrong, 0);
}

}  // namespace

std::vector<Case> dropout_cases() {
  std::vector<Case> rows{{"philox", "known answers", known_answers}};
  for (adalora_dtype_t type : {f64, f32, bf16, f16}) {
    LayerCase layer;
    layer.activation = layer.param = type;
    layer.tokens = 33;
    layer.in = 65;
    layer.rank = {65};
    const auto add = [&](const std::string& what, oracle::Dropout dropout) {
      layer.dropout = dropout;
      layer.name = name_of(type) + " " + what;
      rows.push_back({"dropout mask", layer.name, [layer](Backend& backend) { mask_is_philox(backend, layer); }});
    };
    add("seed and offset of one word", {0.1, 7, 3, 0, 0});
    add("seed and offset of two words", {0.5, 0xFEDCBA9876543210, 0x0123456789ABCDEF, 0, 0});
    add("tokens from the middle", {0.25, 1, 2, 12345, 0});
    add("the last tokens there are", {0.25, 1, 2, (int64_t{1} << 32) - 33, 0});
    add("hardly any dropped", {0x1p-31, 1, 2, 0, 0});
    add("hardly any kept", {0.99, 1, 2, 0, 0});
    layer.whole_in = 201;
    layer.in_begin = 67;
    add("columns of a share", {0.3, 1, 2, 9, 0});
  }

  for (auto [activation, param] : {std::pair{f64, f64}, {f32, f32}, {bf16, f32}, {bf16, bf16}, {f16, f16}}) {
    LayerCase layer;
    layer.activation = activation;
    layer.param = param;
    layer.tokens = 130;
    layer.in = 33;
    layer.out = {65, 7, 13};
    layer.rank = {8, 3, 5};
    layer.dropout = {0.3, 77, 1000, 5, 0};
    const auto add = [&](const std::string& what) {
      layer.name = name_of(activation) + " " + name_of(param) + " " + what;
      rows.push_back({"forward and backward with dropout", layer.name,
                      [layer](Backend& backend) { check_both(backend, layer); }});
    };
    add("three adapters, each with its own mask");
    layer.gap = 3;
    add("with gaps");
    layer.keeps_h = false;
    add("without h");
    layer.keeps_h = true;
    layer.stages_apart = true;
    layer.pattern = true;
    add("in two stages with a pattern");
    layer.stages_apart = layer.pattern = false;
    layer.every_other_drops = true;
    layer.out.push_back(6);
    layer.rank.push_back(2);
    add("two of four adapters drop");
    layer.gap = 0;
    layer.in = 64;
    add("two of four adapters drop, 64 features");
  }
  return rows;
}

}  // namespace operations
