#pragma once

#include <stdexcept>
#include <string>

namespace fused_ebm_cuda {

// `code` is one of fused_ebm_cuda.h.
struct Error : std::runtime_error {
  Error(int code, const std::string& message) : std::runtime_error(message), code(code) {}
  int code;
};

}  // namespace fused_ebm_cuda
