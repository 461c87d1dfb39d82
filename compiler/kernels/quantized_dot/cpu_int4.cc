// quantized_dot on CPU with 4-bit codes in groups: y[M, N] = x[M, K] @ ((codes - zero) * scale)[N, K].T

#include <vector>

#include "int4.h"
#include "split.h"

namespace xlathe {

struct Int4Dot {
  const float* x;  // [M, x_stride] as `arrange` leaves it
  int64_t x_stride;
  Int4Weight weight;
  float* y;  // [M, N]
  int64_t m;
};

constexpr int kInt4Step = 128;  // columns that are worked on together: 16 lanes of 8 codes, 32 bits
constexpr int kInt4Width = kInt4Step + 16;  // floats of x for them: `arrange`

}  // namespace xlathe

#define XLATHE_BODY "quantized_dot/int4_rows.h"
#include "../foreach_isa.h"

namespace ffi = xla::ffi;

namespace xlathe {
namespace {

// Arranges each 128 columns of x as the codes are found: j-th in 16 lanes of 8, and then minus the sum of each lane.
// Codes are used where they lie in their lane, 16**(j mod 4) times as large, and x is as much smaller. Rows are padded
// with zeros, and by one cache line more so that rows of a power-of-two length do not compete for the same cache sets.
std::vector<float> arrange(const float* x, int64_t m, int64_t k, int64_t stride) {
  static constexpr float kSmaller[4] = {1.0f, 1.0f / 16, 1.0f / 256, 1.0f / 4096};
  std::vector<float> arranged(m * stride);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t at = 0; at < k; ++at) {
      const int64_t lane = at % kInt4Step / 8, j = at % 8;
      float* step = arranged.data() + i * stride + at / kInt4Step * kInt4Width + lane;
      step[j * 16] = x[i * k + at] * kSmaller[j % 4];
      step[kInt4Step] -= x[i * k + at];
    }
  }
  return arranged;
}

ffi::Error quantized_dot_int4(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::U8> codes,
                              ffi::BufferR2<ffi::BF16> scale, ffi::BufferR2<ffi::U8> zero,
                              ffi::ResultBufferR2<ffi::F32> y, std::string_view isa_wanted) {
  const Int4Call call{x, codes, scale, zero, y};
  const std::optional<Isa> isa = find_isa(isa_wanted);
  if (ffi::Error error = call.check(isa, isa_wanted); error.failure()) return error;
  const Int4Weight weight = call.weight();
  if (call.m() == 0 || weight.n == 0) return ffi::Error::Success();

  const int64_t stride = (weight.k + kInt4Step - 1) / kInt4Step * kInt4Width + 16;
  const std::vector<float> arranged = arrange(x.typed_data(), call.m(), weight.k, stride);
  const Int4Dot op{arranged.data(), stride, weight, y->typed_data(), call.m()};
  const auto rows = XLATHE_SELECT(*isa, int4_rows);
  split_rows(pool, op.m, weight.n, weight.k, [&](int64_t n0, int64_t n1) { rows(op, n0, n1); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xlathe

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlathe_quantized_dot_int4, xlathe::quantized_dot_int4,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::U8>>()
                                  .Arg<ffi::BufferR2<ffi::BF16>>()
                                  .Arg<ffi::BufferR2<ffi::U8>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<std::string_view>("isa"));
