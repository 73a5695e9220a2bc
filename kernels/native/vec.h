// One vector of floats, and the functions of it that a network needs.
//
// Written with the compiler's vector extensions, so that the same lines serve every instruction set; intrinsics
// are only where the compiler has no operator of its own. This header is compiled once per instruction set (see kernel.cpp):
// everything lives in an unnamed namespace, and nothing of the standard library is used, so that no function
// built for a newer processor can be linked into code for an older one.
#pragma once

#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// A tile is kVectors vectors of events. kPanel outputs times kVectors vectors stay in registers while a layer's
// inputs stream by: 12 x 2 of 32 registers, 4 x 3 or 4 x 2 of 16.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kVectors = 2, kPanel = 12;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kVectors = 3, kPanel = 4;
#else
constexpr int kLanes = 4, kVectors = 2, kPanel = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

#define INLINE inline __attribute__((always_inline))

INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
INLINE Vec broadcast(float s) { return s - Vec{}; }
INLINE Vec as_float(IntVec v) { return reinterpret_cast<Vec>(v); }
INLINE IntVec as_int(Vec v) { return reinterpret_cast<IntVec>(v); }

INLINE Vec absolute(Vec x) { return as_float(as_int(x) & 0x7fffffff); }
INLINE Vec copy_sign(Vec size, Vec sign) {
  return as_float((as_int(size) & 0x7fffffff) | (as_int(sign) & static_cast<int32_t>(0x80000000)));
}

// a * b + c. Products and sums are fused here and nowhere else (-ffp-contract=off): what is fused, and so the bits
// of an energy, must not depend on which instance of a template an expression stands in.
INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

