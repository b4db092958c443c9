// Two tensor-parallel processes, each with a share of the input and the output features, that sum h and g between the
// stages.

#include "operations.hpp"
#include "pass.hpp"

namespace operations {

using namespace support;

namespace {

struct Share {
  int64_t in_begin, in, out_begin, out;
};

LayerContents share_of(const LayerContents& whole, const Share& s) {
  const AdapterContents& one = whole.adapters[0];
  const int64_t rank = one.params.rank(), tokens = whole.x.rows;
  const auto triplets = [&](const oracle::Triplets<double>& p) {
    return oracle::Triplets<double>{block(p.A, 0, rank, s.in_begin, s.in), p.E,
                                    block(p.B, s.out_begin, s.out, 0, rank)};
  };
  const auto outputs = [&](const Dense<double>& y) { return block(y, 0, tokens, s.out_begin, s.out); };
  return {block(whole.x, 0, tokens, s.in_begin, s.in),
          block(whole.dx, 0, tokens, s.in_begin, s.in),
          {{triplets(one.params), triplets(one.grads), outputs(one.y), outputs(one.dy)}}};
}

LayerResults share_of(const LayerResults& whole, const Share& s) {
  const AdapterResults& one = whole.adapters[0];
  const int64_t rank = one.grads.rank(), tokens = whole.dx.rows;
  return {block(whole.dx, 0, tokens, s.in_begin, s.in),
          {{one.h,
            block(one.y, 0, tokens, s.out_begin, s.out),
            one.g,
            {block(one.grads.A, 0, rank, s.in_begin, s.in), one.grads.E,
             block(one.grads.B, s.out_begin, s.out, 0, rank)}}}};
}

// What an all-reduce does.
void add_up(Tensor& a, Tensor& b) {
  const Dense<double> both = oracle::sum(a.get(), b.get());
  a.set(both);
  b.set(both);
}

void two_shares_are_the_whole(Backend& backend, LayerCase layer) {
  const int64_t in = layer.in, out = layer.out[0];
  const LayerContents contents = random_contents(layer);
  const LayerResults expected = expected_results(layer, contents);
  const Share shares[] = {{0, in / 3, 0, out / 2}, {in / 3, in - in / 3, out / 2, out - out / 2}};

  layer.stages_apart = true;
  layer.whole_in = in;
  layer.whole_out = out;
  std::vector<Pass> passes;
  for (const Share& s : shares) {
    layer.in = s.in;
    layer.in_begin = s.in_begin;
    layer.out = {s.out};
    layer.out_begin = s.out_begin;
    passes.emplace_back(backend, backend.context(), layer, share_of(contents, s));
  }

  for (Pass& pass : passes) pass.forward(ADALORA_STAGE_PROJECT);
  add_up(passes[0].h(0), passes[1].h(0));
  for (Pass& pass : passes) pass.forward(ADALORA_STAGE_EXPAND);
  for (Pass& pass : passes) pass.backward(ADALORA_STAGE_PROJECT);
  add_up(passes[0].g(0), passes[1].g(0));
  for (Pass& pass : passes) pass.backward(ADALORA_STAGE_EXPAND);

  for (size_t i : {size_t{0}, size_t{1}}) {
    SCOPED_TRACE("share " + std::to_string(i));
    passes[i].check_forward(share_of(expected, shares[i]));
    passes[i].check_backward(share_of(expected, shares[i]));
  }
}

}  // namespace

std::vector<Case> tensor_parallel_cases() {
  std::vector<Case> rows;
  for (auto [activation, param] : {std::pair{f64, f64}, {f32, f32}, {bf16, f32}, {bf16, bf16}, {f16, f16}})
    for (double dropout : {0.0, 0.3}) {
      LayerCase layer;
      layer.activation = activation;
      layer.param = param;
      layer.tokens = 33;
      layer.in = 100;
      layer.out = {65};
      layer.rank = {8};
      layer.dropout = {dropout, 5, 6, 7, 0};
      layer.gap = dropout > 0 ? 2 : 0;
      layer.name = name_of(activation) + " " + name_of(param) + (dropout > 0 ? " with dropout and gaps" : " plain");
      rows.push_back({"two tensor-parallel shares", layer.name,
                      [layer](Backend& backend) { two_shares_are_the_whole(backend, layer); }});
    }
  return rows;
}

}  // namespace operations
