#include "model.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "pool.h"

namespace fused_ebm {
namespace {

int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// Takes arrays out of one block of memory; with no memory yet, only counts.
struct Arena {
  float* at;
  int64_t used = 0;

  float* take(int64_t floats) {
    float* p = at ? at + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return p;
  }
};

float* padded_copy(Arena& arena, const float* from, int64_t rows, int columns, int padded) {
  float* to = arena.take(rows * padded);
  if (to)
    for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * padded, from + r * columns, sizeof(float) * columns);
  return to;
}

// w[o][k] = from[o * row_step + k * column_step], packed as panels of outputs; see kernel.h.
float* panels(Arena& arena, const float* from, int outputs, int padded_outputs, int depth, int padded_depth,
              int64_t row_step, int64_t column_step, int panel) {
  float* to = arena.take(static_cast<int64_t>(padded_outputs) * padded_depth);
  for (int first = 0; to && first < outputs; first += panel) {
    const int width = std::min(panel, padded_outputs - first);
    for (int k = 0; k < depth; ++k)
      for (int o = first; o < std::min(first + width, outputs); ++o)
        to[static_cast<int64_t>(first) * padded_depth + k * width + o - first] = from[o * row_step + k * column_step];
  }
  return to;
}

float* blocks(Arena& arena, const float* from, int rows, int columns, const Matrix& m, int lanes) {
  float* to = arena.take(static_cast<int64_t>(m.rows) * m.columns);
  if (to)
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < columns; ++c)
        to[static_cast<int64_t>(r - r % lanes) * m.columns + (c - c % lanes) * lanes + r % lanes * lanes + c % lanes] =
            from[static_cast<int64_t>(r) * columns + c];
  return to;
}

// w[o][k] = from[o * row_step + k * column_step], packed in digits; see kernel.h.
DigitMatrix digit_matrix(Arena& arena, const float* from, int outputs, int padded_outputs, int inputs,
                         int64_t row_step, int64_t column_step, int digits) {
  const int levels = levels_of(digits);
  DigitMatrix m{padded_outputs / 16, round_up(inputs, kStep) / kStep, nullptr, nullptr, nullptr};
  const int room = round_up(m.panels, 4);  // some kernels take four together
  const int64_t block = int64_t{m.steps} * digits * 1024;
  auto* weights = reinterpret_cast<int8_t*>(arena.take(room * block / 4));
  auto* offsets = reinterpret_cast<int32_t*>(arena.take(room * levels * 16));
  float* scale = arena.take(m.panels * 16);
  m.weights = weights, m.offsets = offsets, m.scale = scale;
  for (int o = 0; weights && o < outputs; ++o) {
    const auto w = [&](int k) { return double{from[o * row_step + k * column_step]}; };
    double largest = 0;
    for (int k = 0; k < inputs; ++k) largest = std::max(largest, std::fabs(w(k)));
    if (largest == 0) continue;
    // Sums are in units of the last level kept.
    const int dropped = 2 * (digits - 1) - (levels - 1);
    scale[o] = static_cast<float>(std::ldexp(largest / limit_of(digits), 8 * dropped));
    int64_t totals[3] = {};
    for (int k = 0; k < inputs; ++k) {
      int64_t rest = std::llrint(w(k) / largest * limit_of(digits));
      const int group = k % 16 / 4 * 4 + k % 64 / 16;
      for (int j = digits - 1; j >= 0; --j) {
        const auto digit = static_cast<int8_t>(rest);
        rest = (rest - digit) / 256;
        totals[j] += digit;
        weights[o / 16 * block + (int64_t{k / 64} * digits + j) * 1024 + group * 64 + o % 16 * 4 + k % 4] = digit;
      }
    }
    for (int i = 0; i < digits; ++i)
      for (int j = 0; j < digits && i + j < levels; ++j)
        offsets[(o / 16 * levels + i + j) * 16 + o % 16] -= static_cast<int32_t>(128 * totals[j]);
  }
  return m;
}

float* scratch(int64_t floats) {
  thread_local Buffer memory{nullptr, &std::free};
  thread_local int64_t size = 0;
  if (size < floats) {
    memory = allocate(floats);
    size = floats;
  }
  return memory.get();
}

const Passes& passes_of(const Kernels& kernels, Precision precision) {
  static constexpr const char* kNames[kPrecisions] = {"fp32", "int16", "int8"};
  if (const Passes* passes = kernels.passes[precision]) return *passes;
  throw std::runtime_error(std::string("precision ") + kNames[precision] + " needs AVX-512 VNNI or AMX, here the " +
                           kernels.name + " kernels run");
}

}  // namespace

Buffer allocate(int64_t floats) {
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t bytes = sizeof(float) * floats;
  const size_t alignment = bytes >= kHugePage / 8 ? kHugePage : 64;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* p = std::aligned_alloc(alignment, rounded);
  if (!p) throw std::bad_alloc();
  if (alignment == kHugePage) madvise(p, rounded, MADV_HUGEPAGE);  // a hint: fewer address translations
  std::memset(p, 0, rounded);
  return Buffer(static_cast<float*>(p), &std::free);
}

