// The calls of a training run: what they refuse, and that a refusal changes nothing.

#include <functional>

#include "refusal.hpp"
#include "support/model.hpp"

namespace boundary {
namespace {

using namespace support;

constexpr adalora_status_t invalid = ADALORA_ERROR_INVALID_ARGUMENT;
constexpr adalora_status_t not_now = ADALORA_ERROR_INVALID_STATE;

ModelCase small() {
  ModelCase c;
  c.param = f32;
  c.layers = {{7, 5, 4}, {3, 9, 2}};
  return c;
}

template <class T>
T* misaligned(T* p) {
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) + 1);
}

// A model in the middle of its run, and what the calls write to.
struct Training {
  Model model{host(), host().context(), small()};
  Values<double> gram{host(), std::vector<double>(40, 0.5)}, scores{host(), std::vector<double>(6, 0.5)};
  Value<double> number{host(), 0.5}, other{host(), 0.25};
  Value<float> flag{host(), 0.0f};
  Value<uint64_t> hash{host(), 5};
  Values<uint8_t> pattern{host(), std::vector<uint8_t>(6, 1)};
  adalora_step_t step;

  Training() {
    for (int64_t t : {1, 2, 3}) model.step(t);
    step = model.step_at(8);
  }

  adalora_allocator_t* allocator() const { return model.allocator(); }

  std::vector<Bytes> contents() const {
    std::vector<Bytes> all = model.tensors();
    for (size_t k : {size_t{0}, size_t{1}})
      for (int m : {0, 1, 2}) all.push_back(model.part(k, m).g.bytes());
    all.push_back(model.save());
    const auto add = [&](const auto& values) {
      for (auto value : values) {
        Bytes bytes(sizeof value);
        std::memcpy(bytes.data(), &value, sizeof value);
        all.push_back(bytes);
      }
    };
    add(gram.get());
    add(scores.get());
    add(std::vector<double>{number.get(), other.get()});
    add(std::vector<uint64_t>{hash.get()});
    add(std::vector<float>{flag.get()});
    return all;
  }
};

struct BadCall {
  std::string call;
  Refusal refusal;
  std::function<adalora_status_t(Training&)> run;
};

void expect_all_refused(const std::vector<BadCall>& cases) {
  for (const BadCall& c : cases) {
    Training run;
    const std::vector<Bytes> before = run.contents();
    expect_refused(c.call, c.refusal, c.run(run));
    EXPECT_EQ(run.contents(), before) << c.call << ": " << c.refusal.what;
  }
}

double* gradient(Training& r) { return static_cast<double*>(r.model.part(0, 0).g.data()); }

TEST(AllocatorGram, RefusesWhatMakesNoSense) {
  const std::string name = "adalora_allocator_gram";
  expect_all_refused({
      {name,
       {"no output", invalid, {"gram", "NULL"}},
       [](Training& r) { return adalora_allocator_gram(r.allocator(), nullptr, nullptr); }},
      {name,
       {"misaligned", invalid, {"gram", "multiple of 8"}},
       [](Training& r) { return adalora_allocator_gram(r.allocator(), misaligned(r.gram.data()), nullptr); }},
      {name,
       {"over a gradient", invalid, {"gram", "overlaps"}},
       [](Training& r) { return adalora_allocator_gram(r.allocator(), gradient(r), nullptr); }},
  });
}

TEST(AllocatorOrthogonality, RefusesWhatMakesNoSense) {
  const auto bad = [](Refusal refusal, auto... arguments) {
    return BadCall{"adalora_allocator_orthogonality", std::move(refusal), [=](Training& r) {
                     return adalora_allocator_orthogonality(r.allocator(), arguments(r)..., nullptr);
                   }};
  };
  const auto no_gram = [](Training&) -> const double* { return nullptr; };
  const auto no_factor = no_gram;
  const auto weight = [](double w) { return [w](Training&) { return w; }; };
  const auto value = [](Training& r) { return r.number.data(); };
  expect_all_refused({
      bad({"negative weight", invalid, {"weight", "found -1"}}, no_gram, weight(-1), no_factor, value),
      bad({"infinite weight", invalid, {"weight", "inf"}}, no_gram, weight(HUGE_VAL), no_factor, value),
      bad({"weight that is no number", invalid, {"weight", "NaN"}}, no_gram, weight(std::nan("")), no_factor, value),
      bad(
          {"misaligned Gram matrices", invalid, {"gram", "multiple of 8"}},
          [](Training& r) { return misaligned(r.gram.data()); }, weight(1), no_factor, value),
      bad(
          {"misaligned factor", invalid, {"factor"}}, no_gram, weight(1),
          [](Training& r) { return misaligned(r.other.data()); }, value),
      bad({"misaligned value", invalid, {"value"}}, no_gram, weight(1), no_factor,
          [](Training& r) { return misaligned(r.number.data()); }),
      bad({"value over factor", invalid, {"value", "overlaps"}}, no_gram, weight(1), value, value),
      bad(
          {"value in the Gram matrices", invalid, {"value", "overlaps"}}, [](Training& r) { return r.gram.data(); },
          weight(1), no_factor, [](Training& r) { return r.gram.data() + 39; }),
      bad({"value in a gradient", invalid, {"value", "overlaps"}}, no_gram, weight(1), no_factor, gradient),
  });
}

