// The arithmetic of quantized_dot with 4-bit codes, compiled once for every instruction set (foreach_isa.h).
//
// Of each 128 columns, 16 lanes hold 8 successive ones. A lane begins at zero * -(the sum of its x), adds its 8 products
// x * code in ascending order, and the sum times its scale to its total; in the end totals are folded in halves. This
// order holds for every M, block size, thread count and register width, so a row's result has the same bits whatever it
// was computed with; `portable` alone differs, in the last bits, by its rounding.

typedef float Four __attribute__((vector_size(16)));

constexpr int kInt4Registers = 16 / Lanes::kWidth;  // that hold one result's totals

// Scales of the blocks of 32 from `block` on, a multiple of 4.
inline __attribute__((always_inline)) Four four_scales(const Int4Row& row, int64_t block) {
  typedef uint16_t Halves __attribute__((vector_size(8)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  Halves halves;
  if (row.shift == 0) {
    __builtin_memcpy(&halves, row.scale + block, sizeof halves);
  } else {
    for (int i = 0; i < 4; ++i) halves[i] = row.scale[(block + i) >> row.shift];
  }
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  Four scales;
  __builtin_memcpy(&scales, &bits, sizeof scales);
  return scales;
}

inline __attribute__((always_inline)) Four four_zeros(const Int4Row& row, int64_t block) {
  Four zeros;
  for (int i = 0; i < 4; ++i) zeros[i] = row.zero[(block + i) >> row.shift];
  return zeros;
}

// totals[m][n] += the products of columns 128 * step, ... for step < steps. Codes `ahead` of these are prefetched:
// rows read side by side defeat the prefetcher of the CPU.
template <int kM, int kN, bool kZeros>
inline __attribute__((always_inline)) void int4_accumulate(Lanes::Float (&totals)[kM][kN][kInt4Registers],
                                                           const float* x, int64_t x_stride,
                                                           const Int4Row (&rows)[kN], int64_t steps, int64_t ahead) {
  Lanes::Float sums[kM][kN][kInt4Registers];
  __builtin_memcpy(sums, totals, sizeof sums);
  for (int64_t step = 0; step < steps; ++step) {
    Four scales[kN], zeros[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      __builtin_prefetch(rows[n].codes + step * (kInt4Step / 2) + ahead, /*write=*/0, /*locality: L2=*/2);
      scales[n] = four_scales(rows[n], step * 4);
      if (kZeros) zeros[n] = four_zeros(rows[n], step * 4);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kInt4Registers; ++r) {
      Lanes::Int packed[kN];
      Lanes::Float part[kM][kN];
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) {
        __builtin_memcpy(&packed[n], rows[n].codes + step * (kInt4Step / 2) + r * sizeof(Lanes::Int), sizeof packed[n]);
        const Lanes::Float zero = kZeros ? Lanes::spread(zeros[n], r) : Lanes::all(8.0f);
#pragma GCC unroll 4
        for (int m = 0; m < kM; ++m) {
          part[m][n] = zero * Lanes::load(x + m * x_stride + step * kInt4Width + kInt4Step + r * Lanes::kWidth);
        }
      }
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        const int place = 4 * (j % 4);
        Lanes::Float code[kN];
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) {
          if (j == 4) packed[n] >>= 16;
          code[n] = Lanes::from_int(packed[n] & (15 << place));
        }
#pragma GCC unroll 4
        for (int m = 0; m < kM; ++m) {
          const Lanes::Float xs =
              Lanes::keep(Lanes::load(x + m * x_stride + step * kInt4Width + j * 16 + r * Lanes::kWidth));
#pragma GCC unroll 4
          for (int n = 0; n < kN; ++n) part[m][n] = Lanes::madd(code[n], xs, part[m][n]);
        }
      }
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) {
        const Lanes::Float scale = Lanes::spread(scales[n], r);
#pragma GCC unroll 4
        for (int m = 0; m < kM; ++m) sums[m][n][r] = Lanes::madd(part[m][n], scale, sums[m][n][r]);
      }
    }
  }
  __builtin_memcpy(totals, sums, sizeof sums);
}

// y[m0 + m, n] for m < kM and the tile n0 <= n < min(n0 + kTileN, n1), kN rows of codes at a time. A block of x of
// kSteps stays in the L1 cache for the whole tile. Where the last group of rows reaches past n1, row n1 - 1 is
// computed again, and not stored.
template <int kM, int kN, int kSteps, bool kZeros>
void int4_tile(const Int4Dot& op, int64_t m0, int64_t n0, int64_t n1) {
  static_assert(kTileN % kN == 0 && kSteps * kInt4Step % kLargestGroup == 0);
  const int64_t last = n1 - kN;  // where a whole group of rows may begin
  n1 = n0 + kTileN < n1 ? n0 + kTileN : n1;
  const int64_t groups = (n1 - n0 + kN - 1) / kN;
  const int64_t whole = op.weight.k / kInt4Step;
  const float* x = op.x + m0 * op.x_stride;

  Lanes::Float totals[kTileN / kN][kM][kN][kInt4Registers] = {};
  for (int64_t step = 0; step < whole; step += kSteps) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = n0 + group * kN;
      Int4Row rows[kN];
      for (int n = 0; n < kN; ++n) rows[n] = op.weight.row(first + n < n1 ? first + n : n1 - 1, step * 4);
      const int64_t steps = whole - step < kSteps ? whole - step : kSteps;
      const int64_t ahead = first + 2 * kN <= last ? kN * op.weight.k : 0;
      int4_accumulate<kM, kN, kZeros>(totals[group], x + step * kInt4Width, op.x_stride, rows, steps, ahead);
    }
  }
  for (int64_t group = 0; group < groups && whole * kInt4Step < op.weight.k; ++group) {
    const int64_t first = n0 + group * kN;
    Int4Tail<4> tails[kN];
    Int4Row rows[kN];
    for (int n = 0; n < kN; ++n) rows[n] = tails[n].copy(op.weight, first + n < n1 ? first + n : n1 - 1, whole * 4);
    int4_accumulate<kM, kN, kZeros>(totals[group], x + whole * kInt4Width, op.x_stride, rows, 1, 0);
  }
  for (int m = 0; m < kM; ++m) {
    for (int64_t n = n0; n < n1; ++n) {
      op.y[(m0 + m) * op.weight.n + n] = Lanes::fold(totals[(n - n0) / kN][m][(n - n0) % kN]);
    }
  }
}

template <bool kZeros>
void int4_all(const Int4Dot& op, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += kTileN) {
    int64_t m = 0;
    for (; op.m - m >= 4; m += 4) int4_tile<4, 2, 8, kZeros>(op, m, n, n1);
    for (; op.m - m >= 2; m += 2) int4_tile<2, 3, 16, kZeros>(op, m, n, n1);
    if (m < op.m) int4_tile<1, 4, 32, kZeros>(op, m, n, n1);
  }
}

// y[m, n] for all m and n0 <= n < n1. The shapes of the tiles fill the 16 registers of AVX2.
inline void int4_rows(const Int4Dot& op, int64_t n0, int64_t n1) {
  op.weight.first.zero ? int4_all<true>(op, n0, n1) : int4_all<false>(op, n0, n1);
}
