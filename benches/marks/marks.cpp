// The adapter's passes on a CPU beside two libraries of matrix products: BLIS, one call for each product, and LIBXSMM,
// kernels on blocks of tokens while a block is in the cache. One process, turn by turn, on the same OpenMP threads.
//
//   marks [ROUNDS] >results.json
//
// Exits with 1, before a row is timed, where not all ways compute the same.
#include <blis.h>
#include <libxsmm.h>
#include <omp.h>

#include <adalora.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <fstream>
#include <functional>
#include <iostream>
#include <limits>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// libgomp's, and what BLIS computes on: nobody's threads have to be started or woken apart from the others'.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);

namespace {

constexpr int layers = 24, tokens = 512, in = 768, out = 768;

// The same values in every run, spread over [-1, 1).
float value() {
  static std::uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<float>(static_cast<std::int64_t>(state) >> 40) * 0x1p-23f;
}

class Array {
 public:
  explicit Array(int size) : size_(size), memory_(static_cast<std::size_t>(size) * sizeof(float)) {}
  Array(int size, float scale) : Array(size) {
    std::generate_n(data(), size, [=] { return scale * value(); });
  }
  float* data() const { return static_cast<float*>(memory_.data()); }
  int size() const { return size_; }
  void fill(float element) const { std::fill_n(data(), size_, element); }

 private:
  int size_;
  adalora::Buffer memory_;
};

// A layer has activations of its own, so that they come from memory. The same ones serve all ways.
struct Layer {
  explicit Layer(int rank)
      : x(tokens * in, 1),
        y(tokens * out, 1),
        dy(tokens * out, 1),
        dx(tokens * in, 1),
        A(rank * in, 0.1f),
        E(rank, 1),
        B(out * rank, 0.1f),
        dA(rank * in),
        dE(rank),
        dB(out * rank),
        h(tokens * rank),
        hE(tokens * rank) {}
  Array x, y, dy, dx, A, E, B, dA, dE, dB;
  Array h, hE;  // kept from forward to backward: x A^T, and it times E, which only BLIS's way keeps
};

// One way to compute y += ((x A^T) E) B^T, and with g = dy B: dA = (g E)^T x, dE = colsum(g h), dB = dy^T (h E),
// dx += (g E) A.
class Way {
 public:
  virtual ~Way() = default;
  virtual void forward(int layer) = 0;
  virtual void backward(int layer) = 0;

  void pass() {
    for (int layer = 0; layer < layers; ++layer) forward(layer);
    for (int layer = layers; layer-- > 0;) backward(layer);
  }
};

class Ours : public Way {
 public:
  Ours(std::deque<Layer>& all, int rank, int threads) : context_(on(threads)) {
    adalora::AdapterDesc desc;
    desc.in_features = in, desc.out_features = out, desc.rank = rank;
    desc.param_dtype = desc.activation_dtype = ADALORA_FLOAT32;
    using adalora::View;
    for (Layer& l : all) {
      adapters_.emplace_back(context_, desc);
      adalora::Call& call = calls_.emplace_back();
      call.adapter = adapters_.back().get();
      call.params = {View(l.A.data(), rank, in), View(l.E.data(), rank), View(l.B.data(), out, rank)};
      call.grads = {View(l.dA.data(), rank, in), View(l.dE.data(), rank), View(l.dB.data(), out, rank)};
      call.scaling = 1;
      call.y = View(l.y.data(), tokens, out), call.dy = View(l.dy.data(), tokens, out);
      call.h = l.h.data();
      x_.push_back(View(l.x.data(), tokens, in)), dx_.push_back(View(l.dx.data(), tokens, in));
    }
    if (!all.empty()) workspace_ = adalora::Buffer(adalora::sizes(calls_[0], tokens).workspace);
  }

  void forward(int layer) override {
    adalora::forward(calls_[layer], ADALORA_STAGE_BOTH, x_[layer], workspace_.data(), workspace_.size());
  }

