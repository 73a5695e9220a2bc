// Products of vectors of 8-bit digits, summed exactly in 32-bit integers: on the tiles of AMX or the vectors of VNNI.
// Both give the same integers, so an event has the same bits whichever of them computed it.
//
// A value is held as Digits balanced digits to the base 256, the largest first. VNNI multiplies unsigned by signed bytes:
// there activations have 128 added to each digit, and the sums begin at what takes that away again (`offsets`).
// Products of digits i and j belong to level i + j; of three digits each, the last level is below rounding and left out.
#pragma once

#include <immintrin.h>

#include "kernel.h"
#include "vec.h"

namespace {

using fused_ebm::DigitMatrix;
using fused_ebm::kStep;
using fused_ebm::levels_of;

constexpr int kBlock = 1024;  // bytes of a digit of 16 outputs in a step

INLINE IntVec load_int(const int32_t* p) { return *reinterpret_cast<const IntVec*>(p); }

#ifdef __AMX_INT8__

// How rows of the tiles lie: sums and activations have `rows` of them, weights 16.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16];

  constexpr TileConfig(int activations, int first_of_weights) : rows() {
    for (int i = 0; i < 8; ++i) rows[i] = static_cast<uint8_t>(i < first_of_weights ? activations : 16);
  }
};

// The sums are in tiles 0 to Count - 1.
template <int Count>
INLINE void zero_sums() {
  _tile_zero(0);
  if constexpr (Count > 1) {
    _tile_zero(1);
  }
  if constexpr (Count > 2) {
    _tile_zero(2);
  }
  if constexpr (Count > 3) {
    _tile_zero(3);
  }
}

template <int Count>
INLINE void store_sums(int32_t* to, int stride) {
  _tile_stored(0, to, 64);
  if constexpr (Count > 1) {
    _tile_stored(1, to + stride, 64);
  }
  if constexpr (Count > 2) {
    _tile_stored(2, to + 2 * stride, 64);
  }
  if constexpr (Count > 3) {
    _tile_stored(3, to + 3 * stride, 64);
  }
}

// 16 events: sums in tiles 0 to 3, activations in 4 to 6, weights in 7.
template <int Digits>
struct Tiles {
  static constexpr bool kOnTiles = true;
  static constexpr int kRows = 16, kGroup = 2, kPauses = Digits == 3 ? 4 : Digits;
  static constexpr TileConfig kConfig{16, 7};

  static INLINE void start() { zero_sums<levels_of(Digits)>(); }

  template <class Pause>
  static INLINE void step(const uint8_t* a, const int8_t* w, const Pause& pause) {
    _tile_loadd(4, a, 64);
    _tile_loadd(7, w, 64);
    _tile_dpbssd(0, 4, 7);
    if constexpr (Digits > 1) {
      _tile_loadd(5, a + kBlock, 64);
      _tile_dpbssd(1, 5, 7);
      pause();
      if constexpr (Digits > 2) {
        _tile_loadd(6, a + 2 * kBlock, 64);
        _tile_dpbssd(2, 6, 7);
      }
      _tile_loadd(7, w + kBlock, 64);
      _tile_dpbssd(1, 4, 7);
      if constexpr (Digits > 2) pause();
      _tile_dpbssd(2, 5, 7);
      if constexpr (Digits > 2) {
        _tile_dpbssd(3, 6, 7);
        pause();
        _tile_loadd(7, w + 2 * kBlock, 64);
        _tile_dpbssd(2, 4, 7);
        _tile_dpbssd(3, 5, 7);
      }
    }
    pause();
  }

  static INLINE void finish(int32_t* sums) { store_sums<levels_of(Digits)>(sums, 256); }

  static INLINE IntVec level(const int32_t* sums, int l, int e) { return load_int(sums + l * 256 + e * 16); }
};

// Up to 5 events: their digits are stacked as the rows of one tile, so that a digit of the weights is used once.
template <int Digits>
struct StackedTiles {
  static constexpr bool kOnTiles = true;
  static constexpr int kRows = 5, kGroup = kRows, kPauses = Digits, kHeight = Digits * kRows;
  static constexpr TileConfig kConfig{kHeight, 4};

