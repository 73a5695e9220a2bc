// The C door: what kernels/scorer.py does for Python (checks, what is not finite, flags), for fused_ebm.h.
#include "fused_ebm.h"

#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "errors.h"
#include "febm.h"
#include "model.h"

using namespace fused_ebm;

struct fused_ebm_model {
  explicit fused_ebm_model(File&& f) : file(std::move(f)), packed(file.weights) {}

  File file;  // its preprocessing says which value of an event is wrong
  PackedModel packed;
  bool deterministic = false;

  int features() const { return file.weights.sizes.features; }
  int levels() const { return file.weights.sizes.levels; }
};

namespace {

template <class Function>
int guarded(const Function& function) noexcept { return fused_ebm::guarded(FUSED_EBM_FAILED, function); }

[[noreturn]] void refuse(const std::string& what) { throw Error(FUSED_EBM_BAD_ARGUMENT, what); }

void need(const void* pointer, const char* name) {
  if (!pointer) refuse(std::string(name) + " is NULL");
}

void check_level(const fused_ebm_model& m, int32_t level, int64_t event = -1) {
  if (level >= 0 && level < m.levels()) return;
  refuse((event < 0 ? "" : "event " + std::to_string(event) + ": ") + "noise level k = " + std::to_string(level) +
         " is out of range, expected 0 to " + std::to_string(m.levels() - 1));
}

// False where there is nothing to do.
bool check_call(const fused_ebm_model* model, const float* x, int64_t n, const float* energy, int threads) {
  need(model, "model");
  if (n < 0) refuse("n is " + std::to_string(n) + ", expected a number of events");
  if (threads < 1) refuse("threads is " + std::to_string(threads) + ", expected a whole number from 1 on");
  if (n == 0) return false;
  need(x, "x");
  need(energy, "the place for energies");
  return true;
}

// Why the energy of an event is not finite.
std::string reason(const fused_ebm_model& m, const float* event) {
  const auto& w = m.file.weights;
  for (int j = 0; j < m.features(); ++j) {
    const bool missing = std::isnan(event[j]) || event[j] == w.marker[j];
    if (std::isfinite(missing ? w.impute[j] : event[j])) continue;
    return "feature " + std::to_string(j) + " (" + m.file.features[j] + ") is " +
           (std::isnan(event[j]) ? "nan, expected a number: this feature has no imputation"
                                 : (event[j] > 0 ? "inf" : "-inf") + std::string(", expected a finite number"));
  }
  return "finite features give an energy beyond float32";
}

// Throws where an energy, `per_event` of them each, is not finite.
void check_finite(const fused_ebm_model& m, const float* x, int64_t n, const float* energy, int per_event) {
  float zero = 0;  // v - v is 0 for a finite v and NaN for any other
  for (int64_t i = 0; i < n * per_event; ++i) zero += energy[i] - energy[i];
  if (zero == 0) return;
  int64_t first = -1, others = -1;
  for (int64_t i = 0; i < n; ++i) {
    bool finite = true;
    for (int k = 0; k < per_event; ++k) finite = finite && std::isfinite(energy[i * per_event + k]);
    if (finite) continue;
    if (first < 0) first = i;
    ++others;
  }
  throw Error(FUSED_EBM_NOT_FINITE, "event " + std::to_string(first) +
                                        (others > 0 ? " (and " + std::to_string(others) + " more)" : "") + ": " +
                                        reason(m, x + first * m.features()));
}

Events events_at(const float* x, int32_t level, const int32_t* levels, float* energy, float* score) {
  Events events{};
  events.x = x;
  events.level = level;
  events.levels = levels;
  events.energy = energy;
  events.score = score;
  return events;
}

}  // namespace

const char* fused_ebm_version(void) { return FUSED_EBM_VERSION; }

const char* fused_ebm_last_error(void) { return last_error.c_str(); }

int fused_ebm_open(const char* path, fused_ebm_model** model) {
  return guarded([&] {
    need(model, "the place for the model");
    *model = nullptr;
    need(path, "path");
    *model = new fused_ebm_model(read_file(path));
  });
}

void fused_ebm_close(fused_ebm_model* model) { delete model; }

int fused_ebm_set_deterministic(fused_ebm_model* model, int on) {
  return guarded([&] {
    need(model, "model");
    model->deterministic = on != 0;
  });
}

int32_t fused_ebm_n_features(const fused_ebm_model* model) { return model ? model->features() : -1; }

int32_t fused_ebm_n_levels(const fused_ebm_model* model) { return model ? model->levels() : -1; }

int32_t fused_ebm_default_level(const fused_ebm_model* model) { return model ? model->file.default_level : -1; }

float fused_ebm_threshold(const fused_ebm_model* model) {
  return model ? model->file.threshold : std::numeric_limits<float>::quiet_NaN();
}

const char* fused_ebm_feature(const fused_ebm_model* model, int32_t j) {
  return model && j >= 0 && j < model->features() ? model->file.features[j].c_str() : nullptr;
}

const char* fused_ebm_isa(const fused_ebm_model* model) { return model ? model->packed.kernels().name : nullptr; }

const char* fused_ebm_digest(const fused_ebm_model* model) { return model ? model->file.digest.c_str() : nullptr; }

int fused_ebm_score(const fused_ebm_model* model, const float* x, int64_t n, int32_t level, float* energy,
                    float* score, uint8_t* flag, int threads) {
  return guarded([&] {
    const bool work = check_call(model, x, n, energy, threads);
    check_level(*model, level);
    const float threshold = model->file.threshold;
    if (flag && std::isnan(threshold)) refuse("flags of a model without a threshold: calibrate it first");
    if (flag && level != model->file.default_level)
      refuse("flags at noise level " + std::to_string(level) + ", the threshold is of level " +
                        std::to_string(model->file.default_level));
    if (!work) return;
    model->packed.run(events_at(x, level, nullptr, energy, score), n, threads, model->deterministic);
    for (int64_t i = 0; flag && i < n; ++i) flag[i] = energy[i] > threshold;
    check_finite(*model, x, n, energy, 1);
  });
}

int fused_ebm_score_levels(const fused_ebm_model* model, const float* x, int64_t n, const int32_t* levels,
                           float* energy, float* score, int threads) {
  return guarded([&] {
    if (!check_call(model, x, n, energy, threads)) return;
    need(levels, "levels");
    for (int64_t i = 0; i < n; ++i) check_level(*model, levels[i], i);
    model->packed.run(events_at(x, 0, levels, energy, score), n, threads, model->deterministic);
    check_finite(*model, x, n, energy, 1);
  });
}

int fused_ebm_energies(const fused_ebm_model* model, const float* x, int64_t n, float* energies, int threads) {
  return guarded([&] {
    if (!check_call(model, x, n, energies, threads)) return;
    model->packed.run_all_levels(events_at(x, 0, nullptr, energies, nullptr), n, threads);
    check_finite(*model, x, n, energies, model->levels());
  });
}
