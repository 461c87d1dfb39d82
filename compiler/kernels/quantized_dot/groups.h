// Rows in groups, each of which is multiplied with a weight of its own: the experts of a mixture.
#ifndef XLATHE_KERNELS_QUANTIZED_DOT_GROUPS_H_
#define XLATHE_KERNELS_QUANTIZED_DOT_GROUPS_H_

#include <algorithm>
#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace xlathe {

// Calls multiply(group, first row, rows) for every group that has rows, in order, and puts zeros into the rows of y
// [M, N] after the last. Nothing of a group without rows is read.
template <typename Multiply>
xla::ffi::Error for_each_group(const int32_t* sizes, int64_t groups, int64_t m, int64_t n, float* y,
                               const Multiply& multiply) {
  int64_t begin = 0;
  for (int64_t group = 0; group < groups; ++group) {
    if (sizes[group] < 0 || sizes[group] > m - begin) {
      return xla::ffi::Error::InvalidArgument("quantized_ragged_dot: sizes must not be negative and sum to at most M");
    }
    if (sizes[group] > 0) multiply(group, begin, sizes[group]);
    begin += sizes[group];
  }
  std::fill(y + begin * n, y + m * n, 0.0f);
  return xla::ffi::Error::Success();
}

}  // namespace xlathe

#endif  // XLATHE_KERNELS_QUANTIZED_DOT_GROUPS_H_
