#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

namespace fused_ebm {
namespace {

constexpr auto kAwake = std::chrono::microseconds(100);  // waking a thread takes about as long

// Waits until the condition holds, at most for a while.
template <class Condition>
void spin(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + kAwake;
  while (!condition() && std::chrono::steady_clock::now() < end) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

struct Job {
  const std::function<void(int64_t)>* task;
  int64_t count;
  std::atomic<int64_t> next{0};
  std::atomic<int> helpers{0};  // threads at work on it besides the caller; changed under the pool's mutex

  void work() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) (*task)(i);
  }
};

class Pool {
 public:
  void run(Job& job, int helpers) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (; size_ < helpers; ++size_) std::thread([this] { serve(); }).detach();
      wanted_.insert(wanted_.end(), helpers, &job);
      waiting_ += helpers;
    }
    helpers == 1 ? wake_.notify_one() : wake_.notify_all();
    job.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto left = std::remove(wanted_.begin(), wanted_.end(), &job);
      waiting_ -= static_cast<int>(wanted_.end() - left);
      wanted_.erase(left, wanted_.end());
    }
    const auto done = [&job] { return job.helpers == 0; };
    spin(done);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, done);
  }

 private:
  void serve() {
    for (;;) {
      spin([this] { return waiting_ > 0; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return !wanted_.empty(); });
      Job* job = wanted_.front();
      wanted_.pop_front();
      --waiting_;
      ++job->helpers;
      lock.unlock();
      job->work();
      lock.lock();
      if (--job->helpers == 0) done_.notify_all();  // from here on the job may be gone
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Job*> wanted_;       // a job once for every helper that it may still have
  std::atomic<int> waiting_{0};  // the size of wanted_, to be read without the mutex
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

void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task) {
  Job job;
  job.task = &task;
  job.count = count;
  const int helpers = static_cast<int>(std::min<int64_t>(threads, count)) - 1;
  if (helpers <= 0) return job.work();
  the_pool().run(job, helpers);
}

}  // namespace fused_ebm
