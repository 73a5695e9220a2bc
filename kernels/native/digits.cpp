// The kernels in 8-bit digits. CMake compiles this file once with AMX and once with VNNI alone, FUSED_EBM_TABLE set.
#include "digits.h"

namespace {

#ifdef __AMX_INT8__

// An event alone waits for the weights, which vectors read faster than tiles do; few share the rows of one tile.
template <int Digits, class Call>
INLINE void with_engine(int count, const Call& call) {
  if (count == 1) return call(Vectors<Digits, 1, 1, 4>{});
  if (count <= StackedTiles<Digits>::kRows) {
    _tile_loadconfig(&StackedTiles<Digits>::kConfig);
    call(StackedTiles<Digits>{});
  } else {
    _tile_loadconfig(&Tiles<Digits>::kConfig);
    call(Tiles<Digits>{});
  }
  _tile_release();
}

#else

template <int Digits, class Call>
INLINE void with_engine(int count, const Call& call) {
  count == 1 ? call(Vectors<Digits, 1, 1, 4>{}) : call(Vectors<Digits, 16, 4 / Digits, 4 / Digits>{});
}

#endif

template <int Digits>
void tile_pass(const Model& m, const Events& events, int64_t first, int64_t last, float* scratch) {
  const int count = static_cast<int>(last - first);
  with_engine<Digits>(count, [&](auto engine) {
    events.score ? digit_pass<Digits, decltype(engine), true>(m, events, first, count, scratch)
                 : digit_pass<Digits, decltype(engine), false>(m, events, first, count, scratch);
  });
}

template <int Digits>
void all_levels_pass(const Model& m, const Events& events, int64_t first, int64_t last, float* scratch) {
  const int count = static_cast<int>(last - first);
  with_engine<Digits>(
      count, [&](auto engine) { digit_pass_all_levels<Digits, decltype(engine)>(m, events, first, count, scratch); });
}

int64_t scratch_size(const fused_ebm::Sizes& s) { return DigitScratch<16>::size(s); }

template <int Digits>
constexpr fused_ebm::Passes kPasses = {
    Digits, 16, 16, 0, fused_ebm::share_of(8'000'000), scratch_size, tile_pass<Digits>, all_levels_pass<Digits>, nullptr};

#ifdef __AMX_INT8__

// Steps of the micro-kernel alone, its operands in L1.
double multiply_tiles_loop(int64_t iterations) {
  alignas(64) uint8_t a[3 * kBlock];
  alignas(64) int8_t w[3 * kBlock];
  for (int i = 0; i < 3 * kBlock; ++i) a[i] = static_cast<uint8_t>(i * 37), w[i] = static_cast<int8_t>(i * 53);
  alignas(64) int32_t sums[4 * 256];
  _tile_loadconfig(&Tiles<3>::kConfig);
  Tiles<3>::start();
  for (int64_t i = 0; i < iterations; ++i) Tiles<3>::step(a, w, [] {});
  Tiles<3>::finish(sums);
  _tile_release();
  return 2.0 * 16 * 16 * kStep * static_cast<double>(iterations);
}

#endif

}  // namespace

namespace fused_ebm {
extern const Passes FUSED_EBM_TABLE[kPrecisions];
#ifdef __AMX_INT8__
const Passes FUSED_EBM_TABLE[kPrecisions] = {kPasses<3>, kPasses<2>, kPasses<1>};
double multiply_tiles(int64_t iterations) { return multiply_tiles_loop(iterations); }
#else
const Passes FUSED_EBM_TABLE[kPrecisions] = {{}, kPasses<2>, kPasses<1>};  // in float32, vectors of floats are faster
#endif
}  // namespace fused_ebm
