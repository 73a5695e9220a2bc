// Reads a packed model file; kernels/febm.py writes it and says what lies where.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "errors.h"
#include "model.h"

namespace fused_ebm {

struct File {
  Buffer memory{nullptr, &std::free};
  Weights weights;  // into memory
  int default_level;
  float threshold;  // NaN where the model has none
  std::string digest;
  std::vector<std::string> features;
};

// Throws Error, with the name of the file and what is wrong with it, and std::bad_alloc. Whatever the bytes are,
// what is returned lies within `memory`.
File read_file(const char* path);

}  // namespace fused_ebm
