// The rows of a weight, shared among threads.
#ifndef XLATHE_KERNELS_QUANTIZED_DOT_SPLIT_H_
#define XLATHE_KERNELS_QUANTIZED_DOT_SPLIT_H_

#include <algorithm>
#include <cstdint>

#include "../parallel.h"

namespace xlathe {

constexpr int kTileN = 48;  // rows of codes that are worked on together
constexpr int kCacheLine = 64;

// Calls rows(n0, n1) for parts of 0 <= n < N, several at once where m * n * k multiply-adds pay for it.
template <typename Rows>
void split_rows(xla::ffi::ThreadPool& pool, int64_t m, int64_t n, int64_t k, const Rows& rows) {
  constexpr int64_t kParallelWork = 1 << 20;  // below it waking another thread costs more than it saves
  constexpr int64_t kBlocksPerThread = 16;    // so that a thread that is held up leaves little to wait for
  if (m * n * k < kParallelWork) return rows(0, n);
  const int64_t blocks = kBlocksPerThread * std::max<int64_t>(1, pool.num_threads());
  const int64_t block = (n / blocks / kTileN + 1) * kTileN;
  parallel_for(pool, (n + block - 1) / block,
               [&](int64_t i) { rows(i * block, std::min(n, (i + 1) * block)); });
}

}  // namespace xlathe

#endif  // XLATHE_KERNELS_QUANTIZED_DOT_SPLIT_H_
