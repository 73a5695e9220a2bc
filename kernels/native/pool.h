// Threads that take work tile by tile.
#pragma once

#include <cstdint>

namespace fused_ebm {

// As below, for task(i) = call(task, i).
void parallel_for(int64_t count, int threads, void (*call)(const void* task, int64_t i), const void* task);

// Calls task(0) ... task(count - 1), each once, on the caller's thread and at most `threads` - 1 others, which take
// the next task as they come free: a stolen core delays one task, not the call. Between calls they wait for a tenth of
// a millisecond, so that a stream of calls finds them awake, and then sleep. Safe to call from several threads at
// once and after fork. Allocates nothing once the threads are there. Tasks must not throw.
template <class Task>
void parallel_for(int64_t count, int threads, const Task& task) {
  parallel_for(count, threads, [](const void* t, int64_t i) { (*static_cast<const Task*>(t))(i); }, &task);
}

}  // namespace fused_ebm
