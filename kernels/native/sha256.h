// SHA-256 (FIPS 180-4).
#pragma once

#include <array>
#include <cstdint>
#include <cstring>

namespace fused_ebm {

class Sha256 {
 public:
  void update(const unsigned char* data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
      block_[bytes_++ % 64] = data[i];
      if (bytes_ % 64 == 0) compress();
    }
  }

  std::array<unsigned char, 32> digest() {
    const uint64_t bits = bytes_ * 8;
    const unsigned char one = 0x80, zero = 0;
    update(&one, 1);
    while (bytes_ % 64 != 56) update(&zero, 1);
    unsigned char length[8];
    for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(bits >> (56 - 8 * i));
    update(length, 8);
    std::array<unsigned char, 32> result;
    for (int i = 0; i < 32; ++i) result[i] = static_cast<unsigned char>(state_[i / 4] >> (24 - i % 4 * 8));
    return result;
  }

 private:
  static uint32_t rotate(uint32_t x, int n) { return x >> n | x << (32 - n); }

  // The constants are the first bits of the fractions of square and cube roots of the first primes.
  static const std::array<uint32_t, 64>& round_constants();

  void compress() {
    const auto& constants = round_constants();
    uint32_t w[64];
    for (int i = 0; i < 16; ++i)
      w[i] = uint32_t{block_[4 * i]} << 24 | uint32_t{block_[4 * i + 1]} << 16 | uint32_t{block_[4 * i + 2]} << 8 |
             block_[4 * i + 3];
    for (int i = 16; i < 64; ++i) {
      const uint32_t a = w[i - 15], b = w[i - 2];
      w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[i - 7] + (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
    }
    std::array<uint32_t, 8> s = state_;
    for (int i = 0; i < 64; ++i) {
      const uint32_t choice = (s[4] & s[5]) ^ (~s[4] & s[6]), majority = (s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]);
      const uint32_t t1 = s[7] + (rotate(s[4], 6) ^ rotate(s[4], 11) ^ rotate(s[4], 25)) + choice + constants[i] + w[i];
      const uint32_t t2 = (rotate(s[0], 2) ^ rotate(s[0], 13) ^ rotate(s[0], 22)) + majority;
      s = {t1 + t2, s[0], s[1], s[2], s[3] + t1, s[4], s[5], s[6]};
    }
    for (int i = 0; i < 8; ++i) state_[i] += s[i];
  }

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  unsigned char block_[64];
  uint64_t bytes_ = 0;
};

// floor(2^32 frac(cbrt(p))) of the first 64 primes, found in whole numbers: r = floor(2^32 cbrt(p)) is the largest r
// with r^3 <= p 2^96.
inline const std::array<uint32_t, 64>& Sha256::round_constants() {
  static const std::array<uint32_t, 64> constants = [] {
    std::array<uint32_t, 64> k{};
    int found = 0;
    for (uint64_t p = 2; found < 64; ++p) {
      bool prime = true;
      for (uint64_t d = 2; d * d <= p; ++d) prime = prime && p % d != 0;
      if (!prime) continue;
      uint64_t r = 0;
      for (int bit = 35; bit >= 0; --bit) {
        const uint64_t next = r | uint64_t{1} << bit;
        // next^3 <= p 2^96 without overflow: next^2 < 2^72 fits 128 bits, and next^2 <= floor(p 2^96 / next).
        const unsigned __int128 square = static_cast<unsigned __int128>(next) * next;
        const unsigned __int128 most = (static_cast<unsigned __int128>(p) << 96) / next;
        if (square <= most) r = next;
      }
      k[found++] = static_cast<uint32_t>(r);
    }
    return k;
  }();
  return constants;
}

}  // namespace fused_ebm
