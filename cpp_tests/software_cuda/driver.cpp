// The driver's functions.
#include <cctype>
#include <cstdio>
#include <cstring>

#include "core.hpp"

namespace software_cuda {
namespace {

Context& device(int number) {
  State& all = state();
  if (number < 0 || size_t(number) >= all.contexts.size())
    refuse(cudaErrorInvalidDevice, "device " + std::to_string(number));
  return *all.contexts[size_t(number)];
}

// A kernel of the image; parameter_bytes is 0 where the text does not say it as expected.
struct Entry {
  std::string name;
  size_t parameter_bytes;
};

// What PTX says of its kernels.
std::vector<Entry> entries_of(const std::string& image) {
  std::vector<Entry> entries;
  const std::string word = ".entry";
  for (size_t at = image.find(word); at != std::string::npos; at = image.find(word, at)) {
    at += word.size();
    while (at < image.size() && isspace(static_cast<unsigned char>(image[at])) != 0) ++at;
    size_t end = at;
    while (end < image.size() &&
           (isalnum(static_cast<unsigned char>(image[end])) != 0 || image[end] == '_' || image[end] == '$'))
      ++end;
    Entry entry{image.substr(at, end - at), 0};
    const std::string parameters = image.substr(end, image.find(')', end) - end);
    const size_t size = parameters.find('[');
    if (size != std::string::npos && parameters.find(".param") == parameters.rfind(".param"))
      entry.parameter_bytes = std::stoul(parameters.substr(size + 1));
    entries.push_back(entry);
    at = end;
  }
  return entries;
}

void load(CUmod_st& module, const std::string& image, const std::vector<KernelInfo>& kernels) {
  for (const char* part : {".version", ".target", ".address_size 64"})
    if (image.find(part) == std::string::npos)
      refuse(cudaErrorInvalidKernelImage, std::string("the image is not PTX: it lacks ") + part);
  for (const Entry& entry : entries_of(image)) {
    size_t number = 0;
    while (number < kernels.size() && kernels[number].name != entry.name) ++number;
    if (number == kernels.size()) refuse(cudaErrorInvalidPtx, "the device program has no kernel " + entry.name);
    if (entry.parameter_bytes != 0 && entry.parameter_bytes != kernels[number].argument_bytes)
      refuse(cudaErrorInvalidPtx, entry.name + " takes " + std::to_string(entry.parameter_bytes) +
                                      " bytes in PTX and " + std::to_string(kernels[number].argument_bytes) +
                                      " in the device program");
    module.functions[entry.name] = std::make_unique<CUfunc_st>(CUfunc_st{module.context, number, &module});
  }
}

CUfunc_st& known_function(Context& context, CUfunction function) {
  for (const auto& [handle, module] : context.modules)
    for (const auto& [name, other] : module->functions)
      if (other.get() == function) return *function;
  refuse(cudaErrorInvalidResourceHandle, "not a function of a module of the current context");
}

void launch(CUfunction function, const unsigned (&grid)[3], const unsigned (&block)[3], unsigned shared_bytes,
            cudaStream_t stream_handle, void** params, void** extra) {
  Context& context = needs_current();
  known_function(context, function);
  const KernelInfo& kernel = context.process->kernels()[function->number];
  const std::string name = kernel.name;
  const cudaStream_t stream = find_stream(context, stream_handle);
  if (!function->loaded) forbid_in_capture(name + ": loading its code, which a first launch does");
  function->loaded = true;
  const auto triple = [](const unsigned (&t)[3]) {
    return "[" + std::to_string(t[0]) + ", " + std::to_string(t[1]) + ", " + std::to_string(t[2]) + "]";
  };
  if (uint64_t(grid[0]) * grid[1] * grid[2] == 0 || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535)
    refuse(cudaErrorInvalidValue, name + ": a grid of " + triple(grid));
  if (uint64_t(block[0]) * block[1] * block[2] == 0 || block[0] > 1024 || block[1] > 1024 || block[2] > 64)
    refuse(cudaErrorInvalidValue, name + ": blocks of " + triple(block));
  if (uint64_t(block[0]) * block[1] * block[2] > 256)
    refuse(cudaErrorLaunchOutOfResources,
           name + ": blocks of " + triple(block) + ", beyond its __launch_bounds__(256)");
  if (shared_bytes != 0) refuse(cudaErrorInvalidValue, name + ": dynamic shared memory is not modelled");
  if (extra != nullptr) refuse(cudaErrorNotSupported, name + ": extra is not modelled");
  if (params == nullptr || params[0] == nullptr) refuse(cudaErrorInvalidValue, name + ": no parameters");

  const char* first = static_cast<const char*>(params[0]);
  const std::vector<char> args(first, first + kernel.argument_bytes);
  const uint32_t number = uint32_t(function->number);
  const CUmodule module = function->module;
  const uint32_t g[3] = {grid[0], grid[1], grid[2]}, b[3] = {block[0], block[1], block[2]};
  protocol::Kernel record{number, {g[0], g[1], g[2]}, {b[0], b[1], b[2]}, 0, 0};
  context.enqueue(stream, name, [=](Context& on) {
    if (on.modules.count(module) == 0)
      return on.fail(cudaErrorIllegalAddress, name + ": its module was unloaded before it ran");
    protocol::Kernel now = record;
    now.seed = random_below(uint64_t(1) << 40);
    on.process->send(protocol::Command::kernel, now, name, args.data(), args.size());
  });
}

}  // namespace
}  // namespace software_cuda

