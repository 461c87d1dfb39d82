// quantized_dot on CPU with a weight in the packed blocks of GGUF files, which are read as they are.

#include <cstdint>
#include <string>

#include "xla/ffi/api/ffi.h"

#include "../isa.h"
#include "../shape.h"
#include "blocks.h"
#include "groups.h"
#include "panels.h"
#include "split.h"

#define XLATHE_BODY "quantized_dot/blocks_rows.h"
#include "../foreach_isa.h"

namespace ffi = xla::ffi;

namespace xlathe {
namespace {

// What a call of a handler chooses by its attributes.
struct BlocksCall {
  BlockSize size;
  Isa isa;
  bool rounded;  // activations are, to 8 bits

  int64_t row(int64_t k) const { return k / size.columns * size.bytes; }
};

ffi::Error find_call(std::string_view type, std::string_view activations, std::string_view isa_wanted,
                     std::optional<BlocksCall>& call) {
  const auto size = find_block_type(type);
  const auto isa = find_isa(isa_wanted);
  if (!size || (activations != "" && activations != "int8")) {
    return ffi::Error::InvalidArgument("quantized_dot: no kernel for blocks of type \"" + std::string(type) +
                                       "\" and activations \"" + std::string(activations) + "\"");
  }
  if (!isa) {
    return ffi::Error::InvalidArgument("quantized_dot: this CPU cannot run isa \"" + std::string(isa_wanted) + "\"");
  }
  call = BlocksCall{*size, *isa, !activations.empty()};
  return ffi::Error::Success();
}

void multiply(ffi::ThreadPool& pool, const BlocksCall& call, const float* x, const uint8_t* weight, float* y,
              int64_t m, int64_t n, int64_t k) {
  const BlocksKernel kernel = XLATHE_SELECT(call.isa, blocks_kernel)(call.size.type, call.rounded);
  const int64_t width = (k + kernel.columns - 1) / kernel.columns;
  const auto packed = aligned_array<uint8_t>(m * width * kernel.entry);
  kernel.pack(x, m, k, packed.get());
  const BlocksDot op{packed.get(), width, weight, call.row(k), y, m, n, k};
  split_rows(pool, m, n, k, [&](int64_t n0, int64_t n1) { kernel.rows(op, n0, n1); });
}

ffi::Error quantized_dot_blocks(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::U8> weight,
                                ffi::ResultBufferR2<ffi::F32> y, std::string_view type, std::string_view activations,
                                std::string_view isa) {
  std::optional<BlocksCall> call;
  if (ffi::Error error = find_call(type, activations, isa, call); error.failure()) return error;
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = weight.dimensions()[0];
  if (k % call->size.columns || weight.dimensions()[1] != call->row(k) || y->dimensions()[0] != m ||
      y->dimensions()[1] != n) {
    return ffi::Error::InvalidArgument(
        "quantized_dot: expected x [M, K], K whole blocks of " + std::to_string(call->size.columns) +
        ", blocks [N, bytes of K], y [M, N]; found x " + shape(x.dimensions()) + ", blocks " +
        shape(weight.dimensions()) + ", y " + shape(y->dimensions()));
  }
  if (m == 0 || n == 0) return ffi::Error::Success();
  multiply(pool, *call, x.typed_data(), weight.typed_data(), y->typed_data(), m, n, k);
  return ffi::Error::Success();
}

// The same for the rows of each expert: x[M, K], sizes[E], blocks[E, N, bytes of K].
ffi::Error quantized_ragged_dot_blocks(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR1<ffi::S32> sizes,
                                       ffi::BufferR3<ffi::U8> weight, ffi::ResultBufferR2<ffi::F32> y,
                                       std::string_view type, std::string_view activations, std::string_view isa) {
  std::optional<BlocksCall> call;
  if (ffi::Error error = find_call(type, activations, isa, call); error.failure()) return error;
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const int64_t experts = weight.dimensions()[0], n = weight.dimensions()[1], row = call->row(k);
  if (k % call->size.columns || weight.dimensions()[2] != row || sizes.dimensions()[0] != experts ||
      y->dimensions()[0] != m || y->dimensions()[1] != n) {
    return ffi::Error::InvalidArgument(
        "quantized_ragged_dot: expected x [M, K], K whole blocks of " + std::to_string(call->size.columns) +
        ", sizes [E], blocks [E, N, bytes of K], y [M, N]; found x " + shape(x.dimensions()) + ", sizes " +
        shape(sizes.dimensions()) + ", blocks " + shape(weight.dimensions()) + ", y " + shape(y->dimensions()));
  }
  if (n == 0) return ffi::Error::Success();
  return for_each_group(sizes.typed_data(), experts, m, n, y->typed_data(),
                        [&](int64_t expert, int64_t begin, int64_t count) {
                          multiply(pool, *call, x.typed_data() + begin * k,
                                       weight.typed_data() + expert * n * row, y->typed_data() + begin * n, count, n,
                                       k);
                        });
}

}  // namespace
}  // namespace xlathe

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlathe_quantized_dot_blocks, xlathe::quantized_dot_blocks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR2<ffi::U8>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<std::string_view>("type")
                                  .Attr<std::string_view>("activations")
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlathe_quantized_ragged_dot_blocks, xlathe::quantized_ragged_dot_blocks,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR3<ffi::U8>>()
                                  .Ret<ffi::BufferR2<ffi::F32>>()
                                  .Attr<std::string_view>("type")
                                  .Attr<std::string_view>("activations")
                                  .Attr<std::string_view>("isa"));