  void backward(int layer) override {
    adalora::backward(calls_[layer], ADALORA_STAGE_BOTH, false, x_[layer], dx_[layer], workspace_.data(),
                      workspace_.size());
  }

  std::string describe() const { return context_.describe(); }

 private:
  static adalora::ContextDesc on(int threads) {
    adalora::ContextDesc desc;
    desc.backend = ADALORA_BACKEND_CPU, desc.threads = threads, desc.parallel = GOMP_parallel;
    return desc;
  }

  adalora::Context context_;
  std::deque<adalora::Adapter> adapters_;
  std::vector<adalora::Call> calls_;
  std::vector<adalora_matrix_t> x_, dx_;
  adalora::Buffer workspace_;
};

// A row-major matrix, or the transpose of one, as BLIS's strides say it.
struct Strided {
  Strided(const Array& array, int columns) : data(array.data()), row(columns), column(1) {}
  Strided transposed() const {
    Strided result = *this;
    std::swap(result.row, result.column);
    return result;
  }
  float* data;
  inc_t row, column;
};

class Blis : public Way {
 public:
  Blis(std::deque<Layer>& all, int rank, int threads, arch_t kernels)
      : all_(all),
        rank_(rank),
        threads_(threads),
        kernels_(bli_gks_lookup_nat_cntx(kernels)),
        g_(tokens * rank),
        gE_(tokens * rank) {
    bli_thread_set_num_threads(threads);
  }

  void forward(int layer) override {
    Layer& l = all_[layer];
    multiply(tokens, rank_, in, {l.x, in}, Strided(l.A, in).transposed(), 0, {l.h, rank_});
    scale(l.h, l.E, l.hE);
    multiply(tokens, out, rank_, {l.hE, rank_}, Strided(l.B, rank_).transposed(), 1, {l.y, out});
  }

  void backward(int layer) override {
    Layer& l = all_[layer];
    multiply(tokens, rank_, out, {l.dy, out}, {l.B, rank_}, 0, {g_, rank_});
    multiply(out, rank_, tokens, Strided(l.dy, out).transposed(), {l.hE, rank_}, 0, {l.dB, rank_});
    scale(g_, l.E, gE_);
    multiply(rank_, in, tokens, Strided(gE_, rank_).transposed(), {l.x, in}, 0, {l.dA, in});
    multiply(tokens, in, rank_, {gE_, rank_}, {l.A, in}, 1, {l.dx, in});
    l.dE.fill(0);
    float* dE = l.dE.data();
#pragma omp parallel for num_threads(threads_) reduction(+ : dE[:rank_])
    for (int t = 0; t < tokens; ++t)
      for (int k = 0; k < rank_; ++k) dE[k] += g_.data()[t * rank_ + k] * l.h.data()[t * rank_ + k];
  }

 private:
  void multiply(dim_t m, dim_t n, dim_t k, const Strided& a, const Strided& b, float beta, const Strided& c) const {
    float one = 1;
    bli_sgemm_ex(BLIS_NO_TRANSPOSE, BLIS_NO_TRANSPOSE, m, n, k, &one, a.data, a.row, a.column, b.data, b.row, b.column,
                 &beta, c.data, c.row, c.column, kernels_, nullptr);
  }

  void scale(const Array& from, const Array& factors, const Array& to) const {
#pragma omp parallel for num_threads(threads_)
    for (int t = 0; t < tokens; ++t)
      for (int k = 0; k < rank_; ++k) to.data()[t * rank_ + k] = from.data()[t * rank_ + k] * factors.data()[k];
  }

