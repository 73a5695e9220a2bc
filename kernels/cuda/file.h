// Reads a compiled model file; kernels/cubin.py writes it and says what lies where.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fused_ebm_cuda {

// What a parameter of a kernel is, as in kernels/cubin.py.
enum Kind : uint64_t { kConstant, kWeights, kX, kEnergy, kScore, kScratch, kEvents, kLevel, kFlag, kKinds };

struct Parameter {
  uint64_t kind, value;
};
constexpr uint32_t kMostParameters = 64;

struct Kernel {
  uint32_t cc;
  bool exact, with_score;  // exact: no other compute capability runs it
  uint32_t block_m, threads, shared, programs_per_sm;
  std::vector<Parameter> parameters;
  const unsigned char* cubin;
  std::string name;
};

struct File {
  std::vector<unsigned char> memory;
  int features, levels, default_level;
  float threshold;  // NaN where the model has none
  const unsigned char* weights;
  uint64_t weights_bytes;
  std::vector<float> marker, imputation;
  std::vector<Kernel> kernels;
  std::vector<std::string> names;
  std::string precision, digest;
};

// Throws Error, with the name of the file and what is wrong with it, and std::bad_alloc. Whatever the bytes are,
// what is returned lies within `memory`.
File read_file(const char* path);

}  // namespace fused_ebm_cuda
