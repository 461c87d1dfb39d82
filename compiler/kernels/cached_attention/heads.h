// The arithmetic of cached_attention, compiled once for every instruction set (foreach_isa.h).
//
// A score is 16 partial sums, of the columns equal modulo 16, folded in halves; so is the sum of the weights. An
// output is the sum over blocks of 64 slots, from the first slot seen, each summed in ascending order. So the bits
// of a token depend on its own query and slots alone; `portable` differs from the others by its rounding.

#include "../exp_tanh.h"

constexpr int kRegisters = kParts / Lanes::kWidth;  // that hold 16 partial sums

struct Matrix {
  const float* at;
  int64_t stride;  // from row to row
};

// The rows themselves where they fill 16 columns, else a copy padded with zeros.
inline Matrix padded(Matrix rows, int64_t count, int64_t columns, float* scratch) {
  const int64_t width = in_parts(columns);
  if (width == columns) return rows;
  for (int64_t i = 0; i < count; ++i) {
    __builtin_memcpy(scratch + i * width, rows.at + i * rows.stride, columns * sizeof(float));
    __builtin_memset(scratch + i * width + columns, 0, (width - columns) * sizeof(float));
  }
  return {scratch, width};
}

// scores[g][i] = q[g] . keys[i]
template <int kG, int kS>
inline __attribute__((always_inline)) void dot_tile(Matrix q, Matrix keys, int64_t width, float* scores,
                                                    int64_t scores_stride) {
  Lanes::Float sums[kG][kS][kRegisters] = {};
  for (int64_t c = 0; c < width; c += kParts) {
#pragma GCC unroll 4
    for (int r = 0; r < kRegisters; ++r) {
      const int64_t at = c + r * Lanes::kWidth;
      Lanes::Float key[kS];
#pragma GCC unroll 4
      for (int i = 0; i < kS; ++i) key[i] = Lanes::keep(Lanes::load(keys.at + i * keys.stride + at));
#pragma GCC unroll 4
      for (int g = 0; g < kG; ++g) {
        const Lanes::Float query = Lanes::keep(Lanes::load(q.at + g * q.stride + at));
#pragma GCC unroll 4
        for (int i = 0; i < kS; ++i) sums[g][i][r] = Lanes::madd(query, key[i], sums[g][i][r]);
      }
    }
  }
  for (int g = 0; g < kG; ++g) {
    for (int i = 0; i < kS; ++i) scores[g * scores_stride + i] = Lanes::fold(sums[g][i]);
  }
}

template <int kG, int kS>
inline void dots(Matrix q, Matrix keys, int64_t count, int64_t width, float* scores, int64_t scores_stride) {
  int64_t i = 0;
  for (; i + kS <= count; i += kS) {
    dot_tile<kG, kS>(q, {keys.at + i * keys.stride, keys.stride}, width, scores + i, scores_stride);
  }
  for (; i < count; ++i) {
    dot_tile<kG, 1>(q, {keys.at + i * keys.stride, keys.stride}, width, scores + i, scores_stride);
  }
}

// sums[g][c] += the sum of weights[g][i] * values[i][c] over the slots i of a block, for kColumns columns
template <int kG, int kColumns>
inline __attribute__((always_inline)) void value_tile(Matrix weights, Matrix values, int64_t count, float* sums,
                                                      int64_t sums_stride) {
  constexpr int kWide = kColumns / Lanes::kWidth;
  Lanes::Float block[kG][kWide] = {};
  for (int64_t i = 0; i < count; ++i) {
    Lanes::Float value[kWide];
#pragma GCC unroll 8
    for (int r = 0; r < kWide; ++r) {
      value[r] = Lanes::keep(Lanes::load(values.at + i * values.stride + r * Lanes::kWidth));
    }
#pragma GCC unroll 4
    for (int g = 0; g < kG; ++g) {
      const Lanes::Float weight = Lanes::all(weights.at[g * weights.stride + i]);
#pragma GCC unroll 8
      for (int r = 0; r < kWide; ++r) block[g][r] = Lanes::madd(weight, value[r], block[g][r]);
    }
  }
  for (int g = 0; g < kG; ++g) {
    for (int r = 0; r < kWide; ++r) {
      float* to = sums + g * sums_stride + r * Lanes::kWidth;
      Lanes::store(to, Lanes::load(to) + block[g][r]);
    }
  }
}

template <int kG>
inline void add_values(Matrix weights, Matrix values, int64_t count, int64_t width, float* sums) {
  int64_t c = 0;
  for (; c + 2 * kParts <= width; c += 2 * kParts) {
    value_tile<kG, 2 * kParts>(weights, {values.at + c, values.stride}, count, sums + c, width);
  }
  if (c < width) value_tile<kG, kParts>(weights, {values.at + c, values.stride}, count, sums + c, width);
}

