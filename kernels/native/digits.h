// Events through all layers and back, every product of a matrix in 8-bit digits (int8.h).
//
// Arrays of Rows events are [panel of 16 units][event][unit], digits [step of 64 units][digit][event][unit]. Before a
// layer each event's inputs are scaled by their largest, so that no event saturates, however unusual: with three digits
// they are whole numbers of 24 bits, as fine as a float32 of the same size.
#pragma once

#include "int8.h"
#include "tile.h"

namespace {

using fused_ebm::limit_of;

// The first n of 16 lanes.
INLINE __mmask16 lanes_below(int n) { return n < 16 ? (1u << n) - 1 : 0xffff; }

// Scratch of one thread for Rows events.
template <int Rows>
struct DigitScratch {
  float *u, *slope, *h, *g, *derivative, *inverse, *terms;
  int32_t* sums;
  uint8_t* digits;
  const float* b_in[Rows];  // of each event's noise level

  static INLINE DigitScratch carve(float* p, const fused_ebm::Sizes& s) {
    const int input = round_up(s.features, kStep) * Rows, unit = s.hidden * Rows;
    const auto take = [&p](int64_t size) { return (p += round_up(size, 16)) - round_up(size, 16); };
    DigitScratch t;
    t.u = take(input), t.slope = take(input), t.h = take(unit), t.g = take(unit);
    t.derivative = take(static_cast<int64_t>(s.layers) * unit);
    t.inverse = take(Rows), t.terms = take(Rows * 16);
    t.sums = reinterpret_cast<int32_t*>(take(kSums));
    t.digits = reinterpret_cast<uint8_t*>(take((input > unit ? input : unit) * 3 / 4));
    return t;
  }

  // Room for the sums of two panels, or of four together.
  static constexpr int64_t kSums = 4 * 4 * 16 * 16;

  static int64_t size(const fused_ebm::Sizes& s) {
    const int64_t input = round_up(s.features, kStep) * Rows, unit = s.hidden * Rows;
    return 3 * input + (s.layers + 3) * unit + 17 * Rows + 16 + kSums;
  }
};

// Values of `count` events as digits; `inverse` takes the sums back.
template <int Digits, class Engine>
INLINE void to_digits(const float* values, int steps, int count, DigitScratch<Engine::kRows>& t) {
  constexpr int kRows = Engine::kRows;
  constexpr float kLimit = limit_of(Digits);
  const IntVec halves = IntVec{} + (Digits == 3 ? 0x808080 : Digits == 2 ? 0x8080 : 0x80);
  // Within four numbers, all bytes of one digit together, the largest first.
  const __m512i gather = _mm512_broadcast_i32x4(
      Digits == 3 ? _mm_setr_epi8(2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12, 3, 7, 11, 15)
      : Digits == 2 ? _mm_setr_epi8(1, 5, 9, 13, 0, 4, 8, 12, 2, 6, 10, 14, 3, 7, 11, 15)
                    : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const auto store_digit = [](uint8_t* to, __m512i digit) {
    _mm512_store_si512(to, Engine::kOnTiles ? _mm512_xor_si512(digit, _mm512_set1_epi8(-128)) : digit);
  };
  for (int e = 0; e < count; ++e) {
    const float* row = values + e * 16;
    __m512i largest[4] = {};  // as bits: NaN above infinity above every number
    for (int step = 0; step < steps; ++step)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)
        largest[v] = _mm512_max_epi32(
            largest[v], reinterpret_cast<__m512i>(as_int(absolute(load(row + (step * 4 + v) * kRows * 16)))));
    const int32_t bits = _mm512_reduce_max_epi32(
        _mm512_max_epi32(_mm512_max_epi32(largest[0], largest[1]), _mm512_max_epi32(largest[2], largest[3])));
    float most;
    __builtin_memcpy(&most, &bits, sizeof most);
    const float unit = most > 1e-30f ? most : 1e-30f, scale = kLimit / unit;
    t.inverse[e] = unit * (1 / kLimit) + (most - most);  // NaN where a value is not finite
    for (int step = 0; step < steps; ++step) {
      __m512i n[4];
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vec scaled = load(row + (step * 4 + v) * kRows * 16) * scale;
        const IntVec whole = reinterpret_cast<IntVec>(_mm512_cvtps_epi32(scaled)) + halves;
        n[v] = _mm512_shuffle_epi8(reinterpret_cast<__m512i>(whole), gather);
      }
      uint8_t* to = t.digits + (step * Digits * kRows + e) * kStep;
      const __m512i low01 = _mm512_unpacklo_epi32(n[0], n[1]), low23 = _mm512_unpacklo_epi32(n[2], n[3]);
      store_digit(to, _mm512_unpacklo_epi64(low01, low23));
      if constexpr (Digits > 1) store_digit(to + kRows * kStep, _mm512_unpackhi_epi64(low01, low23));
      if constexpr (Digits > 2) {
        const __m512i high01 = _mm512_unpackhi_epi32(n[0], n[1]), high23 = _mm512_unpackhi_epi32(n[2], n[3]);
        store_digit(to + 2 * kRows * kStep, _mm512_unpacklo_epi64(high01, high23));
      }
    }
  }
}

