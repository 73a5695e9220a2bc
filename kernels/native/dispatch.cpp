#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef FUSED_EBM_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernel.h"

namespace fused_ebm {
namespace {

struct Choice {
  Kernels kernels;
  bool runs_here;
};

#ifdef FUSED_EBM_X86

// Linux lets a process use the tiles of AMX once it has asked.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kInt8) && may_use_tiles();
}

Kernels with(Kernels kernels, const char* name, const Passes* passes) {
  kernels.name = name;
  for (int p = 0; p < kPrecisions; ++p)
    if (passes[p].digits > 0) kernels.passes[p] = &passes[p];
  return kernels;
}

// An event alone waits for its weights, and floats of them need the fewest instructions.
const Passes* amx_passes() {
  static Passes passes[kPrecisions];
  std::copy(kAmxPasses, kAmxPasses + kPrecisions, passes);
  passes[kFloat32].few = 1;
  passes[kFloat32].few_pass = kAvx512Kernels.passes[kFloat32]->few_pass;
  return passes;
}

// Best first.
const std::vector<Choice>& choices() {
  static const std::vector<Choice> list = [] {
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    Kernels amx = with(kAvx512Kernels, "amx", amx_passes());
    amx.multiply_tiles = multiply_tiles;
    return std::vector<Choice>{
        {amx, vnni && has_amx()},
        {with(kAvx512Kernels, "vnni", kVnniPasses), vnni},
        {kAvx512Kernels, avx512},
        {kAvx2Kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
        {kGenericKernels, true}};
  }();
  return list;
}

#else

const std::vector<Choice>& choices() {
  static const std::vector<Choice> list = {{kGenericKernels, true}};
  return list;
}

#endif

}  // namespace

const Kernels& kernels() {
  const char* asked = std::getenv("FUSED_EBM_ISA");
  std::string names;
  for (const Choice& c : choices()) {
    const bool named = asked && asked == std::string(c.kernels.name);
    if (named && !c.runs_here)
      throw std::runtime_error("FUSED_EBM_ISA=" + std::string(asked) + ": this processor cannot run it");
    if (named || (!asked && c.runs_here)) return c.kernels;
    names += (names.empty() ? "" : ", ") + std::string(c.kernels.name);
  }
  throw std::runtime_error("FUSED_EBM_ISA=" + std::string(asked) + " is not known, expected one of " + names);
}

}  // namespace fused_ebm
