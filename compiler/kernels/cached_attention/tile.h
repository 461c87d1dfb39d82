// The arithmetic of cached_attention, compiled once for every instruction set (foreach_isa.h).
//
// A score is 16 partial sums, of the columns equal modulo 16, folded in halves; so is the sum of the weights, of the
// positions equal modulo 16. An output is the sum over blocks of 64 positions, 0..63 the first, each summed in
// ascending order. So the bits of a token depend on its own query and on what it sees alone: not on the tokens of its
// tile, nor on the layout. `portable` differs from the others by its rounding.

#include "../exp_tanh.h"

constexpr int kRegisters = kParts / Lanes::kWidth;        // that hold 16 partial sums
constexpr int kSquare = Lanes::kWidth == kParts ? 4 : 2;  // lines and slots whose sums fit the registers

using Rows = const float* const*;

// scores[l][i] = q[l] . keys[i]
template <int kL, int kS>
inline __attribute__((always_inline)) void dot_tile(const float* q, Rows keys, int64_t width, float* scores,
                                                    int64_t stride) {
  Lanes::Float sums[kL][kS][kRegisters] = {};
  for (int64_t c = 0; c < width; c += kParts) {
#pragma GCC unroll 4
    for (int r = 0; r < kRegisters; ++r) {
      const int64_t at = c + r * Lanes::kWidth;
      Lanes::Float key[kS];
#pragma GCC unroll 4
      for (int i = 0; i < kS; ++i) key[i] = Lanes::keep(Lanes::load(keys[i] + at));
#pragma GCC unroll 4
      for (int l = 0; l < kL; ++l) {
        const Lanes::Float query = Lanes::keep(Lanes::load(q + l * width + at));
#pragma GCC unroll 4
        for (int i = 0; i < kS; ++i) sums[l][i][r] = Lanes::madd(query, key[i], sums[l][i][r]);
      }
    }
  }
#pragma GCC unroll 4
  for (int l = 0; l < kL; ++l) {
#pragma GCC unroll 4
    for (int i = 0; i < kS; ++i) scores[l * stride + i] = Lanes::fold(sums[l][i]);
  }
}

template <int kL, int kS>
inline void dots(const float* q, Rows keys, int64_t count, int64_t width, float* scores, int64_t stride) {
  int64_t i = 0;
  for (; i + kS <= count; i += kS) dot_tile<kL, kS>(q, keys + i, width, scores + i, stride);
  for (; i < count; ++i) dot_tile<kL, 1>(q, keys + i, width, scores + i, stride);
}

inline void dots_of_lines(const float* q, int64_t lines, Rows keys, int64_t count, int64_t width, float* scores,
                          int64_t stride) {
  int64_t l = 0;
  for (; l + kSquare <= lines; l += kSquare) {
    dots<kSquare, kSquare>(q + l * width, keys, count, width, scores + l * stride, stride);
  }
  for (; l + 2 <= lines; l += 2) dots<2, kSquare>(q + l * width, keys, count, width, scores + l * stride, stride);
  if (l < lines) dots<1, 4>(q + l * width, keys, count, width, scores + l * stride, stride);
}

// sums[l][c] += the sum of weights[l][i] * values[i][c] over the slots i of a block, for kColumns columns
template <int kL, int kColumns>
inline __attribute__((always_inline)) void value_tile(const float* weights, int64_t stride, Rows values, int64_t column,
                                                      int64_t count, float* sums, int64_t width) {
  constexpr int kWide = kColumns / Lanes::kWidth;
  Lanes::Float block[kL][kWide] = {};
  for (int64_t i = 0; i < count; ++i) {
    Lanes::Float value[kWide];
#pragma GCC unroll 8
    for (int r = 0; r < kWide; ++r) value[r] = Lanes::keep(Lanes::load(values[i] + column + r * Lanes::kWidth));
#pragma GCC unroll 4
    for (int l = 0; l < kL; ++l) {
      const Lanes::Float weight = Lanes::all(weights[l * stride + i]);
#pragma GCC unroll 8
      for (int r = 0; r < kWide; ++r) block[l][r] = Lanes::madd(weight, value[r], block[l][r]);
    }
  }
  for (int l = 0; l < kL; ++l) {
    for (int r = 0; r < kWide; ++r) {
      float* to = sums + l * width + column + r * Lanes::kWidth;
      Lanes::store(to, Lanes::load(to) + block[l][r]);
    }
  }
}

