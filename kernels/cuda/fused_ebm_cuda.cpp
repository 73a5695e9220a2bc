// The C door of compiled models: what kernels/native/c_api.cpp does on the CPU (checks, what is not finite, flags).
#include "fused_ebm_cuda.h"

#include <cmath>
#include <limits>
#include <string>

#include "errors.h"
#include "gpu.h"

using namespace fused_ebm_cuda;
using fused_ebm::Error;
using fused_ebm::last_error;

struct fused_ebm_cuda_model {
  fused_ebm_cuda_model(const char* path, int device) : file(read_file(path)), gpu(file, path, device) {}

  const File file;
  Gpu gpu;
};

namespace {

template <class Function>
int guarded(const Function& function) noexcept { return fused_ebm::guarded(FUSED_EBM_CUDA_FAILED, function); }

[[noreturn]] void refuse(const std::string& what) { throw Error(FUSED_EBM_CUDA_BAD_ARGUMENT, what); }

void need(const void* pointer, const char* name) {
  if (!pointer) refuse(std::string(name) + " is NULL");
}

// False where there is nothing to do.
bool check_call(const fused_ebm_cuda_model* model, const float* x, int64_t n, int32_t level, const float* energy) {
  need(model, "model");
  if (n < 0) refuse("n is " + std::to_string(n) + ", expected a number of events");
  if (level < 0 || level >= model->file.levels)
    refuse("noise level k = " + std::to_string(level) + " is out of range, expected 0 to " +
           std::to_string(model->file.levels - 1));
  if (n == 0) return false;
  need(x, "x");
  need(energy, "the place for energies");
  return true;
}

void check_flags(const File& f, int32_t level) {
  if (std::isnan(f.threshold)) refuse("flags of a model without a threshold: calibrate it first");
  if (level != f.default_level)
    refuse("flags at noise level " + std::to_string(level) + ", the threshold is of level " +
           std::to_string(f.default_level));
}

// The kernels load and store vectors of 16 bytes.
CUdeviceptr on_device(const void* pointer, const char* name) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % 16 != 0) refuse(std::string(name) + " is not at a multiple of 16 bytes");
  return address;
}

// Why the energy of an event is not finite.
std::string reason(const File& f, const float* event) {
  for (int j = 0; j < f.features; ++j) {
    const bool missing = std::isnan(event[j]) || event[j] == f.marker[j];
    if (std::isfinite(missing ? f.imputation[j] : event[j])) continue;
    return "feature " + std::to_string(j) + " (" + f.names[j] + ") is " +
           (std::isnan(event[j]) ? "nan, expected a number: this feature has no imputation"
                                 : (event[j] > 0 ? "inf" : "-inf") + std::string(", expected a finite number"));
  }
  return "finite features give an energy beyond the precision";
}

// Throws where an energy is not finite.
void check_finite(const File& f, const float* x, int64_t n, const float* energy) {
  int64_t first = -1, others = -1;
  for (int64_t i = 0; i < n; ++i) {
    if (std::isfinite(energy[i])) continue;
    if (first < 0) first = i;
    ++others;
  }
  if (first < 0) return;
  throw Error(FUSED_EBM_CUDA_NOT_FINITE, "event " + std::to_string(first) +
                                             (others > 0 ? " (and " + std::to_string(others) + " more)" : "") + ": " +
                                             reason(f, x + first * f.features));
}

}  // namespace

const char* fused_ebm_cuda_version(void) { return FUSED_EBM_VERSION; }

const char* fused_ebm_cuda_last_error(void) { return last_error.c_str(); }

int fused_ebm_cuda_open(const char* path, int device, fused_ebm_cuda_model** model) {
  return guarded([&] {
    need(model, "the place for the model");
    *model = nullptr;
    need(path, "path");
    *model = new fused_ebm_cuda_model(path, device);
  });
}

void fused_ebm_cuda_close(fused_ebm_cuda_model* model) { delete model; }

int32_t fused_ebm_cuda_n_features(const fused_ebm_cuda_model* model) { return model ? model->file.features : -1; }

int32_t fused_ebm_cuda_n_levels(const fused_ebm_cuda_model* model) { return model ? model->file.levels : -1; }

int32_t fused_ebm_cuda_default_level(const fused_ebm_cuda_model* model) {
  return model ? model->file.default_level : -1;
}

float fused_ebm_cuda_threshold(const fused_ebm_cuda_model* model) {
  return model ? model->file.threshold : std::numeric_limits<float>::quiet_NaN();
}

const char* fused_ebm_cuda_feature(const fused_ebm_cuda_model* model, int32_t j) {
  return model && j >= 0 && j < model->file.features ? model->file.names[j].c_str() : nullptr;
}

const char* fused_ebm_cuda_digest(const fused_ebm_cuda_model* model) {
  return model ? model->file.digest.c_str() : nullptr;
}

const char* fused_ebm_cuda_precision(const fused_ebm_cuda_model* model) {
  return model ? model->file.precision.c_str() : nullptr;
}

int32_t fused_ebm_cuda_architecture(const fused_ebm_cuda_model* model) {
  return model ? static_cast<int32_t>(model->gpu.architecture()) : -1;
}

int fused_ebm_cuda_score(fused_ebm_cuda_model* model, const float* x, int64_t n, int32_t level, float* energy,
                         float* score, uint8_t* flag) {
  return guarded([&] {
    const bool work = check_call(model, x, n, level, energy);
    const File& f = model->file;
    if (flag) check_flags(f, level);
    if (!work) return;
    model->gpu.score(x, n, level, energy, score);
    for (int64_t i = 0; flag && i < n; ++i) flag[i] = energy[i] > f.threshold;
    check_finite(f, x, n, energy);
  });
}

int fused_ebm_cuda_score_device(fused_ebm_cuda_model* model, const float* x, int64_t n, int32_t level, float* energy,
                                float* score, uint8_t* flag, void* stream) {
  return guarded([&] {
    const bool work = check_call(model, x, n, level, energy);
    if (n > std::numeric_limits<int32_t>::max())
      refuse("n is " + std::to_string(n) + ", expected at most " +
             std::to_string(std::numeric_limits<int32_t>::max()) + " events in memory of the GPU");
    if (flag) check_flags(model->file, level);
    if (!work) return;
    model->gpu.enqueue(on_device(x, "x"), n, level, on_device(energy, "the place for energies"),
                       on_device(score, "the place for scores"), on_device(flag, "the place for flags"),
                       static_cast<CUstream>(stream));
  });
}
