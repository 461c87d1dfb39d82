// quantized_dot on CPU with 4-bit codes in groups: y[M, N] = x[M, K] @ ((codes - zero) * scale)[N, K].T

#include "int4.h"
#include "panels.h"
#include "split.h"

namespace xlathe {

constexpr int kInt4Step = 128;  // columns that are worked on together: 16 lanes of 8
constexpr int kDigits = 3;

// 128 columns of one row of x, in 16 lanes of 8. Column i is step[i / 8] times the number whose digits to the base 256
// are digits[0][i % 2][i / 2], digits[1]..., the highest first.
struct alignas(64) Int4Columns {
  int8_t digits[kDigits][2][kInt4Step / 2];
  int32_t sum[16];  // of a lane's numbers
  float step[16];
};

struct Int4Dot {
  const Int4Columns* x;  // as `pack_int4_panels` leaves it, x_width a row
  int64_t x_width;
  Panels panels;
  Int4Weight weight;
  float* y;  // [M, N]
};

}  // namespace xlathe

#define XLATHE_BODY "quantized_dot/int4_rows.h"
#include "../foreach_isa.h"

namespace ffi = xla::ffi;

namespace xlathe {
namespace {

ffi::Error quantized_dot_int4(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::U8> codes,
                              ffi::BufferR2<ffi::BF16> scale, ffi::BufferR2<ffi::U8> zero,
                              ffi::ResultBufferR2<ffi::F32> y, std::string_view isa_wanted) {
  const Int4Call call{x, codes, scale, zero, y};
  const std::optional<Isa> isa = find_isa(isa_wanted);
  if (ffi::Error error = call.check(isa, isa_wanted); error.failure()) return error;
  const Int4Weight weight = call.weight();
  if (call.m() == 0 || weight.n == 0) return ffi::Error::Success();

  const Panels panels(call.m(), XLATHE_SELECT(*isa, kInt4Panel));
  const int64_t width = (weight.k + kInt4Step - 1) / kInt4Step;
  const auto packed = aligned_array<Int4Columns>(call.m() * width);
  XLATHE_SELECT(*isa, pack_int4_panels)(x.typed_data(), weight.k, panels, packed.get());
  const Int4Dot op{packed.get(), width, panels, weight, y->typed_data()};
  const auto rows = XLATHE_SELECT(*isa, int4_rows);
  split_rows(pool, call.m(), weight.n, weight.k, [&](int64_t n0, int64_t n1) { rows(op, n0, n1); });
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
