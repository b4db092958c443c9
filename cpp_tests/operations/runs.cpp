// Whole runs: against the oracle's, in separate calls, resumed at every step, sharded over two processes.

#include <cstring>
#include <numeric>

#include "operations.hpp"
#include "support/compare.hpp"
#include "support/model.hpp"

namespace operations {

using namespace support;

namespace {

// What the trainer gives at one step.
struct Event {
  int64_t step;
  double factor = 1;
  bool found_inf = false;
  std::vector<uint8_t> has_grad = {};  // empty: all
};

std::vector<Event> steps_of(const oracle::Schedule& schedule) {
  std::vector<Event> all;
  for (int64_t step = 0; step < schedule.total_step; ++step) all.push_back({step});
  return all;
}

// Clipping, idle adapters, a step that is not finite and one more where a mask falls.
std::vector<Event> eventful(const oracle::Schedule& schedule) {
  std::vector<Event> all = steps_of(schedule);
  all[1].found_inf = true;
  all[2].factor = 0.25;
  all[3].has_grad = {1, 0, 1};
  all[static_cast<size_t>(schedule.tinit + 2)].found_inf = true;
  all[static_cast<size_t>(schedule.tinit + 3)].has_grad = {0, 0, 1};
  return all;
}

// Over mask steps and over the end of the budget phase.
std::vector<Event> jumping() { return {{1}, {4}, {7}, {8}, {11}, {14}, {19}, {22}, {23}}; }

void give(Model& model, const Event& event) {
  model.set_gradients(static_cast<uint64_t>(1000 + event.step));
  model.set_factor(event.factor);
  model.set_found_inf(event.found_inf);
  model.set_has_grad(event.has_grad.empty() ? std::vector<uint8_t>(model.model().layers.size(), 1) : event.has_grad);
}

// The specification's own run: AdamW and importance, then the masks that fall on the step.
class OracleRun {
 public:
  OracleRun(const ModelCase& c, const Model& start)
      : p(start.contents(&Part::p)),
        m(start.contents(&Part::m)),
        v(m),
        ipt(m),
        unc(m),
        case_(c),
        applied_(c.layers.size()) {}

  void step(const Event& event, const Contents& g) {
    if (!event.found_inf) update(event, g);
    allocate(event.step);
  }

  Contents p, m, v, ipt, unc;
  std::vector<uint8_t> stays;
  int64_t budget = 0;
  bool final = false;

 private:
  void update(const Event& event, const Contents& g) {
    for (size_t k = 0; k < p.size(); ++k) {
      const bool has_grad = event.has_grad.empty() || event.has_grad[k] != 0;
      if (has_grad) ++applied_[k];
      for (int q : {0, 1, 2})
        for (size_t i = 0; i < p[k][q].values.size(); ++i) {
          double& value = p[k][q].values[i];
          const double slope = g[k][q].values[i] * event.factor;
          if (has_grad) oracle::adamw(value, slope, m[k][q].values[i], v[k][q].values[i], applied_[k], case_.hypers[0]);
          if (event.step < case_.schedule.end() && !final)
            oracle::smooth(has_grad ? std::fabs(value * slope) : 0.0, ipt[k][q].values[i], unc[k][q].values[i],
                           case_.beta1, case_.beta2);
        }
    }
  }

  void allocate(int64_t step) {
    const bool ends = step >= case_.schedule.end();
    bool masks;
    std::tie(budget, masks) = oracle::budget(step, case_.schedule, case_.initial_budget(), case_.target_budget());
    if (!final && (masks || ends)) {
      std::vector<double> scores;
      for (size_t k = 0; k < p.size(); ++k)
        for (double score : oracle::scores(ipt[k], unc[k])) scores.push_back(score);
      stays = oracle::select(scores, budget, case_.costs());
    }
    if (!final && ends) {
      final = true;
      for (Contents* averages : {&ipt, &unc})
        for (auto& q : *averages)
          for (int matrix : {0, 1, 2}) std::fill(q[matrix].values.begin(), q[matrix].values.end(), 0.0);
    }
    if (stays.empty() || (!masks && !final)) return;
    size_t i = 0;
    for (auto& q : p)
      for (double& e : q.E.values)
        if (stays[i++] == 0) e = 0;
  }

