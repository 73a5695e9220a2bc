// The Python module kernels._native. Arguments are checked in kernels/native_cpu.py and kernels/scorer.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <optional>
#include <thread>
#include <vector>

#include "model.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace fused_ebm;

namespace {

template <class T, int Rank>
using Array = nb::ndarray<T, nb::ndim<Rank>, nb::c_contig, nb::device::cpu>;

Precision precision_named(const std::string& name) {
  if (name == "fp32") return kFloat32;
  if (name == "int16") return kInt16;
  if (name == "int8") return kInt8;
  throw nb::value_error(("precision is '" + name + "', expected 'fp32', 'int16' or 'int8'").c_str());
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Whether all are; x - x is 0 for a finite x and NaN for any other.
bool all_finite(const float* x, int64_t size) {
  float zero = 0;
  for (int64_t i = 0; i < size; ++i) zero += x[i] - x[i];
  return zero == 0;
}

// The memory of a C-contiguous array, by Python's buffer protocol: a fifth of the time of an ndarray conversion.
class Buffered {
 public:
  Buffered(nb::handle array, bool writable) {
    if (PyObject_GetBuffer(array.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) nb::raise_python_error();
  }
  ~Buffered() { PyBuffer_Release(&view_); }
  Buffered(const Buffered&) = delete;
  Buffered& operator=(const Buffered&) = delete;

  // As an array of `size` numbers; dtype and shape are Python's to check, the size is not taken on trust.
  template <class T>
  T* data(int64_t size) const {
    if (view_.len != size * static_cast<int64_t>(sizeof(T))) throw nb::value_error("an array has another size");
    return static_cast<T*>(view_.buf);
  }
  int64_t rows(int64_t width) const { return view_.len / static_cast<int64_t>(sizeof(float)) / width; }

 private:
  Py_buffer view_{};
};

// x (n, D), levels int32 (n) or None, energy (n), score (n, D) or None.
bool run(const PackedModel& model, nb::handle x, int32_t level, nb::handle levels, nb::handle energy, nb::handle score,
         int threads, bool deterministic) {
  const int64_t width = model.sizes().features;
  const Buffered in(x, false), out(energy, true);
  const int64_t n = in.rows(width);
  Events events{in.data<float>(n * width), nullptr, level, out.data<float>(n), nullptr};
  std::optional<Buffered> level_buffer, score_buffer;
  if (!levels.is_none()) events.levels = level_buffer.emplace(levels, false).data<int32_t>(n);
  if (!score.is_none()) events.score = score_buffer.emplace(score, true).data<float>(n * width);
  nb::gil_scoped_release released;
  model.run(events, n, threads, deterministic);
  return all_finite(events.energy, n);
}

// Seconds of each of `repeats` calls on the same events, without Python.
std::vector<double> time_calls(const PackedModel& model, Array<const float, 2> x, int32_t level, bool score,
                               int repeats, int threads) {
  const auto n = static_cast<int64_t>(x.shape(0));
  std::vector<float> energy(n), scores(score ? n * x.shape(1) : 0);
  const Events events{x.data(), nullptr, level, energy.data(), score ? scores.data() : nullptr};
  std::vector<double> seconds(repeats);
  nb::gil_scoped_release released;
  for (double& s : seconds) {
    const auto start = std::chrono::steady_clock::now();
    model.run(events, n, threads, false);
    s = seconds_since(start);
  }
  return seconds;
}

bool run_all_levels(const PackedModel& model, Array<const float, 2> x, Array<float, 2> energies, int threads) {
  const Events events{x.data(), nullptr, 0, energies.data(), nullptr};
  const auto n = static_cast<int64_t>(x.shape(0));
  nb::gil_scoped_release released;
  model.run_all_levels(events, n, threads);
  return all_finite(events.energy, n * model.sizes().levels);
}

// The best of some short rounds: what the machine can do when it is let alone.
double gflops(double (*work)(int64_t), int64_t iterations, int threads) {
  std::vector<double> flops(threads);
  double best = 0;
  for (int round = 0; round < 8; ++round) {
    const auto start = std::chrono::steady_clock::now();
    parallel_for(threads, threads, [&](int64_t i) { flops[i] = work(iterations); });
    const double seconds = seconds_since(start);
    double total = 0;
    for (const double f : flops) total += f;
    best = std::max(best, total / seconds / 1e9);
  }
  return best;
}

double fma_gflops(int threads) { return gflops(kernels().multiply_add, 10'000'000, threads); }

std::optional<double> tile_gflops(int threads) {
  if (!kernels().multiply_tiles) return std::nullopt;
  return gflops(kernels().multiply_tiles, 1'000'000, threads);
}

double read_gbps(int64_t bytes, double seconds) {
  const Kernels& k = kernels();
  const int64_t floats = bytes / static_cast<int64_t>(sizeof(float));
  const Buffer data = allocate(floats);
  volatile float sink = k.read(data.get(), floats);
  double best = 0;
  const auto begin = std::chrono::steady_clock::now();
  const int repeats = static_cast<int>(std::max<int64_t>(1, 20'000'000 / bytes));
  while (seconds_since(begin) < seconds) {
    const auto start = std::chrono::steady_clock::now();
    for (int r = 0; r < repeats; ++r) sink = k.read(data.get(), floats);
    best = std::max(best, static_cast<double>(bytes) * repeats / seconds_since(start) / 1e9);
  }
  (void)sink;
  return best;
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Fused C++ kernels; use them through kernels.load_scorer.";
  nb::class_<PackedModel>(m, "Model")
      .def("__init__",
           [](PackedModel* self, Array<const float, 2> w_in, Array<const float, 2> b_in, Array<const float, 3> w,
              Array<const float, 2> b, Array<const float, 1> w_out, float b_out, Array<const float, 1> marker,
              Array<const float, 1> impute, Array<const int32_t, 1> transform, Array<const float, 1> scale,
              Array<const float, 1> mean, Array<const float, 1> inv_std, const std::string& precision) {
             const auto size = [](size_t n) { return static_cast<int>(n); };
             const Sizes sizes{size(w_in.shape(1)), size(w_in.shape(0)), size(w.shape(0)), size(b_in.shape(0))};
             new (self) PackedModel({sizes, w_in.data(), b_in.data(), w.data(), b.data(), w_out.data(), b_out,
                                     marker.data(), impute.data(), scale.data(), mean.data(), inv_std.data(),
                                     transform.data()},
                                    precision_named(precision));
           },
           "w_in"_a, "b_in"_a, "w"_a, "b"_a, "w_out"_a, "b_out"_a, "marker"_a, "impute"_a, "transform"_a, "scale"_a,
           "mean"_a, "inv_std"_a, "precision"_a = "fp32")
      .def("run", &run, "x"_a, "level"_a, "levels"_a.none(), "energy"_a, "score"_a.none(), "threads"_a,
           "deterministic"_a)
      .def("run_all_levels", &run_all_levels, "x"_a.noconvert(), "energies"_a.noconvert(), "threads"_a)
      .def("time", &time_calls, "x"_a, "level"_a, "score"_a, "repeats"_a, "threads"_a,
           "Seconds of each of so many calls, measured without Python.")
      .def_prop_ro("isa", [](const PackedModel& model) { return std::string(model.kernels().name); });
  m.def("fma_gflops", &fma_gflops, "threads"_a, "Multiply-add rate of this machine, GFLOP/s.");
  m.def("tile_gflops", &tile_gflops, "threads"_a,
        "The same in three 8-bit digits, as accurate, on the tiles of AMX; None without them.");
  m.def("read_gbps", &read_gbps, "bytes"_a, "seconds"_a, "Rate of reading an array of that size again and again, GB/s.");
}
