// cuBLAS: column-major matrices, products in stream order, in the caller's workspace.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>

#include "core.hpp"

namespace software_cuda {
namespace {

using protocol::Element;
using protocol::Rounding;

struct Status {
  int status;
  std::string words;
};

[[noreturn]] void reject(int status, const std::string& words) { throw Status{status, words}; }

template <class Body>
int blas(const char* name, int injected, Body body) {
  int status = 0;
  const int error = guarded(name, -1, [&] {
    try {
      body();
    } catch (const Status& rejected) {
      status = rejected.status;
      if (!rejected.words.empty()) tell(std::string(name) + ": " + rejected.words + ": " + cublasGetStatusName(status));
    }
  });
  if (error == -1) return injected;
  return error != 0 ? CUBLAS_STATUS_EXECUTION_FAILED : status;
}

cublasContext& find_handle(cublasHandle_t handle) {
  for (const auto& context : state().contexts) {
    const auto found = context->handles.find(handle);
    if (found != context->handles.end()) return *found->second;
  }
  reject(CUBLAS_STATUS_NOT_INITIALIZED, "not a live handle");
}

// A handle serves one thread at a time.
class Use {
 public:
  explicit Use(cublasHandle_t handle) {
    const std::lock_guard<std::recursive_mutex> lock(state().mutex);
    users_ = &users()[handle];
    alone_ = ++*users_ == 1;
  }
  ~Use() {
    const std::lock_guard<std::recursive_mutex> lock(state().mutex);
    --*users_;
  }
  void check() const {
    if (!alone_) reject(CUBLAS_STATUS_INTERNAL_ERROR, "the handle is used by two threads at once");
  }

 private:
  static std::map<cublasHandle_t, int>& users() {
    static std::map<cublasHandle_t, int>& all = *new std::map<cublasHandle_t, int>;
    return all;
  }