TEST(AllocatorGradientNorm, RefusesWhatMakesNoSense) {
  const std::string name = "adalora_allocator_gradient_norm";
  const auto call = [](Training& r, double* sum, float* flag) {
    return adalora_allocator_gradient_norm(r.allocator(), nullptr, sum, flag, nullptr);
  };
  expect_all_refused({
      {name,
       {"no sum", invalid, {"sum_of_squares", "NULL"}},
       [=](Training& r) { return call(r, nullptr, r.flag.data()); }},
      {name,
       {"misaligned sum", invalid, {"sum_of_squares"}},
       [=](Training& r) { return call(r, misaligned(r.number.data()), r.flag.data()); }},
      {name,
       {"misaligned flag", invalid, {"found_inf"}},
       [=](Training& r) { return call(r, r.number.data(), misaligned(r.flag.data())); }},
      {name,
       {"flag over sum", invalid, {"overlaps"}},
       [=](Training& r) { return call(r, r.number.data(), reinterpret_cast<float*>(r.number.data())); }},
      {name,
       {"sum in a gradient", invalid, {"sum_of_squares", "overlaps"}},
       [=](Training& r) { return call(r, gradient(r), r.flag.data()); }},
  });
}

// What update, select and step say alike about their descriptor.
TEST(Step, RefusesWhatMakesNoSense) {
  struct Caller {
    std::string name;
    adalora_status_t (*call)(Training&, const adalora_step_t*);
  };
  const Caller callers[] = {
      {"adalora_allocator_update",
       [](Training& r, const adalora_step_t* s) { return adalora_allocator_update(r.allocator(), s, 1, nullptr); }},
      {"adalora_allocator_select",
       [](Training& r, const adalora_step_t* s) {
         return adalora_allocator_select(r.allocator(), s, nullptr, nullptr);
       }},
      {"adalora_allocator_step",
       [](Training& r, const adalora_step_t* s) { return adalora_allocator_step(r.allocator(), s, 1, nullptr); }},
  };
  struct BadStep {
    Refusal refusal;
    void (*spoil)(adalora_step_t&);
  };
  const BadStep cases[] = {
      {{"no size", invalid, {"step.struct_size", "found 0"}}, [](auto& s) { s.struct_size = 0; }},
      {{"no number", invalid, {"step.step", "NULL"}}, [](auto& s) { s.step = nullptr; }},
      {{"misaligned number", invalid, {"step.step"}}, [](auto& s) { s.step = misaligned(s.step); }},
      {{"misaligned factor", invalid, {"step.grad_factor"}},
       [](auto& s) { s.grad_factor = misaligned(s.grad_factor); }},
      {{"misaligned flag", invalid, {"step.found_inf"}}, [](auto& s) { s.found_inf = misaligned(s.found_inf); }},
  };
  std::vector<BadCall> bad;
  for (const Caller& caller : callers) {
    bad.push_back(
        {caller.name, {"no step", invalid, {"step", "NULL"}}, [=](Training& r) { return caller.call(r, nullptr); }});
    for (const BadStep& c : cases)
      bad.push_back({caller.name, c.refusal, [=](Training& r) {
                       c.spoil(r.step);
                       return caller.call(r, &r.step);
                     }});
  }
  bad.push_back({"adalora_allocator_update",
                 {"no flag", invalid, {"with_adamw", "found 2", "0 or 1"}},
                 [](Training& r) { return adalora_allocator_update(r.allocator(), &r.step, 2, nullptr); }});
  bad.push_back({"adalora_allocator_step", {"no flag", invalid, {"with_adamw", "found -1", "0 or 1"}}, [](Training& r) {
                   return adalora_allocator_step(r.allocator(), &r.step, -1, nullptr);
                 }});
  expect_all_refused(bad);
}

