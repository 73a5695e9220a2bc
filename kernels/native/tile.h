// A tile of events through all layers and back, its activations staying in cache.
//
// Arrays of a tile are [feature or unit][event], so that a vector holds one unit of kLanes events and every
// weight is broadcast. No lane ever meets another: an event gives the same bits wherever it stands in a batch.
#pragma once

#include "kernel.h"
#include "vec.h"

namespace {

using fused_ebm::Events;
using fused_ebm::Matrix;
using fused_ebm::Model;
using fused_ebm::Preprocessing;

INLINE int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

// The preprocessing of one feature (broadcast), or of kLanes features.
struct FeatureVec {
  Vec marker, impute, inv_scale, mean, inv_std;
  IntVec transform;
};

INLINE FeatureVec feature(const Preprocessing& p, int j) {
  return {broadcast(p.marker[j]), broadcast(p.impute[j]), broadcast(p.inv_scale[j]), broadcast(p.mean[j]),
          broadcast(p.inv_std[j]), p.transform[j] - IntVec{}};
}

INLINE FeatureVec features_from(const Preprocessing& p, int j) {
  return {load(p.marker + j), load(p.impute + j), load(p.inv_scale + j), load(p.mean + j), load(p.inv_std + j),
          *reinterpret_cast<const IntVec*>(p.transform + j)};
}

// u in place of raw values x, and du/dx.
template <bool Identity, int N>
INLINE void preprocess(Vec (&x)[N], const FeatureVec& f, Vec (&slope)[N]) {
  IntVec missing[N];
  EACH(i, x) missing[i] = (x[i] != x[i]) | (x[i] == f.marker);
  EACH(i, x) x[i] = missing[i] ? f.impute : x[i];
  EACH(i, x) slope[i] = f.inv_std;
  if constexpr (!Identity) {
    const IntVec is_log1p = f.transform == 1, is_asinh = f.transform == 2, is_either = is_log1p | is_asinh;
    // asinh r = log1p(r + r^2 / (1 + sqrt(1 + r^2))); beyond 1e9, where r^2 may overflow, asinh r = log(2 r).
    Vec size[N], ratio[N], root[N], divisor[N], inverse[N], squashed[N];
    EACH(i, x) size[i] = absolute(x[i]);
    EACH(i, x) ratio[i] = size[i] * f.inv_scale;
    EACH(i, x) root[i] = square_root(multiply_add(ratio[i], ratio[i], broadcast(1.0f)));
    EACH(i, x) divisor[i] = 1.0f + root[i];
    reciprocal(divisor, inverse);
    EACH(i, x) {
      const Vec grown = multiply_add(ratio[i] * ratio[i], inverse[i], ratio[i]);
      squashed[i] = is_asinh ? (ratio[i] < 1e9f ? grown : 2.0f * ratio[i]) : size[i];
    }
    EACH(i, x) divisor[i] = is_log1p ? 1.0f + size[i] : ratio[i] < 1e9f ? root[i] : ratio[i];
    log1p(squashed, size);
    reciprocal(divisor, inverse);
    EACH(i, x) slope[i] = is_either ? f.inv_std * (is_asinh ? inverse[i] * f.inv_scale : inverse[i]) : f.inv_std;
    EACH(i, x) x[i] = is_either ? copy_sign(size[i], x[i]) : x[i];
  }
  EACH(i, x) slope[i] = missing[i] ? Vec{} : slope[i];
  EACH(i, x) x[i] = (x[i] - f.mean) * f.inv_std;
}

template <int N>
INLINE void preprocess(bool identity, Vec (&x)[N], const FeatureVec& f, Vec (&slope)[N]) {
  identity ? preprocess<true>(x, f, slope) : preprocess<false>(x, f, slope);
}

// The longest chain of rounding errors: longer sums are made in parts, so that a wide layer is no less accurate.
constexpr int kChain = 256;

// Outputs that an epilogue takes together, so that it does not wait for itself.
template <int Vectors>
constexpr int kTogether = Vectors == 1 ? 4 : Vectors == 2 ? 2 : 1;

// The micro-kernel: Outputs x Vectors sums over `depth` inputs, all in registers.
template <int Outputs, int Vectors, class Epilogue>
INLINE void panel(const float* w, const float* in, int depth, int first, const Epilogue& epilogue) {
  Vec sums[Outputs][Vectors] = {}, parts[Outputs][Vectors];
  for (int begin = 0; begin < depth; begin += kChain) {
    if (begin > 0)
      for (int o = 0; o < Outputs; ++o)
        for (int v = 0; v < Vectors; ++v) {
          parts[o][v] = begin == kChain ? sums[o][v] : parts[o][v] + sums[o][v];
          sums[o][v] = Vec{};
        }
    const int end = depth - begin < kChain ? depth : begin + kChain;
#pragma GCC unroll 2
    for (int k = begin; k < end; ++k) {
      Vec a[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) a[v] = load(in + (k * Vectors + v) * kLanes);
#pragma GCC unroll 16
      for (int o = 0; o < Outputs; ++o) {
        const Vec weight = broadcast(w[k * Outputs + o]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sums[o][v] = multiply_add(weight, a[v], sums[o][v]);
      }
    }
  }
  if (depth > kChain) EACH(i, sums) sums[i / Vectors][i % Vectors] += parts[i / Vectors][i % Vectors];
#pragma GCC unroll 16
  for (int o = 0; o < Outputs; o += kTogether<Vectors>) {
    Vec z[kTogether<Vectors> * Vectors];
    EACH(i, z) z[i] = sums[o + i / Vectors][i % Vectors];
    epilogue(first + o, z);
  }
}

// out[o] = sum_k w[o][k] in[k] for `rows` outputs (a multiple of 4); an epilogue takes the vectors of a few together:
// that of output o + i / Vectors and vector i % Vectors is z[i].
template <int Vectors, class Epilogue>
__attribute__((noinline)) void layer(const float* w, const float* in, int rows, int depth, const Epilogue& epilogue) {
  int o = 0;
  for (; o + kPanel <= rows; o += kPanel) panel<kPanel, Vectors>(w + o * depth, in, depth, o, epilogue);
  if constexpr (kPanel > 8)
    if (rows - o == 8) return panel<8, Vectors>(w + o * depth, in, depth, o, epilogue);
  if (rows - o == 4) panel<4, Vectors>(w + o * depth, in, depth, o, epilogue);
}

// Scratch of one thread, for a tile of kVectors vectors.
struct TileScratch {
  float *u, *slope, *bias, *h, *h_next, *q, *q_next, *g, *derivative;

  template <int Vectors>
  static INLINE TileScratch carve(float* p, const fused_ebm::Sizes& s) {
    const int64_t width = Vectors * kLanes, input = round_up(s.features, fused_ebm::kPadding) * width, unit = s.hidden * width;
    const auto take = [&p](int64_t size) { return (p += size) - size; };
    TileScratch t;
    t.u = take(input), t.slope = take(input);
    t.bias = take(unit), t.h = take(unit), t.h_next = take(unit), t.q = take(unit), t.q_next = take(unit);
    t.g = take(unit), t.derivative = take((s.layers + 1) * unit);
    return t;
  }

  static int64_t size(const fused_ebm::Sizes& s) {
    const int64_t width = kVectors * kLanes;
    return width * (2 * round_up(s.features, fused_ebm::kPadding) + static_cast<int64_t>(s.hidden) * (6 + s.layers + 1));
  }
};

// Read a tile of events, [event][feature] -> [feature][event], and preprocess it.
template <int Vectors>
INLINE void read_tile(const Model& m, const float* x, int count, TileScratch& t) {
  constexpr int kWidth = Vectors * kLanes;
  const int features = m.sizes.features;
  for (int j = 0; j < features; ++j) {
    float* column = t.u + j * kWidth;
    for (int e = 0; e < count; ++e) column[e] = x[e * static_cast<int64_t>(features) + j];
    for (int e = count; e < kWidth; ++e) column[e] = 0;
    Vec values[Vectors], slope[Vectors];
    EACH(v, values) values[v] = load(column + v * kLanes);
    preprocess(m.preprocessing.transform[j] == 0, values, feature(m.preprocessing, j), slope);
    EACH(v, values) store(column + v * kLanes, values[v]);
    EACH(v, values) store(t.slope + j * kWidth + v * kLanes, slope[v]);
  }
}

// silu(z) in place of z, and where it is kept silu'(z), the vectors of it `stride` floats apart.
template <bool Keep, int N>
INLINE void activate(Vec (&z)[N], float* derivative, int stride = kLanes) {
  Vec s[N];
  sigmoid(z, s);
  EACH(i, z) z[i] *= s[i];
  if constexpr (Keep) EACH(i, z) store(derivative + i * stride, multiply_add(z[i], 1.0f - s[i], s[i]));
}

// The residual layers from h_0 (in t.h), energy of each event out. With Keep, the derivatives are kept and
// t.q holds w_out * silu'(z_n), where the backward pass begins.
template <int Vectors, bool Keep>
INLINE void forward(const Model& m, TileScratch& t, Vec (&energy)[Vectors]) {
  constexpr int kWidth = Vectors * kLanes;
  const int hidden = m.sizes.hidden, layers = m.sizes.layers;
  Vec lost[Vectors] = {};  // Kahan: what rounding the energy has dropped so far
  for (int v = 0; v < Vectors; ++v) energy[v] = broadcast(m.b_out);
  for (int i = 0; i < layers; ++i) {
    const float *b = m.b + i * hidden, *h = t.h, *w_out = m.w_out;
    float *h_next = t.h_next, *q = t.q, *derivative = t.derivative + (i + 1) * hidden * kWidth;
    if (i + 1 < layers) {
      layer<Vectors>(m.matrices[i + 1].forward, h, hidden, hidden, [=](int o, auto& z) {
        EACH(j, z) z[j] += b[o + j / Vectors];
        activate<Keep>(z, derivative + o * kWidth);
        EACH(j, z) store(h_next + o * kWidth + j * kLanes, load(h + o * kWidth + j * kLanes) + z[j]);
      });
    } else {
      Vec *e = energy, *c = lost;
      layer<Vectors>(m.matrices[i + 1].forward, h, hidden, hidden, [=](int o, auto& z) {
        EACH(j, z) z[j] += b[o + j / Vectors];
        activate<Keep>(z, q + o * kWidth);
        EACH(j, z) {
          const int at = o * kWidth + j * kLanes, v = j % Vectors;
          const float w = w_out[o + j / Vectors];
          const Vec term = w * (load(h + at) + z[j]) - c[v], grown = e[v] + term;
          c[v] = (grown - e[v]) - term;
          e[v] = grown;
          if constexpr (Keep) store(q + at, w * load(q + at));
        }
      });
    }
    float* swap = t.h;
    t.h = t.h_next;
    t.h_next = swap;
  }
}

// The analytic backward pass: g_{i-1} = g_i + W_i^T (g_i silu'(z_i)), then dE/du = W_in^T (g_0 silu'(z_0)),
// which replaces u.
template <int Vectors>
INLINE void backward(const Model& m, TileScratch& t) {
  constexpr int kWidth = Vectors * kLanes;
  const int hidden = m.sizes.hidden, layers = m.sizes.layers;
  for (int i = layers; i >= 1; --i) {
    const bool first = i == layers;  // g_n is w_out itself
    const float *w_out = m.w_out, *derivative = t.derivative + (i - 1) * hidden * kWidth;
    float *g = t.g, *q_next = t.q_next;
    layer<Vectors>(m.matrices[i].backward, t.q, hidden, hidden, [=](int o, const auto& z) {
      EACH(j, z) {
        const int at = o * kWidth + j * kLanes;
        const Vec g_o = (first ? broadcast(w_out[o + j / Vectors]) : load(g + at)) + z[j];
        store(g + at, g_o);
        store(q_next + at, g_o * load(derivative + at));
      }
    });
    float* swap = t.q;
    t.q = t.q_next;
    t.q_next = swap;
  }
  float* u = t.u;
  layer<Vectors>(m.matrices[0].backward, t.q, round_up(m.sizes.features, 4), hidden,
                 [=](int j, const auto& z) { EACH(i, z) store(u + j * kWidth + i * kLanes, z[i]); });
}

template <int Vectors, bool Score>
INLINE void tile(const Model& m, const Events& events, int64_t first, int count, float* scratch) {
  constexpr int kWidth = Vectors * kLanes;
  const int features = m.sizes.features, hidden = m.sizes.hidden;
  TileScratch t = TileScratch::carve<Vectors>(scratch, m.sizes);
  read_tile<Vectors>(m, events.x + first * features, count, t);

  const float* b_in = m.b_in + static_cast<int64_t>(events.level) * hidden;
  float *h = t.h, *derivative = t.derivative, *bias = t.bias;
  if (events.levels == nullptr) {
    layer<Vectors>(m.matrices[0].forward, t.u, hidden, features, [=](int o, auto& z) {
      EACH(i, z) z[i] += b_in[o + i / Vectors];
      activate<Score>(z, derivative + o * kWidth);
      EACH(i, z) store(h + o * kWidth + i * kLanes, z[i]);
    });
  } else {
    for (int e = 0; e < kWidth; ++e) {
      const float* row = m.b_in + static_cast<int64_t>(events.levels[first + (e < count ? e : 0)]) * hidden;
      for (int o = 0; o < hidden; ++o) bias[o * kWidth + e] = row[o];
    }
    layer<Vectors>(m.matrices[0].forward, t.u, hidden, features, [=](int o, auto& z) {
      EACH(i, z) z[i] += load(bias + o * kWidth + i * kLanes);
      activate<Score>(z, derivative + o * kWidth);
      EACH(i, z) store(h + o * kWidth + i * kLanes, z[i]);
    });
  }

  Vec energy[Vectors];
  forward<Vectors, Score>(m, t, energy);
  for (int e = 0; e < count; ++e) events.energy[first + e] = energy[e / kLanes][e % kLanes];
  if constexpr (Score) {
    backward<Vectors>(m, t);
    float* out = events.score + first * features;
    for (int j = 0; j < features; ++j) {
      float* column = t.u + j * kWidth;
      for (int v = 0; v < kWidth; v += kLanes) store(column + v, load(column + v) * -load(t.slope + j * kWidth + v));
      for (int e = 0; e < count; ++e) out[e * static_cast<int64_t>(features) + j] = column[e];
    }
  }
}

template <int Vectors>
INLINE void tile_all_levels(const Model& m, const Events& events, int64_t first, int count, float* scratch) {
  constexpr int kWidth = Vectors * kLanes;
  const int features = m.sizes.features, hidden = m.sizes.hidden, levels = m.sizes.levels;
  TileScratch t = TileScratch::carve<Vectors>(scratch, m.sizes);
  read_tile<Vectors>(m, events.x + first * features, count, t);
  float* projected = t.g;
  layer<Vectors>(m.matrices[0].forward, t.u, hidden, features,
                 [=](int o, const auto& z) { EACH(i, z) store(projected + o * kWidth + i * kLanes, z[i]); });
  for (int k = 0; k < levels; ++k) {
    const float* b_in = m.b_in + static_cast<int64_t>(k) * hidden;
    for (int o = 0; o < hidden; o += kTogether<Vectors>) {
      Vec z[kTogether<Vectors> * Vectors];
      EACH(i, z) z[i] = load(projected + o * kWidth + i * kLanes) + b_in[o + i / Vectors];
      activate<false>(z, nullptr);
      EACH(i, z) store(t.h + o * kWidth + i * kLanes, z[i]);
    }
    Vec energy[Vectors];
    forward<Vectors, false>(m, t, energy);
    for (int e = 0; e < count; ++e) events.energy[(first + e) * levels + k] = energy[e / kLanes][e % kLanes];
  }
}

}  // namespace
