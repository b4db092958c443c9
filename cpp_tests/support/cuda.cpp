#include "cuda.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <utility>
#include <vector>

#include "compare.hpp"
#include "software_cuda/software_cuda.hpp"

namespace support::cuda {

namespace {

// Of CUDA's headers.
constexpr unsigned non_blocking_stream = 1;
constexpr int of_this_thread = 1;  // cudaStreamCaptureModeThreadLocal
constexpr int to_device = 1, to_host = 2;

const char* folder() {
  const char* given = std::getenv("ADALORA_CUDA_FOLDER");
  return given != nullptr && *given != 0 ? given : nullptr;
}

std::string description(adalora_context_t* context) {
  size_t bytes = 0;
  require(adalora_context_describe(context, nullptr, &bytes));
  std::string text(bytes, 0);
  require(adalora_context_describe(context, text.data(), &bytes));
  text.resize(bytes - 1);
  return text;
}

// The library that the context's description names, which the process has loaded already.
void* loaded(const std::string& text, const std::string& library) {
  const size_t at = text.find("/" + library);
  if (at == std::string::npos) throw std::runtime_error("no path of " + library + " in: " + text);
  const char* const ends = " ,;()[]\n";
  const size_t before = text.find_last_of(ends, at);
  const size_t begin = before == std::string::npos ? 0 : before + 1;
  const std::string path = text.substr(begin, text.find_first_of(ends, at) - begin);
  void* const handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) throw std::runtime_error("not loaded: " + path);
  return handle;
}

struct Libraries {
  void *cudart, *cublas;

  static const Libraries& get() {
    static const Libraries all = [] {
      const Context any = cuda::context();
      const std::string text = description(any.get());
      return Libraries{loaded(text, "libcudart.so"), loaded(text, "libcublas.so")};
    }();
    return all;
  }
};

void* exported(const char* name) {
  const Libraries& all = Libraries::get();
  void* const found = dlsym(all.cudart, name);
  return found != nullptr ? found : dlsym(all.cublas, name);
}

// Of the driver, which the runtime reaches.
void* driver_function(const char* name) {
  void* function = nullptr;
  int result = 0;
  using Lookup = int (*)(const char*, void**, unsigned long long, int*);
  const auto look_up = reinterpret_cast<Lookup>(exported("cudaGetDriverEntryPoint"));
  return look_up != nullptr && look_up(name, &function, 0, &result) == 0 && result == 0 ? function : nullptr;
}

// Makes a device the current one for a while.
class On {
 public:
  explicit On(int32_t device) : before_(current_device()) { set_device(device); }
  On(const On&) = delete;
  On& operator=(const On&) = delete;
  ~On() { reinterpret_cast<int (*)(int)>(symbol("cudaSetDevice"))(before_); }

 private:
  int32_t before_;
};

}  // namespace

bool wanted() {
  const char* const asked = std::getenv("ADALORA_TEST_CUDA");
  return folder() != nullptr || (asked != nullptr && std::string(asked) == "1");
}

Context context(int32_t device, void* cublas, bool tf32) {
  adalora_context_desc_t desc{};
  desc.struct_size = sizeof desc;
  desc.backend = ADALORA_BACKEND_CUDA;
  desc.device = device;
  desc.cublas_handle = cublas;
  desc.library_folder = folder();
  desc.tf32 = tf32 ? 1 : 0;
  adalora_context_t* made = nullptr;
  require(adalora_context_create(&desc, &made));
  return Context(made);
}

void* symbol(const char* name) {
  void* const found = std::string(name).rfind("cu", 0) == 0 && name[2] >= 'A' && name[2] <= 'Z' ? driver_function(name)
                                                                                                : exported(name);
  if (found == nullptr) throw std::runtime_error(std::string("no function ") + name);
  return found;
}

void check(const char* name, int status) {
  if (status == 0) return;
  const bool blas = std::string(name).rfind("cublas", 0) == 0;
  const auto name_of_error =
      reinterpret_cast<const char* (*)(int)>(exported(blas ? "cublasGetStatusName" : "cudaGetErrorName"));
  throw std::runtime_error(std::string(name) + ": " + name_of_error(status));
}

int32_t devices() {
  int count = 0;
  call<int*>("cudaGetDeviceCount", &count);
  return count;
}

int32_t current_device() {
  int device = -1;
  call<int*>("cudaGetDevice", &device);
  return device;
}

void set_device(int32_t device) { call<int>("cudaSetDevice", device); }

void* current_context() {
  // There is no question that leaves the stack alone in every driver: the top is taken off and put back.
  void* current = nullptr;
  if (reinterpret_cast<int (*)(void**)>(symbol("cuCtxPopCurrent"))(&current) != 0 || current == nullptr) return nullptr;
  call<void*>("cuCtxPushCurrent", current);
  return current;
}

Stream::Stream(Kind kind, int32_t device) : device_(device) {
  const On on(device);
  call<void**, unsigned>("cudaStreamCreateWithFlags", &stream_, kind == non_blocking ? non_blocking_stream : 0);
}

Stream::~Stream() {
  const On on(device_);
  reinterpret_cast<int (*)(void*)>(symbol("cudaStreamDestroy"))(stream_);
}

void synchronize(void* stream) { call<void*>("cudaStreamSynchronize", stream); }

void begin_capture(void* stream) { call<void*, int>("cudaStreamBeginCapture", stream, of_this_thread); }

