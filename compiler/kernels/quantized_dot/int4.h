// A weight of 4-bit codes in groups, as both kernels for it read it.
#ifndef XLATHE_KERNELS_QUANTIZED_DOT_INT4_H_
#define XLATHE_KERNELS_QUANTIZED_DOT_INT4_H_

#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#include "xla/ffi/api/ffi.h"

#include "../isa.h"
#include "../shape.h"

namespace xlathe {

constexpr int kLargestGroup = 1024;

// A row of the weight: (code - zero) * scale. Codes are packed two a byte, the first in the low half.
struct Int4Row {
  const uint8_t* codes;   // [K / 2]
  const uint16_t* scale;  // bfloat16 [K / group]
  const uint8_t* zero;    // [K / group], or null: 8
  int shift;              // group = 32 << shift
};

struct Int4Weight {
  Int4Row first;
  int64_t n, k;

  // Row n from the block of 32 columns `block`, which begins a group.
  Int4Row row(int64_t n, int64_t block = 0) const {
    const int64_t groups = n * (k / 32 >> first.shift) + (block >> first.shift);
    return {first.codes + n * (k / 2) + block * 16, first.scale + groups, first.zero ? first.zero + groups : nullptr,
            first.shift};
  }
};

// The columns of a row that fill no step of kBlocks blocks of 32, with scales of zero after them.
template <int kBlocks>
struct Int4Tail {
  uint8_t codes[16 * kBlocks] = {};
  uint16_t scale[kBlocks] = {};
  uint8_t zero[kBlocks] = {};

  Int4Row copy(const Int4Weight& weight, int64_t n, int64_t block) {
    const int64_t count = weight.k / 32 - block;
    const Int4Row row = weight.row(n);
    std::memcpy(codes, row.codes + 16 * block, 16 * count);
    for (int64_t i = 0; i < count; ++i) {
      scale[i] = row.scale[(block + i) >> row.shift];
      if (row.zero) zero[i] = row.zero[(block + i) >> row.shift];
    }
    return {codes, scale, row.zero ? zero : nullptr, 0};
  }
};

// The shift that makes 32 << shift the columns of a group; -1 where none does.
inline int group_shift(int64_t k, int64_t groups) {
  for (int shift = 0; 32 << shift <= kLargestGroup; ++shift) {
    if (groups << (shift + 5) == k) return shift;
  }
  return -1;
}

// What a call of a handler is given.
struct Int4Call {
  const xla::ffi::BufferR2<xla::ffi::F32>& x;      // [M, K]
  const xla::ffi::BufferR2<xla::ffi::U8>& codes;   // [N, K / 2]
  const xla::ffi::BufferR2<xla::ffi::BF16>& scale; // [N, K / group]
  const xla::ffi::BufferR2<xla::ffi::U8>& zero;    // [N, K / group], or [N, 0] where all are 8
  const xla::ffi::ResultBufferR2<xla::ffi::F32>& y;  // [M, N]

  int64_t m() const { return x.dimensions()[0]; }

  // Why it cannot be computed, or success.
  xla::ffi::Error check(std::optional<Isa> isa, std::string_view isa_wanted) const {
    const int64_t k = x.dimensions()[1], n = codes.dimensions()[0], groups = scale.dimensions()[1];
    const int64_t zeros = zero.dimensions()[1];
    const bool fits = codes.dimensions()[1] * 2 == k && scale.dimensions()[0] == n && zero.dimensions()[0] == n &&
                      y->dimensions()[0] == m() && y->dimensions()[1] == n && (zeros == 0 || zeros == groups);
    if (!fits || (k > 0 && shift() < 0)) {
      return xla::ffi::Error::InvalidArgument(
          "quantized_dot: expected x [M, K], codes [N, K/2], scale [N, K/group], zero the same or [N, 0], y [M, N] and "
          "groups of 32, 64, ... 1024; found x " +
          shape(x.dimensions()) + ", codes " + shape(codes.dimensions()) + ", scale " + shape(scale.dimensions()) +
          ", zero " + shape(zero.dimensions()) + ", y " + shape(y->dimensions()));
    }
    if (!isa) {
      return xla::ffi::Error::InvalidArgument("quantized_dot: this CPU cannot run isa \"" + std::string(isa_wanted) +
                                              "\"");
    }
    return xla::ffi::Error::Success();
  }

  Int4Weight weight() const {
    const uint8_t* zeros = zero.dimensions()[1] > 0 ? zero.typed_data() : nullptr;
    return {{codes.typed_data(), scale.typed_data(), zeros, shift()}, codes.dimensions()[0], x.dimensions()[1]};
  }

 private:
  int shift() const { return group_shift(x.dimensions()[1], scale.dimensions()[1]); }
};

}  // namespace xlathe

#endif  // XLATHE_KERNELS_QUANTIZED_DOT_INT4_H_