// What a call reads may not lie in what it writes.
TEST(Step, LiesApartFromWhatIsBound) {
  struct Inside {
    Refusal refusal;
    void (*place)(adalora_step_t&, void* moments);
  };
  const Inside cases[] = {
      {{"number", invalid, {"step.step", "overlaps", ".m"}},
       [](auto& s, void* m) { s.step = static_cast<int64_t*>(m); }},
      {{"factor", invalid, {"step.grad_factor", "overlaps", ".m"}},
       [](auto& s, void* m) { s.grad_factor = static_cast<double*>(m); }},
      {{"flag", invalid, {"step.found_inf", "overlaps", ".m"}},
       [](auto& s, void* m) { s.found_inf = static_cast<float*>(m); }},
      {{"has_grad", invalid, {"step.has_grad", "overlaps", ".m"}},
       [](auto& s, void* m) { s.has_grad = static_cast<uint8_t*>(m); }},
  };
  std::vector<BadCall> bad;
  for (const Inside& c : cases)
    for (auto call : {adalora_allocator_update, adalora_allocator_step})
      bad.push_back({call == adalora_allocator_update ? "adalora_allocator_update" : "adalora_allocator_step",
                     c.refusal, [=](Training& r) {
                       c.place(r.step, r.model.part(0, 0).m.data());
                       return call(r.allocator(), &r.step, 1, nullptr);
                     }});
  expect_all_refused(bad);
}

TEST(Step, ServesOlderAndNewerDescriptors) {
  Training full, older;
  adalora_step_t bare = full.step;
  bare.grad_factor = nullptr;
  bare.found_inf = nullptr;
  bare.has_grad = nullptr;
  require(adalora_allocator_step(full.allocator(), &bare, 1, nullptr));
  older.step.struct_size = offsetof(adalora_step_t, grad_factor);
  older.step.grad_factor = misaligned(older.step.grad_factor);  // beyond the caller's descriptor
  ASSERT_EQ(adalora_allocator_step(older.allocator(), &older.step, 1, nullptr), ADALORA_SUCCESS)
      << adalora_last_error();
  EXPECT_EQ(older.model.tensors(), full.model.tensors());

  Training run;
  struct {
    adalora_step_t known;
    int64_t unknown;
  } newer{run.step, 0};
  newer.known.struct_size = sizeof newer;
  ASSERT_EQ(adalora_allocator_step(run.allocator(), &newer.known, 1, nullptr), ADALORA_SUCCESS) << adalora_last_error();
  newer.unknown = 1;
  expect_refused("adalora_allocator_step", {"a newer field", invalid, {"step", "struct_size"}},
                 adalora_allocator_step(run.allocator(), &newer.known, 1, nullptr));
}

TEST(AllocatorScores, RefusesWhatMakesNoSense) {
  const std::string name = "adalora_allocator_scores";
  expect_all_refused({
      {name,
       {"no output", invalid, {"scores", "NULL"}},
       [](Training& r) { return adalora_allocator_scores(r.allocator(), nullptr, nullptr); }},
      {name,
       {"misaligned", invalid, {"scores", "multiple of 8"}},
       [](Training& r) { return adalora_allocator_scores(r.allocator(), misaligned(r.scores.data()), nullptr); }},
      {name,
       {"over an average", invalid, {"scores", "overlaps"}},
       [](Training& r) {
         return adalora_allocator_scores(r.allocator(), static_cast<double*>(r.model.part(0, 0).ipt.data()), nullptr);
       }},
  });
}

TEST(AllocatorSelect, RefusesWhatMakesNoSense) {
  expect_all_refused({
      {"adalora_allocator_select",
       {"misaligned scores", invalid, {"scores", "multiple of 8"}},
       [](Training& r) {
         return adalora_allocator_select(r.allocator(), &r.step, misaligned(r.scores.data()), nullptr);
       }},
      {"adalora_allocator_finalize",
       {"misaligned scores", invalid, {"scores", "multiple of 8"}},
       [](Training& r) { return adalora_allocator_finalize(r.allocator(), misaligned(r.scores.data()), nullptr); }},
  });
}

TEST(AllocatorDigest, RefusesWhatMakesNoSense) {
  const std::string name = "adalora_allocator_digest";
  expect_all_refused({
      {name,
       {"no output", invalid, {"digest", "NULL"}},
       [](Training& r) { return adalora_allocator_digest(r.allocator(), nullptr, nullptr); }},
      {name,
       {"misaligned", invalid, {"digest"}},
       [](Training& r) { return adalora_allocator_digest(r.allocator(), misaligned(r.hash.data()), nullptr); }},
  });
}

