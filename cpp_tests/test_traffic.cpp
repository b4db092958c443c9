// How often the host's processor goes to memory: a pass sweeps x, y, dy, dx, h and g once, whatever the number of
// adapters on an x; a step reads the gradients once for the norm, and once for the update.
//
// What is swept lies in pages that are closed: one that is touched opens, and closes again when as many others were
// opened after it as a block of tokens lies in. So a page that has to be opened twice was left and come back to; what is
// read again while its block is at hand is in cache, and is not counted.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>

#include "operations/pass.hpp"
#include "support/model.hpp"

namespace {

using namespace support;
using operations::LayerCase;
using operations::LayerContents;
using operations::Pass;

const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));

// Pages that are open while they are used, and closed again in the order in which they were opened. The handler of a
// signal calls this, so that nothing is allocated once they are closed.
class Pages {
 public:
  // All pages that hold a part of these bytes, of which no other memory has any.
  Pages(std::string name, const void* data, size_t bytes, size_t window)
      : name_(std::move(name)), begin_(address(data) / page * page), open_(window) {
    openings_.resize((address(data) + bytes - begin_ + page - 1) / page);
  }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  void close() { protect(0, openings_.size(), PROT_NONE); }
  void leave_open() { protect(0, openings_.size(), PROT_READ | PROT_WRITE); }

  // Whether the address is in one of them; that page is open now.
  bool open(const void* at) {
    if (address(at) < begin_ || address(at) >= begin_ + openings_.size() * page) return false;
    const size_t touched = (address(at) - begin_) / page;
    size_t& place = open_[opened_++ % open_.size()];
    if (opened_ > open_.size()) protect(place, 1, PROT_NONE);
    place = touched;
    ++openings_[touched];
    protect(touched, 1, PROT_READ | PROT_WRITE);
    return true;
  }

  const std::string& name() const { return name_; }
  const std::vector<int>& openings() const { return openings_; }

 private:
  static uintptr_t address(const void* at) { return reinterpret_cast<uintptr_t>(at); }

  void protect(size_t first, size_t count, int how) {
    if (mprotect(reinterpret_cast<void*>(begin_ + first * page), count * page, how) != 0) std::abort();
  }

  std::string name_;
  uintptr_t begin_;
  std::vector<int> openings_;
  std::vector<size_t> open_;  // a ring of those that are
  size_t opened_ = 0;
};

using Watched = std::vector<std::unique_ptr<Pages>>;

Watched* watched = nullptr;
struct sigaction before_watching;

void open_page(int, siginfo_t* signal, void*) {
  for (const auto& pages : *watched)
    if (pages->open(signal->si_addr)) return;
  // Another fault than ours: it happens again, and whoever was there before hears of it.
  sigaction(SIGSEGV, &before_watching, nullptr);
}

// Runs the body while the pages open on demand alone.
template <class Body>
void watch(Watched& all, Body body) {
  struct sigaction action {};
  action.sa_sigaction = open_page;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  watched = &all;
  ASSERT_EQ(sigaction(SIGSEGV, &action, &before_watching), 0);
  for (const auto& pages : all) pages->close();
  body();
  for (const auto& pages : all) pages->leave_open();
  sigaction(SIGSEGV, &before_watching, nullptr);
}

// The host, with pages of its own for each buffer.
class PagedHost final : public Backend {
 public:
  std::string name() const override { return "paged host"; }
  adalora_context_t* context() override { return context_.get(); }
  std::vector<Team> teams() override { return {}; }
  void* stream() override { return nullptr; }
  double tolerance_of_products(adalora_dtype_t activation, adalora_dtype_t param, int32_t terms) const override {
    return host().tolerance_of_products(activation, param, terms);
  }

