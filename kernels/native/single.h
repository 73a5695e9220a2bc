// One event at the least latency: every weight is read twice, from one copy, and nothing else matters.
//
// A matrix lies in blocks of kLanes x kLanes. Forward, a block row gives kLanes dot products, summed across lanes
// at the end; backward, the same rows are added up, each times its unit's gradient.
#pragma once

#include "tile.h"

namespace {

// kLanes outputs: rows [block * kLanes, ...) of the matrix times in.
INLINE Vec dot_block(const Matrix& w, int block, const float* in) {
  const float* p = w.blocks + static_cast<int64_t>(block) * kLanes * w.columns;
  Vec sums[kLanes] = {};
  for (int c = 0; c < w.columns; c += kLanes, p += kLanes * kLanes) {
    const Vec a = load(in + c);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) sums[r] = multiply_add(a, load(p + r * kLanes), sums[r]);
  }
  return sum_across(sums);
}

// out[c] += sum_r q[r] w[r][c] for `Width` vectors of columns, which stay in registers, from column `first` on.
template <int Width>
INLINE void add_rows(const Matrix& w, const float* q, int first, float* out) {
  Vec sums[Width];
#pragma GCC unroll 16
  for (int c = 0; c < Width; ++c) sums[c] = load(out + first + c * kLanes);
  for (int block = 0; block < w.rows; block += kLanes) {
    const float* p = w.blocks + static_cast<int64_t>(block) * w.columns + first * kLanes;
#pragma GCC unroll 2
    for (int r = 0; r < kLanes; ++r) {
      const Vec q_r = broadcast(q[block + r]);
#pragma GCC unroll 16
      for (int c = 0; c < Width; ++c) sums[c] = multiply_add(q_r, load(p + (c * kLanes + r) * kLanes), sums[c]);
    }
  }
#pragma GCC unroll 16
  for (int c = 0; c < Width; ++c) store(out + first + c * kLanes, sums[c]);
}

INLINE void add_transposed(const Matrix& w, const float* q, float* out) {
  constexpr int kWide = kLanes == 16 ? 16 : 8;  // half of the registers
  int c = 0, step = kLanes * kWide;
  for (; c + step <= w.columns; c += step) add_rows<kWide>(w, q, c, out);
  for (step = kLanes * 4; c + step <= w.columns; c += step) add_rows<4>(w, q, c, out);
  for (; c < w.columns; c += kLanes) add_rows<1>(w, q, c, out);
}

template <bool Score>
INLINE void single(const Model& m, const Events& events, int64_t event, float* p) {
  const int features = m.sizes.features, hidden = m.sizes.hidden, layers = m.sizes.layers;
  const int padded = m.matrices[0].columns;
  float *u = p, *slope = u + padded, *h = slope + padded, *h_next = h + hidden, *q = h_next + hidden,
        *g = q + hidden, *derivative = g + hidden;

  const Preprocessing& pre = m.preprocessing;
  for (int j = 0; j < features; ++j) u[j] = events.x[event * features + j];
  for (int j = features; j < padded; ++j) u[j] = 0;
  for (int j = 0; j < padded; j += kLanes) {
    const FeatureVec f = {load(pre.marker + j), load(pre.impute + j), load(pre.scale + j), load(pre.mean + j),
                          load(pre.inv_std + j), *reinterpret_cast<const IntVec*>(pre.transform + j)};
    Vec s;
    store(u + j, pre.all_identity ? preprocess<true>(load(u + j), f, s) : preprocess<false>(load(u + j), f, s));
    store(slope + j, s);
  }

  const int level = events.levels ? events.levels[event] : events.level;
  for (int o = 0; o < hidden; o += kLanes) {
    const Vec z = dot_block(m.matrices[0], o / kLanes, u) + load(m.b_in + static_cast<int64_t>(level) * hidden + o);
    store(h + o, activate<Score>(z, derivative + o));
  }
  for (int i = 0; i < layers; ++i) {
    float* d = derivative + (i + 1) * hidden;
    for (int o = 0; o < hidden; o += kLanes) {
      const Vec z = dot_block(m.matrices[i + 1], o / kLanes, h) + load(m.b + i * hidden + o);
      store(h_next + o, load(h + o) + activate<Score>(z, d + o));
    }
    float* swap = h;
    h = h_next;
    h_next = swap;
  }
  Vec energy = {};
  for (int o = 0; o < hidden; o += kLanes) energy = multiply_add(load(m.w_out + o), load(h + o), energy);
  events.energy[event] = m.b_out + sum(energy);

  if constexpr (Score) {
    for (int o = 0; o < hidden; o += kLanes) store(g + o, load(m.w_out + o));
    for (int i = layers; i >= 0; --i) {
      const float* d = derivative + i * hidden;
      for (int o = 0; o < hidden; o += kLanes) store(q + o, load(g + o) * load(d + o));
      if (i > 0) add_transposed(m.matrices[i], q, g);
    }
    for (int j = 0; j < padded; j += kLanes) store(u + j, Vec{});
    add_transposed(m.matrices[0], q, u);
    for (int j = 0; j < padded; j += kLanes) store(u + j, load(u + j) * -load(slope + j));
    float* out = events.score + event * features;
    for (int j = 0; j < features; ++j) out[j] = u[j];
  }
}

}  // namespace
