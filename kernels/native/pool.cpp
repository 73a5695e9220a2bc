#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace fused_ebm {
namespace {

constexpr auto kAwake = std::chrono::microseconds(100);  // waking a thread takes about as long

// Waits until the condition holds, at most for a while: whether it does.
template <class Condition>
bool spin(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + kAwake;
  while (!condition()) {
    if (std::chrono::steady_clock::now() >= end) return false;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return true;
}

struct Job {
  void (*call)(const void* task, int64_t i);
  const void* task;
  int64_t count;
  int wanted;                   // helpers that it may still have
  std::atomic<int> helpers{0};  // threads at work on it besides the caller
  Job* after = nullptr;         // in the pool's list; all three are changed under the pool's mutex
  std::atomic<int64_t> next{0};

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) call(task, i);
  }
};

class Pool {
 public:
  void run(Job& job) {
    const int helpers = job.wanted;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; size_ < helpers; ++size_) std::thread([this] { serve(); }).detach();
      *link_to(nullptr) = &job;
      wanted_ += helpers;
    }
    helpers == 1 ? wake_.notify_one() : wake_.notify_all();
    job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      *link_to(&job) = job.after;
      wanted_ -= job.wanted;
    }
    const auto done = [&job] { return job.helpers == 0; };
    if (spin(done)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, done);
  }

 private:
  // What leads to this job in the list, or to its end.
  Job** link_to(const Job* job) {
    Job** link = &first_;
    while (*link != job) link = &(*link)->after;
    return link;
  }

  void serve() {
    const auto wanted = [this] { return wanted_ > 0; };
    for (;;) {
      spin(wanted);
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, wanted);
      Job* job = first_;
      while (job->wanted == 0) job = job->after;
      --job->wanted;
      --wanted_;
      ++job->helpers;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->helpers == 0) done_.notify_all();  // from here on the job may be gone
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Job* first_ = nullptr;        // the calls under way: a list within the jobs, so that none allocates
  std::atomic<int> wanted_{0};  // by all of them together, to be read without the mutex
  int size_ = 0;
};

// Never destroyed: its threads live as long as the process. A forked child has none of them, so it starts anew.
Pool* pool = nullptr;
std::once_flag at_fork;
std::mutex make_pool;

Pool& the_pool() {
  std::call_once(at_fork, [] {
    pthread_atfork([] { make_pool.lock(); }, [] { make_pool.unlock(); },
                   [] {
                     pool = nullptr;
                     make_pool.unlock();
                   });
  });
  std::lock_guard<std::mutex> lock(make_pool);
  if (!pool) pool = new Pool;
  return *pool;
}

}  // namespace

void parallel_for(int64_t count, int threads, void (*call)(const void* task, int64_t i), const void* task) {
  Job job{call, task, count, static_cast<int>(std::min<int64_t>(threads, count)) - 1};
  job.wanted > 0 ? the_pool().run(job) : job.work();
}

}  // namespace fused_ebm
