// The kernels of one instruction set. CMake compiles this file once for each, with FUSED_EBM_TABLE and
// FUSED_EBM_NAME set and the compiler told which instructions to use.
#include "few.h"
#include "tile.h"

namespace {

int64_t scratch_size(const fused_ebm::Sizes& s) { return TileScratch::size(s); }

void tile_pass(const Model& m, const Events& events, int64_t first, int64_t last, float* scratch) {
  const int count = static_cast<int>(last - first);
  if (count > kLanes) {
    events.score ? tile<kVectors, true>(m, events, first, count, scratch)
                 : tile<kVectors, false>(m, events, first, count, scratch);
  } else {
    events.score ? tile<1, true>(m, events, first, count, scratch) : tile<1, false>(m, events, first, count, scratch);
  }
}

void all_levels_pass(const Model& m, const Events& events, int64_t first, int64_t last, float* scratch) {
  const int count = static_cast<int>(last - first);
  count > kLanes ? tile_all_levels<kVectors>(m, events, first, count, scratch)
                 : tile_all_levels<1>(m, events, first, count, scratch);
}

template <bool Score>
void few_events(const Model& m, const Events& events, int64_t n, float* scratch) {
  int64_t i = 0;
  for (; i + kFew <= n; i += kFew) few<kFew, Score>(m, events, i, scratch);
  for (; i + 2 <= n; i += 2) few<2, Score>(m, events, i, scratch);
  if (i < n) few<1, Score>(m, events, i, scratch);
}

void few_pass(const Model& m, const Events& events, int64_t n, float* scratch) {
  events.score ? few_events<true>(m, events, n, scratch) : few_events<false>(m, events, n, scratch);
}

// Multiply-adds in registers alone, in chains enough to hide the latency of one on two ports.
double multiply_add_loop(int64_t iterations) {
  Vec s0 = {}, s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0, s9 = s0;
  const Vec a = broadcast(0.999f), b = broadcast(1e-3f);
  for (int64_t i = 0; i < iterations; ++i) {
    s0 = multiply_add(s0, a, b), s1 = multiply_add(s1, a, b), s2 = multiply_add(s2, a, b);
    s3 = multiply_add(s3, a, b), s4 = multiply_add(s4, a, b), s5 = multiply_add(s5, a, b);
    s6 = multiply_add(s6, a, b), s7 = multiply_add(s7, a, b), s8 = multiply_add(s8, a, b);
    s9 = multiply_add(s9, a, b);
    asm volatile("" : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7), "+x"(s8), "+x"(s9));
  }
  return 2.0 * 10 * kLanes * static_cast<double>(iterations);
}

float read(const float* data, int64_t size) {
  Vec sums[8] = {};
  int64_t i = 0;
  for (; i + 8 * kLanes <= size; i += 8 * kLanes)
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) sums[c] += load(data + i + c * kLanes);
  for (int c = 1; c < 8; ++c) sums[0] += sums[c];
  return sum(sums[0]);
}

constexpr fused_ebm::Passes kPasses = {
    0,         kLanes,          kVectors * kLanes, 14, fused_ebm::share_of(250'000 * kLanes), scratch_size,
    tile_pass, all_levels_pass, few_pass};

}  // namespace

namespace fused_ebm {
extern const Kernels FUSED_EBM_TABLE;
const Kernels FUSED_EBM_TABLE = {FUSED_EBM_NAME, {&kPasses}, kLanes, kPanel, multiply_add_loop, read};
}  // namespace fused_ebm
