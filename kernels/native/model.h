// A model with its weights packed for one instruction set.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "kernel.h"

namespace fused_ebm {

// Memory aligned for vectors, and to huge pages where it is large, zero at first.
using Buffer = std::unique_ptr<float[], decltype(&std::free)>;
Buffer allocate(int64_t floats);

// Plain arrays, C-contiguous; `hidden` as the network has it.
struct Weights {
  Sizes sizes;
  const float *w_in, *b_in, *w, *b, *w_out;  // (H, D), (L, H), (n, H, H), (n, H), (H)
  float b_out;
  const float *marker, *impute, *scale, *mean, *inv_std;  // (D)
  const int32_t* transform;                               // (D)
};

class PackedModel {
 public:
  // Throws std::runtime_error where this instruction set does not have the precision.
  explicit PackedModel(const Weights& weights, Precision precision = kFloat32);

  // Scores n events on at most `threads` threads, the caller's among them; small batches stay on the caller's. The bits
  // of an event depend neither on the threads nor on its place. Up to Passes::few events go a few at a time, summed in
  // another order, unless `deterministic`.
  void run(const Events& events, int64_t n, int threads, bool deterministic) const;
  // Energies (n, levels).
  void run_all_levels(const Events& events, int64_t n, int threads) const;

  const Sizes& sizes() const { return model_.sizes; }
  const Kernels& kernels() const { return kernels_; }

 private:
  using Pass = void (*)(const Model&, const Events&, int64_t, int64_t, float*);
  void run_tiles(Pass pass, const Events& events, int64_t n, int levels, int threads) const;

  const Kernels& kernels_;
  const Passes& passes_;
  Model model_{};
  Buffer memory_{nullptr, &std::free};
  std::vector<Matrix> matrices_;
  std::vector<DigitMatrices> digits_;
};

}  // namespace fused_ebm
