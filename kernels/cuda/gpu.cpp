#include "gpu.h"

#include <algorithm>
#include <string>

#include "errors.h"
#include "fused_ebm_cuda.h"

namespace fused_ebm_cuda {

using fused_ebm::Error;

namespace {

constexpr int64_t kBlock = 65536;        // events that score() holds on the GPU at a time
constexpr uint64_t kAlignment = 256;     // bytes
constexpr uint32_t kUnasked = 48 << 10;  // shared memory that a launch may have without asking for it

uint64_t aligned(uint64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The GPU's context is the calling thread's current one as long as this lives.
class Current {
 public:
  Current(const Driver& driver, CUcontext context) : driver_(driver) {
    driver_.check(driver_.cuCtxPushCurrent(context), "entering the GPU's context");
  }
  ~Current() {
    CUcontext context;
    driver_.cuCtxPopCurrent(&context);
  }
  Current(const Current&) = delete;

 private:
  const Driver& driver_;
};

std::string architectures(const File& file) {
  std::string said;
  uint32_t last = 0;
  for (const Kernel& k : file.kernels) {
    if (k.cc == last) continue;
    said += (last ? ", sm_" : "sm_") + std::to_string(k.cc) + (k.exact ? "a" : "");
    last = k.cc;
  }
  return said;
}

}  // namespace

Gpu::Gpu(const File& file, const char* path, int device) : Gpu(file) {  // from here on the destructor clears away
  int count = 0;
  driver_.check(driver_.cuDeviceGetCount(&count), "counting GPUs");
  if (count == 0) throw Error(FUSED_EBM_CUDA_NO_DEVICE, "the NVIDIA driver sees no GPU");
  if (device < 0 || device >= count)
    throw Error(FUSED_EBM_CUDA_BAD_ARGUMENT,
                "device is " + std::to_string(device) + ", expected 0 to " + std::to_string(count - 1));
  driver_.check(driver_.cuDeviceGet(&device_, device), "finding the GPU");
  CUcontext context = nullptr;
  driver_.check(driver_.cuDevicePrimaryCtxRetain(&context, device_), "making the GPU's context");
  context_ = context;
  const Current current(driver_, context_);
  driver_.check(driver_.cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "making a stream");
  driver_.check(driver_.cuEventCreate(&last_, CU_EVENT_DISABLE_TIMING), "making an event");
  load(path);
  place();
}

Gpu::~Gpu() {
  if (!context_) return;
  if (driver_.cuCtxPushCurrent(context_) == 0) {  // not at the end of a process, where the driver may be gone
    if (last_) driver_.cuEventSynchronize(last_);
    for (const CUdeviceptr memory : {weights_, scratch_, events_})
      if (memory) driver_.cuMemFree(memory);
    for (const Loaded& k : kernels_) driver_.cuModuleUnload(k.module);
    if (last_) driver_.cuEventDestroy(last_);
    if (stream_) driver_.cuStreamDestroy(stream_);
    CUcontext context;
    driver_.cuCtxPopCurrent(&context);
  }
  driver_.cuDevicePrimaryCtxRelease(device_);
}

void Gpu::load(const char* path) {
  const auto attribute = [&](int which) {
    int value = 0;
    driver_.check(driver_.cuDeviceGetAttribute(&value, which, device_), "asking for the GPU's properties");
    return static_cast<uint32_t>(value);
  };
  const uint32_t major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  const uint32_t cc = 10 * major + attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  multiprocessors_ = attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);

  // Code runs on later chips of its major version, but what was made for one chip's own instructions does not.
  uint32_t best = 0;
  for (const Kernel& k : file_.kernels)
    if (k.cc == cc || (!k.exact && k.cc / 10 == major && k.cc < cc)) best = std::max(best, k.cc);
  bool with_score = false, without = false;
  for (const Kernel& k : file_.kernels) {
    if (k.cc != best) continue;
    (k.with_score ? with_score : without) = true;
    const std::string doing = "loading the kernels for sm_" + std::to_string(k.cc);
    CUmodule module;
    driver_.check(driver_.cuModuleLoadData(&module, k.cubin), doing);
    kernels_.push_back({&k, module, nullptr, {}});
    CUfunction& function = kernels_.back().function;
    driver_.check(driver_.cuModuleGetFunction(&function, module, k.name.c_str()), doing);
    if (k.shared > kUnasked)
      driver_.check(driver_.cuFuncSetAttribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                               static_cast<int>(k.shared)),
                    "asking for " + std::to_string(k.shared) + " bytes of shared memory");
  }
  if (!with_score || !without) {
    char name[256] = "this GPU";
    driver_.cuDeviceGetName(name, sizeof(name), device_);
    throw Error(FUSED_EBM_CUDA_NO_KERNEL,
                std::string(path) + ": compiled for " + architectures(file_) + ", but " + name + " is sm_" +
                    std::to_string(cc) +
                    (cc < 80 ? ": the kernels need sm_80 or newer"
                             : ": compile it with 'python -m kernels cubin ... --arch " + std::to_string(cc) + "'"));
  }
  std::sort(kernels_.begin(), kernels_.end(),
            [](const Loaded& a, const Loaded& b) { return a.kernel->block_m < b.kernel->block_m; });
}

