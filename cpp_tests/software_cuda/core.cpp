#include "core.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "software_cuda.hpp"

namespace software_cuda {
namespace {

constexpr int devices = 2;
constexpr uint64_t window_bytes = uint64_t(1) << 40;  // addresses of a device, each used once
constexpr uint64_t memory_bytes = uint64_t(4) << 30;  // of a device
constexpr uint64_t page = 4096, alignment = 256;

// Addresses that no process has in use: neither this one, sanitized or not, nor the devices'.
uint64_t reserve() {
  for (uint64_t at = uint64_t(0x20) << 40; at < uint64_t(0x70) << 40; at += uint64_t(1) << 40) {
    void* wanted = reinterpret_cast<void*>(at);
    void* got = mmap(wanted, devices * window_bytes, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
    if (got == wanted) return at;
    if (got != MAP_FAILED) munmap(got, devices * window_bytes);
  }
  fprintf(stderr, "software CUDA: no addresses for the devices' memory\n");
  abort();
}

struct Thread {
  ContextStack stack;
  int device;
  int64_t generation;
};

Thread& thread() {
  thread_local Thread here{};
  static_assert(std::is_trivially_destructible_v<Thread>);
  const int64_t generation = state().generation;
  if (here.generation != generation) here = Thread{{}, 0, generation};
  return here;
}

}  // namespace

void refuse(int code, const std::string& words) { throw Failure{code, words}; }

void tell(const std::string& words) {
  state().problem = words;
  fprintf(stderr, "software CUDA: %s\n", words.c_str());
}

std::string hexadecimal(uint64_t address) {
  char digits[24];
  snprintf(digits, sizeof digits, "0x%llx", static_cast<unsigned long long>(address));
  return digits;
}

// Lives until the process ends, since calls come from destructors too.
State& state() {
  static State& all = *[] {
    State* made = new State;
    made->pid = getpid();
    if (const char* seed = getenv("SOFTWARE_CUDA_SEED")) made->random = strtoull(seed, nullptr, 0) * 2 + 1;
    const uint64_t first = reserve();
    for (int i = 0; i < devices; ++i)
      made->contexts.push_back(std::make_unique<Context>(i, first + uint64_t(i) * window_bytes, window_bytes));
    return made;
  }();
  return all;
}

uint64_t random_below(uint64_t n) {
  uint64_t& x = state().random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return (x >> 20) % n;
}

bool enter(const char* name) {
  State& all = state();
  if (all.pid != getpid()) refuse(cudaErrorInitializationError, "CUDA does not outlive a fork");
  ++all.calls;
  ++all.calls_of[name];
  if (all.fail_in == 0 || --all.fail_in > 0) return false;
  all.failed_call = name;
  return true;
}

// ---- Contexts ----------------------------------------------------------------------------------------------------

Context::Context(int device, uint64_t window, uint64_t window_bytes)
    : device(device), window(window), window_bytes(window_bytes), next(window + page), legacy{this,    true,    true,
                                                                                              nullptr, nullptr, {}} {}

void Context::start() {
  if (process == nullptr) process = std::make_unique<Process>(window, window_bytes);
}

void Context::destroy() {
  const int keep = device;
  const uint64_t at = window, bytes = window_bytes;
  for (const auto& capture : state().captures)
    if (capture->context == this) capture->invalid = true;
  for (const OperationRef& operation : pending) operation->needs.clear();
  this->~Context();
  new (this) Context(keep, at, bytes);
}

void Context::check() const {
  if (error != 0) throw Failure{error, ""};
}

void Context::fail(int code, const std::string& words) {
  if (error != 0) return;
  error = code;
  tell(words + ": " + name_of(code) + " from now on");
}

ContextStack& context_stack() { return thread().stack; }
int& runtime_device() { return thread().device; }

Context* current() {
  ContextStack& stack = context_stack();
  return stack.empty() ? nullptr : stack.back();
}

Context& needs_current() {
  Context* context = current();
  if (context == nullptr) refuse(cudaErrorDeviceUninitialized, "no context is current on this thread");
  if (!context->alive()) refuse(cudaErrorDeviceUninitialized, "the current context was destroyed");
  context->start();
  context->check();
  return *context;
}

Context& runtime_context() {
  if (current() == nullptr) {
    Context& context = *state().contexts[size_t(runtime_device())];
    context.runtime_uses = true;
    context_stack().push_back(&context);
  }
  if (!current()->alive()) current()->runtime_uses = true;
  return needs_current();
}

// ---- Memory ------------------------------------------------------------------------------------------------------

uint64_t Context::allocate(size_t bytes) {
  if (bytes > memory_bytes - allocated) refuse(cudaErrorMemoryAllocation, "");
  const uint64_t used = (bytes + alignment - 1) / alignment * alignment, pages = (used + page - 1) / page * page;
  if (next + pages + page > window + window_bytes) refuse(cudaErrorMemoryAllocation, "all addresses were used once");
  // The end lies at a page that nobody has, as near as the alignment lets it.
  const Allocation allocation{next + pages - used, bytes, next, pages};
  next += pages + page * (1 + random_below(4));
  allocated += bytes;
  allocations[allocation.address] = allocation;
  process->send(protocol::Command::map,
                protocol::Map{allocation.pages, allocation.page_bytes, allocation.address, allocation.bytes},
                "cudaMalloc");
  return allocation.address;
}

void Context::release(uint64_t address) {
  const auto found = allocations.find(address);
  if (found == allocations.end())
    refuse(cudaErrorInvalidValue,
           hexadecimal(address) + " is not the start of a live allocation of device " + std::to_string(device));
  settle_all();
  check();
  allocated -= found->second.bytes;
  allocations.erase(found);
  process->send(protocol::Command::unmap, protocol::Unmap{address}, "cudaFree");
}

const Allocation* Context::find(uint64_t address) const {
  auto after = allocations.upper_bound(address);
  if (after == allocations.begin()) return nullptr;
  const Allocation& before = std::prev(after)->second;
  return address < before.address + before.bytes ? &before : nullptr;
}

bool Context::owns(const std::string& name, const std::string& what, uint64_t address, uint64_t bytes) {
  if (bytes == 0) return true;
  const Allocation* allocation = find(address);
  if (allocation != nullptr && bytes <= allocation->address + allocation->bytes - address) return true;
  std::string words = name + ": " + what + ", " + std::to_string(bytes) + " bytes from " + hexadecimal(address);
  if (allocation == nullptr)
    words += ", begins in no live allocation of device " + std::to_string(device);
  else
    words += ", which is byte " + std::to_string(address - allocation->address) + " of an allocation of " +
             std::to_string(allocation->bytes) + ", goes past its end";
  fail(cudaErrorIllegalAddress, words);
  return false;
}

bool is_device_address(const void* pointer) {
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  const State& all = state();
  return address >= all.contexts.front()->window &&
         address < all.contexts.back()->window + all.contexts.back()->window_bytes;
}

// ---- Streams -----------------------------------------------------------------------------------------------------

cudaStream_t find_stream(Context& context, cudaStream_t handle) {
  const uintptr_t number = reinterpret_cast<uintptr_t>(handle);
  if (number == 2) refuse(cudaErrorInvalidResourceHandle, "cudaStreamPerThread is not modelled");
  if (number <= 1) return &context.legacy;
  for (const auto& other : state().contexts)
    if (other->streams.count(handle) != 0) {
      if (other.get() != &context)
        refuse(cudaErrorInvalidResourceHandle, "a stream of device " + std::to_string(other->device) + ", but device " +
                                                   std::to_string(context.device) + " is current");
      return handle;
    }
  refuse(cudaErrorInvalidResourceHandle, "not a live stream");
}

OperationRef Context::add(const std::string& name, std::function<void(Context&)> run, std::vector<OperationRef> needs) {
  auto operation = std::make_shared<Operation>();
  operation->name = name;
  operation->run = std::move(run);
  for (OperationRef& needed : needs)
    if (needed != nullptr && !needed->done) {
      needed->dependents.push_back(operation.get());
      operation->needs.push_back(std::move(needed));
    }
  operation->unmet = operation->needs.size();
  pending.insert(operation);
  if (operation->unmet == 0) runnable.push_back(operation);
  return operation;
}

// What the stream's next operation waits for: the legacy stream and the blocking ones wait for each other.
void Context::follow(cudaStream_t stream, std::vector<OperationRef>& needs) {
  needs.push_back(stream->last);
  if (stream->legacy) {
    for (const auto& [handle, other] : streams)
      if (other->blocking) needs.push_back(other->last);
  } else if (stream->blocking) {
    needs.push_back(legacy.last);
  }
}

std::vector<OperationRef> Context::last_of(cudaStream_t stream) {
  std::vector<OperationRef> all;
  follow(stream, all);
  if (!stream->legacy) all.resize(1);
  return all;
}

OperationRef Context::enqueue(cudaStream_t stream, const std::string& name, std::function<void(Context&)> run,
                              std::vector<OperationRef> needs) {
  check();
  if (stream->legacy) {
    for (const auto& capture : state().captures) {
      bool implicit = capture->context == this && capture->thread == std::this_thread::get_id();
      for (cudaStream_t other : capture->streams) implicit |= capture->context == this && other->blocking;
      if (implicit) {
        invalidate(*capture);
        refuse(cudaErrorStreamCaptureImplicit, "the legacy default stream is used while a stream captures");
      }
    }
  }
  if (stream->capture != nullptr) {
    Capture& capture = *stream->capture;
    if (capture.invalid) refuse(cudaErrorStreamCaptureInvalidated, "the stream's capture was invalidated");
    capture.nodes.push_back({name, std::move(run), stream->captured_last});
    stream->captured_last = {capture.nodes.size() - 1};
    return nullptr;
  }
  follow(stream, needs);
  stream->last = add(name, std::move(run), std::move(needs));
  return stream->last;
}

OperationRef Context::launch(cudaStream_t stream, CUgraphExec_st& exec) {
  const OperationRef begin = enqueue(stream, "cudaGraphLaunch", [](Context&) {}, {exec.last});
  if (begin == nullptr) return nullptr;
  std::vector<OperationRef> all, ends;
  for (const Node& node : exec.nodes) {
    std::vector<OperationRef> needs{begin};
    for (size_t needed : node.needs) needs.push_back(all[needed]);
    all.push_back(add(node.name, node.run, needs));
  }
  ends = all;
  exec.last = stream->last = enqueue(stream, "the end of cudaGraphLaunch", [](Context&) {}, ends);
  return exec.last;
}

void Context::execute(const OperationRef& operation) {
  if (error == 0) operation->run(*this);
  operation->done = true;
  operation->needs.clear();
  for (Operation* dependent : operation->dependents)
    if (--dependent->unmet == 0) runnable.push_back(dependent->shared_from_this());
  pending.erase(operation);
}

void Context::settle(const std::vector<OperationRef>& targets) {
  const auto all_done = [&] {
    return std::all_of(targets.begin(), targets.end(), [](const OperationRef& o) { return o == nullptr || o->done; });
  };
  // Either nothing more than what the targets need, or whatever comes.
  std::set<const Operation*> needed;
  const bool strictly = random_below(2) == 0;
  if (strictly) {
    std::vector<const Operation*> left;
    for (const OperationRef& target : targets)
      if (target != nullptr && !target->done) left.push_back(target.get());
    while (!left.empty()) {
      const Operation* operation = left.back();
      left.pop_back();
      if (!needed.insert(operation).second) continue;
      for (const OperationRef& before : operation->needs)
        if (!before->done) left.push_back(before.get());
    }
  }
  while (!all_done()) {
    std::vector<size_t> choices;
    for (size_t i = 0; i < runnable.size(); ++i)
      if (!strictly || needed.count(runnable[i].get()) != 0) choices.push_back(i);
    const size_t chosen = choices[random_below(choices.size())];
    const OperationRef operation = runnable[chosen];
    runnable.erase(runnable.begin() + ptrdiff_t(chosen));
    execute(operation);
  }
  if (process == nullptr) return;
  std::string words;
  const int failed = process->finish(words);
  if (failed != 0) fail(failed, words);
}

void Context::settle_all() { settle(std::vector<OperationRef>(pending.begin(), pending.end())); }

// ---- Captures ----------------------------------------------------------------------------------------------------

void invalidate(Capture& capture) { capture.invalid = true; }

void forbid_in_capture(const std::string& name) {
  bool found = false;
  for (const auto& capture : state().captures) {
    const bool own = capture->thread == std::this_thread::get_id();
    if (capture->mode == cudaStreamCaptureModeRelaxed || (capture->mode == cudaStreamCaptureModeThreadLocal && !own))
      continue;
    invalidate(*capture);
    found = true;
  }
  if (found) refuse(cudaErrorStreamCaptureUnsupported, name + " while a stream captures");
}

void forbid_waiting(cudaStream_t stream, const std::string& name) {
  if (stream->capture != nullptr) {
    const bool invalid = stream->capture->invalid;
    invalidate(*stream->capture);
    refuse(invalid ? cudaErrorStreamCaptureInvalidated : cudaErrorStreamCaptureUnsupported,
           name + " of a stream that captures");
  }
  if (!stream->legacy) return;
  for (const auto& capture : state().captures)
    if (capture->context == stream->context)
      for (cudaStream_t other : capture->streams)
        if (other->blocking) {
          invalidate(*capture);
          refuse(cudaErrorStreamCaptureImplicit, name + " of the legacy default stream while a stream captures");
        }
}

}  // namespace software_cuda

using namespace software_cuda;

namespace {

template <class Read>
auto locked(Read read) {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  return read(state());
}

}  // namespace

extern "C" {

int64_t software_cuda_live(int what) {
  return locked([&](State& all) {
    int64_t count = 0;
    for (const auto& context : all.contexts) {
      const size_t counts[] = {context->allocations.size(), size_t(context->allocated), context->streams.size(),
                               context->events.size(),      context->graphs.size(),     context->execs.size(),
                               size_t(context->retained),   context->modules.size(),    context->handles.size()};
      count += int64_t(counts[what]);
    }
    return count;
  });
}

void software_cuda_fail_call(int64_t nth) {
  locked([&](State& all) {
    all.fail_in = nth;
    all.failed_call.clear();
  });
}
const char* software_cuda_failed_call() {
  return locked([](State& all) { return all.failed_call.c_str(); });
}
int64_t software_cuda_calls() {
  return locked([](State& all) { return all.calls; });
}
int64_t software_cuda_calls_of(const char* function) {
  return locked([&](State& all) { return all.calls_of[function]; });
}
void software_cuda_seed(uint64_t seed) {
  locked([&](State& all) { all.random = seed * 2 + 1; });
}
int64_t software_cuda_pending() {
  return locked([](State& all) {
    int64_t count = 0;
    for (const auto& context : all.contexts) count += int64_t(context->pending.size());
    return count;
  });
}
const char* software_cuda_problem() {
  return locked([](State& all) { return all.problem.c_str(); });
}
void software_cuda_driver(int version) {
  locked([&](State& all) { all.driver = version; });
}

void software_cuda_reset() {
  locked([](State& all) {
    for (const auto& context : all.contexts) context->destroy();
    all.captures.clear();
    all.fail_in = 0;
    all.driver = NEWEST_DRIVER;
    all.failed_call.clear();
    all.problem.clear();
    ++all.generation;
    all.pid = getpid();
  });
}
}
