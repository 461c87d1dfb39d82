// A loop shared between the calling thread and XLA's own thread pool.
#ifndef XLATHE_KERNELS_PARALLEL_H_
#define XLATHE_KERNELS_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace xlathe {

// Calls body(i) once for every 0 <= i < count; returns when all calls have returned.
//
// The caller takes iterations like every helper and waits only for those which a running thread has
// already begun, never for a task to be scheduled. So it cannot deadlock where XLA calls the kernel from
// a thread of that very pool, and a helper that starts late finds nothing left and touches nothing.
template <typename Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
  struct Progress {
    std::atomic<int64_t> begun{0}, ended{0};
  };
  auto progress = std::make_shared<Progress>();
  auto work = [progress, count, &body] {
    while (true) {
      const int64_t i = progress->begun.fetch_add(1);
      if (i >= count) return;
      body(i);
      progress->ended.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = (pool.num_threads() < count ? pool.num_threads() : count) - 1;
  for (int64_t h = 0; h < helpers; ++h) pool.Schedule([work] { work(); });
  work();
  while (progress->ended.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace xlathe

#endif  // XLATHE_KERNELS_PARALLEL_H_
