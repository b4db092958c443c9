// A libcudart, libcublas or libcuda that answers what it is asked for when a context is made, as its definitions say, and ends
// the process when it is asked for anything else: what a context's creation finds, and that it takes nothing.
#include <stdlib.h>
#include <string.h>

#define FORBIDDEN(name) \
  int name(void) { abort(); }

#ifdef RUNTIME_VERSION
#ifndef DRIVER_VERSION
#define DRIVER_VERSION RUNTIME_VERSION
#endif
#ifndef DEVICES
#define DEVICES 1
#endif
#ifndef CAPABILITY
#define CAPABILITY 90
#endif
#ifndef COUNT_ERROR
#define COUNT_ERROR 0
#endif
#ifndef DRIVER_LACKS
#define DRIVER_LACKS ""
#endif

int cudaGetDeviceCount(int *count) {
  if (COUNT_ERROR == 0) *count = DEVICES;
  return COUNT_ERROR;
}
int cudaDriverGetVersion(int *version) {
  *version = DRIVER_VERSION;
  return 0;
}
int cudaRuntimeGetVersion(int *version) {
  *version = RUNTIME_VERSION;
  return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  if (device >= DEVICES) abort();
  switch (attribute) {
    case 16: *value = 132; return 0;
    case 75: *value = CAPABILITY / 10; return 0;
    case 76: *value = CAPABILITY % 10; return 0;
    default: abort();
  }
}
int cudaGetLastError(void) { return 0; }
const char *cudaGetErrorName(int error) {
  return error == 35 ? "cudaErrorInsufficientDriver" : error == 100 ? "cudaErrorNoDevice" : "cudaErrorOfThisStub";
}
const char *cudaGetErrorString(int error) { return error == 100 ? "no CUDA-capable device is detected" : "a reason"; }
FORBIDDEN(cudaMemcpyAsync)
FORBIDDEN(cudaMemcpy2DAsync)
FORBIDDEN(cudaMemsetAsync)
FORBIDDEN(cudaMemset2DAsync)
#ifndef WITHOUT_STREAMS
FORBIDDEN(cudaStreamSynchronize)
FORBIDDEN(cudaStreamIsCapturing)
#endif

static int device_get(int *device, int ordinal) {
  *device = ordinal;
  return 0;
}
static int device_name(char *name, int length, int device) {
  (void)device;
  strncpy(name, "Stub of a device", (size_t)length);
  return 0;
}
static int forbidden(void) { abort(); }

int cudaGetDriverEntryPoint(const char *name, void (**function)(void), unsigned long long flags, int *found) {
  (void)flags;
  *found = strcmp(name, DRIVER_LACKS) == 0;
  if (*found != 0)
    *function = NULL;
  else if (strcmp(name, "cuDeviceGet") == 0)
    *function = (void (*)(void))device_get;
  else if (strcmp(name, "cuDeviceGetName") == 0)
    *function = (void (*)(void))device_name;
  else
    *function = (void (*)(void))forbidden;
  return 0;
}
#endif

#ifdef CUBLAS_MAJOR
int cublasGetProperty(int type, int *value) {
  *value = type == 0 ? CUBLAS_MAJOR : type;
  return 0;
}
const char *cublasGetStatusName(int status) {
  (void)status;
  return "CUBLAS_STATUS_OF_THIS_STUB";
}
FORBIDDEN(cublasCreate_v2)
FORBIDDEN(cublasDestroy_v2)
FORBIDDEN(cublasSetStream_v2)
FORBIDDEN(cublasGetStream_v2)
FORBIDDEN(cublasSetPointerMode_v2)
FORBIDDEN(cublasGetPointerMode_v2)
FORBIDDEN(cublasSetWorkspace_v2)
FORBIDDEN(cublasSetMathMode)
FORBIDDEN(cublasGetMathMode)
FORBIDDEN(cublasGemmEx)
#ifndef WITHOUT_64
FORBIDDEN(cublasGemmEx_64)
#endif
#endif

#ifdef LIBCUDA_VERSION
int cuDriverGetVersion(int *version) {
  *version = LIBCUDA_VERSION;
  return 0;
}
#endif
