// A stand-in for the CUDA runtime, preloaded before libcudart: one device whose memory is host memory.
//
// Everything that emulated operators need works: memory, copies, streams (all work is synchronous), events (a clock).
// A kernel launch is an error: no CUDA code can run here, and a missing result must not go unnoticed.
// Functions that are not defined here come from the real runtime, which returns an error because it finds no driver.
#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef cudaError_t Error;
#define UNUSED __attribute__((unused))
#define GIB (1ull << 30)

static const size_t CARD = 80 * GIB;      // reported memory of the device
static const size_t AVAILABLE = 12 * GIB; // memory it provides: less than the machine's
static size_t used = 0;
static __thread Error last = cudaSuccess;

static Error fail(Error error) { return last = error; }

// The device.
// An empty CUDA_VISIBLE_DEVICES hides it from a process, like a real device.
Error cudaGetDeviceCount(int *count) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  *count = visible == NULL || *visible != 0;
  return *count ? cudaSuccess : fail(cudaErrorNoDevice);
}
Error cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
Error cudaSetDevice(int device) { return device == 0 ? cudaSuccess : fail(cudaErrorInvalidDevice); }
Error cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
Error cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
Error cudaDeviceSynchronize(void) { return cudaSuccess; }
Error cudaDeviceCanAccessPeer(int *can, int a UNUSED, int b UNUSED) { *can = 0; return cudaSuccess; }
Error cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
Error cudaDeviceGetPCIBusId(char *id, int length, int device UNUSED) {
  snprintf(id, length, "0000:00:00.0");
  return cudaSuccess;
}

Error cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  if (device != 0) return fail(cudaErrorInvalidDevice);
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 (rehearsal)");
  p->major = 9;
  p->minor = 0;
  p->totalGlobalMem = CARD;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->l2CacheSize = 50 << 20;
  p->totalConstMem = 64 << 10;
  p->memoryBusWidth = 5120;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->unifiedAddressing = p->concurrentKernels = 1;
  return cudaSuccess;
}

Error cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device UNUSED) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, 0);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[2]; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

// Memory. Blocks have CUDA's alignment, at least 256 bytes.
Error cudaMalloc(void **pointer, size_t bytes) {
  *pointer = NULL;
  if (__atomic_load_n(&used, __ATOMIC_RELAXED) + bytes > AVAILABLE) return fail(cudaErrorMemoryAllocation);
  if (posix_memalign(pointer, 512, bytes ? bytes : 1)) return fail(cudaErrorMemoryAllocation);
  __atomic_add_fetch(&used, malloc_usable_size(*pointer), __ATOMIC_RELAXED);
  return cudaSuccess;
}
Error cudaFree(void *pointer) {
  if (pointer) __atomic_sub_fetch(&used, malloc_usable_size(pointer), __ATOMIC_RELAXED);
  free(pointer);
  return cudaSuccess;
}
Error cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t s UNUSED) { return cudaMalloc(pointer, bytes); }
Error cudaFreeAsync(void *pointer, cudaStream_t s UNUSED) { return cudaFree(pointer); }
Error cudaHostAlloc(void **pointer, size_t bytes, unsigned flags UNUSED) {
  *pointer = malloc(bytes ? bytes : 1);
  return *pointer ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
Error cudaFreeHost(void *pointer) { free(pointer); return cudaSuccess; }
Error cudaHostRegister(void *pointer UNUSED, size_t bytes UNUSED, unsigned flags UNUSED) { return cudaSuccess; }
Error cudaHostUnregister(void *pointer UNUSED) { return cudaSuccess; }
Error cudaMemGetInfo(size_t *available, size_t *total) {
  *available = AVAILABLE - __atomic_load_n(&used, __ATOMIC_RELAXED);
  *total = CARD;
  return cudaSuccess;
}
Error cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = cudaMemoryTypeDevice;
  attributes->devicePointer = (void *)pointer;
  return cudaSuccess;
}
Error cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind UNUSED) {
  memmove(to, from, bytes);
  return cudaSuccess;
}
Error cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t s UNUSED) {
  return cudaMemcpy(to, from, bytes, kind);
}
Error cudaMemcpyPeerAsync(void *to, int a UNUSED, const void *from, int b UNUSED, size_t bytes, cudaStream_t s UNUSED) {
  return cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
}
Error cudaMemset(void *pointer, int value, size_t bytes) { memset(pointer, value, bytes); return cudaSuccess; }
Error cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t s UNUSED) {
  return cudaMemset(pointer, value, bytes);
}

// Errors.
Error cudaGetLastError(void) { Error error = last; last = cudaSuccess; return error; }
Error cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorString(Error error) {
  if (error == cudaErrorMemoryAllocation) return "out of memory";
  if (error == cudaErrorNotSupported) return "the rehearsal runs no CUDA kernel and captures no graph";
  return error == cudaSuccess ? "no error" : "an error of the rehearsal's CUDA runtime";
}
const char *cudaGetErrorName(Error error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorNotSupported";
}

