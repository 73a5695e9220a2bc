// What the rest of the library knows of the compiled kernels: a packed model, and one table of functions per
// instruction set.
#pragma once

#include <cstdint>

namespace fused_ebm {

// Widths are padded with zeros to a multiple of this, the widest vector.
constexpr int kPadding = 16;

// Sizes as the kernels see them: `features` as given, `hidden` padded by zero weights.
struct Sizes {
  int features, hidden, layers, levels;
};

// Per-feature preprocessing, arrays of `features` padded by zeros to a multiple of kPadding (see ebm/preprocess.py).
struct Preprocessing {
  const float *marker, *impute, *inv_scale, *mean, *inv_std;
  const int32_t* transform;  // 0 identity, 1 log1p, 2 asinh
  bool all_identity;
};

// Three arrangements of the same weights. `blocks` (few events), of kLanes x kLanes, serves both
// directions; `forward` and `backward` (tiles of events) have panels of kPanel outputs, input by input.
struct Matrix {
  int rows, columns;  // padded
  const float *blocks, *forward, *backward;
};

// A matrix in 8-bit digits, as int8.h and digits.h use it: panels of 16 outputs, steps of kStep inputs. Widths are then
// padded to whole steps.
constexpr int kStep = 64;

struct DigitMatrix {
  int panels, steps;
  // [panel][step][digit][16 groups][output][4 inputs]; input b of group g is 16 (g % 4) + 4 (g / 4) + b of the step, the
  // order in which digits.h packs activations fastest.
  const int8_t* weights;
  const int32_t* offsets;  // [panel][level][output]: what sums on vectors begin at
  const float* scale;      // [panel][output]: of the sums, but for the event's own
};
struct DigitMatrices {
  DigitMatrix forward, backward;
};

// Static, like all that is compiled once per instruction set: a copy built for a newer processor must not be linked into
// code for an older one.
//
// Levels of products of digits that are summed.
static inline constexpr int levels_of(int digits) { return digits == 3 ? 4 : 2 * digits - 1; }

// The largest whole number that so many balanced digits are made of.
static inline constexpr float limit_of(int digits) { return digits == 3 ? 127 * 65536.0f : digits == 2 ? 127 * 256.0f : 127.0f; }

struct Model {
  Sizes sizes;
  Preprocessing preprocessing;
  const Matrix* matrices;       // W_in, W_1, ..., W_n as float32, or null
  const DigitMatrices* digits;  // the same in digits, or null
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

// How a model is computed in one precision.
struct Passes {
  int digits;       // 8-bit digits of a weight; 0: float32
  int lanes, tile;  // events go in multiples of the first, at most the second
  int64_t few;      // up to so many events, few_pass is faster than a tile that is mostly padding (measured)
  int64_t share;    // products that a thread must find to do: a tenth of a millisecond, as long as waking it takes

  // Floats of scratch that one thread needs for a model.
  int64_t (*scratch_size)(const Sizes&);
  // Events [first, last), at most a tile of them, through all layers; scratch is 64-byte aligned.
  void (*tile_pass)(const Model&, const Events&, int64_t first, int64_t last, float* scratch);
  // The same for every noise level, W_in u computed once; `energy` is (n, levels).
  void (*all_levels_pass)(const Model&, const Events&, int64_t first, int64_t last, float* scratch);
  // The first n events, a few at a time, at the least latency.
  void (*few_pass)(const Model&, const Events&, int64_t n, float* scratch);
};

// `products` as they are, or few where small batches are to go on threads, too.
#ifdef FUSED_EBM_SHARE
static inline constexpr int64_t share_of(int64_t) { return FUSED_EBM_SHARE; }
#else
static inline constexpr int64_t share_of(int64_t products) { return products; }
#endif

enum Precision { kFloat32, kInt16, kInt8, kPrecisions };

struct Kernels {
  const char* name;
  const Passes* passes[kPrecisions];  // null where this instruction set has none
  int lanes, panel;                   // floats in a vector, outputs of a panel of float32 weights

  // For measuring the machine: 2 * multiply-adds done, and the sum of an array of floats.
  double (*multiply_add)(int64_t iterations);
  float (*read)(const float* data, int64_t size);
  // The same as multiply_add in three digits on tiles, or null.
  double (*multiply_tiles)(int64_t iterations) = nullptr;
};

extern const Kernels kGenericKernels;
#ifdef FUSED_EBM_X86
extern const Kernels kAvx2Kernels, kAvx512Kernels;
// In digits, by Precision.
extern const Passes kAmxPasses[kPrecisions], kVnniPasses[kPrecisions];
double multiply_tiles(int64_t iterations);
#endif

// The best instruction set of this processor, or the one that FUSED_EBM_ISA names. Throws std::runtime_error
// where that one is unknown or cannot run here.
const Kernels& kernels();

}  // namespace fused_ebm
