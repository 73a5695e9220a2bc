// What the rest of the library knows of the compiled kernels: a packed model, and one table of functions per
// instruction set.
#pragma once

#include <cstdint>

namespace fused_ebm {

// Widths are padded with zeros to a multiple of this, the widest vector.
constexpr int kPadding = 16;

// Sizes as the kernels see them: `features` as given, `hidden` padded to a multiple of kPadding by zero weights.
struct Sizes {
  int features, hidden, layers, levels;
};

// Per-feature preprocessing, arrays of `features` padded by zeros to a multiple of kPadding (see ebm/preprocess.py).
struct Preprocessing {
  const float *marker, *impute, *scale, *mean, *inv_std;
  const int32_t* transform;  // 0 identity, 1 log1p, 2 asinh
  bool all_identity;
};

// Three arrangements of the same weights. `blocks` (few events), of kLanes x kLanes, serves both
// directions; `forward` and `backward` (tiles of events) have panels of kPanel outputs, input by input.
struct Matrix {
  int rows, columns;  // padded
  const float *blocks, *forward, *backward;
};

struct Model {
  Sizes sizes;
  Preprocessing preprocessing;
  const Matrix* matrices;  // W_in, W_1, ..., W_n
  const float* b_in;       // (levels, hidden): b_in + emb[k]
  const float* b;          // (layers, hidden)
  const float* w_out;      // (hidden)
  float b_out;
};

// One call's worth of events. `levels` is null where all events are at `level`; `score` null for energies alone.
struct Events {
  const float* x;         // (n, features)
  const int32_t* levels;  // (n) or null
  int32_t level;
  float* energy;  // (n), or (n, levels) for all levels
  float* score;   // (n, features) or null
};

struct Kernels {
  const char* name;
  int lanes, tile;  // floats in a vector, events in a full tile
  int panel;        // outputs of a panel

  // Floats of scratch that one thread needs for a model.
  int64_t (*scratch_size)(const Sizes&);
  // Events [first, last), at most a tile of them, through all layers; scratch is 64-byte aligned.
  void (*tile_pass)(const Model&, const Events&, int64_t first, int64_t last, float* scratch);
  // The same for every noise level, W_in u computed once; `energy` is (n, levels).
  void (*all_levels_pass)(const Model&, const Events&, int64_t first, int64_t last, float* scratch);
  // The first n events, a few at a time, at the least latency.
  void (*few_pass)(const Model&, const Events&, int64_t n, float* scratch);

  // For measuring the machine: 2 * multiply-adds done, and the sum of an array of floats.
  double (*multiply_add)(int64_t iterations);
  float (*read)(const float* data, int64_t size);
};

extern const Kernels kGenericKernels;
#ifdef FUSED_EBM_X86
extern const Kernels kAvx2Kernels, kAvx512Kernels;
#endif

// The best instruction set of this processor, or the one that FUSED_EBM_ISA names. Throws std::runtime_error
// where that one is unknown or cannot run here.
const Kernels& kernels();

}  // namespace fused_ebm
