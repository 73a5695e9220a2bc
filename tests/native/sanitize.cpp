// Runs the kernels over every batch and every number of features under a sanitizer (`make sanitize`).
//
// Every buffer has exactly the size of what it holds, starts where a float may but no vector does, and is NaN before a
// call: what reads or writes beyond it stops the program, and what is left unwritten is found.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>

#include "model.h"

using namespace fused_ebm;

namespace {

template <class T>
struct Exact {
  explicit Exact(int64_t size, T value = std::numeric_limits<T>::quiet_NaN()) : size(size), memory(new T[size + 1]) {
    std::fill(data(), data() + size, value);
  }
  T* data() const { return memory.get() + 1; }
  int64_t size;
  std::unique_ptr<T[]> memory;
};

[[noreturn]] void wrong(const std::string& what) {
  std::fprintf(stderr, "sanitize: %s\n", what.c_str());
  std::exit(1);
}

struct Network {
  Network(int D, int H, int n, int L)
      : sizes{D, H, n, L}, w_in(H * D), b_in(L * H), w(n * H * H), b(n * H), w_out(H), marker(D), impute(D, 0.5f),
        scale(D, 2.0f), mean(D, 0.1f), inv_std(D, 1.5f), transform(D) {
    std::normal_distribution<float> normal;
    for (const auto* a : {&w_in, &b_in, &w, &b, &w_out})
      for (int64_t i = 0; i < a->size; ++i) a->data()[i] = normal(random) / std::sqrt(static_cast<float>(H));
    for (int j = 0; j < D; ++j) transform.data()[j] = j % 3;
  }
  Weights weights() const {
    return {sizes, w_in.data(), b_in.data(), w.data(), b.data(), w_out.data(), 0.25f, marker.data(), impute.data(),
            scale.data(), mean.data(), inv_std.data(), transform.data()};
  }
  Exact<float> events(int64_t n) {
    std::normal_distribution<float> normal;
    Exact<float> x(n * sizes.features);
    for (int64_t i = 0; i < x.size; ++i)
      if (i % 11 != 0) x.data()[i] = normal(random);  // the others stay NaN: missing
    return x;
  }

  Sizes sizes;
  Exact<float> w_in, b_in, w, b, w_out, marker, impute, scale, mean, inv_std;
  Exact<int32_t> transform;
  std::mt19937 random{1};
};

void check(const Exact<float>& result, const char* what, int64_t n) {
  for (int64_t i = 0; i < result.size; ++i)
    if (!std::isfinite(result.data()[i])) wrong(std::string(what) + " not written in a batch of " + std::to_string(n));
}

// Energy and score, energy alone, one level and a level per event, all levels: the same energies.
void score(const PackedModel& model, Network& network, int64_t n, int threads, float tolerance) {
  const int D = network.sizes.features, L = network.sizes.levels;
  const Exact<float> x = network.events(n), energies(n * L);
  Exact<int32_t> levels(n, 0);
  for (int64_t i = 0; i < n; ++i) levels.data()[i] = static_cast<int32_t>(i % L);
  model.run_all_levels({x.data(), nullptr, 0, energies.data(), nullptr}, n, threads);
  check(energies, "energies", n);
  for (const bool deterministic : {false, true})
    for (const bool mixed : {false, true}) {
      const Exact<float> energy(n), alone(n), s(n * D);
      const int32_t *each = mixed ? levels.data() : nullptr, level = L - 1;
      model.run({x.data(), each, level, energy.data(), s.data()}, n, threads, deterministic);
      model.run({x.data(), each, level, alone.data(), nullptr}, n, threads, deterministic);
      check(energy, "energy", n);
      check(s, "score", n);
      if (std::memcmp(energy.data(), alone.data(), sizeof(float) * n) != 0)
        wrong("an energy with a score differs from one without in a batch of " + std::to_string(n));
      for (int64_t i = 0; i < n; ++i) {
        const float other = energies.data()[i * L + (mixed ? levels.data()[i] : level)];
        if (std::fabs(energy.data()[i] - other) > tolerance * (1 + std::fabs(other)))
          wrong("all levels and one level differ in a batch of " + std::to_string(n));
      }
    }
}

// On a thread of its own, whose scratch memory then has exactly the size that this model needs.
void score_model(int D, int H, int layers, std::initializer_list<int64_t> batches) {
  std::thread([&] {
    Network network(D, H, layers, 3);
    // How far the energies at all levels may be from those at one, which round elsewhere.
    constexpr float kTolerance[kPrecisions] = {1e-4f, 1e-2f, 0.3f};
    for (int p = 0; p < kPrecisions; ++p) {
      if (!kernels().passes[p]) continue;
      const PackedModel model(network.weights(), static_cast<Precision>(p));
      for (const int64_t n : batches) score(model, network, n, 1, kTolerance[p]);
    }
  }).join();
}

void concurrent_calls() {
  Network network(20, 64, 2, 3);
  const PackedModel model(network.weights());
  const int64_t n = 300;
  const Exact<float> x = network.events(n), expected(n);
  model.run({x.data(), nullptr, 1, expected.data(), nullptr}, n, 3, false);
  std::thread threads[6];
  for (int t = 0; t < 6; ++t)
    threads[t] = std::thread([&, t] {
      for (int call = 0; call < 60; ++call) {
        const int64_t size = 40 + (37 * call + 50 * t) % (n - 40), first = n - size;  // tiles: the same bits
        const Exact<float> energy(size), s(size * 20);
        model.run({x.data() + first * 20, nullptr, 1, energy.data(), s.data()}, size, 1 + call % 4, call % 2 == 0);
        if (std::memcmp(energy.data(), expected.data() + first, sizeof(float) * size) != 0)
          wrong("concurrent calls gave other bits");
      }
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

// "all", "slice" for some of all (`make test`), or "threads" for the concurrent calls alone.
int main(int argc, char** argv) {
  try {
    kernels();
  } catch (const std::runtime_error& e) {
    std::printf("skipped: %s\n", e.what());
    return 0;
  }
  const std::string part = argc < 2 ? "all" : argv[1];
  const int step = part == "slice" ? 17 : 1, widest = part == "slice" ? 64 : 512;  // 17: each remainder by 16 once
  if (part != "threads") {
    for (int n = 1; n <= 257; n += step) score_model(21, 48, 2, {n});
    for (int D = 1; D <= 256; D += step) score_model(D, 32, 1, {1, 7, 40});
    for (const int H : {1, 15, 16, 17, 60, 64, 100, 128, 256, 512})
      for (const int layers : {1, 2, 3, 8})
        if (H <= widest) score_model(20, H, layers, {3, 14, 40});
  }
  concurrent_calls();
  std::printf("%s: nothing found\n", kernels().name);
}