// The vectors that an epilogue takes together: 16 units of some events, or one event's of four panels. The i-th is that
// of unit o + i * units on, of event e + i * events; `at` is its place in an array, where they follow one another.
template <class Engine>
struct Group {
  static constexpr int kSize = Engine::kGroup;
  static constexpr int kEvents = Engine::kRows == 1 ? 0 : 1, kUnits = Engine::kRows == 1 ? 16 : 0;
  int o, e;

  INLINE int unit(int i) const { return o + i * kUnits; }
  INLINE int event(int i) const { return e + i * kEvents; }
  INLINE int at(int i) const { return o * Engine::kRows + (e + i) * 16; }
};

// A layer: the products of a group, with addend(group, i) added, are handed to epilogue(group, z). While the tiles
// multiply for one panel, the epilogue of the panel before runs.
template <int Digits, class Engine, class Addend, class Epilogue>
INLINE void digit_layer(const DigitMatrix& w, int count, const DigitScratch<Engine::kRows>& t, const Addend& addend,
                        const Epilogue& epilogue) {
  using Group = Group<Engine>;
  constexpr int kRows = Engine::kRows, kLevels = levels_of(Digits), kSize = Group::kSize;
  const int steps = w.steps, offset_stride = kLevels * 16;
  const int64_t stride = static_cast<int64_t>(steps) * Digits * kBlock;
  const auto group = [&](const int32_t* sums, int panel, int e) {
    const Group at{panel * 16, e};
    const auto level = [&](int l, int i) {
      return __builtin_convertvector(Engine::level(sums + i * Group::kUnits / 16 * kLevels * 16, l, at.event(i)), Vec);
    };
    Vec z[kSize];
    EACH(i, z) z[i] = level(0, i);
#pragma GCC unroll 4
    for (int l = 1; l < kLevels; ++l) EACH(i, z) z[i] = multiply_add(z[i], broadcast(256.0f), level(l, i));
    EACH(i, z) z[i] = multiply_add(z[i], t.inverse[at.event(i)] * load(w.scale + at.unit(i)), addend(at, i));
    epilogue(at, z);
  };
  if constexpr (!Engine::kOnTiles) {
    constexpr int kPanels = Engine::kPanels;
    for (int p = 0; p < w.panels; p += kPanels) {
      Engine::product(t.digits, w.weights + p * stride, stride, w.offsets + p * offset_stride, offset_stride, steps,
                      count, t.sums);
      if constexpr (kRows == 1) {
        group(t.sums, p, 0);
      } else {
        for (int q = p; q < p + kPanels && q < w.panels; ++q)
          for (int e = 0; e < count; e += kSize) group(t.sums + (q - p) * kLevels * kRows * 16, q, e);
      }
    }
  } else {
    const int pauses = steps * Engine::kPauses, groups = (count + kSize - 1) / kSize;
    const int groups_a_pause = (groups + pauses - 1) / pauses;
    const int every = groups_a_pause > 1 ? 1 : pauses / groups;
    for (int p = 0; p <= w.panels; ++p) {
      int32_t* sums = t.sums + (p & 1) * 4 * 16 * 16;
      const int32_t* before = t.sums + (~p & 1) * 4 * 16 * 16;
      int e = p > 0 ? 0 : count, pause = 0;
      const auto some = [&] {
        if (++pause % every != 0) return;
        for (int end = e + groups_a_pause * kSize; e < end && e < count; e += kSize) group(before, p - 1, e);
      };
      if (p == w.panels) {
        for (; e < count; e += kSize) group(before, p - 1, e);
        break;
      }
      Engine::start();
      for (int step = 0; step < steps; ++step)
        Engine::step(t.digits + step * Digits * kRows * kStep, w.weights + p * stride + step * Digits * kBlock, some);
      Engine::finish(sums);
    }
  }
}

