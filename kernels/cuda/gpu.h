// A model on a GPU: its kernels, weights and memory, and the launches.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "driver.h"
#include "file.h"

namespace fused_ebm_cuda {

class Gpu {
 public:
  // Throws Error; `file` outlives the Gpu, and `path` is its name.
  Gpu(const File& file, const char* path, int device);
  ~Gpu();
  Gpu(const Gpu&) = delete;

  // From and to memory of the host; score may be null.
  void score(const float* x, int64_t n, int32_t level, float* energy, float* score);
  // In memory of the GPU; score and flag may be null; n is below 2^31. Returns when the work is enqueued.
  void enqueue(CUdeviceptr x, int64_t n, int32_t level, CUdeviceptr energy, CUdeviceptr score, CUdeviceptr flag,
               CUstream stream);

  uint32_t architecture() const { return kernels_.front().kernel->cc; }

 private:
  struct Loaded {
    const Kernel* kernel;
    CUmodule module;
    CUfunction function;
    std::vector<uint64_t> values;  // of the parameters, as far as they are the same at every launch
  };

  explicit Gpu(const File& file) : file_(file), driver_(driver()) {}
  void load(const char* path);
  void place();  // weights and scratch
  CUdeviceptr allocate(uint64_t bytes, const char* what) const;
  void reserve(int64_t events);
  const Loaded& choose(int64_t n, bool with_score) const;
  void launch(CUdeviceptr x, int64_t n, int32_t level, CUdeviceptr energy, CUdeviceptr score, CUdeviceptr flag,
              CUstream stream);

  const File& file_;
  const Driver& driver_;
  CUdevice device_ = -1;
  CUcontext context_ = nullptr;
  uint64_t multiprocessors_ = 0;
  std::vector<Loaded> kernels_;  // smaller tiles first
  CUdeviceptr weights_ = 0, scratch_ = 0;
  CUstream stream_ = nullptr;  // of score()
  CUevent last_ = nullptr;     // the end of the last launch: the next one uses the same scratch memory
  CUdeviceptr events_ = 0;     // x, score and energy of score()
  int64_t capacity_ = 0;       // events of them
  std::mutex mutex_;
};

}  // namespace fused_ebm_cuda
