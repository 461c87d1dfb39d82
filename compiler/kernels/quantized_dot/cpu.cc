// quantized_dot on CPU: y[M, N] = (x[M, K] @ codes[N, K].T) * scale[N], codes never expanded in memory.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

#include "../isa.h"
#include "../shape.h"
#include "split.h"

namespace xlathe {

struct QuantizedDot {
  const float* x;       // [M, x_stride], zero from K to the next multiple of 16
  int64_t x_stride;
  const int8_t* codes;  // [N, K]
  const float* scale;   // [N]
  float* y;             // [M, N]
  int64_t m, n, k;
};

}  // namespace xlathe

#define XLATHE_BODY "quantized_dot/rows.h"
#include "../foreach_isa.h"

namespace ffi = xla::ffi;

namespace xlathe {
namespace {

// Copies x into rows padded with zeros to a multiple of 16, and by one cache line more so that rows of a
// power-of-two length do not compete for the same cache sets.
std::vector<float> pad_rows(const float* x, int64_t m, int64_t k, int64_t stride) {
  std::vector<float> padded(m * stride);
  for (int64_t i = 0; i < m; ++i) std::copy_n(x + i * k, k, padded.data() + i * stride);
  return padded;
}

ffi::Error quantized_dot_int8(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::S8> codes,
                              ffi::BufferR1<ffi::F32> scale, ffi::ResultBufferR2<ffi::F32> y,
                              std::string_view isa_wanted) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = codes.dimensions()[0];
  if (codes.dimensions()[1] != k || scale.dimensions()[0] != n || y->dimensions()[0] != m ||
      y->dimensions()[1] != n) {
    return ffi::Error::InvalidArgument(
        "quantized_dot: expected x [M, K], codes [N, K], scale [N], y [M, N]; found x " +
        shape(x.dimensions()) + ", codes " + shape(codes.dimensions()) + ", scale " +
        shape(scale.dimensions()) + ", y " + shape(y->dimensions()));
  }
  const std::optional<Isa> isa = find_isa(isa_wanted);
  if (!isa) {
    return ffi::Error::InvalidArgument("quantized_dot: this CPU cannot run isa \"" + std::string(isa_wanted) +
                                       "\"");
  }
  if (m == 0 || n == 0) return ffi::Error::Success();

  const int64_t stride = (k + 15) / 16 * 16 + 16;
  const std::vector<float> padded = pad_rows(x.typed_data(), m, k, stride);
  const QuantizedDot op{
      padded.data(), stride, codes.typed_data(), scale.typed_data(), y->typed_data(), m, n, k};
  const auto rows = XLATHE_SELECT(*isa, rows);
  split_rows(pool, m, n, k, [&](int64_t n0, int64_t n1) { rows(op, n0, n1); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xlathe

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlathe_quantized_dot_int8, xlathe::quantized_dot_int8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::S8>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<std::string_view>("isa"));
