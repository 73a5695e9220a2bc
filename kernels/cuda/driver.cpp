#include "driver.h"

#include <dlfcn.h>

#include "errors.h"
#include "fused_ebm_cuda.h"

namespace fused_ebm_cuda {

using fused_ebm::Error;

namespace {

Driver load() {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);  // never closed, as the driver asks for
  if (!library)
    throw Error(FUSED_EBM_CUDA_NO_DEVICE, "no NVIDIA driver on this machine (libcuda.so.1 cannot be opened)");
  Driver d;
  const auto find = [&](const char* symbol) {
    void* const address = dlsym(library, symbol);
    if (!address)
      throw Error(FUSED_EBM_CUDA_NO_DEVICE, std::string("the NVIDIA driver has no ") + symbol + ": it is too old");
    return address;
  };
#define FUSED_EBM_CUDA_FIND(name, symbol, parameters) d.name = reinterpret_cast<CUresult(*) parameters>(find(symbol));
  FUSED_EBM_CUDA_DRIVER(FUSED_EBM_CUDA_FIND)
#undef FUSED_EBM_CUDA_FIND
  try {
    d.check(d.cuInit(0), "starting the NVIDIA driver");
  } catch (const Error& e) {
    throw Error(FUSED_EBM_CUDA_NO_DEVICE, e.what());
  }
  return d;
}

}  // namespace

void Driver::check(CUresult result, const std::string& doing) const {
  if (result == 0) return;
  const char *name = nullptr, *text = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &text);
  throw Error(FUSED_EBM_CUDA_FAILED, doing + ": " + (text ? text : "an unknown error") + " (" +
                                         (name ? name : "CUDA error " + std::to_string(result)) + ")");
}

const Driver& driver() {
  static const Driver d = load();
  return d;
}

}  // namespace fused_ebm_cuda
