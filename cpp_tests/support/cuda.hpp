// The trainer's side of CUDA. Nothing is linked: the functions come from the very libraries that the library under test
// has bound to, so that one program runs on software CUDA and on a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "backend.hpp"

namespace support::cuda {

// Whether this run is to test CUDA: ADALORA_CUDA_FOLDER names the folder of its libraries, or ADALORA_TEST_CUDA is 1
// and they are where the library finds them by itself.
bool wanted();

// A context on a device; `cublas` is a handle to lend, or NULL.
Context context(int32_t device = 0, void* cublas = nullptr, bool tf32 = false);

// A function of the runtime, the driver or cuBLAS; throws where there is none of the name.
void* symbol(const char* name);

// Calls a function that has these parameters; throws the error's name.
void check(const char* name, int status);
template <class... Parameters>
void call(const char* name, Parameters... arguments) {
  check(name, reinterpret_cast<int (*)(Parameters...)>(symbol(name))(arguments...));
}

int32_t devices();
int32_t current_device();
void set_device(int32_t device);
// The driver's current context of this thread; NULL: none.
void* current_context();

class Stream {
 public:
  enum Kind { non_blocking, blocking };
  explicit Stream(Kind kind = non_blocking, int32_t device = 0);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream();
  void* get() const { return stream_; }

 private:
  int32_t device_;
  void* stream_ = nullptr;
};

void synchronize(void* stream);

// From here on, what is enqueued in the stream is recorded and not run.
void begin_capture(void* stream);

// What was recorded, to be launched as often as wanted.
class Graph {
 public:
  // Ends the capture.
  explicit Graph(void* stream);
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph();
  void launch(void* stream) const;

 private:
  void* executable_ = nullptr;
};

class Blas {
 public:
  Blas();
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;
  ~Blas();
  void* get() const { return handle_; }

 private:
  void* handle_ = nullptr;
};

enum class Capturing { no, everything };

// Device memory, a context and a stream. With `Capturing::everything` whatever is enqueued between two reads or writes
// of memory is captured into one graph, which is launched then.
class Device final : public Backend {
 public:
  explicit Device(std::string name, Capturing capturing = Capturing::no, int32_t device = 0);
  // Uses a stream that is given, such as NULL for the default one.
  Device(std::string name, void* stream);

  std::string name() const override { return name_; }
  adalora_context_t* context() override { return context_.get(); }
  std::vector<Team> teams() override;
  void* stream() override;
  void* waiting_stream() override;
  double tolerance_of_products(adalora_dtype_t activation, adalora_dtype_t param, int32_t terms) const override;
  void* allocate(size_t bytes) override;
  void release(void* memory) override;
  void fill(void* to, unsigned char byte, size_t bytes) override;
  void upload(void* to, const void* from, size_t bytes) override;
  void download(void* to, const void* from, size_t bytes) override;

 private:
  void run_captured();

  std::string name_;
  int32_t device_ = 0;
  Context context_;
  std::unique_ptr<Stream> own_;
  void* stream_ = nullptr;
  bool captures_ = false, capture_began_ = false;
};

// What software CUDA counts, and can make fail (software_cuda/software_cuda.hpp); nothing of it is there on a GPU.
namespace software {
bool is_there();
// How often a function was called so far; NULL: all together.
int64_t calls(const char* name = nullptr);
// The n-th call from now fails once, doing nothing; 0: none.
void fail(int64_t n);
// The function whose call was made to fail since; empty: it has not come.
std::string failed();
// As CUDA counts versions.
void driver(int version);
// How many there are of each kind of object.
std::vector<int64_t> living();
}  // namespace software

}  // namespace support::cuda