  ModelCase case_;
  std::vector<int64_t> applied_;
};

void against_oracle(Backend& backend, const ModelCase& c, const std::vector<Event>& events, double fraction) {
  Model model(backend, backend.context(), c);
  OracleRun run(c, model);
  int64_t skipped = 0;
  for (const Event& event : events) {
    SCOPED_TRACE("step " + std::to_string(event.step));
    give(model, event);
    run.step(event, model.contents(&Part::g));
    model.step(event.step);
    skipped += event.found_inf ? 1 : 0;

    const struct {
      const char* name;
      Tensor Part::* kind;
      const Contents& expected;
    } kinds[] = {{"p", &Part::p, run.p},
                 {"m", &Part::m, run.m},
                 {"v", &Part::v, run.v},
                 {"ipt", &Part::ipt, run.ipt},
                 {"unc", &Part::unc, run.unc}};
    for (const auto& kind : kinds) {
      const Contents found = model.contents(kind.kind);
      for (size_t k = 0; k < found.size(); ++k)
        for (int m : {0, 1, 2})
          expect_near(std::string(kind.name) + " of " + "AEB"[m] + std::to_string(k), kind.expected[k][m], found[k][m],
                      fraction);
    }
    const adalora_report_t report = model.report();
    EXPECT_EQ(report.budget, run.budget);
    EXPECT_EQ(report.skipped, skipped);
    EXPECT_EQ(report.irregular, 0);
    EXPECT_EQ(report.last_step, event.step);
    EXPECT_EQ(report.is_final, run.final ? 1 : 0);
    EXPECT_EQ(report.has_pattern, run.stays.empty() ? 0 : 1);
    const std::vector<uint8_t> stays =
        run.stays.empty() ? std::vector<uint8_t>(static_cast<size_t>(c.total_rank()), 1) : run.stays;
    EXPECT_EQ(model.pattern(), stays);
    EXPECT_EQ(report.live_triplets, std::accumulate(stays.begin(), stays.end(), int64_t{0}));
    const std::vector<int64_t> ranks = model.ranks();
    int64_t parameters = 0;
    size_t first = 0;
    for (size_t k = 0; k < ranks.size(); ++k) {
      const auto from = stays.begin() + static_cast<ptrdiff_t>(first);
      EXPECT_EQ(ranks[k], std::accumulate(from, from + c.layers[k].rank, int64_t{0}));
      first += static_cast<size_t>(c.layers[k].rank);
      parameters += ranks[k] * (c.layers[k].in + c.layers[k].out + 1);
    }
    EXPECT_EQ(report.live_parameters, parameters);
  }
}

void separate_calls(Backend& backend, const ModelCase& c) {
  Model together(backend, backend.context(), c), apart(backend, backend.context(), c);
  for (const Event& event : eventful(c.schedule)) {
    give(together, event);
    give(apart, event);
    together.step(event.step);
    apart.update(event.step);
    apart.select(event.step, apart.scores());
    ASSERT_EQ(together.tensors(), apart.tensors()) << "step " << event.step;
    ASSERT_EQ(together.save(), apart.save()) << "step " << event.step;
    ASSERT_EQ(together.digest(), apart.digest()) << "step " << event.step;
  }
}

void resumed(Backend& backend, const ModelCase& c) {
  const std::vector<Event> events = eventful(c.schedule);
  Model straight(backend, backend.context(), c);
  std::vector<Bytes> states{straight.save()};
  std::vector<std::vector<Bytes>> tensors{straight.tensors()};
  for (const Event& event : events) {
    give(straight, event);
    straight.step(event.step);
    states.push_back(straight.save());
    tensors.push_back(straight.tensors());
  }
  for (size_t from = 0; from <= events.size(); ++from) {
    Model resumed(backend, backend.context(), c, 99);
    resumed.set_tensors(tensors[from]);
    resumed.load(states[from]);
    ASSERT_EQ(resumed.save(), states[from]) << "resumed after " << from << " steps";
    for (size_t i = from; i < events.size(); ++i) {
      give(resumed, events[i]);
      resumed.step(events[i].step);
      ASSERT_EQ(resumed.tensors(), tensors[i + 1]) << "resumed after " << from << " steps, at step " << events[i].step;
      ASSERT_EQ(resumed.save(), states[i + 1]) << "resumed after " << from << " steps, at step " << events[i].step;
    }
  }
}

void bound_again(Backend& backend, const ModelCase& c) {
  Model straight(backend, backend.context(), c), moving(backend, backend.context(), c);
  for (const Event& event : eventful(c.schedule)) {
    for (Model* model : {&straight, &moving}) {
      give(*model, event);
      model->step(event.step);
    }
    moving.move();
    ASSERT_EQ(straight.tensors(), moving.tensors()) << "step " << event.step;
    ASSERT_EQ(straight.save(), moving.save()) << "step " << event.step;
  }
}

void gradients_elsewhere(Backend& backend, const ModelCase& c) {
  Model straight(backend, backend.context(), c), moving(backend, backend.context(), c);
  for (const Event& event : eventful(c.schedule)) {
    for (Model* model : {&straight, &moving}) give(*model, event);
    moving.move_gradients();
    for (Model* model : {&straight, &moving}) model->step(event.step);
    ASSERT_EQ(straight.tensors(), moving.tensors()) << "step " << event.step;
    ASSERT_EQ(straight.save(), moving.save()) << "step " << event.step;
  }
  const Model fresh(backend, backend.context(), c);
  ASSERT_NE(moving.save(), fresh.save());
  moving.forget();
  EXPECT_EQ(moving.save(), fresh.save());
}

// How two processes share a model: both halves of everything, E on both, or everything on both.
enum class Split { halves, E_replicated, all_replicated };

// What one of two processes owns of each matrix: columns of A, values of E, rows of B.
std::vector<Owned> half(const Model& model, bool second, Split split) {
  const ModelCase& c = model.model();
  std::vector<Owned> owned;
  if (split == Split::all_replicated) {
    owned = model.everything();
    for (Owned& range : owned) range.replica = second;
    return owned;
  }
  const auto range = [&](int64_t count) {
    return second ? std::pair{count / 2, count} : std::pair{int64_t{0}, count / 2};
  };
  for (size_t i = 0; i < c.layers.size(); ++i) {
    const auto k = static_cast<int64_t>(i);
    const auto [in, out, rank] = c.layers[i];
    const auto [first_column, last_column] = range(in);
    for (int64_t row = 0; row < rank; ++row) owned.push_back({k, 0, row * in + first_column, row * in + last_column});
    if (split == Split::E_replicated) {
      owned.push_back({k, 1, 0, rank, second});
    } else {
      const auto [first, last] = range(rank);
      owned.push_back({k, 1, first, last});
    }
    const auto [first_row, last_row] = range(out);
    owned.push_back({k, 2, first_row * rank, last_row * rank});
  }
  return owned;
}

template <class T>
std::vector<T> sum(const std::vector<T>& a, const std::vector<T>& b) {
  std::vector<T> both(a.size());
  std::transform(a.begin(), a.end(), b.begin(), both.begin(), std::plus<>());
  return both;
}

struct Norm {
  double squares;
  float found_inf;
};

Norm norm_of(const Model& model) {
  const Value<double> squares(model.backend(), 0.0);
  const Value<float> found_inf(model.backend(), 0.0f);
  require(adalora_allocator_gradient_norm(model.allocator(), nullptr, squares.data(), found_inf.data(),
                                          model.backend().stream()));
  return {squares.get(), found_inf.get()};
}

std::vector<double> gram_of(const Model& model) {
  size_t bytes = 0;
  require(adalora_allocator_sizes(model.allocator(), 0, nullptr, nullptr, &bytes));
  const Values<double> gram(model.backend(), bytes / sizeof(double));
  require(adalora_allocator_gram(model.allocator(), gram.data(), model.backend().stream()));
  return gram.get();
}

double penalty_of(Model& model, const std::vector<double>& gram) {
  const Values<double> given(model.backend(), gram);
  const Value<double> value(model.backend());
  require(adalora_allocator_orthogonality(model.allocator(), given.data(), 0.1, nullptr, value.data(),
                                          model.backend().stream()));
  return value.get();
}

void expect_owned(const Model& whole, const Model& share, const std::vector<Owned>& owned, double fraction) {
  for (Tensor Part::* kind : {&Part::p, &Part::g, &Part::m, &Part::v, &Part::ipt, &Part::unc})
    for (const Owned& range : owned) {
      const auto k = static_cast<size_t>(range.adapter);
      const auto elements = [&](const Model& model) {
        const std::vector<double> all = (model.part(k, range.matrix).*kind).get().values;
        return Dense<double>(1, range.end - range.begin, {all.begin() + range.begin, all.begin() + range.end});
      };
      expect_near("elements from " + std::to_string(range.begin) + " of " + "AEB"[range.matrix] + std::to_string(k),
                  elements(whole), elements(share), fraction);
    }
}

void sharded(Backend& backend, ModelCase c, Split split, double fraction) {
  Model whole(backend, backend.context(), c);
  c.whole = false;
  Model first(backend, backend.context(), c), second(backend, backend.context(), c);
  const std::vector<Owned> owned[] = {half(first, false, split), half(second, true, split)};
  first.bind(owned[0]);
  second.bind(owned[1]);
  for (const Event& event : eventful(c.schedule)) {
    SCOPED_TRACE("step " + std::to_string(event.step));
    for (Model* model : {&whole, &first, &second}) give(*model, event);

    const std::vector<double> gram = sum(gram_of(first), gram_of(second)), gram_of_whole = gram_of(whole);
    const auto n = static_cast<int64_t>(gram.size());
    expect_near("Gram matrices", {1, n, gram_of_whole}, {1, n, gram}, fraction);
    const double penalty = penalty_of(whole, gram_of_whole);
    EXPECT_NEAR(penalty_of(first, gram), penalty, fraction * penalty);
    EXPECT_NEAR(penalty_of(second, gram), penalty, fraction * penalty);

    const double squares = norm_of(whole).squares;
    EXPECT_NEAR(norm_of(first).squares + norm_of(second).squares, squares, fraction * squares);

    for (Model* model : {&whole, &first, &second}) model->update(event.step);
    const std::vector<double> scores = sum(first.scores(), second.scores()), scores_of_whole = whole.scores();
    const auto total = static_cast<int64_t>(scores.size());
    expect_near("scores", {1, total, scores_of_whole}, {1, total, scores}, fraction);
    whole.select(event.step);
    first.select(event.step, scores);
    second.select(event.step, scores);
    EXPECT_EQ(first.pattern(), whole.pattern());
    EXPECT_EQ(first.digest(), whole.digest());
    EXPECT_EQ(second.digest(), whole.digest());
    expect_owned(whole, first, owned[0], fraction);
    expect_owned(whole, second, owned[1], fraction);
  }
}

// What a process does not own, it does not write.
void writes_what_it_owns(Backend& backend, ModelCase c) {
  c.whole = false;
  Model model(backend, backend.context(), c);
  const std::vector<Owned> mine = half(model, false, Split::halves), others = half(model, true, Split::halves);
  model.bind(mine);
  Model untouched(backend, backend.context(), c);
  for (const Event& event : steps_of(c.schedule)) {
    model.set_gradients(1);
    untouched.set_gradients(1);
    penalty_of(model, gram_of(model));
    model.update(event.step);
    model.select(event.step, model.scores());
  }
  expect_owned(untouched, model, others, 0);
}

// What is kept of each matrix.
Contents kept_of(const Contents& all, const std::vector<uint8_t>& stays) {
  Contents kept;
  size_t first = 0;
  for (const auto& q : all) {
    const auto stays_here = [&](int64_t i) { return stays[first + static_cast<size_t>(i)] != 0; };
    oracle::Triplets<double> to;
    for (int64_t i = 0; i < q.rank(); ++i)
      if (stays_here(i)) to.E.values.push_back(q.E(0, i));
    const auto rank = static_cast<int64_t>(to.E.values.size());
    to.E = {1, rank, to.E.values};
    to.A = {rank, q.A.columns};
    to.B = {q.B.rows, rank};
    for (int64_t i = 0, k = 0; i < q.rank(); ++i) {
      if (!stays_here(i)) continue;
      for (int64_t j = 0; j < q.A.columns; ++j) to.A(k, j) = q.A(i, j);
      for (int64_t j = 0; j < q.B.rows; ++j) to.B(j, k) = q.B(j, i);
      ++k;
    }
    first += static_cast<size_t>(q.rank());
    kept.push_back(to);
  }
  return kept;
}

// The first adapter keeps nothing, the second some, the third everything.
const std::vector<uint8_t> some_stay = {0, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1};

ModelCase smaller(ModelCase c) {
  const int64_t kept[] = {0, 2, 5};
  for (size_t k = 0; k < c.layers.size(); ++k) {
    c.ranknums.push_back(c.layers[k].rank);
    c.layers[k].rank = kept[k];
  }
  return c;
}

void expect_kept(const Model& whole, const Model& compacted, double fraction) {
  for (Tensor Part::* kind : {&Part::p, &Part::g, &Part::m, &Part::v, &Part::ipt, &Part::unc}) {
    const Contents expected = kept_of(whole.contents(kind), some_stay), found = compacted.contents(kind);
    for (size_t k = 0; k < found.size(); ++k)
      for (int m : {0, 1, 2})
        expect_near(std::string(1, "AEB"[m]) + std::to_string(k), expected[k][m], found[k][m], fraction);
  }
}

void compacted(Backend& backend, const ModelCase& c, double fraction) {
  Model whole(backend, backend.context(), c);
  const std::vector<Event> events = eventful(c.schedule);
  const auto last = static_cast<size_t>(c.schedule.end());
  for (size_t i = 0; i <= last; ++i) {
    give(whole, events[i]);
    whole.step(events[i].step);
  }
  whole.set_pattern(some_stay, true);
  Model compacted(backend, backend.context(), smaller(c), 99);
  EXPECT_EQ(compacted.report().is_final, 1);
  EXPECT_EQ(compacted.report().budget, whole.report().budget);
  require(adalora_allocator_compact_sync(whole.allocator(), compacted.allocator(), backend.waiting_stream()));
  expect_kept(whole, compacted, 0);
  EXPECT_EQ(compacted.ranks(), whole.ranks());
  EXPECT_EQ(compacted.pattern(), std::vector<uint8_t>(7, 1));
  EXPECT_EQ(compacted.adam_steps(), whole.adam_steps());
  const adalora_report_t before = whole.report(), after = compacted.report();
  EXPECT_EQ(std::memcmp(&before, &after, sizeof before), 0);

  // The state from before goes to compacted adapters as well.
  Model resumed(backend, backend.context(), smaller(c), 99);
  resumed.load(whole.save());
  EXPECT_EQ(resumed.save(), compacted.save());

  // AdamW works on each element by itself, so that the same gradients lead to the same parameters.
  for (size_t i = last + 1; i < events.size(); ++i) {
    give(whole, events[i]);
    compacted.set_factor(events[i].factor);
    for (size_t k = 0; k < c.layers.size(); ++k)
      for (int m : {0, 1, 2}) compacted.part(k, m).g.set(kept_of(whole.contents(&Part::g), some_stay)[k][m]);
    whole.step(events[i].step);
    compacted.step(events[i].step);
    expect_kept(whole, compacted, fraction);
  }
  EXPECT_EQ(compacted.report().last_step, whole.report().last_step);
  require(adalora_allocator_reset(compacted.allocator(), backend.stream()));
  EXPECT_EQ(compacted.report().is_final, 1);
}

// Each process hands over what it owns.
void compacted_shares(Backend& backend, ModelCase c) {
  c.whole = false;
  for (bool second : {false, true}) {
    Model share(backend, backend.context(), c), compacted(backend, backend.context(), smaller(c), 99);
    share.bind(half(share, second, Split::E_replicated));
    share.set_pattern(some_stay, true);
    const std::vector<Owned> owned = half(compacted, second, Split::E_replicated);
    compacted.bind(owned);
    require(adalora_allocator_compact_sync(share.allocator(), compacted.allocator(), backend.waiting_stream()));
    for (Tensor Part::* kind : {&Part::p, &Part::g}) {
      const Contents expected = kept_of(share.contents(kind), some_stay), found = compacted.contents(kind);
      for (const Owned& range : owned) {
        const auto k = static_cast<size_t>(range.adapter);
        for (auto i = static_cast<size_t>(range.begin); i < static_cast<size_t>(range.end); ++i)
          EXPECT_EQ(found[k][range.matrix].values[i], expected[k][range.matrix].values[i]);
      }
    }
    // E in halves is not what is kept of the same elements.
    Model other(backend, backend.context(), smaller(c), 99);
    other.bind(half(other, second, Split::halves));
    EXPECT_EQ(adalora_allocator_compact_sync(share.allocator(), other.allocator(), backend.waiting_stream()),
              ADALORA_ERROR_INVALID_ARGUMENT);
  }
}

void compaction_refused(Backend& backend, const ModelCase& c) {
  Model whole(backend, backend.context(), c), compacted(backend, backend.context(), smaller(c), 99);
  const std::vector<Bytes> before = compacted.tensors();
  const Bytes state = compacted.save();
  const auto refused = [&](const adalora_allocator_t* from, adalora_allocator_t* to, adalora_status_t status,
                           const std::string& words) {
    EXPECT_EQ(adalora_allocator_compact_sync(from, to, backend.waiting_stream()), status);
    EXPECT_NE(std::string(adalora_last_error()).find(words), std::string::npos) << adalora_last_error();
  };
  const adalora_status_t argument = ADALORA_ERROR_INVALID_ARGUMENT;
  refused(whole.allocator(), compacted.allocator(), ADALORA_ERROR_INVALID_STATE, "allocator: found a pattern that may");
  whole.set_pattern(some_stay, true);
  refused(whole.allocator(), whole.allocator(), argument, "compacted: found the allocator itself");
  refused(whole.allocator(), nullptr, ADALORA_ERROR_INVALID_HANDLE, "compacted");
  ModelCase other = smaller(c);
  other.layers[1].rank = 3;
  Model more(backend, backend.context(), other);
  refused(whole.allocator(), more.allocator(), argument, "compacted: found rank 3 of adapter 1");
  other = smaller(c);
  other.layers[1].in = 12;
  Model narrow(backend, backend.context(), other);
  refused(whole.allocator(), narrow.allocator(), argument, "compacted: adapters[1]: found 12 to 8 features");
  other = smaller(c);
  other.ranknums[0] = 9;
  Model larger(backend, backend.context(), other);
  refused(whole.allocator(), larger.allocator(), argument, "compacted: adapters[0]: found 7 to 5 features");
  other = smaller(c);
  other.layers.pop_back();
  other.ranknums.pop_back();
  Model fewer(backend, backend.context(), other);
  refused(whole.allocator(), fewer.allocator(), argument, "compacted: found one of 2 adapters");
  other = smaller(c);
  other.whole = false;
  Model unbound(backend, backend.context(), other);
  refused(whole.allocator(), unbound.allocator(), ADALORA_ERROR_INVALID_STATE,
          "compacted: allocator: found no buffers");
  EXPECT_EQ(compacted.tensors(), before);
  EXPECT_EQ(compacted.save(), state);

  // A state whose pattern may change, or keeps other ranks.
  Model fresh(backend, backend.context(), c);
  const Bytes open = fresh.save();
  EXPECT_EQ(
      adalora_allocator_load_state_sync(compacted.allocator(), open.data(), open.size(), backend.waiting_stream()),
      argument);
  fresh.set_pattern(std::vector<uint8_t>(12, 1), true);
  const Bytes all = fresh.save();
  EXPECT_EQ(adalora_allocator_load_state_sync(compacted.allocator(), all.data(), all.size(), backend.waiting_stream()),
            argument);
  // One of the same ranks, of adapters that were not compacted: its pattern may change too.
  other = smaller(c);
  other.ranknums.clear();
  const Bytes whole_ranks = Model(backend, backend.context(), other).save();
  EXPECT_EQ(adalora_allocator_load_state_sync(compacted.allocator(), whole_ranks.data(), whole_ranks.size(),
                                              backend.stream()),
            argument);
  EXPECT_EQ(compacted.save(), state);
  EXPECT_EQ(compacted.report().is_final, 1);
}

}  // namespace

std::vector<Case> run_cases() {
  std::vector<Case> rows;
  ModelCase c;
  for (adalora_dtype_t param : {f64, f32}) {
    c.param = param;
    const double fraction = param == f64 ? 1e-12 : 1e-5;
    const auto add = [&](const std::string& what, const ModelCase& model, const std::vector<Event>& events) {
      rows.push_back(
          {"run", name_of(param) + " " + what, [=](Backend& b) { against_oracle(b, model, events, fraction); }});
    };
    add("every step", c, steps_of(c.schedule));
    add("with events", c, eventful(c.schedule));
    ModelCase jumps = c;
    jumps.schedule = {3, 4, 24, 2};
    add("with jumps", jumps, jumping());
    ModelCase parameters = c;
    parameters.budget_unit = ADALORA_BUDGET_PARAMETERS;
    add("budget in parameters", parameters, eventful(c.schedule));
    ModelCase no_tail = c;
    no_tail.schedule = {2, 0, 11, 4};
    add("no final phase", no_tail, steps_of({0, 0, 13, 1}));
    ModelCase decay = c;
    decay.hypers = {{0.05, 0.3, 0.5, 0.7, 1e-4}};
    add("large rates", decay, steps_of(c.schedule));
  }
  ModelCase low = c;
  low.param = bf16;
  low.gradient = f32;
  low.master = true;
  rows.push_back(
      {"run", "bf16 with master", [low](Backend& b) { against_oracle(b, low, eventful(low.schedule), 1e-5); }});

  for (adalora_dtype_t param : {f64, f32, bf16, f16})
    for (bool master : {false, true}) {
      if (master && compute_type(param) == param) continue;
      c.param = param;
      c.master = master;
      const std::string what = name_of(param) + (master ? " with master" : "");
      rows.push_back({"step is update, scores and select", what, [c](Backend& b) { separate_calls(b, c); }});
      rows.push_back({"resumed at every step", what, [c](Backend& b) { resumed(b, c); }});
      rows.push_back({"bound again at every step", what, [c](Backend& b) { bound_again(b, c); }});
      rows.push_back({"gradients elsewhere at every step", what, [c](Backend& b) { gradients_elsewhere(b, c); }});
      rows.push_back({"sharded writes what it owns", what, [c](Backend& b) { writes_what_it_owns(b, c); }});
      rows.push_back({"compacted after the last mask", what,
                      [=](Backend& b) { compacted(b, c, 32 * roundoff(master ? compute_type(param) : param)); }});
      const double fraction = 256 * roundoff(param);
      const std::pair<Split, std::string> splits[] = {{Split::halves, " in halves"},
                                                      {Split::E_replicated, " E replicated"},
                                                      {Split::all_replicated, " all replicated"}};
      for (const auto& [split, name] : splits)
        if (param == f64 || param == f32)
          rows.push_back({"sharded over two processes", what + name,
                          [=, split = split](Backend& b) { sharded(b, c, split, fraction); }});
    }
  c = ModelCase{};
  rows.push_back({"compacted after the last mask", "in shares", [c](Backend& b) { compacted_shares(b, c); }});
  rows.push_back({"compacted after the last mask", "refusals", [c](Backend& b) { compaction_refused(b, c); }});
  return rows;
}

}  // namespace operations