void Gpu::place() {
  uint64_t most = 1;
  for (Loaded& k : kernels_) {
    uint64_t end = 0;
    for (const Parameter& p : k.kernel->parameters) {
      k.values.push_back(p.kind == kScratch ? end : p.value);
      if (p.kind == kScratch) end += aligned(p.value * k.kernel->programs_per_sm * multiprocessors_);
    }
    most = std::max(most, end);
  }
  weights_ = allocate(file_.weights_bytes, "weights");
  scratch_ = allocate(most, "scratch memory");
  for (Loaded& k : kernels_)
    for (size_t i = 0; i < k.values.size(); ++i) {
      const uint64_t kind = k.kernel->parameters[i].kind;
      k.values[i] += kind == kWeights ? weights_ : kind == kScratch ? scratch_ : 0;
    }
  driver_.check(driver_.cuMemcpyHtoDAsync(weights_, file_.weights, file_.weights_bytes, stream_),
                "copying the weights");
  driver_.check(driver_.cuStreamSynchronize(stream_), "copying the weights");
}

CUdeviceptr Gpu::allocate(uint64_t bytes, const char* what) const {
  CUdeviceptr memory = 0;
  driver_.check(driver_.cuMemAlloc(&memory, bytes), "asking for " + std::to_string(bytes) + " bytes for " + what);
  return memory;
}

void Gpu::reserve(int64_t events) {
  if (events <= capacity_) return;
  if (events_) driver_.check(driver_.cuMemFree(events_), "freeing the memory of events");
  events_ = 0;
  capacity_ = 0;
  events = static_cast<int64_t>(aligned(static_cast<uint64_t>(events)));  // so that each part is aligned
  events_ = allocate(static_cast<uint64_t>(events) * (2 * file_.features + 1) * sizeof(float), "events");
  capacity_ = events;
}

const Gpu::Loaded& Gpu::choose(int64_t n, bool with_score) const {
  const Loaded* chosen = nullptr;
  for (const Loaded& k : kernels_) {
    if (k.kernel->with_score != with_score) continue;
    chosen = &k;  // the largest, unless a smaller one does it in one round
    if ((static_cast<uint64_t>(n) - 1) / k.kernel->block_m < multiprocessors_) break;
  }
  return *chosen;
}

void Gpu::launch(CUdeviceptr x, int64_t n, int32_t level, CUdeviceptr energy, CUdeviceptr score, CUdeviceptr flag,
                 CUstream stream) {
  const Loaded& k = choose(n, score != 0);
  uint64_t live[kKinds] = {}, values[kMostParameters];
  live[kX] = x;
  live[kEnergy] = energy;
  live[kScore] = score;
  live[kFlag] = flag;
  live[kEvents] = static_cast<uint64_t>(n);
  live[kLevel] = static_cast<uint64_t>(level);
  void* parameters[kMostParameters];
  for (size_t i = 0; i < k.values.size(); ++i) {  // the driver knows how many bytes of a value each one has
    values[i] = k.values[i] + live[k.kernel->parameters[i].kind];
    parameters[i] = &values[i];
  }
  const uint64_t tiles = (static_cast<uint64_t>(n) - 1) / k.kernel->block_m + 1;
  const auto programs = static_cast<unsigned>(std::min(tiles, k.kernel->programs_per_sm * multiprocessors_));
  const auto start = [&] {
    driver_.check(driver_.cuLaunchKernel(k.function, programs, 1, 1, k.kernel->threads, 1, 1, k.kernel->shared, stream,
                                         parameters, nullptr),
                  "launching the kernel");
  };
  int capturing = 0;
  driver_.check(driver_.cuStreamIsCapturing(stream, &capturing), "asking whether the stream is captured");
  if (capturing) return start();  // a graph cannot wait for what is outside of it
  driver_.check(driver_.cuStreamWaitEvent(stream, last_, 0), "waiting for the launch before");
  start();
  driver_.check(driver_.cuEventRecord(last_, stream), "marking the end of the launch");
}

void Gpu::enqueue(CUdeviceptr x, int64_t n, int32_t level, CUdeviceptr energy, CUdeviceptr score, CUdeviceptr flag,
                  CUstream stream) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Current current(driver_, context_);
  launch(x, n, level, energy, score, flag, stream);
}

void Gpu::score(const float* x, int64_t n, int32_t level, float* energy, float* score) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Current current(driver_, context_);
  reserve(std::min(n, kBlock));
  const int64_t d = file_.features;
  const auto bytes = [](int64_t floats) { return static_cast<uint64_t>(floats) * sizeof(float); };
  const CUdeviceptr at_score = events_ + bytes(capacity_ * d), at_energy = at_score + bytes(capacity_ * d);
  try {
    for (int64_t i = 0; i < n; i += kBlock) {
      const int64_t count = std::min(n - i, kBlock);
      driver_.check(driver_.cuMemcpyHtoDAsync(events_, x + i * d, bytes(count * d), stream_), "copying events");
      launch(events_, count, level, at_energy, score ? at_score : 0, 0, stream_);
      driver_.check(driver_.cuMemcpyDtoHAsync(energy + i, at_energy, bytes(count), stream_), "copying energies");
      if (score)
        driver_.check(driver_.cuMemcpyDtoHAsync(score + i * d, at_score, bytes(count * d), stream_), "copying scores");
    }
  } catch (...) {
    driver_.cuStreamSynchronize(stream_);  // nothing reads or writes the caller's memory any more
    throw;
  }
  driver_.check(driver_.cuStreamSynchronize(stream_), "computing energies");
}

}  // namespace fused_ebm_cuda
