// quantized_dot on CPU with 4-bit codes in groups: y[M, N] = x[M, K] @ ((codes - zero) * scale)[N, K].T

#include "groups.h"
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

void multiply(ffi::ThreadPool& pool, Isa isa, const float* x, const Int4Weight& weight, float* y, int64_t m) {
  const Panels panels(m, XLATHE_SELECT(isa, kInt4Panel));
  const int64_t width = (weight.k + kInt4Step - 1) / kInt4Step;
  const auto packed = aligned_array<Int4Columns>(m * width);
  XLATHE_SELECT(isa, pack_int4_panels)(x, weight.k, panels, packed.get());
  const Int4Dot op{packed.get(), width, panels, weight, y};
  const auto rows = XLATHE_SELECT(isa, int4_rows);
  split_rows(pool, m, weight.n, weight.k, [&](int64_t n0, int64_t n1) { rows(op, n0, n1); });
}

ffi::Error quantized_dot_int4(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::U8> codes,
                              ffi::BufferR2<ffi::BF16> scale, ffi::BufferR2<ffi::U8> zero,
                              ffi::ResultBufferR2<ffi::F32> y, std::string_view isa_wanted) {
  const Int4Call call{x, codes, scale, zero, y};
  const std::optional<Isa> isa = find_isa(isa_wanted);
  if (ffi::Error error = call.check(isa, isa_wanted); error.failure()) return error;
  const Int4Weight weight = call.weight();
  if (call.m() == 0 || weight.n == 0) return ffi::Error::Success();
  multiply(pool, *isa, x.typed_data(), weight, y->typed_data(), call.m());
  return ffi::Error::Success();
}

// The same for the rows of each expert: x[M, K], sizes[E], codes[E, N, K/2], scale[E, N, K/group], zero like it or
// [E, N, 0].
ffi::Error quantized_ragged_dot_int4(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR1<ffi::S32> sizes,
                                     ffi::BufferR3<ffi::U8> codes, ffi::BufferR3<ffi::BF16> scale,
                                     ffi::BufferR3<ffi::U8> zero, ffi::ResultBufferR2<ffi::F32> y,
                                     std::string_view isa_wanted) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const int64_t experts = codes.dimensions()[0], n = codes.dimensions()[1];
  const int64_t groups = scale.dimensions()[2], zeros = zero.dimensions()[2];
  const int shift = group_shift(k, groups);
  if (codes.dimensions()[2] * 2 != k || sizes.dimensions()[0] != experts || scale.dimensions()[0] != experts ||
      scale.dimensions()[1] != n || zero.dimensions()[0] != experts || zero.dimensions()[1] != n ||
      (zeros != 0 && zeros != groups) || y->dimensions()[0] != m || y->dimensions()[1] != n || (k > 0 && shift < 0)) {
    return ffi::Error::InvalidArgument(
        "quantized_ragged_dot: expected x [M, K], sizes [E], codes [E, N, K/2], scale [E, N, K/group], zero the same or "
        "[E, N, 0], y [M, N] and groups of 32, 64, ... 1024; found x " +
        shape(x.dimensions()) + ", sizes " + shape(sizes.dimensions()) + ", codes " + shape(codes.dimensions()) +
        ", scale " + shape(scale.dimensions()) + ", zero " + shape(zero.dimensions()) + ", y " +
        shape(y->dimensions()));
  }
  const std::optional<Isa> isa = find_isa(isa_wanted);
  if (!isa) {
    return ffi::Error::InvalidArgument("quantized_dot: this CPU cannot run isa \"" + std::string(isa_wanted) + "\"");
  }
  if (n == 0) return ffi::Error::Success();
  const Int4Weight all{{codes.typed_data(), scale.typed_data(), zeros > 0 ? zero.typed_data() : nullptr, shift}, n, k};
  return for_each_group(sizes.typed_data(), experts, m, n, y->typed_data(),
                        [&](int64_t expert, int64_t begin, int64_t count) {
                          multiply(pool, *isa, x.typed_data() + begin * k, {all.row(expert * n), n, k},
                                   y->typed_data() + begin * n, count);
                        });
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlathe_quantized_ragged_dot_int4, xlathe::quantized_ragged_dot_int4,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR3<ffi::U8>>()
                                  .Arg<ffi::BufferR3<ffi::BF16>>()
                                  .Arg<ffi::BufferR3<ffi::U8>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<std::string_view>("isa"));