  static INLINE void start() { zero_sums<Digits>(); }

  template <class Pause>
  static INLINE void step(const uint8_t* a, const int8_t* w, const Pause& pause) {
    _tile_loadd(3, a, 64);
    _tile_loadd(4, w, 64);
    _tile_dpbssd(0, 3, 4);
    pause();
    if constexpr (Digits > 1) {
      _tile_loadd(5, w + kBlock, 64);
      _tile_dpbssd(1, 3, 5);
      pause();
    }
    if constexpr (Digits > 2) {
      _tile_loadd(6, w + 2 * kBlock, 64);
      _tile_dpbssd(2, 3, 6);
      pause();
    }
  }

  static INLINE void finish(int32_t* sums) { store_sums<Digits>(sums, kHeight * 16); }

  static INLINE IntVec level(const int32_t* sums, int l, int e) {
    IntVec total = {};
#pragma GCC unroll 3
    for (int j = 0; j < Digits; ++j)
      if (const int i = l - j; i >= 0 && i < Digits) total += load_int(sums + (j * kHeight + i * kRows + e) * 16);
    return total;
  }
};

#endif

// Rows events by vectors of 16 outputs, Panels of them together.
template <int Digits, int Rows, int Group, int Panels>
struct Vectors {
  static constexpr bool kOnTiles = false;
  static constexpr int kRows = Rows, kPanels = Panels, kGroup = 4, kLevels = levels_of(Digits);

  // All steps at once; weights of the panels are `stride` bytes apart, their offsets `offset_stride`.
  static INLINE void product(const uint8_t* a, const int8_t* w, int64_t stride, const int32_t* offsets,
                             int offset_stride, int steps, int count, int32_t* sums) {
    for (int first = 0; first < count; first += Group) {
      __m512i total[Group][Panels][kLevels];
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 4
        for (int l = 0; l < kLevels; ++l)
#pragma GCC unroll 4
          for (int r = 0; r < Group; ++r)
            total[r][p][l] = _mm512_load_si512(offsets + p * offset_stride + l * 16);
      for (int step = 0; step < steps; ++step) {
        const uint8_t* a_step = a + step * Digits * Rows * kStep + first * kStep;
        const int8_t* w_step = w + step * Digits * kBlock;
#pragma GCC unroll 2
        for (int g = 0; g < 16; ++g) {
          __m512i four[Group][Digits];  // four inputs, for every output
#pragma GCC unroll 4
          for (int r = 0; r < Group; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < Digits; ++i) {
              int32_t bytes;
              __builtin_memcpy(&bytes, a_step + (i * Rows + r) * kStep + g * 4, 4);
              four[r][i] = _mm512_set1_epi32(bytes);
            }
#pragma GCC unroll 4
          for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 4
            for (int j = 0; j < Digits; ++j) {
              __m512i weights = _mm512_load_si512(w_step + p * stride + j * kBlock + g * 64);
              asm("" : "+v"(weights));  // read once, not again by every instruction that takes it
#pragma GCC unroll 4
              for (int r = 0; r < Group; ++r)
#pragma GCC unroll 4
                for (int i = 0; i < Digits; ++i)
                  if (i + j < kLevels) total[r][p][i + j] = _mm512_dpbusd_epi32(total[r][p][i + j], four[r][i], weights);
            }
        }
      }
#pragma GCC unroll 4
      for (int p = 0; p < Panels; ++p)
#pragma GCC unroll 4
        for (int l = 0; l < kLevels; ++l)
#pragma GCC unroll 4
          for (int r = 0; r < Group; ++r)
            _mm512_store_si512(sums + ((p * kLevels + l) * Rows + first + r) * 16, total[r][p][l]);
    }
  }

  static INLINE IntVec level(const int32_t* sums, int l, int e) { return load_int(sums + (l * Rows + e) * 16); }
};

}  // namespace
