// What the C interfaces share: errors are codes with a message for the thread, and no exception leaves a library.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace fused_ebm {

// `code` is one of the interface's header.
struct Error : std::runtime_error {
  Error(int code, const std::string& message) : std::runtime_error(message), code(code) {}
  int code;
};

inline thread_local std::string last_error;

inline int failed(int code, const char* message) noexcept {
  try {
    last_error = message;
  } catch (...) {
    last_error.clear();
  }
  return code;
}

// Runs a function of an interface: 0, or the code of what it threw, `other` for what has none.
template <class Function>
int guarded(int other, const Function& function) noexcept {
  try {
    function();
    return 0;
  } catch (const Error& e) {
    return failed(e.code, e.what());
  } catch (const std::bad_alloc&) {
    return failed(other, "out of memory");
  } catch (const std::exception& e) {
    return failed(other, e.what());
  } catch (...) {
    return failed(other, "an unknown error");
  }
}

}  // namespace fused_ebm