TEST(AllocatorSetPattern, RefusesWhatMakesNoSense) {
  const std::string name = "adalora_allocator_set_pattern";
  expect_all_refused({
      {name,
       {"no pattern", invalid, {"pattern", "NULL"}},
       [](Training& r) { return adalora_allocator_set_pattern(r.allocator(), nullptr, 0, nullptr); }},
      {name,
       {"no flag", invalid, {"is_final", "found 2", "0 or 1"}},
       [](Training& r) { return adalora_allocator_set_pattern(r.allocator(), r.pattern.data(), 2, nullptr); }},
  });
}

TEST(AllocatorSetAdamSteps, RefusesWhatMakesNoSense) {
  static const int64_t steps[] = {0, 1, 2, 3, 4, 5, 6, 7};
  static const int64_t below[] = {-1, -1, -1, -1, -1, -1, -1, -1};
  const std::string name = "adalora_allocator_set_adam_steps_sync";
  expect_all_refused({
      {name,
       {"no steps", invalid, {"adam_steps", "NULL"}},
       [](Training& r) { return adalora_allocator_set_adam_steps_sync(r.allocator(), nullptr, nullptr); }},
      {name,
       {"misaligned", invalid, {"adam_steps"}},
       [](Training& r) { return adalora_allocator_set_adam_steps_sync(r.allocator(), misaligned(steps), nullptr); }},
      {name,
       {"below 0", invalid, {"adam_steps[0]", "found -1", "0 or more"}},
       [](Training& r) { return adalora_allocator_set_adam_steps_sync(r.allocator(), below, nullptr); }},
  });
}

TEST(AllocatorReadSync, RefusesWhatMakesNoSense) {
  static int64_t numbers[7];
  static adalora_report_t report;
  const std::string name = "adalora_allocator_read_sync";
  expect_all_refused({
      {name,
       {"misaligned ranks", invalid, {"ranks"}},
       [](Training& r) {
         return adalora_allocator_read_sync(r.allocator(), nullptr, misaligned(numbers), nullptr, nullptr, nullptr);
       }},
      {name,
       {"misaligned clocks", invalid, {"adam_steps"}},
       [](Training& r) {
         return adalora_allocator_read_sync(r.allocator(), nullptr, nullptr, misaligned(numbers), nullptr, nullptr);
       }},
      {name,
       {"a report without its size", invalid, {"report.struct_size", "found 0"}},
       [](Training& r) {
         return adalora_allocator_read_sync(r.allocator(), nullptr, nullptr, nullptr, &report, nullptr);
       }},
  });

  // No output is written where another one is refused.
  Training run;
  uint8_t pattern[6] = {9, 9, 9, 9, 9, 9};
  int64_t ranks[2] = {9, 9};
  expect_refused(name, {"misaligned clocks", invalid, {"adam_steps"}},
                 adalora_allocator_read_sync(run.allocator(), pattern, ranks, misaligned(numbers), nullptr, nullptr));
  EXPECT_EQ(pattern[0], 9);
  EXPECT_EQ(ranks[0], 9);
}

TEST(AllocatorReadSync, ServesOlderAndNewerReports) {
  Training run;
  adalora_report_t older;
  std::memset(&older, 0x77, sizeof older);
  const adalora_report_t untouched = older;
  older.struct_size = offsetof(adalora_report_t, irregular);
  ASSERT_EQ(adalora_allocator_read_sync(run.allocator(), nullptr, nullptr, nullptr, &older, nullptr), ADALORA_SUCCESS)
      << adalora_last_error();
  EXPECT_EQ(older.struct_size, offsetof(adalora_report_t, irregular));
  EXPECT_EQ(older.last_step, 3);
  EXPECT_EQ(older.skipped, 0);
  EXPECT_EQ(older.irregular, untouched.irregular) << "beyond the caller's report";

  struct {
    adalora_report_t known;
    int64_t unknown;
  } newer{};
  newer.known.struct_size = sizeof newer;
  ASSERT_EQ(adalora_allocator_read_sync(run.allocator(), nullptr, nullptr, nullptr, &newer.known, nullptr),
            ADALORA_SUCCESS)
      << adalora_last_error();
  EXPECT_EQ(newer.known.last_step, 3);
  EXPECT_EQ(newer.known.struct_size, sizeof newer);
  EXPECT_EQ(newer.unknown, 0);
  newer.unknown = 1;
  expect_refused("adalora_allocator_read_sync", {"a newer field", invalid, {"report", "struct_size"}},
                 adalora_allocator_read_sync(run.allocator(), nullptr, nullptr, nullptr, &newer.known, nullptr));
}