// Streams run their work synchronously. An event is the time at which it was recorded.
static Error new_stream(cudaStream_t *stream) { *stream = malloc(16); return cudaSuccess; }
Error cudaStreamCreate(cudaStream_t *stream) { return new_stream(stream); }
Error cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned f UNUSED, int p UNUSED) { return new_stream(stream); }
Error cudaStreamDestroy(cudaStream_t stream) { free(stream); return cudaSuccess; }
Error cudaStreamSynchronize(cudaStream_t stream UNUSED) { return cudaSuccess; }
Error cudaStreamQuery(cudaStream_t stream UNUSED) { return cudaSuccess; }
Error cudaStreamWaitEvent(cudaStream_t s UNUSED, cudaEvent_t e UNUSED, unsigned f UNUSED) { return cudaSuccess; }
Error cudaStreamGetPriority(cudaStream_t s UNUSED, int *priority) { *priority = 0; return cudaSuccess; }
Error cudaStreamIsCapturing(cudaStream_t s UNUSED, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
Error cudaStreamGetCaptureInfo(cudaStream_t s UNUSED, enum cudaStreamCaptureStatus *status,
                               unsigned long long *id UNUSED, cudaGraph_t *graph UNUSED,
                               const cudaGraphNode_t **nodes UNUSED, const cudaGraphEdgeData **edges UNUSED,
                               size_t *count UNUSED) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
Error cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode UNUSED) { return cudaSuccess; }
Error cudaStreamBeginCapture(cudaStream_t s UNUSED, enum cudaStreamCaptureMode mode UNUSED) {
  return fail(cudaErrorNotSupported);
}
Error cudaEventCreate(cudaEvent_t *event) {
  *event = calloc(1, sizeof(struct timespec));
  return cudaSuccess;
}
Error cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags UNUSED) { return cudaEventCreate(event); }
Error cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
Error cudaEventQuery(cudaEvent_t event UNUSED) { return cudaSuccess; }
Error cudaEventSynchronize(cudaEvent_t event UNUSED) { return cudaSuccess; }
Error cudaEventRecord(cudaEvent_t event, cudaStream_t s UNUSED) {
  clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event);
  return cudaSuccess;
}
Error cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t s, unsigned flags UNUSED) {
  return cudaEventRecord(event, s);
}
Error cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  const struct timespec *a = (void *)begin, *b = (void *)end;
  *milliseconds = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) / 1e6;
  return cudaSuccess;
}

// Kernels: registered when torch's libraries load, never run.
static Error refuse_launch(void) { return fail(cudaErrorNotSupported); }
Error cudaLaunchKernel(const void *f UNUSED, dim3 grid UNUSED, dim3 block UNUSED, void **arguments UNUSED,
                       size_t shared UNUSED, cudaStream_t s UNUSED) {
  return refuse_launch();
}
Error __cudaLaunchKernel(cudaKernel_t f UNUSED, dim3 grid UNUSED, dim3 block UNUSED, void **arguments UNUSED,
                         size_t shared UNUSED, cudaStream_t s UNUSED) {
  return refuse_launch();
}
Error cudaLaunchKernelExC(const cudaLaunchConfig_t *c UNUSED, const void *f UNUSED, void **arguments UNUSED) {
  return refuse_launch();
}
Error cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *f UNUSED) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}
Error cudaFuncSetAttribute(const void *f UNUSED, enum cudaFuncAttribute a UNUSED, int value UNUSED) {
  return cudaSuccess;
}
Error cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f UNUSED, int threads UNUSED,
                                                             size_t shared UNUSED, unsigned flags UNUSED) {
  *blocks = 2;
  return cudaSuccess;
}
Error __cudaGetKernel(cudaKernel_t *kernel, const void *f) { *kernel = (cudaKernel_t)f; return cudaSuccess; }
Error cudaGetDriverEntryPointByVersion(const char *name UNUSED, void **f, unsigned version UNUSED,
                                       unsigned long long flags UNUSED,
                                       enum cudaDriverEntryPointQueryResult *result) {
  *f = NULL;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return fail(cudaErrorNotSupported);
}
void **__cudaRegisterFatBinary(void *binary UNUSED) { static void *handle; return &handle; }
void __cudaRegisterFatBinaryEnd(void **handle UNUSED) {}
void __cudaUnregisterFatBinary(void **handle UNUSED) {}
void __cudaRegisterFunction(void **handle UNUSED, const char *f UNUSED, char *device UNUSED, const char *name UNUSED,
                            int threads UNUSED, void *a UNUSED, void *b UNUSED, void *c UNUSED, void *d UNUSED,
                            int *warp UNUSED) {}
void __cudaRegisterVar(void **handle UNUSED, char *host UNUSED, char *device UNUSED, const char *name UNUSED,
                       int external UNUSED, size_t bytes UNUSED, int constant UNUSED, int global UNUSED) {}
char __cudaInitModule(void **handle UNUSED) { return 1; }
unsigned __cudaPushCallConfiguration(dim3 grid UNUSED, dim3 block UNUSED, size_t shared UNUSED,
                                     struct CUstream_st *s UNUSED) {
  return 0;
}
Error __cudaPopCallConfiguration(dim3 *grid UNUSED, dim3 *block UNUSED, size_t *shared UNUSED, void *s UNUSED) {
  return cudaSuccess;
}

// The driver: the few functions of libcuda.so.1 that torch needs to start the device. Others are not found.
int cuInit(unsigned flags UNUSED) { return 0; }
int cuDriverGetVersion(int *version) { *version = CUDART_VERSION; return 0; }
int cuDevicePrimaryCtxGetState(int device UNUSED, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return 0;
}
