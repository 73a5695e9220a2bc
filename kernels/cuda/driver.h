// NVIDIA's driver API, as much of it as is needed, found in libcuda.so.1 at run time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fused_ebm_cuda {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;

enum : int {
  CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
  CU_STREAM_NON_BLOCKING = 1,
  CU_EVENT_DISABLE_TIMING = 2,
};

// Name, the version of it that cuda.h means by it, and parameters.
#define FUSED_EBM_CUDA_DRIVER(F)                                                                                  \
  F(cuInit, "cuInit", (unsigned flags))                                                                           \
  F(cuGetErrorName, "cuGetErrorName", (CUresult error, const char** name))                                        \
  F(cuGetErrorString, "cuGetErrorString", (CUresult error, const char** text))                                    \
  F(cuDeviceGetCount, "cuDeviceGetCount", (int* count))                                                           \
  F(cuDeviceGet, "cuDeviceGet", (CUdevice * device, int ordinal))                                                 \
  F(cuDeviceGetName, "cuDeviceGetName", (char* name, int size, CUdevice device))                                  \
  F(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int* value, int attribute, CUdevice device))                   \
  F(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CUcontext * context, CUdevice device))                 \
  F(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (CUdevice device))                                 \
  F(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (CUcontext context))                                                 \
  F(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (CUcontext * context))                                                 \
  F(cuModuleLoadData, "cuModuleLoadData", (CUmodule * module, const void* image))                                 \
  F(cuModuleUnload, "cuModuleUnload", (CUmodule module))                                                          \
  F(cuModuleGetFunction, "cuModuleGetFunction", (CUfunction * function, CUmodule module, const char* name))       \
  F(cuFuncSetAttribute, "cuFuncSetAttribute", (CUfunction function, int attribute, int value))                    \
  F(cuMemAlloc, "cuMemAlloc_v2", (CUdeviceptr * pointer, size_t bytes))                                           \
  F(cuMemFree, "cuMemFree_v2", (CUdeviceptr pointer))                                                             \
  F(cuMemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (CUdeviceptr to, const void* from, size_t bytes, CUstream stream)) \
  F(cuMemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void* to, CUdeviceptr from, size_t bytes, CUstream stream))       \
  F(cuStreamCreate, "cuStreamCreate", (CUstream * stream, unsigned flags))                                        \
  F(cuStreamDestroy, "cuStreamDestroy_v2", (CUstream stream))                                                     \
  F(cuStreamSynchronize, "cuStreamSynchronize", (CUstream stream))                                                \
  F(cuStreamWaitEvent, "cuStreamWaitEvent", (CUstream stream, CUevent event, unsigned flags))                     \
  F(cuStreamIsCapturing, "cuStreamIsCapturing", (CUstream stream, int* status))                                   \
  F(cuEventCreate, "cuEventCreate", (CUevent * event, unsigned flags))                                            \
  F(cuEventRecord, "cuEventRecord", (CUevent event, CUstream stream))                                             \
  F(cuEventSynchronize, "cuEventSynchronize", (CUevent event))                                                    \
  F(cuEventDestroy, "cuEventDestroy_v2", (CUevent event))                                                         \
  F(cuLaunchKernel, "cuLaunchKernel",                                                                             \
    (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,  \
     unsigned block_z, unsigned shared, CUstream stream, void** parameters, void** extra))

struct Driver {
#define FUSED_EBM_CUDA_MEMBER(name, symbol, parameters) CUresult(*name) parameters;
  FUSED_EBM_CUDA_DRIVER(FUSED_EBM_CUDA_MEMBER)
#undef FUSED_EBM_CUDA_MEMBER

  // Throws Error with what was being done and what the driver says.
  void check(CUresult result, const std::string& doing) const;
};

// Loaded and initialised at the first call; throws Error where there is no driver, or no GPU.
const Driver& driver();

}  // namespace fused_ebm_cuda
