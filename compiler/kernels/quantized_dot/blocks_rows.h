// The arithmetic of quantized_dot with a weight in blocks, compiled once for every instruction set (foreach_isa.h).
//
// What 16 lanes add up to is in `blocks_digits.h` and `blocks_rounded.h`; in the end their totals are folded in halves.
// The order of additions holds for every M, block size, thread count and register width, so a row's result has the same
// bits whatever it was computed with; `portable` alone differs, in the last bits, by its rounding.

constexpr int kBlockRegisters = 16 / Lanes::kWidth;  // that hold one result's totals
typedef float Four __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(sizeof(Lanes::Float))));

#include "round_block.h"
#include "blocks_types.h"
#include "blocks_digits.h"
#include "blocks_rounded.h"

// Rows of x that are worked on together where so many are left: each number of them is compiled on its own.
inline int64_t panel_of(int64_t left) {
#if defined(XLATHE_LANES_AVX512) || defined(XLATHE_LANES_AVX2) || defined(XLATHE_LANES_NEON)
  return left >= 4 ? 4 : left >= 2 ? 2 : 1;
#else
  return 1;
#endif
}

// Copies x into panels: of the columns of an entry those of the panel's first row, of its second, ...
template <typename Way>
void pack_blocks(const float* x, int64_t rows, int64_t k, void* packed) {
  auto* entry = static_cast<typename Way::Columns*>(packed);
  for (int64_t m0 = 0; m0 < rows; m0 += panel_of(rows - m0)) {
    for (int64_t at = 0; at < k; at += Way::kColumns) {
      for (int64_t m = m0; m < m0 + panel_of(rows - m0); ++m, ++entry) {
        Way::pack(x + m * k + at, k - at < Way::kColumns ? k - at : Way::kColumns, *entry);
      }
    }
  }
}

// totals[m][n] += the products of `steps` times Type::kColumns columns. Bytes `ahead` of these are prefetched: rows
// read side by side defeat the prefetcher of the CPU.
template <typename Way, int kM, int kN>
XLATHE_INLINE void blocks_accumulate(Lanes::Float (&totals)[kM][kN][kBlockRegisters], const typename Way::Columns* x,
                                     const uint8_t* const (&rows)[kN], int64_t steps, int64_t ahead) {
  constexpr int kBytes = Way::Type::kBytes, kEntries = Way::Type::kColumns / Way::kColumns;
  Lanes::Float sums[kM][kN][kBlockRegisters];
  __builtin_memcpy(sums, totals, sizeof sums);
  for (int64_t step = 0; step < steps; ++step, x += kEntries * kM) {
    const uint8_t* blocks[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      blocks[n] = rows[n] + step * kBytes;
      for (int line = 0; line < kBytes; line += kCacheLine) {
        __builtin_prefetch(blocks[n] + line + ahead, /*write=*/0, /*locality: L2=*/2);
      }
    }
    Way::template add<kM, kN>(sums, x, blocks);
  }
  __builtin_memcpy(totals, sums, sizeof sums);
}

// How many rows of the weight are worked on together with kM of x: their totals fill half of the registers.
template <int kM>
constexpr int rows_beside() {
  const int fit = Lanes::kFile / 2 / (kM * kBlockRegisters);
  return fit > 2 ? 2 : fit > 0 ? fit : 1;
}