  int* users_;
  bool alone_;
};

template <class Body>
int with_handle(const char* name, cublasHandle_t handle, Body body) {
  const Use use(handle);
  std::this_thread::yield();  // another one has its chance to be noticed
  return blas(name, CUBLAS_STATUS_EXECUTION_FAILED, [&] {
    use.check();
    body(find_handle(handle));
  });
}

bool element_of(int type, Element& element) {
  switch (type) {
    case CUDA_R_64F:
      element = Element::float64;
      return true;
    case CUDA_R_32F:
      element = Element::float32;
      return true;
    case CUDA_R_16BF:
      element = Element::bfloat16;
      return true;
    case CUDA_R_16F:
      element = Element::float16;
      return true;
    default:
      return false;
  }
}
uint64_t size_of(Element element) { return element == Element::float64 ? 8 : element == Element::float32 ? 4 : 2; }

struct Product {
  int transa, transb;
  int64_t m, n, k;
  const void* alpha;
  const void* a;
  int a_type;
  int64_t lda;
  const void* b;
  int b_type;
  int64_t ldb;
  const void* beta;
  void* c;
  int c_type;
  int64_t ldc;
  int compute, algorithm;
};

// The pairs of types that cublasGemmEx lists, of those that are modelled.
void take_types(const Product& p, int math_mode, protocol::Gemm& g) {
  const auto refused = [&] {
    reject(CUBLAS_STATUS_NOT_SUPPORTED, "types " + std::to_string(p.a_type) + ", " + std::to_string(p.b_type) + ", " +
                                            std::to_string(p.c_type) + " with compute type " +
                                            std::to_string(p.compute));
  };
  if (!element_of(p.a_type, g.a.element) || !element_of(p.b_type, g.b.element) || !element_of(p.c_type, g.c.element))
    refused();
  if (g.a.element != g.b.element) refused();
  const bool singles = g.a.element == Element::float32 && g.c.element == Element::float32;
  g.rounding = Rounding::none;
  switch (p.compute) {
    case CUBLAS_COMPUTE_64F:
    case CUBLAS_COMPUTE_64F_PEDANTIC:
      if (g.a.element != Element::float64 || g.c.element != Element::float64) refused();
      g.is_double = 1;
      return;
    case CUBLAS_COMPUTE_32F:
      if (singles && (math_mode & 15) == CUBLAS_TF32_TENSOR_OP_MATH) g.rounding = Rounding::tf32;
      break;
    case CUBLAS_COMPUTE_32F_PEDANTIC:
      break;
    case CUBLAS_COMPUTE_32F_FAST_TF32:
      g.rounding = Rounding::tf32;
      break;
    case CUBLAS_COMPUTE_32F_FAST_16BF:
      g.rounding = Rounding::bfloat16;
      break;
    case CUBLAS_COMPUTE_32F_FAST_16F:
      g.rounding = Rounding::float16;
      break;
    default:
      refused();
  }
  if (p.compute != CUBLAS_COMPUTE_32F && p.compute != CUBLAS_COMPUTE_32F_PEDANTIC && !singles) refused();
  if (g.a.element == Element::float64 || g.c.element == Element::float64) refused();
  if (g.c.element != Element::float32 && g.c.element != g.a.element) refused();
  g.is_double = 0;
}

uint64_t extent(int64_t ld, int64_t rows, int64_t columns, Element element) {
  if (rows == 0 || columns == 0) return 0;
  return (uint64_t(columns - 1) * uint64_t(ld) + uint64_t(rows)) * size_of(element);
}

double scalar(const protocol::Gemm& g, const void* from) {
  if (g.is_double != 0) {
    double value;
    memcpy(&value, from, sizeof value);
    return value;
  }
  float value;
  memcpy(&value, from, sizeof value);
  return double(value);
}

struct Part {
  const char* what;
  uint64_t address, bytes, alignment;
};

// Leaves nothing of what was there, but for the middle of a large one.
void spoil(Context& on, const std::string& name, uint64_t address, uint64_t bytes) {
  constexpr uint64_t some = 64 << 10;
  const auto fill = [&](uint64_t at, uint64_t count) {
    on.process->send(protocol::Command::fill, protocol::Fill{at, count, count, 1, 0xff, 0}, name + "'s workspace");
  };
  if (bytes <= 4 * some) return fill(address, bytes);
  fill(address, some);
  fill(address + bytes - some, some);
  fill(address + random_below(bytes - some), some);
}

void multiply(const std::string& name, cublasContext& handle, const Product& p) {
  Context& context = *handle.context;
  if (current() != &context)
    reject(CUBLAS_STATUS_EXECUTION_FAILED,
           "the handle is of device " + std::to_string(context.device) + ", whose context is not current");
  context.check();
  const cudaStream_t stream = find_stream(context, handle.stream);
  const auto bad = [](const std::string& words) { reject(CUBLAS_STATUS_INVALID_VALUE, words); };

  for (int operation : {p.transa, p.transb})
    if (operation < CUBLAS_OP_N || operation > CUBLAS_OP_C) bad("operation " + std::to_string(operation));
  if (p.m < 0 || p.n < 0 || p.k < 0)
    bad("m, n, k of " + std::to_string(p.m) + ", " + std::to_string(p.n) + ", " + std::to_string(p.k));
  const bool is_algorithm = (p.algorithm >= -1 && p.algorithm <= 23) || (p.algorithm >= 99 && p.algorithm <= 115);
  if (!is_algorithm) bad("algorithm " + std::to_string(p.algorithm));
  protocol::Gemm g{};
  take_types(p, handle.math_mode, g);
  const int64_t a_rows = p.transa != CUBLAS_OP_N ? p.k : p.m, a_columns = p.transa != CUBLAS_OP_N ? p.m : p.k;
  const int64_t b_rows = p.transb != CUBLAS_OP_N ? p.n : p.k, b_columns = p.transb != CUBLAS_OP_N ? p.k : p.n;
  const auto leading = [&](const char* what, int64_t found, int64_t rows) {
    if (found < std::max<int64_t>(1, rows))
      bad(std::string(what) + " of " + std::to_string(found) + " for " + std::to_string(rows) + " rows");
  };
  leading("lda", p.lda, a_rows);
  leading("ldb", p.ldb, b_rows);
  leading("ldc", p.ldc, p.m);
  if (p.alpha == nullptr || p.beta == nullptr) bad("alpha or beta is null");
  const bool on_device = handle.pointer_mode == CUBLAS_POINTER_MODE_DEVICE;
  for (const void* at : {p.alpha, p.beta})
    if (is_device_address(at) != on_device)
      bad(std::string("alpha or beta is not in the ") + (on_device ? "device's" : "host's") +
          " memory, as the pointer mode says");
  if (p.m == 0 || p.n == 0) return;

  g.m = uint64_t(p.m);
  g.n = uint64_t(p.n);
  g.k = uint64_t(p.k);
  const auto place = [](protocol::Operand& operand, const void* at, int64_t stride, int operation) {
    operand.address = reinterpret_cast<uint64_t>(at);
    operand.stride = uint64_t(stride);
    operand.transposed = operation != CUBLAS_OP_N ? 1 : 0;
  };
  place(g.a, p.a, p.lda, p.transa);
  place(g.b, p.b, p.ldb, p.transb);
  place(g.c, p.c, p.ldc, CUBLAS_OP_N);
  if (on_device) {
    g.alpha_address = reinterpret_cast<uint64_t>(p.alpha);
    g.beta_address = reinterpret_cast<uint64_t>(p.beta);
  } else {
    g.alpha = scalar(g, p.alpha);
    g.beta = scalar(g, p.beta);
  }
  std::vector<Part> parts;
  if (on_device || g.alpha != 0.0) {
    parts.push_back({"A", g.a.address, extent(p.lda, a_rows, a_columns, g.a.element), size_of(g.a.element)});
    parts.push_back({"B", g.b.address, extent(p.ldb, b_rows, b_columns, g.b.element), size_of(g.b.element)});
  }
  const uint64_t c_bytes = extent(p.ldc, p.m, p.n, g.c.element);
  parts.push_back({"C", g.c.address, c_bytes, size_of(g.c.element)});
  for (uint64_t address : {g.alpha_address, g.beta_address})
    if (address != 0)
      parts.push_back({"alpha or beta", address, g.is_double != 0 ? 8u : 4u, g.is_double != 0 ? 8u : 4u});
  const auto meet = [](uint64_t at, uint64_t bytes, uint64_t other, uint64_t other_bytes) {
    return bytes > 0 && other_bytes > 0 && at < other + other_bytes && other < at + bytes;
  };
  const uint64_t workspace = handle.workspace, workspace_bytes = handle.workspace_bytes;
  for (const Part& part : parts) {
    if (part.bytes > 0 && part.address == 0) bad(std::string("operand ") + part.what + " is null");
    if (meet(part.address, part.bytes, workspace, workspace_bytes))
      bad(std::string("operand ") + part.what + " lies in the workspace");
    // Rows between those of C may be another operand's.
    if (part.address != g.c.address && p.ldc == p.m && meet(part.address, part.bytes, g.c.address, c_bytes))
      bad(std::string("operand ") + part.what + " and C overlap");
  }

  context.enqueue(stream, name, [=](Context& on) {
    for (const Part& part : parts) {
      if (!on.owns(name, part.what, part.address, part.bytes)) return;
      if (part.address % part.alignment != 0)
        return on.fail(cudaErrorMisalignedAddress, name + ": " + part.what + " at " + hexadecimal(part.address));
    }
    if (workspace_bytes > 0) {
      if (!on.owns(name, "the workspace", workspace, workspace_bytes)) return;
      spoil(on, name, workspace, workspace_bytes);
    }
    on.process->send(protocol::Command::gemm, g, name);
  });
}

}  // namespace
}  // namespace software_cuda

