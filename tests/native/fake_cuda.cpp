// A stand-in for NVIDIA's driver, built by tests/fake_gpu.py as libcuda.so.1: memory of the GPU is memory of the host,
// launches go to a function of the test, and what needs a context, or is not given back, is noticed.
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

struct Module {
  const void* image;
  int dynamic_shared;
};
int context;  // its address is the only context
thread_local std::vector<void*> current;
std::map<unsigned long long, size_t> memory;
std::string calls;

}  // namespace

extern "C" {

int fake_devices = 1, fake_cc = 90, fake_multiprocessors = 3, fake_capturing = 0, fake_live = 0;
const char* fake_failing = "";
int (*fake_on_launch)(const void* image, const unsigned* launch, int dynamic_shared, void* stream, void** parameters);

// Calls since the last question, one letter each: waits, launches, records, copies up and down.
const char* fake_calls() {
  static std::string said;
  said.swap(calls);
  calls.clear();
  return said.c_str();
}

// Bytes from a pointer to the end of its allocation; 0 outside of all.
size_t fake_rest(unsigned long long pointer) {
  auto after = memory.upper_bound(pointer);
  if (after == memory.begin()) return 0;
  --after;
  const auto end = after->first + after->second;
  return pointer < end ? end - pointer : 0;
}

int fake_depth() { return static_cast<int>(current.size()); }

#define BEGIN(needs_context)                              \
  if (std::strcmp(fake_failing, __func__) == 0) return 2; \
  if ((needs_context) && (current.empty() || current.back() != &context)) return 201

int cuInit(unsigned) {
  BEGIN(false);
  return fake_devices ? 0 : 100;
}
int cuGetErrorName(int, const char** name) {
  *name = "CUDA_ERROR_FAKE";
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = "as the test asked for";
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = fake_devices;
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = 40 + ordinal;
  return 0;
}
int cuDeviceGetName(char* name, int size, int) {
  std::strncpy(name, "Fake GPU", static_cast<size_t>(size));
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  BEGIN(false);
  *value = attribute == 16 ? fake_multiprocessors : attribute == 75 ? fake_cc / 10 : fake_cc % 10;
  return 0;
}
int cuDevicePrimaryCtxRetain(void** c, int) {
  BEGIN(false);
  ++fake_live;
  *c = &context;
  return 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return device >= 40 ? (--fake_live, 0) : 101; }
int cuCtxPushCurrent_v2(void* c) {
  current.push_back(c);
  return 0;
}
int cuCtxPopCurrent_v2(void** c) {
  BEGIN(true);
  *c = current.back();
  current.pop_back();
  return 0;
}
int cuModuleLoadData(void** module, const void* image) {
  BEGIN(true);
  ++fake_live;
  *module = new Module{image, 0};
  return 0;
}
int cuModuleUnload(void* module) {
  BEGIN(true);
  --fake_live;
  delete static_cast<Module*>(module);
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  BEGIN(true);
  *function = module;
  return std::strcmp(name, "fused") == 0 ? 0 : 500;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
  BEGIN(true);
  if (attribute != 8) return 1;
  static_cast<Module*>(function)->dynamic_shared = value;
  return 0;
}
int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes) {
  BEGIN(true);
  ++fake_live;
  void* const p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(p, 0xff, bytes);  // NaN
  *pointer = reinterpret_cast<unsigned long long>(p);
  memory[*pointer] = bytes;
  return 0;
}
int cuMemFree_v2(unsigned long long pointer) {
  BEGIN(true);
  if (!memory.erase(pointer)) return 1;
  --fake_live;
  std::free(reinterpret_cast<void*>(pointer));
  return 0;
}
int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t bytes, void* stream) {
  BEGIN(true);
  calls += 'u';
  if (!stream || fake_rest(to) < bytes) return 1;
  std::memcpy(reinterpret_cast<void*>(to), from, bytes);
  return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, void* stream) {
  BEGIN(true);
  calls += 'd';
  if (!stream || fake_rest(from) < bytes) return 1;
  std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
  return 0;
}
int cuStreamCreate(void** stream, unsigned flags) {
  BEGIN(true);
  ++fake_live;
  *stream = new int;
  return flags == 1 ? 0 : 1;
}
int cuStreamDestroy_v2(void* stream) {
  BEGIN(true);
  --fake_live;
  delete static_cast<int*>(stream);
  return 0;
}
int cuStreamSynchronize(void*) {
  BEGIN(true);
  return 0;
}
int cuStreamIsCapturing(void*, int* status) {
  BEGIN(true);
  *status = fake_capturing;
  return 0;
}
int cuStreamWaitEvent(void*, void*, unsigned) {
  BEGIN(true);
  calls += 'w';
  return 0;
}
int cuEventCreate(void** event, unsigned flags) {
  BEGIN(true);
  ++fake_live;
  *event = new int;
  return flags == 2 ? 0 : 1;
}
int cuEventRecord(void*, void*) {
  BEGIN(true);
  calls += 'r';
  return 0;
}
int cuEventSynchronize(void*) {
  BEGIN(true);
  return 0;
}
int cuEventDestroy_v2(void* event) {
  BEGIN(true);
  --fake_live;
  delete static_cast<int*>(event);
  return 0;
}
int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters, void** extra) {
  BEGIN(true);
  calls += 'l';
  const auto* m = static_cast<Module*>(function);
  const unsigned launch[] = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared};
  return extra ? 1 : fake_on_launch(m->image, launch, m->dynamic_shared, stream, parameters);
}

}  // extern "C"
