// Threads that take work tile by tile.
#pragma once

#include <cstdint>
#include <functional>

namespace fused_ebm {

// Calls task(0) ... task(count - 1), each once, on the caller's thread and at most `threads` - 1 others, which take
// the next task as they come free: a stolen core delays one task, not the call. Between calls they wait for a tenth of
// a millisecond, so that a stream of calls finds them awake, and then sleep. Safe to call from several threads at
// once and after fork. Tasks must not throw.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace fused_ebm