  std::deque<Layer>& all_;
  int rank_, threads_;
  cntx_t* kernels_;
  Array g_, gE_;
};

// LIBXSMM is column-major: to it, our row-major x of tokens by in is one of in by tokens. Its kernels take no
// transposed left factor; all products can be written without one if A and B are transposed once a call, and dB at its
// end.
class Libxsmm : public Way {
 public:
  Libxsmm(std::deque<Layer>& all, int rank, int threads, int block)
      : all_(all), rank_(rank), threads_(threads), block_(block), A_(rank * in), B_(rank * out) {
    // Smaller blocks where the threads would not have equally many.
    while (block_ > 16 && tokens / block_ % threads != 0) block_ /= 2;
    h_ = kernel(rank, block_, in, rank, in, rank, false, false);       // h^T = A x^T, and g^T = B^T dy^T
    y_ = kernel(out, block_, rank, out, rank, out, true, false);       // y^T += B hE^T, and dx^T += A^T gE^T
    first_ = kernel(out, rank, block_, out, rank, out, false, true);   // dB = dy^T hE, and dA^T = x^T gE
    further_ = kernel(out, rank, block_, out, rank, out, true, true);  // the same, added
    for (int k = 0; k < threads; ++k) scratch_.emplace_back(rank, block_);
  }

  void forward(int layer) override {
    Layer& l = all_[layer];
#pragma omp parallel num_threads(threads_)
    {
      transpose(l.A, rank_, in, A_), transpose(l.B, out, rank_, B_);
#pragma omp barrier
      const Scratch& own = scratch_[omp_get_thread_num()];
#pragma omp for schedule(static) nowait
      for (int t = 0; t < tokens; t += block_) {
        float* h = l.h.data() + t * rank_;
        h_(A_.data(), l.x.data() + t * in, h);
        scale(h, l.E, own.hE);
        y_(B_.data(), own.hE.data(), l.y.data() + t * out);
      }
    }
  }

  void backward(int layer) override {
    Layer& l = all_[layer];
#pragma omp parallel num_threads(threads_)
    {
      Scratch& own = scratch_[omp_get_thread_num()];
      own.dE.fill(0);
      own.any = false;
#pragma omp for schedule(static)
      for (int t = 0; t < tokens; t += block_) {
        const float *h = l.h.data() + t * rank_, *x = l.x.data() + t * in, *dy = l.dy.data() + t * out;
        const libxsmm_smmfunction product = own.any ? further_ : first_;
        own.any = true;
        scale(h, l.E, own.hE);
        product(dy, own.hE.data(), own.dB.data());
        h_(l.B.data(), dy, own.g.data());
        for (int i = 0; i < block_; ++i)
          for (int k = 0; k < rank_; ++k) own.dE.data()[k] += own.g.data()[i * rank_ + k] * h[i * rank_ + k];
        scale(own.g.data(), l.E, own.gE);
        product(x, own.gE.data(), own.dA.data());
        y_(l.A.data(), own.gE.data(), l.dx.data() + t * in);
      }
      const int begin = in * omp_get_thread_num() / threads_, end = in * (omp_get_thread_num() + 1) / threads_;
      add(&Scratch::dA, begin, end), add(&Scratch::dB, begin, end);
      for (int k = 0; k < rank_; ++k)
        std::copy(scratch_[0].dA.data() + k * in + begin, scratch_[0].dA.data() + k * in + end,
                  l.dA.data() + k * in + begin);
      transpose(scratch_[0].dB, rank_, out, l.dB);
#pragma omp single nowait
      for (int k = 0; k < rank_; ++k) {
        l.dE.data()[k] = 0;
        for (const Scratch& s : scratch_) l.dE.data()[k] += s.dE.data()[k];
      }
    }
  }

 private:
  // What a thread has of its own.
  struct Scratch {
    Scratch(int rank, int block)
        : hE(block * rank), g(block * rank), gE(block * rank), dA(rank * in), dE(rank), dB(rank * out) {}
    Array hE, g, gE, dA, dE, dB;
    bool any = false;
  };

