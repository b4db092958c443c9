// What both libraries share: devices and their processes, memory, streams as graphs of operations, captures, errors.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cuda_api.hpp"
#include "protocol.hpp"

namespace software_cuda {

// What a function returns; the words go to stderr.
struct Failure {
  int code;
  std::string words;
};
// Throws a Failure.
[[noreturn]] void refuse(int code, const std::string& words);
// Tells stderr, and keeps it for software_cuda_problem.
void tell(const std::string& words);
const char* name_of(int code);

struct KernelInfo {
  std::string name;
  size_t argument_bytes;
};

// The other process. Records are kept until somebody waits for them.
class Process {
 public:
  Process(uint64_t window, uint64_t bytes);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  template <class Record>
  void send(protocol::Command command, const Record& record, const std::string& name, const void* extra = nullptr,
            size_t extra_bytes = 0) {
    append({command, uint32_t(name.size()), extra_bytes}, &record, sizeof record, name, extra);
  }
  // Waits until all is done, but for memory that came and went. The first error since the start, with its words.
  int finish(std::string& words);
  // The same, and rows of memory.
  int read(const protocol::Read& record, const std::string& name, void* to, size_t to_pitch, std::string& words);
  const std::vector<KernelInfo>& kernels() const { return kernels_; }

 private:
  void append(const protocol::Header& header, const void* record, size_t bytes, const std::string& name,
              const void* extra);
  bool flush();
  bool receive(void* to, size_t bytes);
  int answer(std::string& words, void* to, size_t to_pitch, size_t width, size_t rows);

  int socket_ = -1, pid_ = -1;
  bool working_ = false;
  std::vector<char> unsent_;
  std::vector<KernelInfo> kernels_;
};

struct Allocation {
  uint64_t address, bytes, pages, page_bytes;
};

struct Context;

// An operation that waits for others.
struct Operation : std::enable_shared_from_this<Operation> {
  std::string name;
  std::function<void(Context&)> run;
  std::vector<std::shared_ptr<Operation>> needs;
  std::vector<Operation*> dependents;
  size_t unmet = 0;
  bool done = false;
};
using OperationRef = std::shared_ptr<Operation>;

struct Node {
  std::string name;
  std::function<void(Context&)> run;
  std::vector<size_t> needs;
};

}  // namespace software_cuda

struct CUgraph_st {
  software_cuda::Context* context;
  std::vector<software_cuda::Node> nodes;
};

struct CUgraphExec_st {
  software_cuda::Context* context;
  std::vector<software_cuda::Node> nodes;
  software_cuda::OperationRef last;  // launches of one follow each other
};

namespace software_cuda {

struct Capture {
  cudaStream_t origin;
  std::thread::id thread;
  int mode;
  bool invalid = false;
  Context* context;
  std::vector<Node> nodes;
  std::set<cudaStream_t> streams;
};

}  // namespace software_cuda

struct CUstream_st {
  software_cuda::Context* context;
  bool legacy, blocking;
  software_cuda::OperationRef last;
  std::shared_ptr<software_cuda::Capture> capture;
  std::vector<size_t> captured_last;  // what the next node follows
};

struct CUevent_st {
  software_cuda::Context* context;
  software_cuda::OperationRef recorded;
  std::shared_ptr<software_cuda::Capture> capture;
  std::vector<size_t> captured;
};

struct CUfunc_st {
  software_cuda::Context* context;
  size_t number;
  CUmod_st* module;
  bool loaded = false;
};

struct CUmod_st {
  software_cuda::Context* context;
  std::map<std::string, std::unique_ptr<CUfunc_st>> functions;
};

struct cublasContext {
  software_cuda::Context* context;
  cudaStream_t stream = nullptr;
  int math_mode = CUBLAS_DEFAULT_MATH, pointer_mode = CUBLAS_POINTER_MODE_HOST;
  uint64_t workspace = 0, workspace_bytes = 0;  // 0: cuBLAS's own
};

namespace software_cuda {

// Owns its objects by their handles.
template <class T>
using Owned = std::map<T*, std::unique_ptr<T>>;

// A device and its primary context.
struct Context {
  Context(int device, uint64_t window, uint64_t window_bytes);