PackedModel::PackedModel(const Weights& w, Precision precision)
    : kernels_(fused_ebm::kernels()), passes_(passes_of(kernels_, precision)) {
  const int features = w.sizes.features, hidden = w.sizes.hidden, layers = w.sizes.layers, levels = w.sizes.levels;
  const int padded = round_up(hidden, passes_.digits > 0 ? kStep : kPadding), inputs = round_up(features, kPadding), lanes = kernels_.lanes;
  model_.sizes = {features, padded, layers, levels};
  std::vector<float> inv_scale(features);
  std::transform(w.scale, w.scale + features, inv_scale.begin(), [](float scale) { return 1 / scale; });
  // W_in, W_1, ...
  const auto from = [&](int i) { return i == 0 ? w.w_in : w.w + static_cast<int64_t>(i - 1) * hidden * hidden; };

  const auto pack = [&](Arena arena) {
    matrices_.clear();
    digits_.clear();
    for (int i = 0; passes_.digits > 0 && i <= layers; ++i) {
      const int columns = i == 0 ? features : hidden;
      digits_.push_back(
          {digit_matrix(arena, from(i), hidden, padded, columns, columns, 1, passes_.digits),
           digit_matrix(arena, from(i), columns, i == 0 ? inputs : padded, hidden, 1, columns, passes_.digits)});
    }
    for (int i = 0; passes_.few > 0 && i <= layers; ++i) {
      Matrix m{padded, i == 0 ? inputs : padded, nullptr, nullptr, nullptr};
      m.blocks = blocks(arena, from(i), hidden, i == 0 ? features : hidden, m, lanes);
      matrices_.push_back(m);
    }
    // The arrangements of a kind together: a batch of one touches the blocks alone.
    for (int i = 0; passes_.digits == 0 && i <= layers; ++i) {
      const int columns = i == 0 ? features : hidden, depth = i == 0 ? features : padded;
      matrices_[i].forward = panels(arena, from(i), hidden, padded, columns, depth, columns, 1, kernels_.panel);
      matrices_[i].backward = panels(arena, from(i), columns, i == 0 ? round_up(features, 4) : padded, hidden, padded, 1,
                                     columns, kernels_.panel);
    }
    model_.b_in = padded_copy(arena, w.b_in, levels, hidden, padded);
    model_.b = padded_copy(arena, w.b, layers, hidden, padded);
    model_.w_out = padded_copy(arena, w.w_out, 1, hidden, padded);
    Preprocessing& p = model_.preprocessing;
    p.marker = padded_copy(arena, w.marker, 1, features, inputs);
    p.impute = padded_copy(arena, w.impute, 1, features, inputs);
    p.inv_scale = padded_copy(arena, inv_scale.data(), 1, features, inputs);
    p.mean = padded_copy(arena, w.mean, 1, features, inputs);
    p.inv_std = padded_copy(arena, w.inv_std, 1, features, inputs);
    p.transform = reinterpret_cast<const int32_t*>(
        padded_copy(arena, reinterpret_cast<const float*>(w.transform), 1, features, inputs));
    return arena.used;
  };
  memory_ = allocate(pack(Arena{nullptr}));
  pack(Arena{memory_.get()});
  model_.b_out = w.b_out;
  model_.matrices = matrices_.data();
  model_.digits = digits_.data();
  model_.preprocessing.all_identity = std::all_of(w.transform, w.transform + features, [](int t) { return t == 0; });
}

void PackedModel::run_tiles(Pass pass, const Events& events, int64_t n, int levels, int threads) const {
  const Sizes& s = model_.sizes;
  const int64_t work = n * (s.features + int64_t{levels} * s.layers * s.hidden) * s.hidden;
  threads = static_cast<int>(std::clamp<int64_t>(work / passes_.share, 1, threads));
  // Smaller tiles where there are not enough events to give every thread a full one.
  const int share = static_cast<int>(std::min<int64_t>(passes_.tile, (n + threads - 1) / threads));
  const int64_t tile = std::min(passes_.tile, round_up(share, passes_.lanes));
  const int64_t size = passes_.scratch_size(model_.sizes);
  parallel_for((n + tile - 1) / tile, threads, [&](int64_t i) {
    pass(model_, events, i * tile, std::min(n, (i + 1) * tile), scratch(size));
  });
}

void PackedModel::run(const Events& events, int64_t n, int threads, bool deterministic) const {
  if (n <= passes_.few && !deterministic) {
    passes_.few_pass(model_, events, n, scratch(passes_.scratch_size(model_.sizes)));
  } else {
    run_tiles(passes_.tile_pass, events, n, 1, threads);
  }
}

void PackedModel::run_all_levels(const Events& events, int64_t n, int threads) const {
  run_tiles(passes_.all_levels_pass, events, n, model_.sizes.levels, threads);
}

}  // namespace fused_ebm
