// What the tests need of a backend: a column of the table of operation tests.
#pragma once

#include <adalora.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace support {

struct ContextDeleter {
  void operator()(adalora_context_t* context) const { adalora_context_destroy(context); }
};
struct AdapterDeleter {
  void operator()(adalora_adapter_t* adapter) const { adalora_adapter_destroy(adapter); }
};
struct AllocatorDeleter {
  void operator()(adalora_allocator_t* allocator) const { adalora_allocator_destroy(allocator); }
};
using Context = std::unique_ptr<adalora_context_t, ContextDeleter>;
using Adapter = std::unique_ptr<adalora_adapter_t, AdapterDeleter>;
using Allocator = std::unique_ptr<adalora_allocator_t, AllocatorDeleter>;

// A context on the host's processor; throws what the library says where it refuses.
Context cpu_context(int32_t threads, adalora_parallel_fn parallel = nullptr);

// Throws the library's text where a call that should succeed did not.
void require(adalora_status_t status);

struct Team;

class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string name() const = 0;
  virtual adalora_context_t* context() = 0;
  virtual std::vector<Team> teams() = 0;

  // For a call that only enqueues.
  virtual void* stream() = 0;
  // For a call that may wait.
  virtual void* waiting_stream() { return stream(); }

  // By how much of itself an operand or an operation of a product with activations may be off, where float32 parameters
  // are multiplied in `terms` terms of half precision.
  virtual double tolerance_of_products(adalora_dtype_t activation, adalora_dtype_t param, int32_t terms) const = 0;

  // Memory of the backend, aligned to 64 bytes.
  virtual void* allocate(size_t bytes) = 0;
  virtual void release(void* memory) = 0;

  // All three wait until the bytes are there.
  virtual void fill(void* to, unsigned char byte, size_t bytes) = 0;
  virtual void upload(void* to, const void* from, size_t bytes) = 0;
  virtual void download(void* to, const void* from, size_t bytes) = 0;
};

// One way of spreading the work; all of a backend's must give the same bits.
struct Team {
  std::string name;
  std::unique_ptr<Backend> own = nullptr;  // whose stream and memory it uses; NULL: those of the backend
  std::shared_ptr<void> lent = nullptr;    // what the context uses of the caller's
  Context context = nullptr;
  bool on_another_thread = false;
};

// Every backend that this machine has.
const std::vector<Backend*>& backends();

// The backend whose memory the host reads: for tests of what is not arithmetic.
Backend& host();

}  // namespace support
