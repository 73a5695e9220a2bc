// A few events at the least latency: every weight is read twice, from one copy, for all of them.
//
// A matrix lies in blocks of kLanes x kLanes. Forward, a row of blocks gives kLanes dot products for each event, summed
// across lanes at the end; backward, the same rows are added up, each times its unit's gradient. The order of an
// event's sums does not depend on how many events go together.
#pragma once

#include "tile.h"

namespace {

constexpr int kFew = 4;  // events together at most: with them the work no longer waits for the weights

// z[e] of kLanes units: rows [block * kLanes, ...) of the matrix times in[e], which are `stride` floats apart.
template <int E>
INLINE void dot_block(const Matrix& w, int block, const float* in, int stride, Vec (&z)[E]) {
  constexpr int kRows = kLanes / E;  // at a time: kLanes sums stay in registers
  const float* p = w.blocks + static_cast<int64_t>(block) * kLanes * w.columns;
  Vec rows[E][kLanes];
  for (int first = 0; first < kLanes; first += kRows) {
    Vec sums[E][kRows] = {};
    for (int c = 0; c < w.columns; c += kLanes) {
      const float* at = p + (c + first) * kLanes;
      Vec a[E];
#pragma GCC unroll 4
      for (int e = 0; e < E; ++e) a[e] = load(in + e * stride + c);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec row = load(at + r * kLanes);
#pragma GCC unroll 4
        for (int e = 0; e < E; ++e) sums[e][r] = multiply_add(a[e], row, sums[e][r]);
      }
    }
#pragma GCC unroll 4
    for (int e = 0; e < E; ++e)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) rows[e][first + r] = sums[e][r];
  }
#pragma GCC unroll 4
  for (int e = 0; e < E; ++e) z[e] = sum_across(rows[e]);
}

// out[e][c] += sum_r q[e][r] w[r][c] for `Width` vectors of columns, from column `first` on.
template <int E, int Width>
INLINE void add_rows(const Matrix& w, const float* q, int q_stride, int first, float* out, int out_stride) {
  Vec sums[E][Width];
#pragma GCC unroll 4
  for (int e = 0; e < E; ++e)
#pragma GCC unroll 16
    for (int c = 0; c < Width; ++c) sums[e][c] = load(out + e * out_stride + first + c * kLanes);
  // The last rows first: of the last layer they are still in L1 from the way up.
  for (int block = w.rows - kLanes; block >= 0; block -= kLanes) {
    const float* p = w.blocks + static_cast<int64_t>(block) * w.columns + first * kLanes;
#pragma GCC unroll 2
    for (int r = 0; r < kLanes; ++r) {
      Vec q_r[E];
#pragma GCC unroll 4
      for (int e = 0; e < E; ++e) q_r[e] = broadcast(q[e * q_stride + block + r]);
#pragma GCC unroll 16
      for (int c = 0; c < Width; ++c) {
        const Vec row = load(p + (c * kLanes + r) * kLanes);
#pragma GCC unroll 4
        for (int e = 0; e < E; ++e) sums[e][c] = multiply_add(q_r[e], row, sums[e][c]);
      }
    }
  }
#pragma GCC unroll 4
  for (int e = 0; e < E; ++e)
#pragma GCC unroll 16
    for (int c = 0; c < Width; ++c) store(out + e * out_stride + first + c * kLanes, sums[e][c]);
}

template <int E>
INLINE void add_transposed(const Matrix& w, const float* q, int q_stride, float* out, int out_stride) {
  constexpr int kWide = (kLanes == 16 ? 16 : 8) / E;  // half of the registers
  int c = 0;
  for (; c + kLanes * kWide <= w.columns; c += kLanes * kWide) add_rows<E, kWide>(w, q, q_stride, c, out, out_stride);
  if constexpr (kWide > 4)
    for (; c + kLanes * 4 <= w.columns; c += kLanes * 4) add_rows<E, 4>(w, q, q_stride, c, out, out_stride);
  for (; c < w.columns; c += kLanes) add_rows<E, 1>(w, q, q_stride, c, out, out_stride);
}

// Events first ... first + E - 1. Scratch arrays are [event][unit].
template <int E, bool Score>
INLINE void few(const Model& m, const Events& events, int64_t first, float* scratch) {
  const int features = m.sizes.features, hidden = m.sizes.hidden, layers = m.sizes.layers;
  const int inputs = m.matrices[0].columns;
  const auto take = [&scratch](int size) { return (scratch += E * size) - E * size; };
  float *u = take(inputs), *slope = take(inputs), *h = take(hidden), *h_next = take(hidden), *q = take(hidden),
        *g = take(hidden), *derivative = take((layers + 1) * hidden);
  const int kept = E * hidden;  // from one layer's derivatives to the next's

  const Preprocessing& pre = m.preprocessing;
  for (int e = 0; e < E; ++e) {
    float* row = u + e * inputs;
    for (int j = 0; j < features; ++j) row[j] = events.x[(first + e) * features + j];
    for (int j = features; j < inputs; ++j) row[j] = 0;
    for (int j = 0; j < inputs; j += kLanes) {
      Vec values[1] = {load(row + j)}, derivative_of_u[1];
      preprocess(pre.all_identity, values, features_from(pre, j), derivative_of_u);
      store(row + j, values[0]);
      store(slope + e * inputs + j, derivative_of_u[0]);
    }
  }

  Vec z[E];
  for (int o = 0; o < hidden; o += kLanes) {
    dot_block<E>(m.matrices[0], o / kLanes, u, inputs, z);
    EACH(e, z) {
      const int64_t level = events.levels ? events.levels[first + e] : events.level;
      z[e] += load(m.b_in + level * hidden + o);
    }
    activate<Score>(z, derivative + o, hidden);
    EACH(e, z) store(h + e * hidden + o, z[e]);
  }
  for (int i = 0; i < layers; ++i) {
    for (int o = 0; o < hidden; o += kLanes) {
      dot_block<E>(m.matrices[i + 1], o / kLanes, h, hidden, z);
      EACH(e, z) z[e] += load(m.b + i * hidden + o);
      activate<Score>(z, derivative + (i + 1) * kept + o, hidden);
      EACH(e, z) store(h_next + e * hidden + o, load(h + e * hidden + o) + z[e]);
    }
    float* swap = h;
    h = h_next;
    h_next = swap;
  }
  for (int e = 0; e < E; ++e) {
    Vec energy = {};
    for (int o = 0; o < hidden; o += kLanes)
      energy = multiply_add(load(m.w_out + o), load(h + e * hidden + o), energy);
    events.energy[first + e] = m.b_out + sum(energy);
  }

  if constexpr (Score) {
    for (int e = 0; e < E; ++e)
      for (int o = 0; o < hidden; o += kLanes) store(g + e * hidden + o, load(m.w_out + o));
    for (int i = layers; i >= 0; --i) {
      for (int at = 0; at < kept; at += kLanes) store(q + at, load(g + at) * load(derivative + i * kept + at));
      if (i > 0) add_transposed<E>(m.matrices[i], q, hidden, g, hidden);
    }
    for (int at = 0; at < E * inputs; at += kLanes) store(u + at, Vec{});
    add_transposed<E>(m.matrices[0], q, hidden, u, inputs);
    for (int at = 0; at < E * inputs; at += kLanes) store(u + at, load(u + at) * -load(slope + at));
    for (int e = 0; e < E; ++e)
      for (int j = 0; j < features; ++j) events.score[(first + e) * features + j] = u[e * inputs + j];
  }
}

}  // namespace