INLINE Vec square_root(Vec x) {
#if defined(__AVX512F__)
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// x within [-limit, limit]; NaN stays NaN, since these instructions give their second operand then.
INLINE Vec clamp(Vec x, float limit) {
#if defined(__AVX512F__)
  return _mm512_max_ps(broadcast(-limit), _mm512_min_ps(broadcast(limit), x));
#elif defined(__AVX2__)
  return _mm256_max_ps(broadcast(-limit), _mm256_min_ps(broadcast(limit), x));
#else
  x = x > limit ? broadcast(limit) : x;
  return x < -limit ? broadcast(-limit) : x;
#endif
}

// A few vectors together, step by step: one after the other, each would wait for itself.
#define EACH(i, vectors) _Pragma("GCC unroll 32") for (int i = 0; i < static_cast<int>(sizeof(vectors) / sizeof(Vec)); ++i)

// 1 / x for x in [1, 2^127): an estimate and Newton steps, since a division takes as long as 30 products.
template <int N>
INLINE void reciprocal(const Vec (&x)[N], Vec (&r)[N]) {
#if defined(__AVX512F__)
  EACH(i, r) r[i] = _mm512_rcp14_ps(x[i]);
  constexpr int kSteps = 1;
#elif defined(__AVX2__)
  EACH(i, r) r[i] = _mm256_rcp_ps(x[i]);
  constexpr int kSteps = 2;
#else
  EACH(i, r) r[i] = 1.0f / x[i];
  constexpr int kSteps = 0;
#endif
  for (int step = 0; step < kSteps; ++step) {
    Vec left[N];
    EACH(i, left) left[i] = multiply_add(-x[i], r[i], broadcast(1.0f));
    EACH(i, r) r[i] = multiply_add(left[i], r[i], r[i]);
  }
}

// sig(z) = 1 / (1 + exp(-z)).
// exp(-z) = 2^n 2^f with n whole: adding 1.5 * 2^23 rounds to n and leaves it in the low bits, ready to be moved into the
// exponent. The polynomial for 2^f is minimax on [-1/2, 1/2]: 2e-9. The clamp keeps the exponential finite.
template <int N>
INLINE void sigmoid(const Vec (&z)[N], Vec (&s)[N]) {
  constexpr float kLog2e = 1.44269504088896341f, kRound = 12582912.0f;
  constexpr float kCoefficients[] = {1.339993145e-3f, 9.618488961e-3f, 5.550328776e-2f,
                                     2.402264689e-1f, 6.931472057e-1f, 1.0f};
  Vec x[N], shifted[N], f[N], p[N];
  EACH(i, x) x[i] = clamp(z[i], 87.0f);
  EACH(i, shifted) shifted[i] = multiply_add(x[i], broadcast(-kLog2e), broadcast(kRound));
  EACH(i, f) f[i] = multiply_add(x[i], broadcast(-kLog2e), kRound - shifted[i]);
  EACH(i, p) p[i] = multiply_add(broadcast(1.53458115e-4f), f[i], broadcast(kCoefficients[0]));
#pragma GCC unroll 8
  for (int c = 1; c < 6; ++c) EACH(i, p) p[i] = multiply_add(p[i], f[i], broadcast(kCoefficients[c]));
  EACH(i, p) p[i] = 1.0f + as_float(as_int(p[i]) + (as_int(shifted[i]) << 23));
  reciprocal(p, s);
}

// log(1 + a) for a >= 0, accurate near 0; Inf and NaN stay what they are.
template <int N>
INLINE void log1p(const Vec (&a)[N], Vec (&result)[N]) {
  Vec y[N], inverse_y[N], m[N], s[N], inverse_m[N], series[N];
  IntVec exponent[N];
  EACH(i, y) y[i] = 1.0f + a[i];
  EACH(i, y) exponent[i] = (as_int(y[i]) - 0x3f2aaaab) >> 23;
  EACH(i, y) m[i] = as_float(as_int(y[i]) - (exponent[i] << 23));  // in [2/3, 4/3)
  EACH(i, y) s[i] = m[i] + 1.0f;
  reciprocal(s, inverse_m);
  reciprocal(y, inverse_y);
  EACH(i, y) s[i] = (m[i] - 1.0f) * inverse_m[i];  // log m = 2 artanh s, |s| <= 1/5
  EACH(i, y) m[i] = s[i] * s[i];
  EACH(i, y) series[i] = multiply_add(m[i], broadcast(2.0f / 9), broadcast(2.0f / 7));
  EACH(i, y) series[i] = multiply_add(m[i], series[i], broadcast(2.0f / 5));
  EACH(i, y) series[i] = multiply_add(m[i], series[i], broadcast(2.0f / 3));
  EACH(i, y) series[i] = multiply_add(m[i], series[i], broadcast(2.0f));
  EACH(i, y) y[i] = (a[i] - (y[i] - 1.0f)) * inverse_y[i];  // what rounding 1 + a dropped
  EACH(i, y) y[i] = multiply_add(s[i], series[i], y[i]);
  EACH(i, y) {
    const Vec log = multiply_add(__builtin_convertvector(exponent[i], Vec), broadcast(0.693147180559945309f), y[i]);
    result[i] = a[i] < __builtin_inff() ? log : a[i];
  }
}

// The low (Offset 0) or high (Offset Group / 2) halves of each group of lanes, those of a beside those of b.
template <int Group, int Offset>
INLINE Vec halves(Vec a, Vec b) {
  IntVec lanes;
  for (int i = 0; i < kLanes; ++i) {
    const int within = i % Group;
    lanes[i] = i - within + within % (Group / 2) + Offset + (within < Group / 2 ? 0 : kLanes);
  }
  return __builtin_shuffle(a, b, lanes);
}

// Sums kLanes vectors across their lanes at once: lane i of the result is the sum of rows[i]. Each step halves
// the number of vectors: the halves of each group of lanes are added, rows i and i + Group / 2 side by side.
template <int Group = kLanes>
INLINE Vec sum_across(Vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < Group / 2; ++i) {
    const Vec a = rows[i], b = rows[i + Group / 2];
    rows[i] = halves<Group, 0>(a, b) + halves<Group, Group / 2>(a, b);
  }
  if constexpr (Group > 2) return sum_across<Group / 2>(rows);
  else return rows[0];
}

INLINE float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

}  // namespace
