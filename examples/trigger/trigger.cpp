// Scores events from a file with a packed model, as a trigger would: open once, then one call for each block of events.
//
//     python -m kernels pack models/demo demo.febm
//     trigger demo.febm events.f32            one line an event: number, energy, and * where it is flagged
//     trigger --binary demo.febm events.f32   energies alone, as raw float32
//
// events.f32 holds raw little-endian float32, D numbers an event: in NumPy, x.astype("<f4").tofile("events.f32").
#include <fused_ebm.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

int main(int argc, char** argv) {
  const bool binary = argc == 4 && std::strcmp(argv[1], "--binary") == 0;
  if (argc != 3 && !binary) {
    std::fprintf(stderr, "usage: trigger [--binary] MODEL.febm EVENTS.f32\n");
    return 2;
  }
  const char *model_path = argv[argc - 2], *events_path = argv[argc - 1];

  fused_ebm_model* opened;
  if (fused_ebm_open(model_path, &opened) != FUSED_EBM_OK) {
    std::fprintf(stderr, "trigger: %s\n", fused_ebm_last_error());
    return 2;
  }
  const std::unique_ptr<fused_ebm_model, void (*)(fused_ebm_model*)> model(opened, &fused_ebm_close);
  const int level = fused_ebm_default_level(opened);
  const bool has_threshold = !std::isnan(fused_ebm_threshold(opened));

  const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(events_path, "rb"), &std::fclose);
  if (!file) {
    std::perror(events_path);
    return 2;
  }

  constexpr size_t kBlock = 4096;  // events
  const auto features = static_cast<size_t>(fused_ebm_n_features(opened));
  std::vector<float> x(kBlock * features), energy(kBlock);
  std::vector<uint8_t> flag(kBlock);
  int status = 0;
  for (size_t first = 0, floats; (floats = std::fread(x.data(), sizeof(float), x.size(), file.get())) > 0;) {
    const size_t n = floats / features;
    const int code = fused_ebm_score(opened, x.data(), static_cast<int64_t>(n), level, energy.data(), nullptr,
                                     has_threshold ? flag.data() : nullptr, 1);
    if (code != FUSED_EBM_OK) std::fprintf(stderr, "trigger: block at event %zu: %s\n", first, fused_ebm_last_error());
    if (code != FUSED_EBM_OK) status = 1;
    if (code != FUSED_EBM_OK && code != FUSED_EBM_NOT_FINITE) break;  // the others of a block are good

    if (binary) std::fwrite(energy.data(), sizeof(float), n, stdout);
    for (size_t i = 0; i < n && !binary; ++i) std::printf("%zu %.6g%s\n", first + i, energy[i], flag[i] ? " *" : "");
    if (floats % features != 0) {
      std::fprintf(stderr, "trigger: %s does not end after a whole event of %zu features\n", events_path, features);
      return 1;
    }
    first += n;
  }
  return status;
}
