// Encodes runs of blocks; compiled for every instruction set by foreach_isa.h.

#include "gguf_blocks/vectors.h"

#include "gguf_blocks/search.h"

#include "gguf_blocks/table.h"

#include "gguf_blocks/small.h"

#include "gguf_blocks/super.h"

// Operands of a group of blocks. Lanes past the last block repeat it.
struct Group {
  const float* x[kBlocks];
  const float* importance[kBlocks];
  Numbers spread;  // mean square of the row of each block
};

inline Group group_at(const BlockEncode& op, int64_t begin, int64_t end, int block) {
  Group group;
  for (int64_t i = 0; i < kBlocks; ++i) {
    const int64_t at = (begin + i < end ? begin + i : end - 1) * block;
    group.x[i] = op.x + at;
    group.importance[i] = op.importance == nullptr ? nullptr : op.importance + at % op.cols;
    group.spread[i] = op.spread == nullptr ? 0.0f : op.spread[at / op.cols];
  }
  return group;
}

// The bits of the largest |x|, where infinity and NaN are larger than numbers.
template <int n>
inline Ints largest_bits(const Numbers* x) {
  Ints found{};
  for (int j = 0; j < n; ++j) {
    const Ints size = bits(x[j]) & 0x7fffffff;
    found = size > found ? size : found;
  }
  return found;
}

using Encode = Ints (*)(const Numbers*, const Numbers*, Ints*);

// Blocks of n numbers, whose last operand is the importance, or (of 32 numbers) what the type makes of it.
template <int n, int size, Encode encode, typename Prepare>
inline int encode_run(const BlockEncode& op, int64_t begin, int64_t end, const Prepare& prepare) {
  Ints top{}, large{};
  for (int64_t i = begin; i < end; i += kBlocks) {
    const Group group = group_at(op, i, end, n);
    Numbers x[n], weight[n];
    Ints bytes[size];
    load<n>(group.x, x);
    if (op.importance != nullptr) load<n>(group.importance, weight);
    const bool weighted = prepare(group, x, weight);
    const Ints found = largest_bits<n>(x);
    top = found > top ? found : top;
    large |= encode(x, weighted ? weight : nullptr, bytes);
    store<size>(bytes, op.out + i * size, end - i < kBlocks ? end - i : kBlocks);
  }
  return (any(top >= 0x7f800000) ? kNotFinite : 0) | (any(large | (top >= kTooLargeBits)) ? kTooLarge : 0);
}

template <int size, Encode encode>
inline int encode_small(const BlockEncode& op, int64_t begin, int64_t end) {
  return encode_run<32, size, encode>(op, begin, end, [&](const Group& group, const Numbers* x, Numbers* weight) {
    if (op.importance != nullptr) weigh<32>(x, weight, group.spread, weight);
    return op.importance != nullptr;
  });
}

inline int encode_table(const BlockEncode& op, int64_t begin, int64_t end) {
  return encode_run<32, 18, encode_iq4_nl>(op, begin, end, [&](const Group&, const Numbers* x, Numbers* weight) {
    if (op.importance != nullptr) {
      weigh<32>(x, weight, sum_of_squares<32>(x) * (2.0f / 32), weight);
    } else {
      for (int j = 0; j < 32; ++j) weight[j] = x[j] * x[j];
    }
    return true;
  });
}

template <int size, Encode encode>
inline int encode_super(const BlockEncode& op, int64_t begin, int64_t end) {
  const auto as_it_is = [&](const Group&, const Numbers*, const Numbers*) { return op.importance != nullptr; };
  return encode_run<kSuper, size, encode>(op, begin, end, as_it_is);
}

// Encodes the blocks [begin, end) of the whole array. Returns the sum of what is wrong with them.
inline int encode_blocks(const BlockEncode& op, int64_t begin, int64_t end) {
  switch (op.type) {
    case BlockType::kQ4_0: return encode_small<18, encode_symmetric<4>>(op, begin, end);
    case BlockType::kQ4_1: return encode_small<20, encode_affine<4>>(op, begin, end);
    case BlockType::kQ5_0: return encode_small<22, encode_symmetric<5>>(op, begin, end);
    case BlockType::kQ5_1: return encode_small<24, encode_affine<5>>(op, begin, end);
    case BlockType::kQ8_0: return encode_small<34, encode_q8_0>(op, begin, end);
    case BlockType::kIQ4_NL: return encode_table(op, begin, end);
    case BlockType::kQ2_K: return encode_super<84, encode_q2_k>(op, begin, end);
    case BlockType::kQ3_K: return encode_super<110, encode_q3_k>(op, begin, end);
    case BlockType::kQ4_K: return encode_super<144, encode_q45_k<4>>(op, begin, end);
    case BlockType::kQ5_K: return encode_super<176, encode_q45_k<5>>(op, begin, end);
    case BlockType::kQ6_K: return encode_super<210, encode_q6_k>(op, begin, end);
    case BlockType::kIQ4_XS: return encode_super<136, encode_iq4_xs>(op, begin, end);
  }
  return 0;
}

// The mean squares of the rows [begin, end), each added up in order; a lane has a row.
inline void mean_squares(const BlockEncode& op, int64_t begin, int64_t end, float* out) {
  for (int64_t row = begin; row < end; row += kBlocks) {
    const float* from[kBlocks];
    for (int64_t i = 0; i < kBlocks; ++i) from[i] = op.x + (row + i < end ? row + i : end - 1) * op.cols;
    Numbers total{};
    for (int64_t column = 0; column < op.cols; column += 32) {
      Numbers x[32];
      load<32>(from, x);
      for (int j = 0; j < 32; ++j) total += x[j] * x[j];
      for (int i = 0; i < kBlocks; ++i) from[i] += 32;
    }
    total /= static_cast<float>(op.cols);
    for (int64_t i = 0; i < kBlocks && row + i < end; ++i) out[row + i] = total[i];
  }
}