Graph::Graph(void* stream) {
  void* graph = nullptr;
  call<void*, void**>("cudaStreamEndCapture", stream, &graph);
  const auto destroy = [&] { call<void*>("cudaGraphDestroy", graph); };
  try {
    call<void**, void*, unsigned long long>("cudaGraphInstantiateWithFlags", &executable_, graph, 0);
  } catch (...) {
    destroy();
    throw;
  }
  destroy();
}

Graph::~Graph() { reinterpret_cast<int (*)(void*)>(symbol("cudaGraphExecDestroy"))(executable_); }

void Graph::launch(void* stream) const { call<void*, void*>("cudaGraphLaunch", executable_, stream); }

Blas::Blas() { call<void**>("cublasCreate_v2", &handle_); }

Blas::~Blas() { reinterpret_cast<int (*)(void*)>(symbol("cublasDestroy_v2"))(handle_); }

Device::Device(std::string name, Capturing capturing, int32_t device)
    : name_(std::move(name)),
      device_(device),
      context_(cuda::context(device)),
      own_(std::make_unique<Stream>(Stream::non_blocking, device)),
      stream_(own_->get()),
      captures_(capturing == Capturing::everything) {
  require(adalora_context_prepare(context_.get(), stream_));
}

Device::Device(std::string name, void* stream) : name_(std::move(name)), context_(cuda::context()), stream_(stream) {
  require(adalora_context_prepare(context_.get(), stream_));
}

std::vector<Team> Device::teams() {
  std::vector<Team> teams;
  const auto add = [&](const std::string& name, std::unique_ptr<Device> own, std::shared_ptr<Blas> lent = nullptr) {
    Backend& used = own ? *own : *this;
    Context context = cuda::context(device_, lent ? lent->get() : nullptr);
    require(adalora_context_prepare(context.get(), used.waiting_stream()));
    teams.push_back({name, std::move(own), std::move(lent), std::move(context)});
  };
  add("a_stream", nullptr);
  if (captures_) {
    add("calls_that_run_at_once", std::make_unique<Device>("cuda"));
    return teams;
  }
  add("another_stream", std::make_unique<Device>("cuda"));
  add("the_default_stream", std::make_unique<Device>("cuda", nullptr));
  add("a_lent_handle", nullptr, std::make_shared<Blas>());
  add("another_thread", std::make_unique<Device>("cuda"));
  teams.back().on_another_thread = true;
  return teams;
}

void* Device::stream() {
  if (captures_ && !capture_began_) {
    begin_capture(stream_);
    capture_began_ = true;
  }
  return stream_;
}

void* Device::waiting_stream() {
  run_captured();
  return stream_;
}

double Device::tolerance_of_products(adalora_dtype_t activation, adalora_dtype_t param, int32_t terms) const {
  if (size_of(activation) != 2) return tolerance(param);
  // What is left of a factor after so many terms, and the products of the small terms.
  return 2 * std::pow(roundoff(activation), terms != 0 ? terms : 2) + tolerance(param);
}

void* Device::allocate(size_t bytes) {
  run_captured();
  const On on(device_);
  void* memory = nullptr;
  call<void**, size_t>("cudaMalloc", &memory, std::max<size_t>(bytes, 1));
  return memory;
}

void Device::release(void* memory) {
  run_captured();
  const On on(device_);
  call<void*>("cudaFree", memory);
}

void Device::fill(void* to, unsigned char byte, size_t bytes) {
  run_captured();
  const On on(device_);
  call<void*, int, size_t, void*>("cudaMemsetAsync", to, byte, bytes, stream_);
  synchronize(stream_);
}

void Device::upload(void* to, const void* from, size_t bytes) {
  run_captured();
  const On on(device_);
  call<void*, const void*, size_t, int, void*>("cudaMemcpyAsync", to, from, bytes, to_device, stream_);
  synchronize(stream_);
}

void Device::download(void* to, const void* from, size_t bytes) {
  run_captured();
  const On on(device_);
  call<void*, const void*, size_t, int, void*>("cudaMemcpyAsync", to, from, bytes, to_host, stream_);
  synchronize(stream_);
}

void Device::run_captured() {
  if (!std::exchange(capture_began_, false)) return;
  const Graph graph(stream_);
  graph.launch(stream_);
  synchronize(stream_);
}

namespace software {

// As it is declared; found where it is, since nothing is linked.
template <class Function>
Function* function(const char* name) {
  return reinterpret_cast<Function*>(symbol(name));
}

bool is_there() { return wanted() && exported("software_cuda_calls") != nullptr; }

int64_t calls(const char* name) {
  if (name == nullptr) return function<decltype(software_cuda_calls)>("software_cuda_calls")();
  return function<decltype(software_cuda_calls_of)>("software_cuda_calls_of")(name);
}

void fail(int64_t n) { function<decltype(software_cuda_fail_call)>("software_cuda_fail_call")(n); }

std::string failed() { return function<decltype(software_cuda_failed_call)>("software_cuda_failed_call")(); }

void driver(int version) { function<decltype(software_cuda_driver)>("software_cuda_driver")(version); }

std::vector<int64_t> living() {
  std::vector<int64_t> all;
  for (int kind : {SOFTWARE_CUDA_ALLOCATIONS, SOFTWARE_CUDA_STREAMS, SOFTWARE_CUDA_EVENTS,
                   SOFTWARE_CUDA_RETAINED_CONTEXTS, SOFTWARE_CUDA_MODULES, SOFTWARE_CUDA_HANDLES})
    all.push_back(function<decltype(software_cuda_live)>("software_cuda_live")(kind));
  return all;
}

}  // namespace software

}  // namespace support::cuda
