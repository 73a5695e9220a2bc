// Opens damaged packed models whose checksum is right, so that every check behind it is met (`make sanitize`).
//
//     fuzz_febm MODEL.febm SCRATCH.febm
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "fused_ebm.h"
#include "sha256.h"

namespace {

constexpr int kHeader = 224, kDigest = 192;
using Bytes = std::vector<unsigned char>;

void sign(Bytes& bytes) {
  fused_ebm::Sha256 sum;
  sum.update(bytes.data(), kDigest);
  sum.update(bytes.data() + kHeader, bytes.size() - kHeader);
  std::memcpy(&bytes[kDigest], sum.digest().data(), 32);
}

// Opens the bytes, and scores a batch where they are a model after all. True: they are.
bool open(const Bytes& bytes, const char* path) {
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  fused_ebm_model* model;
  const int code = fused_ebm_open(path, &model);
  if (code != FUSED_EBM_OK) {
    if (model || !std::strstr(fused_ebm_last_error(), path)) std::abort();
    return false;
  }
  const std::vector<float> x(9 * fused_ebm_n_features(model), 1.0f);
  std::vector<float> energy(9), score(x.size());
  fused_ebm_score(model, x.data(), 9, fused_ebm_default_level(model), energy.data(), score.data(), nullptr, 1);
  fused_ebm_close(model);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::ifstream file(argv[1], std::ios::binary);
  const Bytes whole((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  Bytes copy = whole;
  sign(copy);
  if (copy != whole || !open(whole, argv[2])) return 1;

  std::mt19937_64 random(1);
  int opened = 0, refused = 0;
  const auto count = [&](bool is_model) { ++(is_model ? opened : refused); };
  for (int at = 8; at < kHeader; at += 4)  // every number of the header
    for (const uint32_t value : {0u, 1u, 64u, 257u, 0x7fffffffu, 0xffffffc0u}) {
      copy = whole;
      std::memcpy(&copy[at], &value, 4);
      if (at < kDigest) sign(copy);
      count(open(copy, argv[2]));
    }
  for (int i = 0; i < 150; ++i) {  // random bytes anywhere, the end cut off, the header's size put right
    copy = whole;
    if (i % 3 == 0) copy.resize(kHeader + random() % (copy.size() - kHeader));
    const uint64_t size = copy.size();
    std::memcpy(&copy[16], &size, 8);
    for (int k = 0; k < i % 5; ++k)
      copy[i % 2 ? 24 + random() % 136 : random() % size] = static_cast<unsigned char>(random());
    sign(copy);
    count(open(copy, argv[2]));
  }
  std::printf("packed models: %d refused, %d opened, nothing found\n", refused, opened);
}