  int device;
  uint64_t window, window_bytes, next;
  int retained = 0;
  bool runtime_uses = false;
  std::unique_ptr<Process> process;  // from the first use on
  int error = 0;                     // sticky
  std::map<uint64_t, Allocation> allocations;
  uint64_t allocated = 0;
  CUstream_st legacy;
  Owned<CUstream_st> streams;
  Owned<CUevent_st> events;
  Owned<CUmod_st> modules;
  Owned<CUgraph_st> graphs;
  Owned<CUgraphExec_st> execs;
  Owned<cublasContext> handles;
  std::vector<OperationRef> runnable;  // nothing that they need is left to do
  std::set<OperationRef> pending;

  bool alive() const { return retained > 0 || runtime_uses; }
  void start();
  // All that it holds is gone.
  void destroy();
  // Throws where the context has a sticky error.
  void check() const;
  // From now on every call fails.
  void fail(int code, const std::string& words);

  uint64_t allocate(size_t bytes);
  void release(uint64_t address);
  const Allocation* find(uint64_t address) const;
  // Whether all bytes are of one allocation; else the context fails.
  bool owns(const std::string& name, const std::string& what, uint64_t address, uint64_t bytes);

  OperationRef enqueue(cudaStream_t stream, const std::string& name, std::function<void(Context&)> run,
                       std::vector<OperationRef> needs = {});
  OperationRef launch(cudaStream_t stream, CUgraphExec_st& exec);
  // Runs what must run before they are done, and sometimes more.
  void settle(const std::vector<OperationRef>& targets);
  void settle_all();
  std::vector<OperationRef> last_of(cudaStream_t stream);

 private:
  OperationRef add(const std::string& name, std::function<void(Context&)> run, std::vector<OperationRef> needs);
  void execute(const OperationRef& operation);
  void follow(cudaStream_t stream, std::vector<OperationRef>& needs);
};

// As CUDA counts versions.
constexpr int NEWEST_DRIVER = 13000;

struct State {
  std::recursive_mutex mutex;
  std::vector<std::unique_ptr<Context>> contexts;
  std::vector<std::shared_ptr<Capture>> captures;
  int64_t calls = 0, fail_in = 0;
  std::map<std::string, int64_t> calls_of;
  std::string failed_call, problem;
  uint64_t random = 1;
  int driver = NEWEST_DRIVER;
  int64_t generation = 0;  // of resets
  int pid = 0;
};
State& state();
uint64_t random_below(uint64_t n);

// A thread's, without a destructor: static objects' destructors still call.
class ContextStack {
 public:
  bool empty() const { return depth_ == 0; }
  Context*& back() { return contexts_[depth_ - 1]; }
  void pop_back() { --depth_; }
  void push_back(Context* context) {
    if (depth_ == sizeof contexts_ / sizeof *contexts_)
      refuse(cudaErrorInvalidValue, "contexts are pushed, not popped");
    contexts_[depth_++] = context;
  }

 private:
  Context* contexts_[256];
  size_t depth_;
};

// The calling thread's.
Context* current();          // by the driver; null: none
Context& needs_current();    // the driver's calls
Context& runtime_context();  // made current where none is
ContextStack& context_stack();
int& runtime_device();

// Any device's, or null.
bool is_device_address(const void* pointer);
// The stream that a handle names in that context, or a Failure.
cudaStream_t find_stream(Context& context, cudaStream_t handle);
template <class T>
T& find_in(Owned<T>& owned, T* handle, const char* what) {
  const auto found = owned.find(handle);
  if (found == owned.end())
    refuse(cudaErrorInvalidResourceHandle, std::string("not a live ") + what + " of the current context");
  return *found->second;
}

// A call that no capture allows: those that it would concern become invalid.
void forbid_in_capture(const std::string& name);
void invalidate(Capture& capture);
// What waits for the stream from the host.
void forbid_waiting(cudaStream_t stream, const std::string& name);

// Whether this call is the one that is to fail; counts it.
bool enter(const char* name);
template <class Body>
int guarded(const char* name, int injected, Body body) {
  State& all = state();
  const std::lock_guard<std::recursive_mutex> lock(all.mutex);
  try {
    if (enter(name)) return injected;
    body();
    return 0;
  } catch (const Failure& failure) {
    if (!failure.words.empty()) tell(std::string(name) + ": " + failure.words + ": " + name_of(failure.code));
    return failure.code;
  }
}

std::string hexadecimal(uint64_t address);

}  // namespace software_cuda