using namespace software_cuda;

extern "C" {

int cublasCreate_v2(cublasHandle_t* handle) {
  return blas("cublasCreate_v2", CUBLAS_STATUS_ALLOC_FAILED, [&] {
    *handle = nullptr;
    forbid_in_capture("cublasCreate_v2");
    Context& context = runtime_context();
    auto made = std::make_unique<cublasContext>();
    made->context = &context;
    *handle = made.get();
    context.handles[made.get()] = std::move(made);
  });
}

int cublasDestroy_v2(cublasHandle_t handle) {
  return with_handle("cublasDestroy_v2", handle, [](cublasContext& found) {
    forbid_in_capture("cublasDestroy_v2");
    Context& context = *found.context;
    context.settle_all();
    context.handles.erase(&found);
    context.check();
  });
}

int cublasGetProperty(int property, int* value) {
  return blas("cublasGetProperty", CUBLAS_STATUS_INTERNAL_ERROR, [&] {
    if (property < MAJOR_VERSION || property > PATCH_LEVEL)
      reject(CUBLAS_STATUS_INVALID_VALUE, "property " + std::to_string(property));
    *value = property == MAJOR_VERSION ? 13 : 0;
  });
}

// The workspace is cuBLAS's own again.
int cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  return with_handle("cublasSetStream_v2", handle, [&](cublasContext& found) {
    find_stream(*found.context, stream);
    found.stream = stream;
    found.workspace = found.workspace_bytes = 0;
  });
}