// From products q . k to scores: scale, soft cap, bias and mask of one query over `count` slots.
inline void finish_scores(const CachedAttention& op, const bool* mask, const float* bias, int64_t count,
                          float* scores) {
  const Lanes::Float scale = Lanes::all(op.scale), cap = Lanes::all(op.softcap);
  for (int64_t i = 0; i < count; i += Lanes::kWidth) {
    Lanes::Float x = Lanes::load(scores + i) * scale;
    if (op.softcap != 0.0f) x = tanh_of(x / cap) * cap;
    Lanes::store(scores + i, x);
  }
  for (int64_t i = 0; bias != nullptr && i < count; ++i) scores[i] += bias[i];
  for (int64_t i = 0; mask != nullptr && i < count; ++i) scores[i] = mask[i] ? scores[i] : -__FLT_MAX__;
}

// Turns scores into e**(score - largest) and returns their sum. What pads them to 16 becomes 0.
inline float exponentiate(float* scores, int64_t count) {
  const int64_t width = in_parts(count);
  for (int64_t i = count; i < width; ++i) scores[i] = -__builtin_inff();
  Lanes::Float most = Lanes::load(scores);
  for (int64_t i = Lanes::kWidth; i < width; i += Lanes::kWidth) {
    const Lanes::Float x = Lanes::load(scores + i);
    most = x > most ? x : most;
  }
  float largest = most[0];
  for (int i = 1; i < Lanes::kWidth; ++i) largest = most[i] > largest ? most[i] : largest;

  Lanes::Float sums[kRegisters] = {};
  for (int64_t i = 0; i < width; i += kParts) {
    for (int r = 0; r < kRegisters; ++r) {
      float* at = scores + i + r * Lanes::kWidth;
      const Lanes::Float weight = exp_of_negative(Lanes::load(at) - Lanes::all(largest));
      Lanes::store(at, weight);
      sums[r] = sums[r] + weight;
    }
  }
  return Lanes::fold(sums);
}

// The outputs of a few query heads of one token that share a key-value head.
inline void attend(const CachedAttention& op, const Heads& heads, const Scratch& scratch) {
  const int64_t d = in_parts(op.d), e = in_parts(op.e);
  const int64_t count = heads.end - heads.first, stride = in_parts(count);
  const int64_t slot0 = (heads.row * op.s + heads.first) * op.k + heads.kv_head;
  const int64_t head0 = (heads.token * op.k + heads.kv_head) * op.g + heads.g0;
  const Matrix q = padded({op.q + head0 * op.d, op.d}, heads.count, op.d, scratch.q);
  const auto block_of = [&](const float* cache, int64_t columns, int64_t i, int64_t size) {
    const Matrix rows{cache + (slot0 + i * op.k) * columns, op.k * columns};
    return padded(rows, size, columns, scratch.block);
  };

  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t size = count - i < kBlock ? count - i : kBlock;
    const Matrix keys = block_of(op.keys, op.d, i, size);
    int64_t g = 0;
    for (; g + 2 <= heads.count; g += 2) {
      dots<2, 2>({q.at + g * q.stride, q.stride}, keys, size, d, scratch.scores + g * stride + i, stride);
    }
    if (g < heads.count) dots<1, 4>({q.at + g * d, d}, keys, size, d, scratch.scores + g * stride + i, stride);
  }

  float total[kHeads];
  for (int64_t g = 0; g < heads.count; ++g) {
    const int64_t head = heads.g0 + g;
    const bool* mask = op.mask.row(heads.kv_head, head, heads.token, heads.first);
    const float* bias = op.bias.row(heads.kv_head, head, heads.token, heads.first);
    finish_scores(op, mask, bias, count, scratch.scores + g * stride);
    total[g] = exponentiate(scratch.scores + g * stride, count);
  }

  __builtin_memset(scratch.sums, 0, heads.count * e * sizeof(float));
  for (int64_t i = 0; i < count; i += kBlock) {
    const int64_t size = count - i < kBlock ? count - i : kBlock;
    const Matrix values = block_of(op.values, op.e, i, size);
    int64_t g = 0;
    for (; g + 2 <= heads.count; g += 2) {
      add_values<2>({scratch.scores + g * stride + i, stride}, values, size, e, scratch.sums + g * e);
    }
    if (g < heads.count) {
      add_values<1>({scratch.scores + g * stride + i, stride}, values, size, e, scratch.sums + g * e);
    }
  }
  for (int64_t g = 0; g < heads.count; ++g) {
    float* out = op.out + (head0 + g) * op.e;
    for (int64_t c = 0; c < op.e; ++c) out[c] = scratch.sums[g * e + c] / total[g];
  }
}
