#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernel.h"

namespace fused_ebm {
namespace {

struct Choice {
  const Kernels* kernels;
  bool runs_here;
};

// Best first.
const Choice* choices() {
#ifdef FUSED_EBM_X86
  __builtin_cpu_init();
  static const Choice list[] = {
      {&kAvx512Kernels, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")},
      {&kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&kGenericKernels, true},
      {nullptr, false}};
#else
  static const Choice list[] = {{&kGenericKernels, true}, {nullptr, false}};
#endif
  return list;
}

}  // namespace

const Kernels& kernels() {
  const char* asked = std::getenv("FUSED_EBM_ISA");
  std::string names;
  for (const Choice* c = choices(); c->kernels; ++c) {
    const bool named = asked && asked == std::string(c->kernels->name);
    if (named && !c->runs_here)
      throw std::runtime_error("FUSED_EBM_ISA=" + std::string(asked) + ": this processor cannot run it");
    if (named || (!asked && c->runs_here)) return *c->kernels;
    names += (names.empty() ? "" : ", ") + std::string(c->kernels->name);
  }
  throw std::runtime_error("FUSED_EBM_ISA=" + std::string(asked) + " is not known, expected one of " + names);
}

}  // namespace fused_ebm
