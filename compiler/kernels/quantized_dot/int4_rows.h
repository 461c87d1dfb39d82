// The arithmetic of quantized_dot with 4-bit codes, compiled once for every instruction set (foreach_isa.h).
//
// A block of 32 columns of x is held as whole numbers of 24 bits and their step. Of each 128 columns, 16 lanes hold 8
// successive ones: what a lane adds up to, the sum of (code - zero) * x, is exact in 32 bits. Rounded to a float it is
// multiplied by (scale * step) and added to the lane's total, and in the end totals are folded in halves. This order
// holds for every M, block size, thread count and register width, so a row's result has the same bits whatever it was
// computed with; `portable` alone differs, in the last bits, by its rounding.
//
// As floats, every code would be masked, converted and multiplied by itself. Bytes are multiplied four at a time, and
// a whole number of x is three of them: its digits to the base 256, from -128 to 127.

#include "round_block.h"

typedef float Four __attribute__((vector_size(16)));

constexpr int kInt4Registers = 16 / Lanes::kWidth;      // that hold one result's totals
constexpr int kInt4Panel = Lanes::kFile == 32 ? 8 : 4;  // the most rows of x that are worked on together

// Makes the block-th 32 columns of `packed` of as many floats.
inline void pack_block(const float* x, int64_t block, Int4Columns& packed) {
  float columns[32];  // the even ones, then the odd ones
  for (int i = 0; i < 16; ++i) {
    columns[i] = x[2 * i];
    columns[16 + i] = x[2 * i + 1];
  }
  int32_t whole[32], sums[4] = {};
  const float step = round_block<127 * 65536, 32>(columns, whole);
  for (int i = 0; i < 16; ++i) sums[i / 4] += whole[i] + whole[16 + i];
  for (int lane = 0; lane < 4; ++lane) {
    packed.step[block * 4 + lane] = step;
    packed.sum[block * 4 + lane] = sums[lane];
  }
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    int8_t digits[32];
    for (int i = 0; i < 32; ++i) {
      digits[i] = static_cast<int8_t>(whole[i]);
      whole[i] = (whole[i] - digits[i]) >> 8;
    }
    __builtin_memcpy(packed.digits[digit][0] + block * 16, digits, 16);
    __builtin_memcpy(packed.digits[digit][1] + block * 16, digits + 16, 16);
  }
}

// Copies x into panels: of each 128 columns those of the panel's first row, of its second, ...; zeros after the last.
inline void pack_int4_panels(const float* x, int64_t k, const Panels& panels, Int4Columns* packed) {
  for (int64_t p = 0; p < panels.count; ++p) {
    for (int64_t at = 0; at < k; at += kInt4Step) {
      for (int64_t m = panels.begin(p); m < panels.begin(p + 1); ++m, ++packed) {
        const int64_t blocks = (k - at < kInt4Step ? k - at : kInt4Step) / 32;
        if (blocks < kInt4Step / 32) __builtin_memset(packed, 0, sizeof *packed);
        for (int64_t block = 0; block < blocks; ++block) pack_block(x + m * k + at + block * 32, block, *packed);
      }
    }
  }
}

// Codes of the lanes of one register: those of even columns, then those of odd ones, a byte each.
struct Int4Codes {
  Lanes::Bytes even, odd;

  static __attribute__((always_inline)) Int4Codes load(const uint8_t* codes) {
    const Lanes::Bytes packed = Lanes::load_bytes(codes), low = Lanes::Bytes{} + 15;
    return {packed & low, reinterpret_cast<Lanes::Bytes>(reinterpret_cast<Lanes::Int>(packed) >> 4) & low};
  }
};

// Scales of the blocks of 32 from `block` on, a multiple of 4.
inline __attribute__((always_inline)) Four four_scales(const Int4Row& row, int64_t block) {
  uint64_t halves = 0;
  if (row.shift == 0) {
    __builtin_memcpy(&halves, row.scale + block, sizeof halves);
  } else {
    for (int i = 0; i < 4; ++i) halves |= static_cast<uint64_t>(row.scale[(block + i) >> row.shift]) << 16 * i;
  }
  return Lanes::widen(halves);
}

// The zero points of register r's lanes.
inline __attribute__((always_inline)) Lanes::Int lane_zeros(const Int4Row& row, int64_t block, int r) {
  Lanes::Int zeros;
  for (int i = 0; i < Lanes::kWidth; ++i) zeros[i] = row.zero[(block + (r * Lanes::kWidth + i) / 4) >> row.shift];
  return zeros;
}