using namespace software_cuda;

extern "C" {

int cuDeviceGet(CUdevice* number, int ordinal) {
  return guarded("cuDeviceGet", cudaErrorInitializationError, [&] { *number = device(ordinal).device; });
}

int cuDeviceGetName(char* name, int length, CUdevice number) {
  return guarded("cuDeviceGetName", cudaErrorInitializationError, [&] {
    if (length <= 0) refuse(cudaErrorInvalidValue, "no room");
    snprintf(name, size_t(length), "Software CUDA device %d", device(number).device);
  });
}

int cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice number) {
  return guarded("cuDevicePrimaryCtxRetain", cudaErrorMemoryAllocation, [&] {
    Context& primary = device(number);
    primary.check();
    primary.start();
    ++primary.retained;
    *context = reinterpret_cast<CUcontext>(&primary);
  });
}

int cuDevicePrimaryCtxRelease_v2(CUdevice number) {
  return guarded("cuDevicePrimaryCtxRelease", cudaErrorDeviceUninitialized, [&] {
    Context& primary = device(number);
    if (primary.retained == 0) refuse(cudaErrorDeviceUninitialized, "the context is not retained");
    --primary.retained;
    if (!primary.alive()) primary.destroy();
  });
}

int cuCtxPushCurrent_v2(CUcontext handle) {
  return guarded("cuCtxPushCurrent", cudaErrorDeviceUninitialized, [&] {
    for (const auto& context : state().contexts)
      if (reinterpret_cast<CUcontext>(context.get()) == handle && context->alive())
        return context_stack().push_back(context.get());
    refuse(cudaErrorDeviceUninitialized, "not a live context");
  });
}

int cuCtxPopCurrent_v2(CUcontext* handle) {
  return guarded("cuCtxPopCurrent", cudaErrorDeviceUninitialized, [&] {
    Context* context = current();
    if (context == nullptr) refuse(cudaErrorDeviceUninitialized, "no context is current on this thread");
    context_stack().pop_back();
    if (handle != nullptr) *handle = reinterpret_cast<CUcontext>(context);
  });
}

int cuModuleLoadData(CUmodule* handle, const void* image) {
  return guarded("cuModuleLoadData", cudaErrorMemoryAllocation, [&] {
    forbid_in_capture("loading a module");
    Context& context = needs_current();
    auto module = std::make_unique<CUmod_st>();
    module->context = &context;
    load(*module, static_cast<const char*>(image), context.process->kernels());
    *handle = module.get();
    context.modules[module.get()] = std::move(module);
  });
}

int cuModuleUnload(CUmodule module) {
  return guarded("cuModuleUnload", cudaErrorUnknown, [&] {
    forbid_in_capture("unloading a module");
    Context& context = needs_current();
    find_in(context.modules, module, "module");
    context.settle_all();
    context.modules.erase(module);
    context.check();
  });
}

int cuModuleGetFunction(CUfunction* function, CUmodule handle, const char* name) {
  return guarded("cuModuleGetFunction", cudaErrorSymbolNotFound, [&] {
    Context& context = needs_current();
    const CUmod_st& module = find_in(context.modules, handle, "module");
    const auto found = module.functions.find(name);
    if (found == module.functions.end()) refuse(cudaErrorSymbolNotFound, std::string("the PTX has no kernel ") + name);
    *function = found->second.get();
  });
}

int cuFuncLoad(CUfunction function) {
  return guarded("cuFuncLoad", cudaErrorMemoryAllocation, [&] {
    forbid_in_capture("loading a kernel's code");
    known_function(needs_current(), function).loaded = true;
  });
}

int cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, cudaStream_t stream, void** params,
                   void** extra) {
  return guarded("cuLaunchKernel", cudaErrorLaunchOutOfResources, [&] {
    launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream, params, extra);
  });
}
}