template <class Engine>
INLINE Vec nothing(Group<Engine>, int) { return Vec{}; }

template <int Rows>
INLINE void read_events(const Model& m, const float* x, int count, DigitScratch<Rows>& t) {
  const int features = m.sizes.features;
  const Preprocessing& p = m.preprocessing;
  for (int at = round_up(features, 16) * Rows; at < round_up(features, kStep) * Rows; at += 16) store(t.u + at, Vec{});
  for (int j = 0; j < features; j += 16) {
    const FeatureVec f = features_from(p, j);
    const __mmask16 there = lanes_below(features - j);
    constexpr int kTogether = Rows == 1 ? 1 : 4;
    for (int e = 0; e < count; e += kTogether) {
      Vec values[kTogether], slope[kTogether];
      EACH(i, values) {
        const int64_t event = e + i < count ? e + i : e;
        values[i] = _mm512_maskz_loadu_ps(there, x + event * features + j);
      }
      preprocess(p.all_identity, values, f, slope);
      EACH(i, values) if (e + i < Rows) {
        store(t.u + j * Rows + (e + i) * 16, values[i]);
        store(t.slope + j * Rows + (e + i) * 16, slope[i]);
      }
    }
  }
}

// h_1 ... h_n from h_0; energies out. With Keep, t.h ends as w_out silu'(z_n), where the backward pass begins.
template <int Digits, class Engine, bool Keep>
INLINE void digit_forward(const Model& m, int count, DigitScratch<Engine::kRows>& t, float* energy, int64_t stride) {
  constexpr int kRows = Engine::kRows;
  const int hidden = m.sizes.hidden, layers = m.sizes.layers, steps = m.digits[1].forward.steps;
  const int64_t kept = int64_t{steps} * kStep * kRows;
  for (int e = 0; e < count; ++e) store(t.terms + e * 16, Vec{});
  for (int i = 1; i <= layers; ++i) {
    to_digits<Digits, Engine>(t.h, steps, count, t);
    const float* b = m.b + (i - 1) * hidden;
    const auto bias = [b](Group<Engine> at, int i) { return load(b + at.unit(i)); };
    if (i < layers) {
      float* derivative = t.derivative + i * kept;
      digit_layer<Digits, Engine>(m.digits[i].forward, count, t, bias, [&t, derivative](Group<Engine> at, auto& z) {
        activate<Keep>(z, derivative + at.at(0));
        EACH(j, z) store(t.h + at.at(j), load(t.h + at.at(j)) + z[j]);
      });
    } else {
      digit_layer<Digits, Engine>(m.digits[i].forward, count, t, bias, [&t, &m](Group<Engine> at, auto& z) {
        Vec last[Group<Engine>::kSize];
        EACH(j, z) last[j] = load(t.h + at.at(j));
        activate<Keep>(z, t.h + at.at(0));
        EACH(j, z) {
          const Vec w_out = load(m.w_out + at.unit(j));
          float* terms = t.terms + at.event(j) * 16;
          store(terms, multiply_add(w_out, last[j] + z[j], load(terms)));
          if constexpr (Keep) store(t.h + at.at(j), w_out * load(t.h + at.at(j)));
        }
      });
    }
  }
  for (int e = 0; e < count; ++e) energy[e * stride] = m.b_out + _mm512_reduce_add_ps(load(t.terms + e * 16));
}

