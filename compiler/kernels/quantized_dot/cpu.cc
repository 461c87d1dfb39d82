// quantized_dot on CPU: y[M, N] = (x[M, K] @ codes[N, K].T) * scale[N], codes never expanded in memory.

#include <cstdint>
#include <string>

#include "xla/ffi/api/ffi.h"

#include "../isa.h"
#include "../shape.h"
#include "groups.h"
#include "panels.h"
#include "split.h"

namespace xlathe {

struct QuantizedDot {
  const float* x;  // as `pack_panels` leaves it, x_width floats a row
  int64_t x_width;
  Panels panels;
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

ffi::Error no_such_isa(std::string_view isa) {
  return ffi::Error::InvalidArgument("quantized_dot: this CPU cannot run isa \"" + std::string(isa) + "\"");
}

// y[M, N] = (x[M, K] @ codes[N, K].T) * scale[N]
void multiply(ffi::ThreadPool& pool, Isa isa, const float* x, const int8_t* codes, const float* scale, float* y,
              int64_t m, int64_t n, int64_t k) {
  const Panels panels(m, XLATHE_SELECT(isa, kPanel));
  const int64_t width = (k + 15) / 16 * 16;
  const auto packed = aligned_array<float>(m * width);
  XLATHE_SELECT(isa, pack_panels)(x, k, panels, packed.get());
  const QuantizedDot op{packed.get(), width, panels, codes, scale, y, m, n, k};
  const auto rows = XLATHE_SELECT(isa, rows);
  split_rows(pool, m, n, k, [&](int64_t n0, int64_t n1) { rows(op, n0, n1); });
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
  if (!isa) return no_such_isa(isa_wanted);
  if (m == 0 || n == 0) return ffi::Error::Success();
  multiply(pool, *isa, x.typed_data(), codes.typed_data(), scale.typed_data(), y->typed_data(), m, n, k);
  return ffi::Error::Success();
}

// The same for the rows of each expert: x[M, K], sizes[E], codes[E, N, K], scale[E, N].
ffi::Error quantized_ragged_dot_int8(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR1<ffi::S32> sizes,
                                     ffi::BufferR3<ffi::S8> codes, ffi::BufferR2<ffi::F32> scale,
                                     ffi::ResultBufferR2<ffi::F32> y, std::string_view isa_wanted) {
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = codes.dimensions()[1];
  const int64_t experts = codes.dimensions()[0];
  if (codes.dimensions()[2] != k || sizes.dimensions()[0] != experts || scale.dimensions()[0] != experts ||
      scale.dimensions()[1] != n || y->dimensions()[0] != m || y->dimensions()[1] != n) {
    return ffi::Error::InvalidArgument(
        "quantized_ragged_dot: expected x [M, K], sizes [E], codes [E, N, K], scale [E, N], y [M, N]; found x " +
        shape(x.dimensions()) + ", sizes " + shape(sizes.dimensions()) + ", codes " + shape(codes.dimensions()) +
        ", scale " + shape(scale.dimensions()) + ", y " + shape(y->dimensions()));
  }
  const std::optional<Isa> isa = find_isa(isa_wanted);
  if (!isa) return no_such_isa(isa_wanted);
  if (n == 0) return ffi::Error::Success();
  return for_each_group(sizes.typed_data(), experts, m, n, y->typed_data(),
                        [&](int64_t expert, int64_t begin, int64_t count) {
                          multiply(pool, *isa, x.typed_data() + begin * k, codes.typed_data() + expert * n * k,
                                   scale.typed_data() + expert * n, y->typed_data() + begin * n, count, n, k);
                        });
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlathe_quantized_ragged_dot_int8, xlathe::quantized_ragged_dot_int8,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR3<ffi::S8>>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<std::string_view>("isa"));