TEST(AllocatorSaveState, SaysHowManyBytesThereAre) {
  const Training run;
  size_t needed = 0;
  ASSERT_EQ(adalora_allocator_save_state_sync(run.allocator(), nullptr, &needed, nullptr), ADALORA_SUCCESS);
  Bytes bytes(needed, 0x33);
  size_t room = needed - 1;
  expect_refused("adalora_allocator_save_state_sync",
                 {"too little room", invalid, {"bytes", std::to_string(needed - 1), std::to_string(needed)}},
                 adalora_allocator_save_state_sync(run.allocator(), bytes.data(), &room, nullptr));
  EXPECT_EQ(room, needed);
  EXPECT_EQ(bytes, Bytes(needed, 0x33));
  expect_refused("adalora_allocator_save_state_sync", {"no size", invalid, {"size", "NULL"}},
                 adalora_allocator_save_state_sync(run.allocator(), bytes.data(), nullptr, nullptr));
  room = needed + 5;
  EXPECT_EQ(adalora_allocator_save_state_sync(run.allocator(), bytes.data(), &room, nullptr), ADALORA_SUCCESS);
  EXPECT_EQ(room, needed);
}

// FNV-1a, by which a state's last eight bytes guard the others.
void seal(Bytes& state) {
  uint64_t hash = 0xcbf29ce484222325;
  for (size_t i = 0; i + 8 < state.size(); ++i) hash = (hash ^ state[i]) * 0x100000001b3;
  for (size_t i = 0; i < 8; ++i) state[state.size() - 8 + i] = static_cast<unsigned char>(hash >> (8 * i));
}

void expect_damaged(const Training& run, const Bytes& bytes, const std::string& what) {
  const std::vector<Bytes> before = run.contents();
  const adalora_status_t status =
      adalora_allocator_load_state_sync(run.allocator(), bytes.data(), bytes.size(), nullptr);
  expect_refused("adalora_allocator_load_state_sync", {what, ADALORA_ERROR_CORRUPT_DATA, {"bytes"}}, status);
  EXPECT_EQ(run.contents(), before) << what;
}

TEST(AllocatorLoadState, RefusesDamagedBytes) {
  const Training run;
  const Bytes good = run.model.save();
  for (size_t length = 0; length < good.size(); ++length)
    expect_damaged(run, Bytes(good.begin(), good.begin() + static_cast<ptrdiff_t>(length)),
                   "cut to " + std::to_string(length) + " bytes");
  for (size_t i = 0; i < good.size(); ++i) {
    Bytes bad = good;
    bad[i] ^= 0x40;
    expect_damaged(run, bad, "byte " + std::to_string(i) + " changed");
  }
  Bytes longer = good;
  longer.push_back(0);
  expect_damaged(run, longer, "a byte too many");
  seal(longer);
  expect_damaged(run, longer, "a byte too many, sealed");

  expect_refused("adalora_allocator_load_state_sync", {"no bytes", invalid, {"bytes", "NULL"}},
                 adalora_allocator_load_state_sync(run.allocator(), nullptr, good.size(), nullptr));
}

// Bytes that are wrong though their checksum is right are either refused or a state like any other.
TEST(AllocatorLoadState, ChecksEveryValue) {
  Training run;
  const Bytes good = run.model.save();
  Bytes sealed = good;
  seal(sealed);
  ASSERT_EQ(sealed, good) << "the checksum is another one than this test knows";
  int refused = 0;
  for (size_t i = 0; i + 8 < good.size(); ++i)
    for (unsigned char change : {0x01, 0x80, 0xff}) {
      Bytes bad = good;
      bad[i] ^= change;
      seal(bad);
      const std::vector<Bytes> before = run.contents();
      const adalora_status_t status =
          adalora_allocator_load_state_sync(run.allocator(), bad.data(), bad.size(), nullptr);
      if (status == ADALORA_SUCCESS) {
        EXPECT_EQ(run.model.save(), bad) << "byte " << i << " was not taken as it is";
        for (uint8_t kept : run.model.pattern()) EXPECT_LE(kept, 1);
        run.model.report();
        run.model.load(good);
      } else {
        EXPECT_TRUE(status == ADALORA_ERROR_CORRUPT_DATA || status == invalid) << adalora_last_error();
        EXPECT_EQ(run.contents(), before) << "byte " << i;
        ++refused;
      }
    }
  EXPECT_GT(refused, 0);
}

