// Reads a packed model file; kernels/febm.py writes it and says what lies where.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "model.h"

namespace fused_ebm {

// `code` is one of fused_ebm.h.
struct Error : std::runtime_error {
  Error(int code, const std::string& message) : std::runtime_error(message), code(code) {}
  int code;
};

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
