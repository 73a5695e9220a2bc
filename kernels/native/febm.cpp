#include "febm.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#include "fused_ebm.h"
#include "sha256.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Packed models are little-endian; this reader takes their numbers as they are."
#endif

namespace fused_ebm {
namespace {

constexpr uint32_t kFormatVersion = 1;
constexpr int kArrays = 11, kDigestAt = 192, kDigestBytes = 32, kAlignment = 64;

struct Header {
  char magic[8];
  uint32_t format_version, header_bytes;
  uint64_t file_bytes;
  uint32_t features, hidden, layers, levels, default_level, has_threshold;
  float threshold, b_out;
  uint64_t offsets[kArrays], names, names_bytes;
  unsigned char bundle_digest[kDigestBytes], digest[kDigestBytes];
};
static_assert(sizeof(Header) == 224 && offsetof(Header, digest) == kDigestAt, "as in kernels/febm.py");

// The largest model of kernels/febm.py is 11 MB; what is larger is not read.
constexpr int64_t kMostBytes = 64 << 20;

class Reader {
 public:
  explicit Reader(const char* path) : path_(path) {
    struct stat status;
    if (stat(path, &status) != 0) fail(FUSED_EBM_CANNOT_READ, std::strerror(errno));
    if (!S_ISREG(status.st_mode)) fail(FUSED_EBM_CANNOT_READ, "not a regular file");
    const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path, "rb"), &std::fclose);
    if (!file) fail(FUSED_EBM_CANNOT_READ, std::strerror(errno));
    size_ = std::min<int64_t>(status.st_size, kMostBytes + 1);
    memory_ = allocate(std::max<int64_t>(size_, sizeof(Header)) / 4 + 1);
    size_ = static_cast<int64_t>(std::fread(memory_.get(), 1, size_, file.get()));
    if (std::ferror(file.get())) fail(FUSED_EBM_CANNOT_READ, "an error while reading");
  }

  File read() {
    check_whole();
    const Header& h = header();
    const auto check = [&](const char* name, uint32_t value, uint32_t least, uint32_t most) {
      if (value < least || value > most)
        damaged(std::string(name) + " is " + std::to_string(value) + ", expected " + std::to_string(least) + " to " +
                std::to_string(most));
    };
    check("the number of features", h.features, 1, 256);
    check("the hidden width", h.hidden, 1, 512);
    check("the number of layers", h.layers, 1, 8);
    check("the number of noise levels", h.levels, 1, 64);
    check("the default level", h.default_level, 0, h.levels - 1);
    check("the mark of a threshold", h.has_threshold, 0, 1);
    if (!std::isfinite(h.threshold) || !std::isfinite(h.b_out)) damaged("threshold or output bias is not finite");

    const int64_t D = h.features, H = h.hidden, n = h.layers, L = h.levels;
    const int64_t sizes[kArrays] = {H * D, L * H, n * H * H, n * H, H, D, D, D, D, D, D};
    const float* arrays[kArrays];
    for (int i = 0; i < kArrays; ++i)
      arrays[i] = reinterpret_cast<const float*>(at(h.offsets[i], sizes[i] * 4, kAlignment));

    File f;
    f.weights = {{static_cast<int>(D), static_cast<int>(H), static_cast<int>(n), static_cast<int>(L)},
                 arrays[0], arrays[1], arrays[2], arrays[3], arrays[4], h.b_out,
                 arrays[5], arrays[6], arrays[7], arrays[8], arrays[9], reinterpret_cast<const int32_t*>(arrays[10])};
    for (int i = 0; i < D; ++i)
      if (f.weights.transform[i] < 0 || f.weights.transform[i] > 2) damaged("a transform that is not 0, 1 or 2");
    for (const int i : {0, 1, 2, 3, 4, 7, 8, 9})  // marker and imputation may be NaN
      if (!std::all_of(arrays[i], arrays[i] + sizes[i], [](float v) { return std::isfinite(v); }))
        damaged("weights that are not finite");
    f.features = names();
    f.default_level = static_cast<int>(h.default_level);
    f.threshold = h.has_threshold ? h.threshold : std::numeric_limits<float>::quiet_NaN();
    for (const unsigned char byte : h.bundle_digest)
      for (const int digit : {byte >> 4, byte & 15}) f.digest += "0123456789abcdef"[digit];
    f.memory = std::move(memory_);
    return f;
  }