int cublasGetStream_v2(cublasHandle_t handle, cudaStream_t* stream) {
  return with_handle("cublasGetStream_v2", handle, [&](cublasContext& found) { *stream = found.stream; });
}

int cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes) {
  return with_handle("cublasSetWorkspace_v2", handle, [&](cublasContext& found) {
    const uint64_t address = reinterpret_cast<uint64_t>(workspace);
    if (address % 256 != 0) reject(CUBLAS_STATUS_INVALID_VALUE, hexadecimal(address) + " is not aligned to 256 bytes");
    if (bytes > 0) {
      const Allocation* allocation = found.context->find(address);
      if (allocation == nullptr || bytes > allocation->address + allocation->bytes - address)
        reject(CUBLAS_STATUS_INVALID_VALUE,
               std::to_string(bytes) + " bytes from " + hexadecimal(address) + " are not within a live allocation");
    }
    found.workspace = address;
    found.workspace_bytes = bytes;
  });
}

int cublasSetMathMode(cublasHandle_t handle, int mode) {
  return with_handle("cublasSetMathMode", handle, [&](cublasContext& found) {
    const int base = mode & ~CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    if (base < CUBLAS_DEFAULT_MATH || base > CUBLAS_TF32_TENSOR_OP_MATH)
      reject(CUBLAS_STATUS_INVALID_VALUE, "mode " + std::to_string(mode));
    found.math_mode = mode;
  });
}

int cublasGetMathMode(cublasHandle_t handle, int* mode) {
  return with_handle("cublasGetMathMode", handle, [&](cublasContext& found) { *mode = found.math_mode; });
}

int cublasSetPointerMode_v2(cublasHandle_t handle, int mode) {
  return with_handle("cublasSetPointerMode_v2", handle, [&](cublasContext& found) {
    if (mode != CUBLAS_POINTER_MODE_HOST && mode != CUBLAS_POINTER_MODE_DEVICE)
      reject(CUBLAS_STATUS_INVALID_VALUE, "mode " + std::to_string(mode));
    found.pointer_mode = mode;
  });
}

int cublasGetPointerMode_v2(cublasHandle_t handle, int* mode) {
  return with_handle("cublasGetPointerMode_v2", handle, [&](cublasContext& found) { *mode = found.pointer_mode; });
}

int cublasGemmEx(cublasHandle_t handle, int transa, int transb, int m, int n, int k, const void* alpha, const void* a,
                 int a_type, int lda, const void* b, int b_type, int ldb, const void* beta, void* c, int c_type,
                 int ldc, int compute, int algorithm) {
  return with_handle("cublasGemmEx", handle, [&](cublasContext& found) {
    multiply(
        "cublasGemmEx", found,
        {transa, transb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algorithm});
  });
}

int cublasGemmEx_64(cublasHandle_t handle, int transa, int transb, int64_t m, int64_t n, int64_t k, const void* alpha,
                    const void* a, int a_type, int64_t lda, const void* b, int b_type, int64_t ldb, const void* beta,
                    void* c, int c_type, int64_t ldc, int compute, int algorithm) {
  return with_handle("cublasGemmEx_64", handle, [&](cublasContext& found) {
    multiply(
        "cublasGemmEx_64", found,
        {transa, transb, m, n, k, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algorithm});
  });
}

const char* cublasGetStatusName(int status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED:
      return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_ARCH_MISMATCH:
      return "CUBLAS_STATUS_ARCH_MISMATCH";
    case CUBLAS_STATUS_MAPPING_ERROR:
      return "CUBLAS_STATUS_MAPPING_ERROR";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case CUBLAS_STATUS_INTERNAL_ERROR:
      return "CUBLAS_STATUS_INTERNAL_ERROR";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
      return "CUBLAS_UNKNOWN";
  }
}
}
