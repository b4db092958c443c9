// Handles over time, threads and processes: any order of destruction, concurrent calls, fork, exit, loading and
// unloading.

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <thread>

#include "operations/pass.hpp"
#include "support/model.hpp"

namespace {

using namespace support;
using operations::LayerCase;
using operations::LayerContents;
using operations::Pass;

// Large enough for several threads to share it.
LayerCase large_layer() {
  LayerCase layer;
  layer.activation = layer.param = f32;
  layer.tokens = 200;
  layer.in = 300;
  layer.out = {257};
  layer.rank = {8};
  layer.dropout.probability = 0.1;
  return layer;
}

std::vector<Bytes> results_of(Pass& pass) {
  pass.forward();
  pass.backward();
  return pass.outputs();
}

size_t threads_of_this_process() {
  const std::filesystem::directory_iterator tasks("/proc/self/task");
  return static_cast<size_t>(std::distance(begin(tasks), end(tasks)));
}

// Threads that ended may be listed for a moment more.
bool soon_has_threads(size_t count) {
  for (int i = 0; i < 500; ++i) {
    if (threads_of_this_process() == count) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

TEST(Lifetime, ObjectsKeepWhatTheyNeedInAnyOrder) {
  const LayerCase layer = large_layer();
  const LayerContents contents = operations::random_contents(layer);
  ModelCase c;
  std::vector<Bytes> passed, trained;
  enum { context_first, context_last };
  for (int order : {context_first, context_last}) {
    Context context = cpu_context(2);
    Pass pass(host(), context.get(), layer, contents);
    auto model = std::make_unique<Model>(host(), context.get(), c);
    if (order == context_first) context.reset();
    std::vector<Bytes> now = results_of(pass);
    if (order == context_first)
      passed = now;
    else
      EXPECT_EQ(now, passed);
    model->step(1);
    now = model->tensors();
    if (order == context_first)
      trained = now;
    else
      EXPECT_EQ(now, trained);
  }
}

TEST(Lifetime, AnAllocatorOutlivesItsAdapters) {
  Context context = cpu_context(2);
  adalora_adapter_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.in_features = desc.out_features = 5;
  desc.rank = 3;
  desc.param_dtype = desc.activation_dtype = f32;
  adalora_adapter_t* handle = nullptr;
  require(adalora_adapter_create(context.get(), &desc, &handle));
  Adapter adapter(handle);
  const adalora_adapter_t* const adapters[] = {handle};
  adalora_allocator_desc_t all{};
  all.struct_size = sizeof all;
  all.n_adapters = 1;
  all.adapters = adapters;
  all.target_rank = 1;
  all.total_step = 10;
  all.delta_t = 1;
  all.beta1 = all.beta2 = 0.85;
  adalora_allocator_t* made = nullptr;
  require(adalora_allocator_create(context.get(), &all, &made));
  const Allocator allocator(made);
  adapter.reset();
  context.reset();
  int64_t budget = 0;
  EXPECT_EQ(adalora_allocator_budget(allocator.get(), 0, &budget, nullptr), ADALORA_SUCCESS);
  EXPECT_EQ(budget, 3);
}

TEST(Lifetime, ManyObjectsComeAndGo) {
  const size_t before = threads_of_this_process();
  const LayerCase layer = large_layer();
  const LayerContents contents = operations::random_contents(layer);
  for (int i = 0; i < 20; ++i) {
    const Context context = cpu_context(3);
    Pass pass(host(), context.get(), layer, contents);
    pass.forward();
  }
  EXPECT_TRUE(soon_has_threads(before)) << "pools end with their contexts";
}

TEST(Threads, StartAtTheFirstComputation) {
  const size_t before = threads_of_this_process();
  Context context = cpu_context(3);
  const LayerCase layer = large_layer();
  Pass pass(host(), context.get(), layer, operations::random_contents(layer));
  Model model(host(), context.get(), ModelCase{});
  size_t length = 0;
  EXPECT_EQ(adalora_context_describe(context.get(), nullptr, &length), ADALORA_SUCCESS);
  EXPECT_EQ(threads_of_this_process(), before);
  EXPECT_EQ(adalora_context_prepare(context.get(), nullptr), ADALORA_SUCCESS);
  EXPECT_EQ(threads_of_this_process(), before + 2) << "the calling thread is one of the three";
  pass.forward();
  EXPECT_EQ(threads_of_this_process(), before + 2);
}

TEST(Threads, AreTheCallersAlone) {
  const size_t before = threads_of_this_process();
  static uint32_t most_asked_for;
  most_asked_for = 0;
  const Context context = cpu_context(3, [](void (*body)(void*), void* data, uint32_t threads, uint32_t) {
    most_asked_for = std::max(most_asked_for, threads);
    body(data);
  });
  const LayerCase layer = large_layer();
  Pass pass(host(), context.get(), layer, operations::random_contents(layer));
  EXPECT_EQ(adalora_context_prepare(context.get(), nullptr), ADALORA_SUCCESS);
  results_of(pass);
  EXPECT_EQ(threads_of_this_process(), before);
  EXPECT_EQ(most_asked_for, 3u);
}

// What the system says of a thread: whether it sleeps ("S"), and how often it has begun or ceased to run.
struct Activity {
  std::string state;
  int64_t switches = 0;
  bool operator==(const Activity& other) const { return state == other.state && switches == other.switches; }
};

// By thread, of those that the library has started.
std::map<std::string, Activity> pool_threads() {
  std::map<std::string, Activity> all;
  std::error_code gone;  // a thread may end while this looks at it
  for (std::filesystem::directory_iterator task("/proc/self/task", gone), end; task != end; task.increment(gone)) {
    std::ifstream status(task->path() / "status");
    std::string word, name;
    Activity activity;
    while (status >> word) {
      if (word == "Name:") status >> name;
      if (word == "State:") status >> activity.state;
      int64_t count = 0;
      if (word == "voluntary_ctxt_switches:" || word == "nonvoluntary_ctxt_switches:") status >> count;
      activity.switches += count;
    }
    if (name.rfind("adalora-", 0) == 0) all[task->path().filename()] = activity;
  }
  return all;
}

// Neither spins nor looks now and then whether there is work: for a while, no thread of the pool runs at all.
TEST(Threads, SleepWhileThereIsNothingToDo) {
  const Context context = cpu_context(4);
  const LayerCase layer = large_layer();
  Pass pass(host(), context.get(), layer, operations::random_contents(layer));
  results_of(pass);
  std::map<std::string, Activity> earlier, later = pool_threads();
  // They may still be on their way to sleep.
  for (int i = 0; i < 50 && earlier != later; ++i) {
    earlier = later;
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    later = pool_threads();
  }
  EXPECT_EQ(later.size(), 3u);
  for (const auto& [thread, activity] : later) {
    EXPECT_EQ(activity.state, "S") << "thread " << thread;
    EXPECT_EQ(activity.switches, earlier[thread].switches) << "thread " << thread;
  }
}

// Also where several callers come at once, to several contexts whose pools are not there yet.
TEST(Threads, AreNoMoreThanWereAskedFor) {
  const size_t before = threads_of_this_process();
  const LayerCase layer = large_layer();
  const LayerContents contents = operations::random_contents(layer);
  for (int round = 0; round < 30; ++round) {
    ASSERT_TRUE(soon_has_threads(before));
    const Context two = cpu_context(2), four = cpu_context(4);
    std::vector<std::unique_ptr<Pass>> passes;
    for (adalora_context_t* context : {two.get(), two.get(), four.get(), four.get(), four.get()})
      passes.push_back(std::make_unique<Pass>(host(), context, layer, contents));
    std::vector<std::function<void()>> calls;
    for (const auto& pass : passes) calls.emplace_back([&pass = *pass] { results_of(pass); });
    for (const Context* context : {&two, &four})
      calls.emplace_back([context] { EXPECT_EQ(adalora_context_prepare(context->get(), nullptr), ADALORA_SUCCESS); });
    std::atomic<size_t> waiting{calls.size()}, computing{calls.size()};
    std::vector<std::thread> callers;
    for (const auto& call : calls)
      callers.emplace_back([&] {
        for (--waiting; waiting > 0;) std::this_thread::yield();
        call();
        --computing;
      });
    size_t most = 0;
    while (computing > 0) most = std::max(most, pool_threads().size());
    for (std::thread& caller : callers) caller.join();
    EXPECT_EQ(pool_threads().size(), 1u + 3u) << "the calling thread is one of them";
    ASSERT_LE(most, 1u + 3u) << "in round " << round;
  }
}

TEST(Threads, UseOneAdapterEachAtOnce) {
  const Context context = cpu_context(2);
  const LayerCase layer = large_layer();
  const LayerContents contents = operations::random_contents(layer);
  Pass alone(host(), context.get(), layer, contents);
  const std::vector<Bytes> expected = results_of(alone);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (int round = 0; round < 5; ++round) {
        Pass pass(host(), context.get(), layer, contents);
        if (results_of(pass) != expected) ++wrong;
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// A handle made on one thread, used on a second, destroyed on a third.
TEST(Threads, PassHandlesOn) {
  std::unique_ptr<Pass> pass;
  const LayerCase layer = large_layer();
  const LayerContents contents = operations::random_contents(layer);
  Context context;
  std::vector<Bytes> elsewhere;
  std::thread([&] {
    context = cpu_context(2);
    pass = std::make_unique<Pass>(host(), context.get(), layer, contents);
  }).join();
  std::thread([&] { elsewhere = results_of(*pass); }).join();
  std::thread([&] {
    context.reset();
    pass.reset();
  }).join();
  const Context here = cpu_context(2);
  Pass again(host(), here.get(), layer, contents);
  EXPECT_EQ(results_of(again), elsewhere);
}

TEST(Threads, ShareOneObjectInConstCalls) {
  const ModelCase c;
  Model model(host(), host().context(), c);
  for (int64_t step = 0; step < 7; ++step) model.step(step);
  const std::vector<double> scores = model.scores();
  const uint64_t digest = model.digest();
  const Bytes state = model.save();

  // One adapter, too, in calls of its own buffers each.
  adalora_triplets_t params[4];
  std::vector<Tensor> buffers;
  for (int i = 0; i < 4; ++i)
    for (int m : {0, 1, 2}) buffers.emplace_back(host(), f64, m == 2 ? 5 : m == 0 ? 4 : 1, m == 0 ? 7 : 4);
  for (size_t i = 0; i < 4; ++i)
    params[i] = {buffers[3 * i].matrix(), buffers[3 * i + 1].matrix(), buffers[3 * i + 2].matrix()};

  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (size_t i = 0; i < 4; ++i)
    threads.emplace_back([&, i] {
      std::vector<double> found(scores.size());
      Bytes bytes(state.size());
      for (int round = 0; round < 50; ++round) {
        uint64_t hash = 0;
        int64_t budget = 0;
        size_t size = bytes.size();
        adalora_report_t report{};
        report.struct_size = sizeof report;
        const adalora_status_t statuses[] = {
            adalora_allocator_scores(model.allocator(), found.data(), nullptr),
            adalora_allocator_digest(model.allocator(), &hash, nullptr),
            adalora_allocator_budget(model.allocator(), 8, &budget, nullptr),
            adalora_allocator_read_sync(model.allocator(), nullptr, nullptr, nullptr, &report, nullptr),
            adalora_allocator_save_state_sync(model.allocator(), bytes.data(), &size, nullptr),
            adalora_adapter_initialize(model.adapter(0), &params[i], 7, nullptr),
        };
        for (adalora_status_t status : statuses)
          if (status != ADALORA_SUCCESS) ++wrong;
        if (found != scores || hash != digest || bytes != state || report.last_step != 6) ++wrong;
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  for (size_t i = 3; i < buffers.size(); ++i) EXPECT_EQ(buffers[i].bytes(), buffers[i % 3].bytes());
}

// Calls that change an object wait for each other, and for those that read it.
TEST(Threads, WaitForEachOtherOnOneObject) {
  Model model(host(), host().context(), ModelCase{});
  const adalora_step_t step = model.step_at(1);
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (int round = 0; round < 25; ++round) {
        uint64_t hash = 0;
        if (adalora_allocator_update(model.allocator(), &step, 1, nullptr) != ADALORA_SUCCESS) ++failed;
        if (adalora_allocator_digest(model.allocator(), &hash, nullptr) != ADALORA_SUCCESS) ++failed;
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
  EXPECT_EQ(model.adam_steps(), std::vector<int64_t>(3, 100));
}

// Runs the body in a child of fork; whether it came back with true.
bool succeeds_in_child(const std::function<bool()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);  // a child that waits for threads that it does not have never returns
    [&]() noexcept { _exit(body() ? 0 : 1); }();
  }
  int status = -1;
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status)) ADD_FAILURE() << "the child ended by signal " << WTERMSIG(status);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

TEST(Fork, LeavesTheChildAPoolOfItsOwn) {
  const Context context = cpu_context(3);
  const LayerCase layer = large_layer();
  const LayerContents contents = operations::random_contents(layer);
  Pass first(host(), context.get(), layer, contents);
  const std::vector<Bytes> expected = results_of(first);
  Pass for_child(host(), context.get(), layer, contents);
  EXPECT_TRUE(succeeds_in_child([&] { return results_of(for_child) == expected && threads_of_this_process() == 3; }));
  // The child of a child, and the parent after it.
  EXPECT_TRUE(succeeds_in_child([&] {
    return results_of(for_child) == expected && succeeds_in_child([&] {
             Pass again(host(), context.get(), layer, contents);
             return results_of(again) == expected;
           });
  }));
  Pass after(host(), context.get(), layer, contents);
  EXPECT_EQ(results_of(after), expected);
}

TEST(Fork, LetsTheChildDestroyWhatItsParentMade) {
  Context context = cpu_context(3);
  const LayerCase layer = large_layer();
  const LayerContents contents = operations::random_contents(layer);
  auto pass = std::make_unique<Pass>(host(), context.get(), layer, contents);
  results_of(*pass);
  EXPECT_TRUE(succeeds_in_child([&] {
    pass.reset();
    context.reset();
    return true;
  }));
  pass->forward();
}

TEST(Fork, MayHappenWhileAnotherThreadComputes) {
  const Context context = cpu_context(3);
  const LayerCase layer = large_layer();
  const LayerContents contents = operations::random_contents(layer);
  Pass first(host(), context.get(), layer, contents);
  const std::vector<Bytes> expected = results_of(first);
  std::atomic<bool> stop{false};
  Pass busy(host(), context.get(), layer, contents);
  std::thread other([&] {
    while (!stop) busy.forward();
  });
  for (int i = 0; i < 10; ++i) {
    Pass for_child(host(), context.get(), layer, contents);
    EXPECT_TRUE(succeeds_in_child([&] { return results_of(for_child) == expected; }));
  }
  stop = true;
  other.join();
}

// A signal that the host blocks on its threads to wait for it must not end up on a thread that the host does not know.
TEST(Signals, AreLeftToTheHost) {
  EXPECT_TRUE(succeeds_in_child([] {
    const Context context = cpu_context(3);
    require(adalora_context_prepare(context.get(), nullptr));
    sigset_t awaited;
    sigemptyset(&awaited);
    sigaddset(&awaited, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &awaited, nullptr);
    kill(getpid(), SIGUSR1);
    const timespec patience{10, 0};
    return sigtimedwait(&awaited, nullptr, &patience) == SIGUSR1;
  }));
}

struct Ended {
  int status;
  std::string output;
};

// A program with its output and errors caught.
Ended run_program(const std::vector<std::string>& command) {
  int ends[2];
  if (pipe(ends) != 0) return {-1, "no pipe"};
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    dup2(ends[1], STDOUT_FILENO);
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    std::vector<char*> arguments;
    for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
    arguments.push_back(nullptr);
    execv(arguments[0], arguments.data());
    _exit(127);
  }
  close(ends[1]);
  Ended ended{-1, ""};
  char part[4096];
  for (ssize_t n; (n = read(ends[0], part, sizeof part)) > 0;) ended.output.append(part, static_cast<size_t>(n));
  close(ends[0]);
  waitpid(child, &ended.status, 0);
  return ended;
}

void expect_silent_success(const std::vector<std::string>& command) {
  const Ended ended = run_program(command);
  EXPECT_TRUE(WIFEXITED(ended.status) && WEXITSTATUS(ended.status) == 0)
      << (WIFSIGNALED(ended.status) ? "signal " + std::to_string(WTERMSIG(ended.status))
                                    : "exit " + std::to_string(WEXITSTATUS(ended.status)));
  EXPECT_EQ(ended.output, "") << "the library writes to no stream";
}

TEST(Exit, DestroysAStaticObject) { expect_silent_success({EXIT_PROGRAM, "static"}); }
TEST(Exit, DestroysInAnExitFunction) { expect_silent_success({EXIT_PROGRAM, "atexit"}); }
TEST(Exit, DestroysInAThreadsDestructor) { expect_silent_success({EXIT_PROGRAM, "thread_local"}); }
TEST(Exit, DestroysInTheMainThreadsDestructor) { expect_silent_success({EXIT_PROGRAM, "main_thread_local"}); }
TEST(Exit, MayComeWithoutDestruction) { expect_silent_success({EXIT_PROGRAM, "never"}); }
TEST(Exit, MayComeFromAChild) { expect_silent_success({EXIT_PROGRAM, "child"}); }

TEST(Load, LeavesNoTraceInTheProcess) { expect_silent_success({LOAD_PROGRAM, LIBRARY}); }

}  // namespace