  void* allocate(size_t bytes) override {
    const size_t taken = page + (bytes + page - 1) / page * page;
    void* const memory = mmap(nullptr, taken, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    *static_cast<size_t*>(memory) = taken;
    return static_cast<unsigned char*>(memory) + page;
  }
  void release(void* memory) override {
    void* const begin = static_cast<unsigned char*>(memory) - page;
    munmap(begin, *static_cast<size_t*>(begin));
  }
  void fill(void* to, unsigned char byte, size_t bytes) override { host().fill(to, byte, bytes); }
  void upload(void* to, const void* from, size_t bytes) override { host().upload(to, from, bytes); }
  void download(void* to, const void* from, size_t bytes) override { host().download(to, from, bytes); }

 private:
  // One thread: with several, each would have a block of its own.
  Context context_ = cpu_context(1);
};

// Tokens that go through all products together while they are in cache.
constexpr size_t block_of_tokens = 32;

// Closes as soon as so many bytes, which may lie in two pages more than they fill, were touched after it.
std::unique_ptr<Pages> pages_of(const std::string& name, const Tensor& tensor, size_t window) {
  const size_t bytes = static_cast<size_t>(tensor.rows() * tensor.columns()) * size_of(tensor.type());
  return std::make_unique<Pages>(name, tensor.data(), bytes, window / page + 2);
}

// Whether a name is among several, each followed by the adapter's number where there is one each.
bool is_among(const std::string& name, const std::vector<std::string>& names) {
  const std::string kind = name.substr(0, name.find_first_of("0123456789"));
  return std::find(names.begin(), names.end(), kind) != names.end();
}

// Each page of these was opened once, and none of the others.
void expect_one_sweep(const Watched& all, const std::vector<std::string>& of, const std::string& what) {
  for (const auto& pages : all) {
    const int times = is_among(pages->name(), of) ? 1 : 0;
    const std::vector<int>& openings = pages->openings();
    const auto otherwise = std::find_if(openings.begin(), openings.end(), [&](int n) { return n != times; });
    EXPECT_EQ(otherwise, openings.end())
        << what << " opens page " << otherwise - openings.begin() << " of " << pages->name() << " " << *otherwise
        << " times, not " << times << "; all " << openings.size() << " pages together "
        << std::accumulate(openings.begin(), openings.end(), 0) << " times";
  }
}

// A row of x is as long as a page, and the last block is a part of one.
LayerCase query_key_value(adalora_dtype_t activation, adalora_dtype_t param) {
  LayerCase layer;
  layer.name = name_of(activation) + " with " + name_of(param);
  layer.activation = activation;
  layer.param = param;
  layer.tokens = 493;
  layer.in = static_cast<int64_t>(page / size_of(activation));
  layer.out = {layer.in, layer.in / 4, layer.in / 2 + 9};
  layer.rank = {12, 17, 5};
  return layer;
}

class Traffic : public testing::TestWithParam<LayerCase> {};

TEST_P(Traffic, IsOneSweepAPass) {
  const LayerCase& layer = GetParam();
  const LayerContents contents = operations::random_contents(layer);
  PagedHost paged;
  Pass elsewhere(host(), paged.context(), layer, contents);
  Pass pass(paged, paged.context(), layer, contents);
  const auto expect = [&](const std::string& what, const std::vector<std::string>& swept, const auto& call) {
    Watched all;
    for (const auto& [name, tensor] : pass.rows_of_tokens()) {
      const size_t row = static_cast<size_t>(tensor->columns()) * size_of(tensor->type());
      all.push_back(pages_of(name, *tensor, block_of_tokens * row));
    }
    watch(all, [&] { call(pass); });
    expect_one_sweep(all, swept, what);
    call(elsewhere);
    EXPECT_TRUE(pass.outputs() == elsewhere.outputs()) << what << " is disturbed by being watched";
  };
  if (layer.stages_apart) {
    expect("forward's first stage", {"x", "h"}, [](Pass& p) { p.forward(ADALORA_STAGE_PROJECT); });
    expect("forward's second stage", {"h", "y"}, [](Pass& p) { p.forward(ADALORA_STAGE_EXPAND); });
    expect("backward's first stage", {"dy", "h", "g"}, [](Pass& p) { p.backward(ADALORA_STAGE_PROJECT); });
    expect("backward's second stage", {"x", "h", "g", "dx"}, [](Pass& p) { p.backward(ADALORA_STAGE_EXPAND); });
  } else if (layer.keeps_h) {
    expect("forward", {"x", "h", "y"}, [](Pass& p) { p.forward(); });
    expect("backward", {"x", "dy", "h", "dx"}, [](Pass& p) { p.backward(); });
  } else {
    expect("forward", {"x", "y"}, [](Pass& p) { p.forward(); });
    expect("backward", {"x", "dy", "dx"}, [](Pass& p) { p.backward(); });
  }
}

std::vector<LayerCase> cases() {
  std::vector<LayerCase> all = {query_key_value(f64, f64),  query_key_value(f32, f32),  query_key_value(bf16, f32),
                                query_key_value(f16, f32),  query_key_value(bf16, bf16), query_key_value(f16, f16)};
  for (adalora_dtype_t activation : {f32, bf16}) {
    const auto add = [&](const std::string& name, auto change) {
      LayerCase layer = query_key_value(activation, f32);
      layer.name += ", " + name;
      change(layer);
      all.push_back(layer);
    };
    add("stages apart", [](LayerCase& layer) { layer.stages_apart = true; });
    add("h not kept", [](LayerCase& layer) { layer.keeps_h = false; });
    add("dropout", [](LayerCase& layer) { layer.dropout = {0.1, 3, 4, 5, 0}; });
    add("masked triplets", [](LayerCase& layer) { layer.pattern = true; });
    add("high rank", [](LayerCase& layer) { layer.rank = {128, 65, 64}; });
    add("one adapter", [](LayerCase& layer) { layer.out.resize(1), layer.rank.resize(1); });
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Swept, Traffic, testing::ValuesIn(cases()), [](const auto& row) {
  std::string name = row.param.name;
  for (char& c : name)
    if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
  return name;
});

TEST(Traffic, OfAStepIsOneSweepForTheNormAndOneForTheUpdate) {
  for (adalora_dtype_t param : {f64, f32, bf16}) {
    ModelCase c;
    c.layers = {{2048, 515, 12}, {300, 1030, 17}};
    c.param = param;
    c.master = param == bf16;
    PagedHost paged;
    Model model(paged, paged.context(), c);
    const auto expect = [&](const std::string& what, const std::vector<std::string>& swept, const auto& call) {
      Watched all;
      for (size_t k = 0; k < c.layers.size(); ++k)
        for (int matrix : {0, 1, 2}) {
          const Part& part = model.part(k, matrix);
          const std::string number = std::to_string(3 * k + static_cast<size_t>(matrix));
          const auto add = [&](const std::string& kind, const Tensor& tensor) {
            all.push_back(pages_of(kind + number, tensor, 0));
          };
          add("p", part.p), add("g", part.g), add("m", part.m), add("v", part.v);
          add("ipt", part.ipt), add("unc", part.unc);
          if (part.low) add("low", *part.low);
        }
      adalora_status_t status = ADALORA_ERROR_INTERNAL;
      watch(all, [&] { status = call(); });
      EXPECT_EQ(status, ADALORA_SUCCESS) << adalora_last_error();
      expect_one_sweep(all, swept, name_of(param) + " " + what);
    };
    const Value<double> squares(host(), 0.0);
    const Value<float> found_inf(host(), 0.0f);
    const adalora_step_t step = model.step_at(1);
    expect("norm", {"g"}, [&] {
      return adalora_allocator_gradient_norm(model.allocator(), nullptr, squares.data(), found_inf.data(), nullptr);
    });
    expect("update", {"p", "g", "m", "v", "ipt", "unc", "low"},
           [&] { return adalora_allocator_update(model.allocator(), &step, 1, nullptr); });
    expect("importance alone", {"p", "g", "ipt", "unc"},
           [&] { return adalora_allocator_update(model.allocator(), &step, 0, nullptr); });
  }
}

// What comes back to a page is counted, and what stays within the window is not: else no test above would show a thing.
TEST(Traffic, IsCounted) {
  constexpr size_t pages = 10, window = 4;
  PagedHost paged;
  const Buffer buffer(paged, pages * page - 128);
  const auto openings = [&](size_t sweeps, size_t again) {
    Watched all;
    all.push_back(std::make_unique<Pages>("buffer", buffer.data(), buffer.size(), window));
    watch(all, [&] {
      const auto* bytes = static_cast<const volatile unsigned char*>(buffer.data());
      for (size_t sweep = 0; sweep < sweeps; ++sweep)
        for (size_t at = 0; at < pages; ++at)
          for (size_t back = 0; back <= std::min(again, at); ++back) (void)bytes[(at - back) * page];
    });
    return all.front()->openings();
  };
  EXPECT_EQ(openings(1, 0), std::vector<int>(pages, 1));
  EXPECT_EQ(openings(1, window - 1), std::vector<int>(pages, 1));
  EXPECT_EQ(openings(3, 0), std::vector<int>(pages, 3));
  EXPECT_NE(openings(1, window), std::vector<int>(pages, 1));
}

}  // namespace