template <int kL>
inline void add_values(const float* weights, int64_t stride, Rows values, int64_t count, float* sums, int64_t width) {
  constexpr int kWide = kL == 1 || Lanes::kWidth == kParts ? 4 * kParts : 2 * kParts;
  int64_t c = 0;
  for (; c + kWide <= width; c += kWide) value_tile<kL, kWide>(weights, stride, values, c, count, sums, width);
  for (; c < width; c += kParts) value_tile<kL, kParts>(weights, stride, values, c, count, sums, width);
}

inline void add_values_of_lines(const float* weights, int64_t stride, int64_t lines, Rows values, int64_t count,
                                float* sums, int64_t width) {
  int64_t l = 0;
  for (; l + kSquare <= lines; l += kSquare) {
    add_values<kSquare>(weights + l * stride, stride, values, count, sums + l * width, width);
  }
  for (; l < lines; ++l) add_values<1>(weights + l * stride, stride, values, count, sums + l * width, width);
}

// The slots of the positions first <= p < end, fewer than kBlock, of a row of the cache for one key-value head.
struct Block {
  const float* rows[kBlock];  // where a slot lies, or a copy
  float scales[kBlock];       // of codes
};

// Copies what is no row of whole registers of floats: codes as numbers, short rows with zeros behind, and zeros for
// slots in no page.
inline void read_block(const CachedAttention& op, const Kept& kept, int64_t row, int64_t head, int64_t first,
                       int64_t end, float* copies, Block& block) {
  const int64_t width = in_parts(kept.width);
  int64_t i = 0;
  op.slots.each_page(row, first, end, [&](int64_t from, int64_t stop, int64_t slot) {
    for (int64_t p = from; p < stop; ++p, ++i) {
      const int64_t line = slot == kNowhere ? 0 : (slot + p - from) * op.k + head;
      float* copy = copies + i * width;
      block.rows[i] = copy;
      if (slot == kNowhere) {
        __builtin_memset(copy, 0, width * sizeof(float));
        block.scales[i] = 0.0f;
      } else if (kept.codes != nullptr) {
        const int8_t* codes = kept.codes + line * kept.stride;
        int64_t c = 0;
        for (; c + Lanes::kWidth <= kept.width; c += Lanes::kWidth) Lanes::store(copy + c, Lanes::load(codes + c));
        for (; c < kept.width; ++c) copy[c] = codes[c];
        for (; c < width; ++c) copy[c] = 0.0f;
        block.scales[i] = kept.scales[line];
      } else if (width == kept.width) {
        block.rows[i] = kept.floats + line * kept.stride;
      } else {
        __builtin_memcpy(copy, kept.floats + line * kept.stride, kept.width * sizeof(float));
        __builtin_memset(copy + kept.width, 0, (width - kept.width) * sizeof(float));
      }
    }
  });
}

// scores[l][i] *= scales[i]
inline void multiply(const float* scales, int64_t lines, int64_t count, float* scores, int64_t stride) {
  for (int64_t l = 0; l < lines; ++l) {
    for (int64_t i = 0; i < count; ++i) scores[l * stride + i] *= scales[i];
  }
}

// From products q . k to scores of one line, where `scores` is position 0: scale, soft cap, bias and mask. Around what
// the token sees, up to whole registers, and in no page scores are -inf.
inline void finish_scores(const CachedAttention& op, const Seen& seen, int64_t head, int64_t g, int64_t token,
                          float* scores) {
  const int64_t start = seen.first / kParts * kParts, stop = in_parts(seen.end);
  const Lanes::Float scale = Lanes::all(op.scale), cap = Lanes::all(op.softcap);
  for (int64_t p = start; p < stop; p += Lanes::kWidth) {
    Lanes::Float x = Lanes::load(scores + p) * scale;
    if (op.softcap != 0.0f) x = tanh_of(x / cap) * cap;
    Lanes::store(scores + p, x);
  }
  const float* bias = op.bias.row(head, g, token);
  const bool* mask = op.mask.row(head, g, token);
  for (int64_t p = seen.first; bias != nullptr && p < seen.end; ++p) scores[p] += bias[p];
  for (int64_t p = seen.first; mask != nullptr && p < seen.end; ++p) scores[p] = mask[p] ? scores[p] : -__FLT_MAX__;

  const auto silence = [&](int64_t first, int64_t end) {
    for (int64_t p = first; p < end; ++p) scores[p] = -__builtin_inff();
  };
  silence(start, seen.first);
  silence(seen.end, stop);
  if (op.slots.table == nullptr) return;
  op.slots.each_page(seen.row, seen.first, seen.end, [&](int64_t first, int64_t end, int64_t slot) {
    if (slot == kNowhere) silence(first, end);
  });
}