// totals[m][n] += the products of columns 128 * step, ... for step < steps. Codes `ahead` of these are prefetched:
// rows read side by side defeat the prefetcher of the CPU.
template <int kM, int kN, bool kZeros>
inline __attribute__((always_inline)) void int4_accumulate(Lanes::Float (&totals)[kM][kN][kInt4Registers],
                                                           const Int4Columns* x, const Int4Row (&rows)[kN],
                                                           int64_t steps, int64_t ahead) {
  Lanes::Float sums[kM][kN][kInt4Registers];
  __builtin_memcpy(sums, totals, sizeof sums);
  for (int64_t step = 0; step < steps; ++step, x += kM) {
    Four scales[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      __builtin_prefetch(rows[n].codes + step * (kInt4Step / 2) + ahead, /*write=*/0, /*locality: L2=*/2);
      scales[n] = four_scales(rows[n], step * 4);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kInt4Registers; ++r) {
      const int64_t byte = r * sizeof(Lanes::Int);
      Int4Codes codes[kN];
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) codes[n] = Int4Codes::load(rows[n].codes + step * (kInt4Step / 2) + byte);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        Lanes::Int whole[kN] = {}, x_sums;
#pragma GCC unroll 4
        for (int digit = 0; digit < kDigits; ++digit) {
          const Lanes::Bytes even = Lanes::load_bytes(x[m].digits[digit][0] + byte);
          const Lanes::Bytes odd = Lanes::load_bytes(x[m].digits[digit][1] + byte);
#pragma GCC unroll 4
          for (int n = 0; n < kN; ++n) {
            whole[n] = Lanes::add_products(codes[n].even, even, codes[n].odd, odd, whole[n] << (digit > 0 ? 8 : 0));
          }
        }
        __builtin_memcpy(&x_sums, x[m].sum + r * Lanes::kWidth, sizeof x_sums);
        const Lanes::Float steps_of_x = Lanes::load(x[m].step + r * Lanes::kWidth);
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) {
          whole[n] -= kZeros ? lane_zeros(rows[n], step * 4, r) * x_sums : x_sums << 3;
          const Lanes::Float factors = Lanes::spread(scales[n], r) * steps_of_x;
          sums[m][n][r] = Lanes::madd(Lanes::from_int(whole[n]), factors, sums[m][n][r]);
        }
      }
    }
  }
  __builtin_memcpy(totals, sums, sizeof sums);
}

// How many rows of codes are worked on together with kM of x: their totals fill half of the registers.
template <int kM>
constexpr int int4_rows_beside() {
  const int fit = Lanes::kFile / 2 / (kM * kInt4Registers);
  return fit > 4 ? 4 : fit > 0 ? fit : 1;
}

// y[m0 + m, n] for m < kM and the tile n0 <= n < min(n0 + kTileN, n1), kN rows of codes at a time. A block of x of
// kSteps stays in the L1 cache for the whole tile. Where the last group of rows reaches past n1, row n1 - 1 is
// computed again, and not stored.
template <int kM, bool kZeros>
void int4_tile(const Int4Dot& op, int64_t m0, int64_t n0, int64_t n1) {
  constexpr int kN = int4_rows_beside<kM>(), kSteps = kM == 1 ? 32 : kM == 2 ? 16 : 8;
  static_assert(kTileN % kN == 0 && kSteps * kInt4Step % kLargestGroup == 0);
  const int64_t last = n1 - kN;  // where a whole group of rows may begin
  n1 = n0 + kTileN < n1 ? n0 + kTileN : n1;
  const int64_t groups = (n1 - n0 + kN - 1) / kN;
  const int64_t whole = op.weight.k / kInt4Step;
  const Int4Columns* x = op.x + m0 * op.x_width;

  Lanes::Float totals[kTileN / kN][kM][kN][kInt4Registers] = {};
  for (int64_t step = 0; step < whole; step += kSteps) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = n0 + group * kN;
      Int4Row rows[kN];
      for (int n = 0; n < kN; ++n) rows[n] = op.weight.row(first + n < n1 ? first + n : n1 - 1, step * 4);
      const int64_t steps = whole - step < kSteps ? whole - step : kSteps;
      const int64_t ahead = first + 2 * kN <= last ? kN * op.weight.k : 0;
      int4_accumulate<kM, kN, kZeros>(totals[group], x + step * kM, rows, steps, ahead);
    }
  }
  for (int64_t group = 0; group < groups && whole * kInt4Step < op.weight.k; ++group) {
    const int64_t first = n0 + group * kN;
    Int4Tail<4> tails[kN];
    Int4Row rows[kN];
    for (int n = 0; n < kN; ++n) rows[n] = tails[n].copy(op.weight, first + n < n1 ? first + n : n1 - 1, whole * 4);
    int4_accumulate<kM, kN, kZeros>(totals[group], x + whole * kM, rows, 1, 0);
  }
  for (int m = 0; m < kM; ++m) {
    for (int64_t n = n0; n < n1; ++n) {
      op.y[(m0 + m) * op.weight.n + n] = Lanes::fold(totals[(n - n0) / kN][m][(n - n0) % kN]);
    }
  }
}

// `int4_tile` for a panel of kM rows or fewer.
template <int kM, bool kZeros>
void int4_tile_of(int64_t height, const Int4Dot& op, int64_t m0, int64_t n0, int64_t n1) {
  if (height == kM) return int4_tile<kM, kZeros>(op, m0, n0, n1);
  if constexpr (kM > 1) int4_tile_of<kM - 1, kZeros>(height, op, m0, n0, n1);
}

template <bool kZeros>
void int4_all(const Int4Dot& op, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += kTileN) {
    for (int64_t p = 0; p < op.panels.count; ++p) {
      const int64_t m0 = op.panels.begin(p);
      int4_tile_of<kInt4Panel, kZeros>(op.panels.begin(p + 1) - m0, op, m0, n, n1);
    }
  }
}

// y[m, n] for all m and n0 <= n < n1.
inline void int4_rows(const Int4Dot& op, int64_t n0, int64_t n1) {
  op.weight.first.zero ? int4_all<true>(op, n0, n1) : int4_all<false>(op, n0, n1);
}
