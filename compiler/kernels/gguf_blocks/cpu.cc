// Numbers to the blocks of codes of GGUF files, with the bytes that ggml's own encoders write.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "../float_mode.h"
#include "../parallel.h"
#include "../shape.h"
#include "xla/ffi/api/ffi.h"

namespace xlathe {

enum class BlockType { kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ8_0, kIQ4_NL, kQ2_K, kQ3_K, kQ4_K, kQ5_K, kQ6_K, kIQ4_XS };

// What may be wrong with numbers, as bits.
constexpr int kNotFinite = 1, kTooLarge = 2;
constexpr int kTooLargeBits = 0x4e800000;  // 2**30: no type holds such numbers, and their squares would be infinite

struct BlockEncode {
  BlockType type;
  const float* x;           // [rows, cols]
  const float* importance;  // [cols], or null
  const float* spread;      // [rows], or null: mean squares of rows
  int64_t cols;
  uint8_t* out;  // [rows, cols / numbers of a block * bytes of a block]
};

}  // namespace xlathe

#define XLATHE_BODY "gguf_blocks/body.h"
#include "../foreach_isa.h"

namespace ffi = xla::ffi;

namespace xlathe {
namespace {

struct Layout {
  std::string_view name;
  BlockType type;
  int64_t numbers, bytes;
  bool by_row;  // importance is weighed by the mean square of a row
};

constexpr Layout kLayouts[] = {
    {"Q4_0", BlockType::kQ4_0, 32, 18, true},     {"Q4_1", BlockType::kQ4_1, 32, 20, true},
    {"Q5_0", BlockType::kQ5_0, 32, 22, true},     {"Q5_1", BlockType::kQ5_1, 32, 24, true},
    {"Q8_0", BlockType::kQ8_0, 32, 34, false},    {"IQ4_NL", BlockType::kIQ4_NL, 32, 18, false},
    {"Q2_K", BlockType::kQ2_K, 256, 84, false},   {"Q3_K", BlockType::kQ3_K, 256, 110, false},
    {"Q4_K", BlockType::kQ4_K, 256, 144, false},  {"Q5_K", BlockType::kQ5_K, 256, 176, false},
    {"Q6_K", BlockType::kQ6_K, 256, 210, false},  {"IQ4_XS", BlockType::kIQ4_XS, 256, 136, false},
};
constexpr int64_t kNumbersATask = 1 << 16, kRowsATask = 16;

const Layout* find_layout(std::string_view name) {
  for (const Layout& layout : kLayouts) {
    if (layout.name == name) return &layout;
  }
  return nullptr;
}

ffi::Error encode(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR1<ffi::F32> importance,
                  ffi::ResultBufferR2<ffi::U8> out, ffi::ResultBufferR1<ffi::S32> wrong, std::string_view type,
                  std::string_view isa_wanted) {
  const Layout* layout = find_layout(type);
  const auto isa = find_isa(isa_wanted);
  if (layout == nullptr) return ffi::Error::InvalidArgument("gguf_blocks: no type " + std::string(type));
  if (!isa) return ffi::Error::InvalidArgument("gguf_blocks: no instruction set " + std::string(isa_wanted));
  const int64_t rows = x.dimensions()[0], cols = x.dimensions()[1], known = importance.dimensions()[0];
  if (cols % layout->numbers != 0 || out->dimensions()[0] != rows ||
      out->dimensions()[1] != cols / layout->numbers * layout->bytes || (known != 0 && known != cols) ||
      wrong->dimensions()[0] != 1) {
    return ffi::Error::InvalidArgument("gguf_blocks: x " + shape(x.dimensions()) + ", importance " +
                                       shape(importance.dimensions()) + ", out " + shape(out->dimensions()) +
                                       " do not fit " + std::string(type));
  }
  BlockEncode op{layout->type, x.typed_data(), known == 0 ? nullptr : importance.typed_data(), nullptr, cols,
                 out->typed_data()};
  std::vector<float> spread;
  if (layout->by_row && op.importance != nullptr) {
    spread.resize(rows);
    const auto measure = XLATHE_SELECT(*isa, mean_squares);
    parallel_for(pool, (rows + kRowsATask - 1) / kRowsATask, [&](int64_t i) {
      const ExactFloats exact;
      measure(op, i * kRowsATask, std::min(rows, (i + 1) * kRowsATask), spread.data());
    });
    op.spread = spread.data();
  }
  const int64_t blocks = rows * (cols / layout->numbers), task = kNumbersATask / layout->numbers;
  std::atomic<int> found{0};
  const auto run = XLATHE_SELECT(*isa, encode_blocks);
  parallel_for(pool, (blocks + task - 1) / task, [&](int64_t i) {
    const ExactFloats exact;
    found |= run(op, i * task, std::min(blocks, (i + 1) * task));
  });
  wrong->typed_data()[0] = found;
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xlathe

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlathe_gguf_blocks, xlathe::encode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR2<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::F32>>()
                                  .Ret<ffi::BufferR2<ffi::U8>>()
                                  .Ret<ffi::BufferR1<ffi::S32>>()
                                  .Attr<std::string_view>("type")
                                  .Attr<std::string_view>("isa"));
