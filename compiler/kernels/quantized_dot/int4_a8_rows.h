// The arithmetic of quantized_dot with 4-bit codes and 8-bit activations, compiled once for every instruction set
// (foreach_isa.h).
//
// A block of 32 columns is summed in integers. Of block b the sum is multiplied by (scale * step) and added to total
// b mod 16, in ascending b; then totals are folded in halves. This order holds for every M, block size, thread count and
// register width, so a row's result has the same bits whatever it was computed with; `portable` alone differs, in the
// last bits, by its rounding.

#include "round_block.h"

constexpr int kA8Registers = kA8Blocks / Lanes::kWidth;  // that hold one result's totals

// Rounds a row to 8 bits a block of 32; the largest magnitude becomes 127, ties go to even.
inline void round_row(const float* x, int64_t k, const RoundedRow& row) {
  for (int64_t b = 0; b < k / kBlock; ++b) {
    int32_t whole[kBlock];
    row.step[b] = round_block<127>(x + b * kBlock, whole);
    int8_t* even = row.codes + b / 2 * 64 + b % 2 * 16;
    int32_t sum = 0;
    for (int i = 0; i < kBlock / 2; ++i) {
      even[i] = static_cast<int8_t>(whole[2 * i]);
      even[i + 32] = static_cast<int8_t>(whole[2 * i + 1]);
      sum += even[i] + even[i + 32];
    }
    row.sum[b] = sum;
  }
}

// Sums of (4-bit code * activation's code) over each of Lanes::kWidth blocks.
#if defined(XLATHE_LANES_AVX512) || defined(XLATHE_LANES_AVX2)

inline __attribute__((always_inline)) __m256i sums_of_eight(const uint8_t* codes, const int8_t* x) {
  const __m256i low = _mm256_set1_epi8(15);
  __m256i fours[4];  // 16-bit sums of 4 products: at most 4 * 15 * 127
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes) + i);
    const __m256i* xs = reinterpret_cast<const __m256i*>(x) + 2 * i;
    const __m256i even = _mm256_maddubs_epi16(_mm256_and_si256(packed, low), _mm256_loadu_si256(xs));
    const __m256i odd =
        _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(packed, 4), low), _mm256_loadu_si256(xs + 1));
    fours[i] = _mm256_add_epi16(even, odd);
  }
  // Sums of 16 still fit: 16 * 15 * 127 < 2**15.
  const __m256i sixteens =
      _mm256_hadd_epi16(_mm256_hadd_epi16(fours[0], fours[1]), _mm256_hadd_epi16(fours[2], fours[3]));
  const __m256i sums = _mm256_madd_epi16(sixteens, _mm256_set1_epi16(1));  // of blocks 0, 2, 4, 6, 1, 3, 5, 7
  return _mm256_permutevar8x32_epi32(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

#endif

inline __attribute__((always_inline)) Lanes::Int block_sums(const uint8_t* codes, const int8_t* x) {
#if defined(XLATHE_LANES_AVX512)
  const __m512i first = _mm512_castsi256_si512(sums_of_eight(codes, x));
  return reinterpret_cast<Lanes::Int>(_mm512_inserti64x4(first, sums_of_eight(codes + 128, x + 256), 1));
#elif defined(XLATHE_LANES_AVX2)
  return reinterpret_cast<Lanes::Int>(sums_of_eight(codes, x));
#else
  Lanes::Int sums;
  for (int b = 0; b < Lanes::kWidth; ++b) {
    const int8_t* even = x + b / 2 * 64 + b % 2 * 16;
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += (codes[b * 16 + i] & 15) * even[i] + (codes[b * 16 + i] >> 4) * even[i + 32];
    sums[b] = sum;
  }
  return sums;
#endif
}

inline __attribute__((always_inline)) Lanes::Float block_scales(const Int4Row& row, int64_t block) {
  typedef uint16_t Halves __attribute__((vector_size(2 * Lanes::kWidth)));
  typedef uint32_t Bits __attribute__((vector_size(4 * Lanes::kWidth)));
  Halves halves;
  if (row.shift == 0) {
    __builtin_memcpy(&halves, row.scale + block, sizeof halves);
  } else {
    for (int i = 0; i < Lanes::kWidth; ++i) halves[i] = row.scale[(block + i) >> row.shift];
  }
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  Lanes::Float scales;
  __builtin_memcpy(&scales, &bits, sizeof scales);
  return scales;
}

template <bool kZeros>
inline __attribute__((always_inline)) Lanes::Int block_zeros(const Int4Row& row, int64_t block) {
  Lanes::Int zeros = Lanes::Int{} + 8;
  if (kZeros) {
    for (int i = 0; i < Lanes::kWidth; ++i) zeros[i] = row.zero[(block + i) >> row.shift];
  }
  return zeros;
}

// totals[m][n] += the products of 16 blocks, from `block` on in x and from `at` on in the rows. Codes `ahead` of these
// are prefetched: rows read side by side defeat the prefetcher of the CPU.
template <int kM, int kN, bool kZeros>
inline __attribute__((always_inline)) void a8_accumulate(Lanes::Float (&totals)[kM][kN][kA8Registers],
                                                         const RoundedRow* x, int64_t block,
                                                         const Int4Row (&rows)[kN], int64_t at, int64_t ahead) {
#pragma GCC unroll 4
  for (int n = 0; n < kN; ++n) {
    for (int line = 0; line < kA8Blocks * 16; line += kCacheLine) {
      __builtin_prefetch(rows[n].codes + at * 16 + line + ahead, /*write=*/0, /*locality: L2=*/2);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kA8Registers; ++r) {
      const int64_t here = at + r * Lanes::kWidth;
      const Lanes::Float scales = block_scales(rows[n], here);
      const Lanes::Int zeros = block_zeros<kZeros>(rows[n], here);
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) {
        const int64_t there = block + r * Lanes::kWidth;
        Lanes::Int sums = block_sums(rows[n].codes + here * (kBlock / 2), x[m].codes + there * kBlock), x_sums;
        __builtin_memcpy(&x_sums, x[m].sum + there, sizeof x_sums);
        sums -= zeros * x_sums;
        const Lanes::Float factors = scales * Lanes::load(x[m].step + there);
        totals[m][n][r] = Lanes::madd(Lanes::from_int(sums), factors, totals[m][n][r]);
      }
    }
  }
}