// g_{i-1} = g_i + W_i^T (g_i silu'(z_i)), then dE/du = W_in^T (g_0 silu'(z_0)) and the score.
template <int Digits, class Engine>
INLINE void digit_backward(const Model& m, int count, DigitScratch<Engine::kRows>& t, float* score) {
  constexpr int kRows = Engine::kRows;
  const int layers = m.sizes.layers, features = m.sizes.features, steps = m.digits[1].forward.steps;
  for (int i = layers; i >= 1; --i) {
    to_digits<Digits, Engine>(t.h, steps, count, t);
    const float* derivative = t.derivative + int64_t{i - 1} * steps * kStep * kRows;
    const bool first = i == layers;  // g_n is w_out itself
    const auto g_i = [&t, &m, first](Group<Engine> at, int j) {
      return load(first ? m.w_out + at.unit(j) : t.g + at.at(j));
    };
    digit_layer<Digits, Engine>(m.digits[i].backward, count, t, g_i, [&t, derivative](Group<Engine> at, const auto& g) {
      EACH(j, g) {
        store(t.g + at.at(j), g[j]);
        store(t.h + at.at(j), g[j] * load(derivative + at.at(j)));
      }
    });
  }
  to_digits<Digits, Engine>(t.h, steps, count, t);
  const auto store_score = [&t, features, score, count](Group<Engine> at, const auto& du) {
    EACH(j, du)
    if (at.event(j) < count && at.unit(j) < features)
      _mm512_mask_storeu_ps(score + at.event(j) * static_cast<int64_t>(features) + at.unit(j),
                            lanes_below(features - at.unit(j)), du[j] * -load(t.slope + at.at(j)));
  };
  digit_layer<Digits, Engine>(m.digits[0].backward, count, t, nothing<Engine>, store_score);
}

template <int Digits, class Engine, bool Score>
INLINE void digit_pass(const Model& m, const Events& events, int64_t first, int count, float* scratch) {
  constexpr int kRows = Engine::kRows;
  const int features = m.sizes.features, hidden = m.sizes.hidden;
  auto t = DigitScratch<kRows>::carve(scratch, m.sizes);
  read_events(m, events.x + first * features, count, t);
  to_digits<Digits, Engine>(t.u, m.digits[0].forward.steps, count, t);
  for (int e = 0; e < kRows; ++e) {
    const int64_t level = events.levels ? events.levels[first + (e < count ? e : 0)] : events.level;
    t.b_in[e] = m.b_in + level * hidden;
  }
  const auto bias = [&t](Group<Engine> at, int i) { return load(t.b_in[at.event(i)] + at.unit(i)); };
  digit_layer<Digits, Engine>(m.digits[0].forward, count, t, bias, [&t](Group<Engine> at, auto& z) {
    activate<Score>(z, t.derivative + at.at(0));
    EACH(i, z) store(t.h + at.at(i), z[i]);
  });
  digit_forward<Digits, Engine, Score>(m, count, t, events.energy + first, 1);
  if constexpr (Score) digit_backward<Digits, Engine>(m, count, t, events.score + first * features);
}

template <int Digits, class Engine>
INLINE void digit_pass_all_levels(const Model& m, const Events& events, int64_t first, int count, float* scratch) {
  constexpr int kRows = Engine::kRows;
  const int features = m.sizes.features, hidden = m.sizes.hidden, levels = m.sizes.levels;
  auto t = DigitScratch<kRows>::carve(scratch, m.sizes);
  read_events(m, events.x + first * features, count, t);
  to_digits<Digits, Engine>(t.u, m.digits[0].forward.steps, count, t);
  digit_layer<Digits, Engine>(m.digits[0].forward, count, t, nothing<Engine>, [&t](Group<Engine> at, const auto& z) {
    EACH(i, z) store(t.g + at.at(i), z[i]);
  });
  for (int k = 0; k < levels; ++k) {
    const float* b_in = m.b_in + static_cast<int64_t>(k) * hidden;
    for (int o = 0; o < hidden; o += 16)
      for (int at = o * kRows; at < o * kRows + count * 16; at += 16) {
        Vec z[1] = {load(t.g + at) + load(b_in + o)};
        activate<false>(z, nullptr);
        store(t.h + at, z[0]);
      }
    digit_forward<Digits, Engine, false>(m, count, t, events.energy + first * levels + k, levels);
  }
}

}  // namespace
