// The runtime's functions, but for streams.
#include "runtime.hpp"

#include <cstring>

#include "core.hpp"

namespace software_cuda {

int& last_error() {
  thread_local int last = 0;
  return last;
}

namespace {

uint64_t address_of(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

struct CopyArguments {
  const void* from;
  size_t from_pitch;
  void* to;
  size_t to_pitch, width, rows;
  int kind;
};

uint64_t extent(size_t pitch, size_t width, size_t rows) { return (rows - 1) * pitch + width; }

void refuse_in_capture(cudaStream_t stream, const std::string& what) {
  if (stream->capture == nullptr) return;
  invalidate(*stream->capture);
  refuse(cudaErrorStreamCaptureUnsupported, what + " while the stream captures");
}

void enqueue_fill(Context& context, cudaStream_t stream, const std::string& name, const protocol::Fill& record) {
  const uint64_t bytes = extent(record.pitch, record.width, record.rows);
  context.enqueue(stream, name, [=](Context& on) {
    if (on.owns(name, "the destination", record.address, bytes))
      on.process->send(protocol::Command::fill, record, name);
  });
}

void copy(const std::string& name, const CopyArguments& args, cudaStream_t handle) {
  Context& context = runtime_context();
  const cudaStream_t stream = find_stream(context, handle);
  const bool from_device = is_device_address(args.from), to_device = is_device_address(args.to);
  const int kind = to_device ? (from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice)
                             : (from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost);
  if (args.kind < cudaMemcpyHostToHost || args.kind > cudaMemcpyDefault)
    refuse(cudaErrorInvalidMemcpyDirection, "kind " + std::to_string(args.kind));
  if (args.width > args.from_pitch || args.width > args.to_pitch)
    refuse(cudaErrorInvalidPitchValue, "a width of " + std::to_string(args.width) + " with pitches of " +
                                           std::to_string(args.from_pitch) + " and " + std::to_string(args.to_pitch));
  if (args.width == 0 || args.rows == 0) return;
  if (args.kind != cudaMemcpyDefault && args.kind != kind)
    refuse(cudaErrorInvalidValue,
           "kind " + std::to_string(args.kind) + " for pointers of kind " + std::to_string(kind));
  if (args.from == nullptr || args.to == nullptr) refuse(cudaErrorInvalidValue, "a null pointer");

  const uint64_t from = address_of(args.from), to = address_of(args.to);
  const uint64_t from_bytes = extent(args.from_pitch, args.width, args.rows);
  const uint64_t to_bytes = extent(args.to_pitch, args.width, args.rows);
  switch (kind) {
    case cudaMemcpyDeviceToDevice: {
      if (args.rows == 1 && from < to + to_bytes && to < from + from_bytes && from != to)
        refuse(cudaErrorInvalidValue, "source and destination overlap");
      const protocol::Copy record{from, args.from_pitch, to, args.to_pitch, args.width, args.rows};
      context.enqueue(stream, name, [=](Context& on) {
        if (on.owns(name, "the source", from, from_bytes) && on.owns(name, "the destination", to, to_bytes))
          on.process->send(protocol::Command::copy, record, name);
      });
      return;
    }
    case cudaMemcpyHostToDevice: {
      refuse_in_capture(stream, "a copy from pageable memory");
      // Pageable memory is staged by the call; a large one of equal bytes costs less as a fill.
      const char* first = static_cast<const char*>(args.from);
      if (args.rows == 1 && args.width > 1 << 16 && memcmp(first, first + 1, args.width - 1) == 0)
        return enqueue_fill(context, stream, name, {to, args.width, args.width, 1, uint32_t(*first & 0xff), 0});
      const auto staged = std::make_shared<std::vector<char>>(args.width * args.rows);
      for (size_t row = 0; row < args.rows; ++row)
        memcpy(staged->data() + row * args.width, static_cast<const char*>(args.from) + row * args.from_pitch,
               args.width);
      const protocol::Write record{to, args.to_pitch, args.width, args.rows};
      context.enqueue(stream, name, [=](Context& on) {
        if (on.owns(name, "the destination", to, to_bytes))
          on.process->send(protocol::Command::write, record, name, staged->data(), staged->size());
      });
      return;
    }
    case cudaMemcpyDeviceToHost: {
      refuse_in_capture(stream, "a copy to pageable memory");
      const OperationRef done = context.enqueue(stream, name, [=](Context& on) {
        if (!on.owns(name, "the source", from, from_bytes)) return;
        std::string words;
        const protocol::Read record{from, args.from_pitch, args.width, args.rows};
        const int failed = on.process->read(record, name, args.to, args.to_pitch, words);
        if (failed != 0) on.fail(failed, words);
      });
      context.settle({done});
      context.check();
      return;
    }
    default:
      refuse(cudaErrorNotSupported, "a copy from host to host is not modelled");
  }
}

void fill(const std::string& name, void* pointer, size_t pitch, int value, size_t width, size_t rows,
          cudaStream_t handle) {
  Context& context = runtime_context();
  const cudaStream_t stream = find_stream(context, handle);
  if (width > pitch)
    refuse(cudaErrorInvalidPitchValue,
           "a width of " + std::to_string(width) + " with a pitch of " + std::to_string(pitch));
  if (width == 0 || rows == 0) return;
  if (!is_device_address(pointer)) refuse(cudaErrorInvalidValue, "not a device's memory");
  enqueue_fill(context, stream, name, {address_of(pointer), pitch, width, rows, uint32_t(value & 0xff), 0});
}

int attribute_value(int attribute) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      return 1024;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 48 << 10;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrMultiProcessorCount:
      return 4;
    case cudaDevAttrL2CacheSize:
      return 4 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrComputeCapabilityMajor:
      return 8;
    case cudaDevAttrComputeCapabilityMinor:
      return 0;
    default:
      refuse(cudaErrorInvalidValue, "attribute " + std::to_string(attribute) + " is not modelled");
  }
}

Context& device(int number) {
  State& all = state();
  if (number < 0 || size_t(number) >= all.contexts.size())
    refuse(cudaErrorInvalidDevice, "device " + std::to_string(number));
  return *all.contexts[size_t(number)];
}

struct EntryPoint {
  const char* name;
  void* function;
  int since = 0;  // The driver that it came with.
};
const EntryPoint entry_points[] = {
    {"cuDeviceGet", reinterpret_cast<void*>(cuDeviceGet)},
    {"cuDeviceGetName", reinterpret_cast<void*>(cuDeviceGetName)},
    {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(cuDevicePrimaryCtxRetain)},
    {"cuDevicePrimaryCtxRelease", reinterpret_cast<void*>(cuDevicePrimaryCtxRelease_v2)},
    {"cuCtxPushCurrent", reinterpret_cast<void*>(cuCtxPushCurrent_v2)},
    {"cuCtxPopCurrent", reinterpret_cast<void*>(cuCtxPopCurrent_v2)},
    {"cuModuleLoadData", reinterpret_cast<void*>(cuModuleLoadData)},
    {"cuModuleUnload", reinterpret_cast<void*>(cuModuleUnload)},
    {"cuModuleGetFunction", reinterpret_cast<void*>(cuModuleGetFunction)},
    {"cuFuncLoad", reinterpret_cast<void*>(cuFuncLoad), 12040},
    {"cuLaunchKernel", reinterpret_cast<void*>(cuLaunchKernel)},
    {"cuGetErrorName", reinterpret_cast<void*>(cuGetErrorName)},
    {"cuGetErrorString", reinterpret_cast<void*>(cuGetErrorString)},
};

}  // namespace
}  // namespace software_cuda

