#include "fibers.hpp"

#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace host {

uint3 thread_index, block_index, block_size, grid_size;

namespace {
const Kernel* newest = nullptr;
}

Kernel::Kernel(const char* name, size_t argument_bytes, void (*run)(const void*))
    : name(name), argument_bytes(argument_bytes), run(run), next(newest) {
  newest = this;
}

}  // namespace host

namespace fibers {
namespace {

constexpr unsigned most_threads = 1024;
constexpr size_t stack_bytes = size_t(64) << 10;

#if defined(__x86_64__)
// What a call keeps goes to the stack that is left, and comes from the one that is entered.
extern "C" void switch_stack(void** left, void* entered);
asm(R"(
.text
.globl switch_stack
.hidden switch_stack
.type switch_stack, @function
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_stack, .-switch_stack
)");

struct Place {
  void* stack = nullptr;

  void begin(char* lowest, void (*entry)()) {
    void** top = reinterpret_cast<void**>(lowest + stack_bytes) - 8;
    for (int i = 0; i < 8; ++i) top[i] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    stack = top;
  }
  static void go(Place& left, Place& entered) { switch_stack(&left.stack, entered.stack); }
};
#else
struct Place {
  ucontext_t context;

  void begin(char* lowest, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = lowest;
    context.uc_stack.ss_size = stack_bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void go(Place& left, Place& entered) { swapcontext(&left.context, &entered.context); }
};
#endif

enum class State : uint8_t { fresh, ready, at_barrier, at_warp, done };

struct Fiber {
  Place place;
  char* stack;
  State state;
  bool predicate;
  int line, source;
  uint32_t mask;
  uint64_t value;
};

Fiber threads[most_threads];
char* free_stacks[most_threads];
unsigned ready[most_threads];
unsigned n_threads, n_ready, n_free, n_waiting, n_done, now;
int counted;
Place scheduler;
bool failed;
std::string text;
const host::Kernel* kernel = nullptr;
const void* arguments;
uint64_t random_state;

unsigned random_below(unsigned n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return unsigned((random_state >> 32) * n >> 32);
}

uint3 index_of(unsigned thread) {
  return {thread % host::block_size.x, thread / host::block_size.x % host::block_size.y,
          thread / (host::block_size.x * host::block_size.y)};
}

std::string triple(uint3 at, uint3 of) {
  if (of.y == 1 && of.z == 1) return std::to_string(at.x);
  return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")";
}

std::string place_of(unsigned thread) {
  return std::string(kernel->name) + ", block " + triple(host::block_index, host::grid_size) + ", thread " +
         triple(index_of(thread), host::block_size);
}

void leave() { Place::go(threads[now].place, scheduler); }

[[noreturn]] void fail(unsigned thread, const std::string& what) {
  failed = true;
  text = what + " (" + place_of(thread) + ")";
  leave();
  abort();
}

void make_ready(unsigned thread) {
  threads[thread].state = State::ready;
  ready[n_ready++] = thread;
}

void entry() {
  kernel->run(arguments);
  threads[now].state = State::done;
  leave();
}

// The fiber waits for the others at a barrier of the whole block; the last one frees all.
void wait_for_block(int line) {
  Fiber& me = threads[now];
  me.line = line;
  me.state = State::at_barrier;
  if (++n_waiting == n_threads) {
    for (unsigned i = 0; i < n_threads; ++i)
      if (threads[i].line != line)
        fail(now, "threads at different barriers: lines " + std::to_string(line) + " and " +
                      std::to_string(threads[i].line));
    n_waiting = 0;
    counted = 0;
    for (unsigned i = 0; i < n_threads; ++i) {
      counted += threads[i].predicate ? 1 : 0;
      make_ready(i);
    }
  }
  leave();
}

// The fiber waits for the lanes of its mask; the last one runs `together` on the warp and frees them.
template <class Together>
void wait_for_warp(uint32_t mask, int line, Together together) {
  Fiber& me = threads[now];
  me.line = line;
  me.mask = mask;
  me.state = State::at_warp;
  const unsigned first = now & ~31u, lane = now & 31u;
  if ((mask >> lane & 1u) == 0) fail(now, "the mask at line " + std::to_string(line) + " lacks the calling lane");
  bool all = true;
  for (unsigned i = 0; i < 32; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    const unsigned other = first + i;
    const std::string at = " at line " + std::to_string(line);
    if (other >= n_threads) fail(now, "the mask" + at + " names lane " + std::to_string(i) + ", past the block's end");
    const Fiber& fiber = threads[other];
    if (fiber.state == State::done)
      fail(now, "the mask" + at + " names lane " + std::to_string(i) + ", which has returned");
    if (fiber.state != State::at_warp || (fiber.mask >> lane & 1u) == 0)
      all = false;
    else if (fiber.line != line || fiber.mask != mask)
      fail(now, "lanes of one mask at different places or with different masks: lines " + std::to_string(line) +
                    " and " + std::to_string(fiber.line));
  }
  if (all) {
    together(&threads[first], mask);
    for (unsigned i = 0; i < 32; ++i)
      if ((mask >> i & 1u) != 0) make_ready(first + i);
  }
  leave();
}

std::string lines(unsigned thread) {
  return "thread " + triple(index_of(thread), host::block_size) + " at line " + std::to_string(threads[thread].line);
}

// Nobody can run, and not all are done.
void explain_deadlock() {
  unsigned barrier = n_threads, warp = n_threads;
  for (unsigned i = n_threads; i-- > 0;) {
    if (threads[i].state == State::at_barrier) barrier = i;
    if (threads[i].state == State::at_warp) warp = i;
  }
  failed = true;
  if (barrier < n_threads && warp < n_threads)
    text = "divergence: " + lines(barrier) + " waits for the block, " + lines(warp) + " for its warp";
  else if (barrier < n_threads)
    text = "a barrier that " + std::to_string(n_done) + " of " + std::to_string(n_threads) +
           " threads left out by returning: " + lines(barrier);
  else
    text = "lanes that their warp does not meet: " + lines(warp);
  text += " (" + place_of(barrier < n_threads ? barrier : warp) + ")";
}

// The program's own thread-local variables: the shared arrays of all kernels.
struct Shared {
  void* begin = nullptr;
  size_t bytes = 0;
};
int find_shared(dl_phdr_info* info, size_t, void* to) {
  if (info->dlpi_name[0] != '\0') return 0;
  for (int i = 0; i < info->dlpi_phnum; ++i)
    if (info->dlpi_phdr[i].p_type == PT_TLS)
      *static_cast<Shared*>(to) = {info->dlpi_tls_data, info->dlpi_phdr[i].p_memsz};
  return 1;
}
Shared shared;

void run_block() {
  memset(shared.begin, 0xff, shared.bytes);
  n_ready = n_threads;
  n_waiting = n_done = 0;
  for (unsigned i = 0; i < n_threads; ++i) {
    threads[i].state = State::fresh;
    threads[i].predicate = false;
    ready[i] = i;
  }
  while (n_ready > 0 && !failed) {
    const unsigned at = random_below(n_ready);
    now = ready[at];
    ready[at] = ready[--n_ready];
    Fiber& fiber = threads[now];
    if (fiber.state == State::fresh) {
      fiber.stack = free_stacks[--n_free];
      fiber.place.begin(fiber.stack, entry);
    }
    fiber.state = State::ready;
    host::thread_index = index_of(now);
    Place::go(scheduler, fiber.place);
    if (fiber.state == State::done) {
      free_stacks[n_free++] = fiber.stack;
      ++n_done;
    }
  }
  if (!failed && n_done < n_threads) explain_deadlock();
}

}  // namespace

const host::Kernel* kernels() { return host::newest; }

void prepare() {
  const size_t page = size_t(sysconf(_SC_PAGESIZE)), each = stack_bytes + page;
  void* all =
      mmap(nullptr, each * most_threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED) abort();
  for (unsigned i = 0; i < most_threads; ++i) {
    char* lowest = static_cast<char*>(all) + i * each;
    mprotect(lowest, page, PROT_NONE);
    free_stacks[most_threads - 1 - i] = lowest + page;
  }
  n_free = most_threads;
  dl_iterate_phdr(find_shared, &shared);
}

bool run(const host::Kernel& which, uint3 grid, uint3 block, const void* args, uint64_t seed) {
  kernel = &which;
  arguments = args;
  failed = false;
  text.clear();
  random_state = seed * 0x9e3779b97f4a7c15ull | 1;
  host::grid_size = grid;
  host::block_size = block;
  n_threads = block.x * block.y * block.z;
  // A walk over all blocks that begins and steps at random.
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  uint64_t step = blocks < 3 ? 1 : 1 + random_below(unsigned(blocks - 1));
  const auto divides = [&](uint64_t a, uint64_t b) {
    while (b != 0) {
      const uint64_t rest = a % b;
      a = b;
      b = rest;
    }
    return a != 1;
  };
  while (divides(blocks, step)) --step;
  uint64_t at = random_below(unsigned(blocks));
  for (uint64_t i = 0; i < blocks && !failed; ++i, at = (at + step) % blocks) {
    host::block_index = {unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y)};
    run_block();
  }
  if (!failed) kernel = nullptr;
  return !failed;
}

const std::string& problem() { return text; }

std::string here() { return kernel == nullptr ? "no kernel" : place_of(now); }

}  // namespace fibers