// y[m0 + m, n] for m < kM and the tile n0 <= n < min(n0 + kTileN, n1), kN rows of codes at a time. Where these reach
// past n1, row n1 - 1 is computed again, and not stored.
template <int kM, int kN, bool kZeros>
void a8_tile(const Int4A8Dot& op, int64_t m0, int64_t n0, int64_t n1) {
  const int64_t last = n1 - kN;  // where a whole group of rows may begin
  n1 = n0 + kTileN < n1 ? n0 + kTileN : n1;
  const int64_t blocks = op.weight.k / kBlock, whole = blocks / kA8Blocks * kA8Blocks;
  for (int64_t first = n0; first < n1; first += kN) {
    Lanes::Float totals[kM][kN][kA8Registers] = {};
    const int64_t ahead = first + 2 * kN <= last ? kN * op.weight.k : 0;
    Int4Row rows[kN];
    for (int n = 0; n < kN; ++n) rows[n] = op.weight.row(first + n < n1 ? first + n : n1 - 1);
    for (int64_t block = 0; block < whole; block += kA8Blocks) {
      a8_accumulate<kM, kN, kZeros>(totals, op.x + m0, block, rows, block, ahead);
    }
    if (whole < blocks) {
      Int4Tail<kA8Blocks> tails[kN];
      for (int n = 0; n < kN; ++n) rows[n] = tails[n].copy(op.weight, first + n < n1 ? first + n : n1 - 1, whole);
      a8_accumulate<kM, kN, kZeros>(totals, op.x + m0, whole, rows, 0, 0);
    }
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN && first + n < n1; ++n) {
        op.y[(m0 + m) * op.weight.n + first + n] = Lanes::fold(totals[m][n]);
      }
    }
  }
}

template <bool kZeros>
void a8_all(const Int4A8Dot& op, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += kTileN) {
    int64_t m = 0;
    for (; op.m - m >= 4; m += 4) a8_tile<4, 1, kZeros>(op, m, n, n1);
    for (; op.m - m >= 2; m += 2) a8_tile<2, 2, kZeros>(op, m, n, n1);
    if (m < op.m) a8_tile<1, 2, kZeros>(op, m, n, n1);
  }
}

// y[m, n] for all m and n0 <= n < n1.
inline void int4_a8_rows(const Int4A8Dot& op, int64_t n0, int64_t n1) {
  op.weight.first.zero ? a8_all<true>(op, n0, n1) : a8_all<false>(op, n0, n1);
}