using namespace software_cuda;

extern "C" {

int cudaGetDeviceCount(int* count) {
  return runtime("cudaGetDeviceCount", cudaErrorInitializationError, [&] { *count = int(state().contexts.size()); });
}

int cudaDriverGetVersion(int* version) {
  return runtime("cudaDriverGetVersion", cudaErrorInvalidValue, [&] { *version = state().driver; });
}

int cudaRuntimeGetVersion(int* version) {
  return runtime("cudaRuntimeGetVersion", cudaErrorInvalidValue, [&] { *version = 13000; });
}

int cudaDeviceGetAttribute(int* value, int attribute, int number) {
  return runtime("cudaDeviceGetAttribute", cudaErrorInvalidValue, [&] {
    device(number);
    *value = attribute_value(attribute);
  });
}

int cudaGetLastError() {
  const int last = cudaPeekAtLastError();
  last_error() = 0;
  return last;
}

int cudaPeekAtLastError() {
  const std::lock_guard<std::recursive_mutex> lock(state().mutex);
  const Context* context = current();
  return context != nullptr && context->error != 0 ? context->error : last_error();
}

int cudaGetDevice(int* number) {
  return runtime("cudaGetDevice", cudaErrorInitializationError,
                 [&] { *number = current() != nullptr ? current()->device : runtime_device(); });
}

int cudaSetDevice(int number) {
  return runtime("cudaSetDevice", cudaErrorInitializationError, [&] {
    Context& context = device(number);
    context.runtime_uses = true;
    runtime_device() = number;
    if (context_stack().empty())
      context_stack().push_back(&context);
    else
      context_stack().back() = &context;
    context.check();
  });
}

int cudaDeviceSynchronize() {
  return runtime("cudaDeviceSynchronize", cudaErrorLaunchFailure, [&] {
    Context& context = runtime_context();
    for (const auto& capture : state().captures)
      if (capture->context == &context) {
        invalidate(*capture);
        refuse(cudaErrorStreamCaptureUnsupported, "waiting for a device on which a stream captures");
      }
    context.settle_all();
    context.check();
  });
}

// Base names alone, as the driver has it.
int cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long flags, int* status) {
  return runtime("cudaGetDriverEntryPoint", cudaErrorInvalidValue, [&] {
    if (flags > 2) refuse(cudaErrorInvalidValue, "flags " + std::to_string(flags));
    *function = nullptr;
    for (const EntryPoint& point : entry_points)
      if (strcmp(point.name, symbol) == 0 && point.since <= state().driver) *function = point.function;
    if (*function == nullptr) tell("cudaGetDriverEntryPoint: no function has the base name " + std::string(symbol));
    if (status != nullptr) *status = *function == nullptr ? 1 : 0;
  });
}

int cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  return runtime("cudaPointerGetAttributes", cudaErrorInvalidValue, [&] {
    *attributes = {};
    attributes->device = -2;
    for (const auto& context : state().contexts)
      if (context->find(address_of(pointer)) != nullptr) {
        attributes->type = cudaMemoryTypeDevice;
        attributes->device = context->device;
        attributes->devicePointer = const_cast<void*>(pointer);
      }
    if (attributes->type == cudaMemoryTypeUnregistered && is_device_address(pointer))
      refuse(cudaErrorInvalidValue, hexadecimal(address_of(pointer)) + " is in no live allocation");
  });
}

int cudaMalloc(void** memory, size_t bytes) {
  return runtime("cudaMalloc", cudaErrorMemoryAllocation, [&] {
    forbid_in_capture("cudaMalloc");
    Context& context = runtime_context();
    *memory = nullptr;
    if (bytes > 0) *memory = reinterpret_cast<void*>(context.allocate(bytes));
  });
}

int cudaFree(void* memory) {
  return runtime("cudaFree", cudaErrorUnknown, [&] {
    forbid_in_capture("cudaFree");
    runtime_context();
    if (memory == nullptr) return;
    const uint64_t address = address_of(memory);
    for (const auto& context : state().contexts)
      if (address - context->window < context->window_bytes) return context->release(address);
    refuse(cudaErrorInvalidValue, "not a device's memory");
  });
}

int cudaMemcpy(void* to, const void* from, size_t bytes, int kind) {
  return runtime("cudaMemcpy", cudaErrorUnknown, [&] {
    forbid_in_capture("cudaMemcpy");
    copy("cudaMemcpy", {from, bytes, to, bytes, bytes, 1, kind}, nullptr);
  });
}

int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, cudaStream_t stream) {
  return runtime("cudaMemcpyAsync", cudaErrorUnknown,
                 [&] { copy("cudaMemcpyAsync", {from, bytes, to, bytes, bytes, 1, kind}, stream); });
}

int cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width, size_t height,
                      int kind, cudaStream_t stream) {
  return runtime("cudaMemcpy2DAsync", cudaErrorUnknown,
                 [&] { copy("cudaMemcpy2DAsync", {from, from_pitch, to, to_pitch, width, height, kind}, stream); });
}

int cudaMemset(void* to, int value, size_t bytes) {
  return runtime("cudaMemset", cudaErrorUnknown, [&] {
    forbid_in_capture("cudaMemset");
    fill("cudaMemset", to, bytes, value, bytes, 1, nullptr);
  });
}

int cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return runtime("cudaMemsetAsync", cudaErrorUnknown,
                 [&] { fill("cudaMemsetAsync", to, bytes, value, bytes, 1, stream); });
}

int cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream) {
  return runtime("cudaMemset2DAsync", cudaErrorUnknown,
                 [&] { fill("cudaMemset2DAsync", to, pitch, value, width, height, stream); });
}
}