namespace host {

using namespace fibers;

void barrier(int line) {
  threads[now].predicate = false;
  wait_for_block(line);
}

int count(bool predicate, int line) {
  threads[now].predicate = predicate;
  wait_for_block(line);
  return counted;
}

uint64_t exchange(uint32_t mask, uint64_t value, int source, int line) {
  Fiber& me = threads[now];
  me.value = value;
  me.source = source;
  wait_for_warp(mask, line, [line](Fiber* warp, uint32_t lanes) {
    uint64_t values[32];
    for (unsigned i = 0; i < 32; ++i)
      if ((lanes >> i & 1u) != 0) {
        const int from = warp[i].source < 0 ? int(i) : warp[i].source;
        if ((lanes >> from & 1u) == 0)
          fail(unsigned(&warp[i] - threads), "the shuffle at line " + std::to_string(line) + " reads lane " +
                                                 std::to_string(from) + ", which its mask lacks");
        values[i] = warp[from].value;
      }
    for (unsigned i = 0; i < 32; ++i)
      if ((lanes >> i & 1u) != 0) warp[i].value = values[i];
  });
  return me.value;
}

uint32_t ballot(uint32_t mask, bool predicate, int line) {
  Fiber& me = threads[now];
  me.value = predicate ? 1 : 0;
  wait_for_warp(mask, line, [](Fiber* warp, uint32_t lanes) {
    uint32_t votes = 0;
    for (unsigned i = 0; i < 32; ++i)
      if ((lanes >> i & 1u) != 0 && warp[i].value != 0) votes |= 1u << i;
    for (unsigned i = 0; i < 32; ++i)
      if ((lanes >> i & 1u) != 0) warp[i].value = votes;
  });
  return uint32_t(me.value);
}

}  // namespace host