  static libxsmm_smmfunction kernel(int m, int n, int k, int lda, int ldb, int ldc, bool add, bool transposed_b) {
    static_assert(in == out, "kernels serve products with x as well as with y");
    const float alpha = 1, beta = add ? 1.0f : 0.0f;
    const int flags = transposed_b ? LIBXSMM_GEMM_FLAG_TRANS_B : LIBXSMM_GEMM_FLAG_NONE;
    const int prefetch = LIBXSMM_PREFETCH_NONE;
    const libxsmm_smmfunction result = libxsmm_smmdispatch(m, n, k, &lda, &ldb, &ldc, &alpha, &beta, &flags, &prefetch);
    if (result == nullptr) throw std::runtime_error("LIBXSMM has no kernel for one of the products on this processor");
    return result;
  }

  // The calling thread's share of the work; both row-major.
  void transpose(const Array& from, int rows, int columns, const Array& to) const {
    const int thread = omp_get_thread_num();
    const int begin = columns * thread / threads_, end = columns * (thread + 1) / threads_;
    if (begin < end)
      libxsmm_otrans(to.data() + begin * rows, from.data() + begin, sizeof(float), end - begin, rows, columns, rows);
  }

  void scale(const float* from, const Array& factors, const Array& to) const {
    for (int t = 0; t < block_; ++t)
      for (int k = 0; k < rank_; ++k) to.data()[t * rank_ + k] = from[t * rank_ + k] * factors.data()[k];
  }

  // Adds up what all threads have of columns of a gradient, in the first one's scratch: thread 0 always had a block.
  void add(Array Scratch::*gradient, int begin, int end) {
    for (const Scratch& other : scratch_)
      for (int k = 0; k < rank_ && other.any && &other != &scratch_[0]; ++k)
        for (int i = k * in + begin; i < k * in + end; ++i)
          (scratch_[0].*gradient).data()[i] += (other.*gradient).data()[i];
  }

