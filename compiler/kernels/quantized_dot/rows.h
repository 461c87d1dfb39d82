// The arithmetic of quantized_dot, compiled once for every instruction set (foreach_isa.h).
//
// Each result is 16 partial sums, of the k equal modulo 16, added in ascending k and then folded in halves.
// This order holds for every M, block size, thread count and register width, so a row's result has the
// same bits whatever it was computed with; `portable` alone differs, in the last bits, by its rounding.

constexpr int kParts = 16;
constexpr int kRegisters = kParts / Lanes::kWidth;  // that hold one result's partial sums
constexpr int kPanel = Lanes::kFile == 32 ? 8 : 6;  // the most rows of x that are worked on together

// Copies x into panels: of each 16 columns those of the panel's first row, of its second, ...; zeros fill the last 16.
inline void pack_panels(const float* x, int64_t k, const Panels& panels, float* packed) {
  for (int64_t p = 0; p < panels.count; ++p) {
    const int64_t begin = panels.begin(p), height = panels.begin(p + 1) - begin;
    for (int64_t at = 0; at < k; at += kParts) {
      for (int64_t m = 0; m < height; ++m, packed += kParts) {
        const float* columns = x + (begin + m) * k + at;
        for (int i = 0; i < kParts; ++i) packed[i] = at + i < k ? columns[i] : 0.0f;
      }
    }
  }
}

// sums[m][n] += x[m][k] * codes[n][k] for k < count, a multiple of 16; the sums stay in registers. Codes
// `ahead` of these are prefetched: rows read side by side defeat the prefetcher of the CPU.
template <int kM, int kN>
inline __attribute__((always_inline)) void accumulate(Lanes::Float (&sums)[kM][kN][kRegisters], const float* x,
                                                      const int8_t* const (&codes)[kN], int64_t count,
                                                      int64_t ahead) {
  Lanes::Float acc[kM][kN][kRegisters];
  __builtin_memcpy(acc, sums, sizeof sums);
  for (int64_t k = 0; k < count; k += kParts) {
    if (k % kCacheLine == 0) {
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) __builtin_prefetch(codes[n] + k + ahead, /*write=*/0, /*locality: L2=*/2);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRegisters; ++r) {
      Lanes::Float w[kN];
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) w[n] = Lanes::load(codes[n] + k + r * Lanes::kWidth);
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        Lanes::Float xs = Lanes::load(x + k * kM + m * kParts + r * Lanes::kWidth);
        if (kN > 1) xs = Lanes::keep(xs);
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) acc[m][n][r] = Lanes::madd(w[n], xs, acc[m][n][r]);
      }
    }
  }
  __builtin_memcpy(sums, acc, sizeof sums);
}

// How many rows of codes are worked on together with kM of x: their sums fill three quarters of the registers.
template <int kM>
constexpr int rows_beside() {
  const int fit = Lanes::kFile * 3 / 4 / (kM * kRegisters);
  return fit > 4 ? 4 : fit > 0 ? fit : 1;
}

// y[m0 + m, n] for m < kM and the tile n0 <= n < min(n0 + kTileN, n1), kN rows of codes at a time. A block of
// kTileK columns of x stays in the L1 cache for the whole tile. Where the last group of rows reaches past n1,
// row n1 - 1 is computed again, and not stored.
template <int kM>
void tile(const QuantizedDot& op, int64_t m0, int64_t n0, int64_t n1) {
  constexpr int kN = rows_beside<kM>(), kTileK = 4096 / kM / kCacheLine * kCacheLine;
  static_assert(kTileN % kN == 0 && kTileK % kParts == 0);
  const int64_t last = n1 - kN;  // where a whole group of rows may begin
  n1 = n0 + kTileN < n1 ? n0 + kTileN : n1;
  const int64_t groups = (n1 - n0 + kN - 1) / kN;
  const int64_t whole = op.k / kParts * kParts;
  const float* x = op.x + m0 * op.x_width;
  const auto codes_at = [&](int64_t n, int64_t k) { return op.codes + (n < n1 ? n : n1 - 1) * op.k + k; };

  Lanes::Float sums[kTileN / kN][kM][kN][kRegisters] = {};
  for (int64_t k = 0; k < whole; k += kTileK) {
    for (int64_t group = 0; group < groups; ++group) {
      const int8_t* codes[kN];
      for (int n = 0; n < kN; ++n) codes[n] = codes_at(n0 + group * kN + n, k);
      const int64_t count = whole - k < kTileK ? whole - k : kTileK;
      const int64_t ahead = n0 + (group + 2) * kN <= last ? 2 * kN * op.k : 0;
      accumulate(sums[group], x + k * kM, codes, count, ahead);
    }
  }
  for (int64_t group = 0; group < groups && whole < op.k; ++group) {
    int8_t padded[kN][kParts] = {};
    const int8_t* codes[kN];
    for (int n = 0; n < kN; ++n) {
      __builtin_memcpy(padded[n], codes_at(n0 + group * kN + n, whole), op.k - whole);
      codes[n] = padded[n];
    }
    accumulate(sums[group], x + whole * kM, codes, kParts, 0);
  }
  for (int m = 0; m < kM; ++m) {
    for (int64_t n = n0; n < n1; ++n) {
      op.y[(m0 + m) * op.n + n] = Lanes::fold(sums[(n - n0) / kN][m][(n - n0) % kN]) * op.scale[n];
    }
  }
}

// `tile` for a panel of kM rows or fewer.
template <int kM>
void tile_of(int64_t height, const QuantizedDot& op, int64_t m0, int64_t n0, int64_t n1) {
  if (height == kM) return tile<kM>(op, m0, n0, n1);
  if constexpr (kM > 1) tile_of<kM - 1>(height, op, m0, n0, n1);
}

// y[m, n] for all m and n0 <= n < n1.
inline void rows(const QuantizedDot& op, int64_t n0, int64_t n1) {
  for (int64_t n = n0; n < n1; n += kTileN) {
    for (int64_t p = 0; p < op.panels.count; ++p) {
      const int64_t m0 = op.panels.begin(p);
      tile_of<kPanel>(op.panels.begin(p + 1) - m0, op, m0, n, n1);
    }
  }
}
