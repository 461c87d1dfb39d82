// quantized_dot on CPU with 4-bit codes in groups and activations rounded to 8 bits, 32 at a time.

#include <vector>

#include "int4.h"
#include "split.h"

namespace xlathe {

// Rounded activations of one row: x ~ code * step. Of each 64 columns the codes of the even ones come first. After K
// come zeros, to a multiple of 512 columns.
struct RoundedRow {
  int8_t* codes;  // [K]
  float* step;    // [K / 32]
  int32_t* sum;   // [K / 32] of codes
};

struct Int4A8Dot {
  const RoundedRow* x;  // [M]
  Int4Weight weight;
  float* y;  // [M, N]
  int64_t m;
};

constexpr int kBlock = 32;
constexpr int kA8Blocks = 16;  // that are worked on together

}  // namespace xlathe

#define XLATHE_BODY "quantized_dot/int4_a8_rows.h"
#include "../foreach_isa.h"

namespace ffi = xla::ffi;

namespace xlathe {
namespace {

ffi::Error quantized_dot_int4_a8(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::U8> codes,
                                 ffi::BufferR2<ffi::BF16> scale, ffi::BufferR2<ffi::U8> zero,
                                 ffi::ResultBufferR2<ffi::F32> y, std::string_view isa_wanted) {
  const Int4Call call{x, codes, scale, zero, y};
  const std::optional<Isa> isa = find_isa(isa_wanted);
  if (ffi::Error error = call.check(isa, isa_wanted); error.failure()) return error;
  const Int4Weight weight = call.weight();
  const int64_t m = call.m();
  if (m == 0 || weight.n == 0) return ffi::Error::Success();

  const int64_t blocks = (weight.k / kBlock + kA8Blocks - 1) / kA8Blocks * kA8Blocks;
  std::vector<int8_t> rounded(m * blocks * kBlock);
  std::vector<float> steps(m * blocks);
  std::vector<int32_t> sums(m * blocks);
  std::vector<RoundedRow> rows;
  const auto round_row = XLATHE_SELECT(*isa, round_row);
  for (int64_t i = 0; i < m; ++i) {
    rows.push_back({rounded.data() + i * blocks * kBlock, steps.data() + i * blocks, sums.data() + i * blocks});
    round_row(x.typed_data() + i * weight.k, weight.k, rows.back());
  }
  const Int4A8Dot op{rows.data(), weight, y->typed_data(), m};
  const auto part = XLATHE_SELECT(*isa, int4_a8_rows);
  split_rows(pool, m, weight.n, weight.k, [&](int64_t n0, int64_t n1) { part(op, n0, n1); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xlathe

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlathe_quantized_dot_int4_a8, xlathe::quantized_dot_int4_a8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::U8>>()
                                  .Arg<ffi::BufferR2<ffi::BF16>>()
                                  .Arg<ffi::BufferR2<ffi::U8>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<std::string_view>("isa"));
