#include "file.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>

#include "errors.h"
#include "fused_ebm_cuda.h"
#include "sha256.h"

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "Compiled models are little-endian; this reader takes their numbers as they are."
#endif

namespace fused_ebm_cuda {

using fused_ebm::Error;

namespace {

constexpr uint32_t kFormatVersion = 1;
constexpr int kDigestBytes = 32;

struct Header {
  char magic[8];
  uint32_t format_version, header_bytes;
  uint64_t file_bytes;
  uint32_t features, levels, default_level, kernels, has_threshold;
  float threshold;
  uint64_t weights, weights_bytes, names, names_bytes, missing, table;
  char precision[16];
  unsigned char bundle_digest[kDigestBytes], digest[kDigestBytes];
};
static_assert(sizeof(Header) == 176 && offsetof(Header, digest) == 144, "as in kernels/cubin.py");

struct Record {
  uint32_t cc, exact, with_score, block_m, threads, shared, programs_per_sm, n_parameters;
  uint64_t parameters, cubin, cubin_bytes;
  char name[40];
};
static_assert(sizeof(Record) == 96, "as in kernels/cubin.py");

// Every architecture of the largest model stays below this; what is larger is not read.
constexpr int64_t kMostBytes = 256 << 20;

class Reader {
 public:
  explicit Reader(const char* path) : path_(path) {
    struct stat status;
    if (stat(path, &status) != 0) fail(FUSED_EBM_CUDA_CANNOT_READ, std::strerror(errno));
    if (!S_ISREG(status.st_mode)) fail(FUSED_EBM_CUDA_CANNOT_READ, "not a regular file");
    const std::unique_ptr<FILE, int (*)(FILE*)> file(std::fopen(path, "rb"), &std::fclose);
    if (!file) fail(FUSED_EBM_CUDA_CANNOT_READ, std::strerror(errno));
    memory_.resize(std::min<int64_t>(status.st_size, kMostBytes + 1));
    memory_.resize(std::fread(memory_.data(), 1, memory_.size(), file.get()));
    if (std::ferror(file.get())) fail(FUSED_EBM_CUDA_CANNOT_READ, "an error while reading");
    size_ = memory_.size();
    if (size_ > 0) std::memcpy(&header_, memory_.data(), std::min<size_t>(size_, sizeof(Header)));
  }

  File read() {
    check_whole();
    const Header& h = header_;
    check("the number of features", h.features, 1, 256);
    check("the number of noise levels", h.levels, 1, 64);
    check("the default level", h.default_level, 0, h.levels - 1);
    check("the number of kernels", h.kernels, 1, 1024);
    check("the mark of a threshold", h.has_threshold, 0, 1);
    if (!std::isfinite(h.threshold)) damaged("the threshold is not finite");

    File f;
    f.features = static_cast<int>(h.features);
    f.levels = static_cast<int>(h.levels);
    f.default_level = static_cast<int>(h.default_level);
    f.threshold = h.has_threshold ? h.threshold : std::numeric_limits<float>::quiet_NaN();
    f.weights = at(h.weights, h.weights_bytes);
    f.weights_bytes = h.weights_bytes;
    const auto missing = copies<float>(h.missing, 2 * uint64_t{h.features});
    f.marker.assign(missing.begin(), missing.begin() + f.features);
    f.imputation.assign(missing.begin() + f.features, missing.end());
    for (const Record& r : copies<Record>(h.table, h.kernels)) f.kernels.push_back(kernel(r));
    f.names = names();
    f.precision = text(h.precision, sizeof(h.precision));
    for (const unsigned char byte : h.bundle_digest)
      for (const int digit : {byte >> 4, byte & 15}) f.digest += "0123456789abcdef"[digit];
    f.memory = std::move(memory_);  // what points into it stays where it is
    return f;
  }