// y[m0 + m, n] for m < kM and the tile n0 <= n < min(n0 + kTileN, n1), kN rows of the weight at a time. A part of x of
// kSpan numbers stays in the L1 cache for the whole tile. Where the last group of rows reaches past n1, row n1 - 1 is
// computed again, and not stored.
template <typename Way, int kM>
void blocks_tile(const BlocksDot& op, int64_t m0, int64_t n0, int64_t n1) {
  using Type = typename Way::Type;
  constexpr int kN = rows_beside<kM>();
  constexpr int64_t kSteps = Way::kSpan / kM / Type::kColumns, kEntries = Type::kColumns / Way::kColumns;
  static_assert(kTileN % kN == 0);
  const int64_t last = n1 - kN;  // where a whole group of rows may begin
  n1 = n0 + kTileN < n1 ? n0 + kTileN : n1;
  const int64_t groups = (n1 - n0 + kN - 1) / kN, whole = op.k / Type::kColumns;
  const auto* x = static_cast<const typename Way::Columns*>(op.x) + m0 * op.x_width;

  Lanes::Float totals[kTileN / kN][kM][kN][kBlockRegisters] = {};
  for (int64_t step = 0; step < whole; step += kSteps) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = n0 + group * kN;
      const uint8_t* rows[kN];
      for (int n = 0; n < kN; ++n) {
        rows[n] = op.weight + (first + n < n1 ? first + n : n1 - 1) * op.row + step * Type::kBytes;
      }
      const int64_t steps = whole - step < kSteps ? whole - step : kSteps;
      const int64_t ahead = first + 2 * kN <= last ? kN * op.row : 0;
      blocks_accumulate<Way, kM, kN>(totals[group], x + step * kEntries * kM, rows, steps, ahead);
    }
  }
  for (int64_t group = 0; group < groups && whole * Type::kColumns < op.k; ++group) {  // one block of 32 is left
    const int64_t first = n0 + group * kN;
    uint8_t tails[kN][Type::kBytes] = {};
    const uint8_t* rows[kN];
    for (int n = 0; n < kN; ++n) {
      const int64_t at = (first + n < n1 ? first + n : n1 - 1) * op.row + whole * Type::kBytes;
      __builtin_memcpy(tails[n], op.weight + at, op.row - whole * Type::kBytes);
      rows[n] = tails[n];
    }
    blocks_accumulate<Way, kM, kN>(totals[group], x + whole * kEntries * kM, rows, 1, 0);
  }
  for (int m = 0; m < kM; ++m) {
    for (int64_t n = n0; n < n1; ++n) {
      op.y[(m0 + m) * op.n + n] = Lanes::fold(totals[(n - n0) / kN][m][(n - n0) % kN]);
    }
  }
}

// y[m, n] for all m and n0 <= n < n1.
template <typename Way>
void blocks_rows(const BlocksDot& op, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += kTileN) {
    for (int64_t m = 0; m < op.m; m += panel_of(op.m - m)) {
      switch (panel_of(op.m - m)) {
#if defined(XLATHE_LANES_AVX512) || defined(XLATHE_LANES_AVX2) || defined(XLATHE_LANES_NEON)
        case 4: blocks_tile<Way, 4>(op, m, n, n1); break;
        case 2: blocks_tile<Way, 2>(op, m, n, n1); break;
#endif
        default: blocks_tile<Way, 1>(op, m, n, n1);
      }
    }
  }
}

template <typename Way>
BlocksKernel kernel_of() {
  return {sizeof(typename Way::Columns), Way::kColumns, pack_blocks<Way>, blocks_rows<Way>};
}

inline BlocksKernel blocks_kernel(BlockType type, bool rounded) {
  switch (type) {
    case BlockType::kQ4_0: return rounded ? kernel_of<Digits<Q4_0, 1>>() : kernel_of<Digits<Q4_0, 3>>();
    case BlockType::kQ8_0: return rounded ? kernel_of<Digits<Q8_0, 1>>() : kernel_of<Digits<Q8_0, 3>>();
    case BlockType::kQ4_K: return rounded ? kernel_of<Rounded<Q4_K>>() : kernel_of<Digits<Q4_K, 3>>();
    case BlockType::kQ5_K: return rounded ? kernel_of<Rounded<Q5_K>>() : kernel_of<Digits<Q5_K, 3>>();
    default: return rounded ? kernel_of<Rounded<Q6_K>>() : kernel_of<Digits<Q6_K, 3>>();
  }
}