TEST(AllocatorLoadState, RefusesTheStateOfOtherAdapters) {
  const Training run;
  for (int64_t LayerShape::* dimension : {&LayerShape::rank, &LayerShape::in, &LayerShape::out}) {
    ModelCase other = small();
    other.layers[1].*dimension += 1;
    const Model theirs(host(), host().context(), other);
    const Bytes bytes = theirs.save();
    const std::vector<Bytes> before = run.contents();
    expect_refused("adalora_allocator_load_state_sync", {"another model", invalid, {"bytes", "adapter 1"}},
                   adalora_allocator_load_state_sync(run.allocator(), bytes.data(), bytes.size(), nullptr));
    EXPECT_EQ(run.contents(), before);
  }
  ModelCase more = small();
  more.layers.push_back({3, 3, 1});
  const Bytes bytes = Model(host(), host().context(), more).save();
  expect_refused("adalora_allocator_load_state_sync", {"more adapters", invalid, {"bytes", "3", "2"}},
                 adalora_allocator_load_state_sync(run.allocator(), bytes.data(), bytes.size(), nullptr));
}

// A sharded allocator's own share suffices for none of these.
TEST(Sharded, NeedsTheSumOverProcesses) {
  ModelCase c = small();
  c.whole = false;
  Model model(host(), host().context(), c);
  model.bind(model.everything());
  const adalora_step_t step = model.step_at(8);
  adalora_step_t no_flag = step;
  no_flag.found_inf = nullptr;
  expect_refused("adalora_allocator_update", {"update", invalid, {"step.found_inf", "NULL", "sharded"}},
                 adalora_allocator_update(model.allocator(), &no_flag, 1, nullptr));
  expect_refused("adalora_allocator_step", {"step", not_now, {"sharded"}},
                 adalora_allocator_step(model.allocator(), &step, 1, nullptr));
  expect_refused("adalora_allocator_select", {"select", invalid, {"scores", "NULL", "sharded"}},
                 adalora_allocator_select(model.allocator(), &step, nullptr, nullptr));
  expect_refused("adalora_allocator_finalize", {"finalize", invalid, {"scores", "NULL", "sharded"}},
                 adalora_allocator_finalize(model.allocator(), nullptr, nullptr));
  expect_refused("adalora_allocator_orthogonality", {"orthogonality", invalid, {"gram", "NULL", "sharded"}},
                 adalora_allocator_orthogonality(model.allocator(), nullptr, 1, nullptr, nullptr, nullptr));
}

TEST(Sharded, NeedsWholeColumnsForGramMatrices) {
  ModelCase c = small();
  c.whole = false;
  Model model(host(), host().context(), c);
  const Values<double> gram(host(), std::vector<double>(40, 0.0));
  for (const Owned& part : {Owned{0, 0, 0, 10}, Owned{0, 2, 0, 6}}) {
    model.bind({part});
    expect_refused("adalora_allocator_gram", {"Gram matrices of parts of columns", not_now, {"whole"}},
                   adalora_allocator_gram(model.allocator(), gram.data(), nullptr));
    expect_refused("adalora_allocator_orthogonality", {"orthogonality of parts of columns", not_now, {"whole"}},
                   adalora_allocator_orthogonality(model.allocator(), gram.data(), 1, nullptr, nullptr, nullptr));
    model.update(1);
    EXPECT_EQ(model.scores().size(), 6u) << "everything else works";
  }
}

TEST(AllocatorUpdate, NeedsMomentsForAdamW) {
  ModelCase c = small();
  c.moments = false;
  const Model model(host(), host().context(), c);
  const adalora_step_t step = model.step_at(1);
  const std::vector<Bytes> before = model.tensors();
  expect_refused("adalora_allocator_update", {"no moments", not_now, {"with_adamw", "m and v"}},
                 adalora_allocator_update(model.allocator(), &step, 1, nullptr));
  expect_refused("adalora_allocator_step", {"no moments", not_now, {"with_adamw", "m and v"}},
                 adalora_allocator_step(model.allocator(), &step, 1, nullptr));
  EXPECT_EQ(model.tensors(), before);
  EXPECT_EQ(model.report().last_step, -1);
}

}  // namespace
}  // namespace boundary