 private:
  // From the outside in: nothing that follows the version is looked at before the version is known.
  void check_whole() const {
    const Header& h = header_;
    if (size_ < 8 || std::memcmp(h.magic, "FEBMCUDA", 8) != 0)
      fail(FUSED_EBM_CUDA_BAD_FILE, "not a compiled model: 'python -m kernels cubin' writes one");
    if (size_ < 16) truncated(sizeof(Header));
    if (h.format_version > kFormatVersion)
      fail(FUSED_EBM_CUDA_NEWER_FILE, "format version " + std::to_string(h.format_version) + ", this library (" +
                                          fused_ebm_cuda_version() + ") reads " + std::to_string(kFormatVersion) +
                                          ": a newer one is needed");
    if (h.format_version < kFormatVersion) damaged("format version 0");
    if (h.header_bytes != sizeof(Header)) damaged("a header of " + std::to_string(h.header_bytes) + " bytes");
    if (size_ < sizeof(Header)) truncated(sizeof(Header));
    if (h.file_bytes > static_cast<uint64_t>(kMostBytes)) damaged("larger than any model");
    if (size_ < h.file_bytes) truncated(h.file_bytes);
    if (size_ > h.file_bytes) damaged("bytes after its end");
    fused_ebm::Sha256 sum;
    sum.update(memory_.data(), offsetof(Header, digest));
    sum.update(memory_.data() + sizeof(Header), size_ - sizeof(Header));
    if (std::memcmp(sum.digest().data(), h.digest, kDigestBytes) != 0) damaged("its SHA-256 is another");
  }

  Kernel kernel(const Record& r) const {
    check("a compute capability", r.cc, 10, 9999);
    check("a mark of one chip", r.exact, 0, 1);
    check("a mark of a score", r.with_score, 0, 1);
    check("the events of a program", r.block_m, 1, 65536);
    check("the threads of a program", r.threads, 1, 1024);
    check("the shared memory of a program", r.shared, 0, 1 << 20);
    check("the programs of a multiprocessor", r.programs_per_sm, 1, 64);
    check("the number of parameters", r.n_parameters, 1, kMostParameters);
    Kernel k{r.cc, r.exact != 0, r.with_score != 0, r.block_m, r.threads, r.shared, r.programs_per_sm,
             copies<Parameter>(r.parameters, r.n_parameters), at(r.cubin, r.cubin_bytes),
             text(r.name, sizeof(r.name))};
    for (const Parameter& p : k.parameters)
      if (p.kind >= kKinds || (p.kind == kWeights && p.value >= header_.weights_bytes) ||
          (p.kind == kScratch && p.value > uint64_t{1} << 30))
        damaged("a parameter that is not known");
    if (r.cubin_bytes < 4 || std::memcmp(k.cubin, "\x7f" "ELF", 4) != 0) damaged("a kernel that is no cubin");
    return k;
  }

  const unsigned char* at(uint64_t offset, uint64_t count) const {
    if (offset < sizeof(Header) || count > size_ || offset > size_ - count) damaged("a part outside of the file");
    return memory_.data() + offset;
  }

  template <class T>
  std::vector<T> copies(uint64_t offset, uint64_t count) const {  // count is small
    std::vector<T> result(count);
    std::memcpy(result.data(), at(offset, count * sizeof(T)), count * sizeof(T));
    return result;
  }

  std::string text(const char* first, size_t most) const {
    const char* const end = std::find(first, first + most, '\0');
    if (end == first || end == first + most) damaged("a name that is empty or does not end");
    return {first, end};
  }

  std::vector<std::string> names() const {
    const char* p = reinterpret_cast<const char*>(at(header_.names, header_.names_bytes));
    const char* const end = p + header_.names_bytes;
    std::vector<std::string> result;
    for (const char* zero; p < end && (zero = std::find(p, end, '\0')) != end; p = zero + 1)
      result.emplace_back(p, zero);
    if (p != end || result.size() != header_.features) damaged("not one name for each feature");
    return result;
  }

  void check(const char* name, uint32_t value, uint32_t least, uint32_t most) const {
    if (value < least || value > most)
      damaged(std::string(name) + " is " + std::to_string(value) + ", expected " + std::to_string(least) + " to " +
              std::to_string(most));
  }

  [[noreturn]] void fail(int code, const std::string& what) const { throw Error(code, path_ + ": " + what); }
  [[noreturn]] void damaged(const std::string& what) const { fail(FUSED_EBM_CUDA_BAD_FILE, "damaged: " + what); }
  [[noreturn]] void truncated(uint64_t expected) const {
    fail(FUSED_EBM_CUDA_BAD_FILE, "truncated: " + std::to_string(size_) + " bytes, expected " +
                                      (size_ < sizeof(Header) ? "at least " : "") + std::to_string(expected));
  }

  std::string path_;
  std::vector<unsigned char> memory_;
  uint64_t size_ = 0;
  Header header_{};
};

}  // namespace

File read_file(const char* path) { return Reader(path).read(); }

}  // namespace fused_ebm_cuda
