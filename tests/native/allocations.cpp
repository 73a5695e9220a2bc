// Counts the allocations of the C library: none, once its threads have their scratch memory (tests/test_c_api.py).
//
//     allocations MODEL.febm
//
// glibc lets a program replace malloc for all of its process: what the library, operator new and the library's
// threads take is counted too. Stacks of threads, which are mapped, are not.
#include <fused_ebm.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kThreads = 3;
std::atomic<long> allocations{0};
std::atomic<int> threads{0};  // that have taken aligned memory: the weights, scratch

}  // namespace

extern "C" {
void* __libc_malloc(size_t size);
void* __libc_calloc(size_t count, size_t size);
void* __libc_realloc(void* old, size_t size);
void* __libc_memalign(size_t alignment, size_t size);

void* malloc(size_t size) {
  ++allocations;
  return __libc_malloc(size);
}
void* calloc(size_t count, size_t size) {
  ++allocations;
  return __libc_calloc(count, size);
}
void* realloc(void* old, size_t size) {
  ++allocations;
  return __libc_realloc(old, size);
}
void* memalign(size_t alignment, size_t size) {
  thread_local bool known = false;
  if (!known) ++threads;
  known = true;
  ++allocations;
  return __libc_memalign(alignment, size);
}
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }
int posix_memalign(void** to, size_t alignment, size_t size) { return (*to = memalign(alignment, size)) ? 0 : ENOMEM; }
}

namespace {

void check(int code) {
  if (code == FUSED_EBM_OK) return;
  std::fprintf(stderr, "allocations: %s\n", fused_ebm_last_error());
  std::exit(1);
}

// Every kind of call, on one thread and on several.
class Calls {
 public:
  explicit Calls(fused_ebm_model* model)
      : model_(model), x_(kMost * fused_ebm_n_features(model), 0.5f), score_(x_.size()), energy_(kMost),
        energies_(kMost * fused_ebm_n_levels(model)), levels_(kMost, 1) {}

  // The allocations of so many rounds.
  long count(int rounds) {
    const long before = allocations;
    for (int i = 0; i < rounds; ++i)
      for (const int deterministic : {0, 1}) {
        check(fused_ebm_set_deterministic(model_, deterministic));
        for (const int n : {1, 8, 64, kMost})
          for (const int t : {1, kThreads}) {
            float *energy = energy_.data(), *score = score_.data();
            check(fused_ebm_score(model_, x_.data(), n, 0, energy, nullptr, nullptr, t));
            check(fused_ebm_score(model_, x_.data(), n, 0, energy, score, nullptr, t));
            check(fused_ebm_score_levels(model_, x_.data(), n, levels_.data(), energy, score, t));
            check(fused_ebm_energies(model_, x_.data(), n, energies_.data(), t));
          }
      }
    return allocations - before;
  }

 private:
  static constexpr int kMost = 1000;
  fused_ebm_model* model_;
  std::vector<float> x_, score_, energy_, energies_;
  std::vector<int32_t> levels_;
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  fused_ebm_model* model;
  check(fused_ebm_open(argv[1], &model));
  const long opening = allocations;
  Calls calls(model);
  const long first = calls.count(1);
  // When a thread of the library gets its first task is not fixed: rounds until each has, and one more is quiet.
  for (int round = 0; round < 200 && (calls.count(1) > 0 || threads < kThreads);) ++round;
  std::printf("opening %ld, first calls %ld, threads %d, ", opening, first, threads.load());
  std::printf("steady %ld\n", calls.count(50));
  fused_ebm_close(model);
}