  std::deque<Layer>& all_;
  int rank_, threads_, block_;
  Array A_, B_;
  libxsmm_smmfunction h_, y_, first_, further_;
  std::deque<Scratch> scratch_;
};

// What a pass leaves, from the same beginning; nothing of what another way computed.
std::vector<std::vector<float>> results(Way& way, std::deque<Layer>& all, const Array& start) {
  for (Layer& l : all) {
    for (const Array* a : {&l.y, &l.dx}) std::copy_n(start.data(), start.size(), a->data());
    for (const Array* a : {&l.dA, &l.dE, &l.dB, &l.h, &l.hE}) a->fill(std::numeric_limits<float>::quiet_NaN());
  }
  way.pass();
  std::vector<std::vector<float>> result;
  for (const Layer& l : all)
    for (const Array* a : {&l.y, &l.dx, &l.dA, &l.dE, &l.dB}) result.emplace_back(a->data(), a->data() + a->size());
  return result;
}

// The largest distance of two ways' results, over their size, in Frobenius norms.
double distance(const std::vector<std::vector<float>>& a, const std::vector<std::vector<float>>& b) {
  double largest = 0;
  for (std::size_t n = 0; n < a.size(); ++n) {
    double difference = 0, size = 0;
    for (std::size_t i = 0; i < a[n].size(); ++i)
      difference += std::pow(a[n][i] - b[n][i], 2), size += std::pow(a[n][i], 2);
    const double relative = std::sqrt(difference / size);
    largest = std::isnan(relative) ? HUGE_VAL : std::max(largest, relative);
  }
  return largest;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.4g", value);
  return text;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

std::string processor(const std::string& field) {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.substr(0, line.find_last_not_of("\t ", line.find(':') - 1) + 1) == field)
      return line.substr(line.find(':') + 2);
  return "";
}

// Named instead of left to BLIS: 0.9 knows processors by their family, and takes portable kernels on those newer than
// itself; and neither set is the faster one at all ranks. Only the static library shows what looks them up.
std::vector<arch_t> kernels_of_blis() {
  std::vector<arch_t> result;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) result.push_back(BLIS_ARCH_HASWELL);
  if (__builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    result.push_back(BLIS_ARCH_SKX);
  if (result.empty()) result.push_back(bli_arch_query_id());
  return result;
}

// One row of the results, or an exception where the ways do not compute the same.
void measure(int rank, int threads, int rounds) {
  std::deque<Layer> all;
  for (int k = 0; k < layers; ++k) all.emplace_back(rank);
  std::vector<std::pair<std::string, std::unique_ptr<Way>>> ways;
  ways.emplace_back("ours", new Ours(all, rank, threads));
  for (const arch_t kernels : kernels_of_blis())
    ways.emplace_back("blis_" + std::string(bli_arch_string(kernels)), new Blis(all, rank, threads, kernels));
  for (const int block : {32, 64})
    ways.emplace_back("libxsmm_" + std::to_string(block), new Libxsmm(all, rank, threads, block));

  const Array start(tokens * in, 0.1f);
  const auto expected = results(*ways[0].second, all, start);
  double furthest = 0;
  for (std::size_t n = 1; n < ways.size(); ++n) {
    const double found = distance(expected, results(*ways[n].second, all, start));
    if (found > 1e-5)
      throw std::runtime_error("rank " + std::to_string(rank) + ", threads " + std::to_string(threads) +
                               ": results of " + ways[n].first + " are " + std::to_string(found) +
                               " of their size away from ours");
    furthest = std::max(furthest, found);
  }

  std::vector<std::vector<double>> times(ways.size());
  for (int round = 0; round < rounds; ++round)
    for (std::size_t turn = 0; turn < ways.size(); ++turn) {
      const std::size_t n = (round + turn) % ways.size();
      const auto begin = std::chrono::steady_clock::now();
      ways[n].second->pass();
      times[n].push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count());
    }
  std::string medians, ratios;
  for (std::size_t n = 0; n < ways.size(); ++n) {
    const std::string name = (n == 0 ? "\"" : ", \"") + ways[n].first + "\": ";
    medians += name + number(median(times[n])), ratios += name + number(median(times[n]) / median(times[0]));
  }
  std::cout << "    {\"rank\": " << rank << ", \"threads\": " << threads << ", \"rounds\": " << rounds
            << ", \"largest_distance\": " << furthest << ",\n     \"ms\": {" << medians << "},\n     \"over_ours\": {"
            << ratios << "}}";
}

}  // namespace

int main(int count, char** arguments) try {
  bli_init();
  libxsmm_init();
  const int rounds = count > 1 ? std::stoi(arguments[1]) : 31;
  const int cores = omp_get_num_procs();
  omp_set_dynamic(0);

  std::deque<Layer> none;
  std::cout.precision(4);
  std::cout << "{\n  \"machine\": {\"processor\": \"" << processor("model name") << "\", \"family\": \""
            << processor("cpu family") << "\", \"model\": \"" << processor("model") << "\", \"cores\": " << cores
            << "},\n  \"adalora\": \"" << Ours(none, 1, cores).describe() << "\",\n  \"blis\": \""
            << bli_info_get_version_str() << "\",\n  \"libxsmm\": \"" << LIBXSMM_VERSION << ", "
            << libxsmm_get_target_arch() << "\",\n  \"layers\": " << layers << ", \"in\": " << in
            << ", \"out\": " << out << ", \"tokens\": " << tokens << ",\n  \"rows\": [\n";
  const char* separator = "";
  for (const int rank : {12, 64})
    for (const int threads : std::set<int, std::greater<int>>{cores, 1}) {
      std::cout << separator;
      measure(rank, threads, rounds);
      separator = ",\n";
    }
  std::cout << "\n  ]\n}\n";
  return 0;
} catch (const std::exception& error) {
  std::cerr << "marks: " << error.what() << std::endl;
  return 1;
}