 private:
  const unsigned char* bytes() const { return reinterpret_cast<const unsigned char*>(memory_.get()); }
  const Header& header() const { return *reinterpret_cast<const Header*>(memory_.get()); }

  // From the outside in: nothing that follows the version is looked at before the version is known.
  void check_whole() const {
    const Header& h = header();
    if (size_ < 8 || std::memcmp(h.magic, "FUSEDEBM", 8) != 0)
      fail(FUSED_EBM_BAD_FILE, "not a packed model: 'python -m kernels pack' writes one");
    if (size_ < 16) truncated(sizeof(Header));
    if (h.format_version > kFormatVersion)
      fail(FUSED_EBM_NEWER_FILE, "format version " + std::to_string(h.format_version) + ", this library (" +
                                     fused_ebm_version() + ") reads " + std::to_string(kFormatVersion) +
                                     ": a newer one is needed");
    if (h.format_version < kFormatVersion) damaged("format version 0");
    if (h.header_bytes != sizeof(Header)) damaged("a header of " + std::to_string(h.header_bytes) + " bytes");
    if (size_ < static_cast<int64_t>(sizeof(Header))) truncated(sizeof(Header));
    if (h.file_bytes > static_cast<uint64_t>(kMostBytes)) damaged("larger than any model");
    if (static_cast<uint64_t>(size_) < h.file_bytes) truncated(h.file_bytes);
    if (static_cast<uint64_t>(size_) > h.file_bytes) damaged("bytes after its end");
    Sha256 sum;
    sum.update(bytes(), kDigestAt);
    sum.update(bytes() + sizeof(Header), static_cast<size_t>(size_) - sizeof(Header));
    if (std::memcmp(sum.digest().data(), h.digest, kDigestBytes) != 0) damaged("its SHA-256 is another");
  }

  // `count` bytes of the file from `offset` on.
  const unsigned char* at(uint64_t offset, int64_t count, uint64_t alignment) const {
    if (offset < sizeof(Header) || offset % alignment != 0 || count > size_ ||
        offset > static_cast<uint64_t>(size_ - count))
      damaged("an array outside of the file");
    return bytes() + offset;
  }

  std::vector<std::string> names() const {
    const Header& h = header();
    if (h.names_bytes > static_cast<uint64_t>(size_)) damaged("feature names outside of the file");
    const auto count = static_cast<int64_t>(h.names_bytes);
    const char* p = reinterpret_cast<const char*>(at(h.names, count, 1));
    const char* const end = p + count;
    std::vector<std::string> result;
    for (const char* zero; p < end && (zero = std::find(p, end, '\0')) != end; p = zero + 1)
      result.emplace_back(p, zero);
    if (p != end || result.size() != h.features) damaged("not one name for each feature");
    return result;
  }

  [[noreturn]] void fail(int code, const std::string& what) const { throw Error(code, path_ + ": " + what); }
  [[noreturn]] void damaged(const std::string& what) const { fail(FUSED_EBM_BAD_FILE, "damaged: " + what); }
  [[noreturn]] void truncated(uint64_t expected) const {
    fail(FUSED_EBM_BAD_FILE, "truncated: " + std::to_string(size_) + " bytes, expected " +
                                 (size_ < static_cast<int64_t>(sizeof(Header)) ? "at least " : "") +
                                 std::to_string(expected));
  }

  std::string path_;
  Buffer memory_{nullptr, &std::free};
  int64_t size_ = 0;
};

}  // namespace

File read_file(const char* path) { return Reader(path).read(); }

}  // namespace fused_ebm