// Turns `count` scores, a multiple of 16, into e**(score - largest) and returns their sum.
inline float exponentiate(float* scores, int64_t count) {
  Lanes::Float most = Lanes::load(scores);
  for (int64_t i = Lanes::kWidth; i < count; i += Lanes::kWidth) {
    const Lanes::Float x = Lanes::load(scores + i);
    most = x > most ? x : most;
  }
  float largest = most[0];
  for (int i = 1; i < Lanes::kWidth; ++i) largest = most[i] > largest ? most[i] : largest;

  Lanes::Float sums[kRegisters] = {};
  for (int64_t i = 0; i < count; i += kParts) {
    for (int r = 0; r < kRegisters; ++r) {
      float* at = scores + i + r * Lanes::kWidth;
      const Lanes::Float weight = exp_of_negative(Lanes::load(at) - Lanes::all(largest));
      Lanes::store(at, weight);
      sums[r] = sums[r] + weight;
    }
  }
  return Lanes::fold(sums);
}

// Tokens from `t` on that see the same part first <= p < end of a block.
struct Run {
  int64_t tokens, first, end;
};

inline Run run_from(const Tile& tile, int64_t t, int64_t block, int64_t stop) {
  const auto part = [&](int64_t token) {
    const Seen& seen = tile.seen[token];
    const int64_t first = seen.first > block ? seen.first : block, end = seen.end < stop ? seen.end : stop;
    return Run{1, first, end > first ? end : first};
  };
  Run run = part(t);
  for (; t + run.tokens < tile.tokens; ++run.tokens) {
    const Run next = part(t + run.tokens);
    if (next.first != run.first || next.end != run.end) break;
  }
  return run;
}

// The outputs of the lines of a tile: line t * heads + h is head h of token t.
inline void attend(const CachedAttention& op, const Tile& tile, const Scratch& scratch) {
  const int64_t d = in_parts(op.keys.width), e = in_parts(op.values.width), lines = tile.tokens * tile.heads;
  const int64_t origin = tile.first / kBlock * kBlock, stride = in_blocks(tile.end - origin);
  const auto first_head = [&](int64_t t) { return ((tile.token + t) * op.k + tile.head) * op.g + tile.g0; };
  Block block;

  __builtin_memset(scratch.q, 0, lines * d * sizeof(float));
  for (int64_t l = 0; l < lines; ++l) {
    const int64_t head = first_head(l / tile.heads) + l % tile.heads;
    __builtin_memcpy(scratch.q + l * d, op.q + head * op.keys.width, op.keys.width * sizeof(float));
  }
  for (int64_t at = origin; at < tile.end; at += kBlock) {  // all lines over all that the tile sees
    const int64_t first = at < tile.first ? tile.first : at, end = at + kBlock < tile.end ? at + kBlock : tile.end;
    float* scores = scratch.scores + first - origin;
    read_block(op, op.keys, tile.seen->row, tile.head, first, end, scratch.copies, block);
    dots_of_lines(scratch.q, lines, block.rows, end - first, d, scores, stride);
    if (op.keys.codes != nullptr) multiply(block.scales, lines, end - first, scores, stride);
  }

  float totals[kLines];
  for (int64_t l = 0; l < lines; ++l) {
    const Seen& seen = tile.seen[l / tile.heads];
    float* scores = scratch.scores + l * stride - origin;
    finish_scores(op, seen, tile.head, tile.g0 + l % tile.heads, tile.token + l / tile.heads, scores);
    const int64_t start = seen.first / kParts * kParts;
    totals[l] = exponentiate(scores + start, in_parts(seen.end) - start);
  }

  __builtin_memset(scratch.sums, 0, lines * e * sizeof(float));
  for (int64_t at = origin; at < tile.end; at += kBlock) {  // each line over what it sees alone
    const int64_t first = at < tile.first ? tile.first : at, end = at + kBlock < tile.end ? at + kBlock : tile.end;
    read_block(op, op.values, tile.seen->row, tile.head, first, end, scratch.copies, block);
    for (int64_t t = 0; t < tile.tokens;) {
      const Run run = run_from(tile, t, first, end);
      const int64_t line = t * tile.heads, count = run.tokens * tile.heads, size = run.end - run.first;
      float* weights = scratch.scores + line * stride + run.first - origin;
      if (op.values.codes != nullptr) multiply(block.scales + run.first - first, count, size, weights, stride);
      add_values_of_lines(weights, stride, count, block.rows + run.first - first, size, scratch.sums + line * e, e);
      t += run.tokens;
    }
  }
  for (int64_t l = 0; l < lines; ++l) {
    float* out = op.out + (first_head(l / tile.heads) + l % tile.heads) * op.values.width;
    for (int64_t c = 0; c < op.values.width; ++c) out[c] = scratch.sums[l * e + c] / totals[l];
  }
}
