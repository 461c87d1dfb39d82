// Blocks of 256 numbers: Q2_K to Q6_K and IQ4_XS. Parts of 16 or 32 numbers have small integers as scales, which are
// multiples of one float16 a block. Codes are rounded again with the scales as stored; where one of those is zero the
// codes of the search stay.
//
// Included by body.h only. `importance` is null where none is known.

constexpr int kSuper = 256;

// weight = importance * sqrt(spread + x^2)
template <int n>
inline void weigh(const Numbers* x, const Numbers* importance, Numbers spread, Numbers* weight) {
  for (int j = 0; j < n; ++j) weight[j] = importance[j] * root(spread + x[j] * x[j]);
}

template <int n>
inline Numbers sum(const Numbers* x) {
  Numbers total{};
  for (int j = 0; j < n; ++j) total += x[j];
  return total;
}

template <int n>
inline Numbers largest(const Numbers* x) {
  Numbers high{};
  for (int j = 0; j < n; ++j) high = x[j] > high ? x[j] : high;
  return high;
}

template <int n>
inline void round_again(const Numbers* x, Numbers scale, Numbers offset, int low, int high, Ints* codes) {
  const Ints zero = scale == 0.0f;
  for (int j = 0; j < n; ++j) {
    codes[j] = zero ? codes[j] : clip(nearest((x[j] + offset) / scale), low, high) - low;
  }
}

struct Steps {
  Ints codes[16];
  Numbers whole;  // what the codes are multiples of
};

// Scales or minimums >= 0 to multiples of the largest / most.
template <int n>
inline void round_steps(const Numbers* scales, int most, bool clipped, Steps* steps) {
  const Numbers high = largest<n>(scales);
  const Numbers inverse = high > 0.0f ? static_cast<float>(most) / high : Numbers{};
  for (int j = 0; j < n; ++j) {
    const Ints code = nearest(inverse * scales[j]) & 255;
    steps->codes[j] = clipped ? least(code, Ints{} + most) : code;
  }
  steps->whole = high > 0.0f ? high / static_cast<float>(most) : Numbers{};
}

// Q2_K, Q4_K, Q5_K: x ~ scale * code - least, in parts of `part` numbers with scales of up to `top`.
template <int part, int most, int top>
inline Ints search_parts(const Numbers* x, const Numbers* importance, Tries coarse, Ints* codes, Steps* scale,
                         Steps* low) {
  constexpr int parts = kSuper / part;
  Numbers scales[parts], lows[parts], sums[parts], weight[part];
  const Numbers squares = importance == nullptr ? Numbers{} : sum_of_squares<kSuper>(x);
  const Numbers spread = (part == 16 ? squares : 2.0f * squares) / static_cast<float>(kSuper);
  for (int p = 0; p < parts; ++p) {
    const Numbers* from = x + p * part;
    Affine found;
    if (importance != nullptr) {
      weigh<part>(from, importance + p * part, spread, weight);
      sums[p] = sum<part>(weight);
      found = search_affine<part, false>(from, weight, most, kFine, codes + p * part);
    } else {
      const Numbers base = part == 16 ? Numbers{} : root(sum_of_squares<part>(from) / static_cast<float>(part));
      for (int j = 0; j < part; ++j) weight[j] = base + absolute(from[j]);
      found = search_affine<part, part == 16>(from, weight, most, coarse, codes + p * part);
    }
    scales[p] = found.scale;
    lows[p] = found.least;
  }
  if (importance != nullptr) {
    scale->whole = search_positive<parts>(scales, sums, top, scale->codes);
    low->whole = search_positive<parts>(lows, sums, top, low->codes);
  } else {
    round_steps<parts>(scales, top, part == 32, scale);
    round_steps<parts>(lows, top, part == 32, low);
  }
  const Ints scale_half = to_half(scale->whole), low_half = to_half(low->whole);
  scale->whole = from_half(scale_half);
  low->whole = from_half(low_half);
  for (int p = 0; p < parts; ++p) {
    const Numbers step = scale->whole * to_float(scale->codes[p]), offset = low->whole * to_float(low->codes[p]);
    round_again<part>(x + p * part, step, offset, 0, most, codes + p * part);
  }
  return scale_half | low_half << 16;
}

// Two bits of each code: byte l of 32 holds the codes l, l + 32, l + 64, l + 96 of each 128.
inline void put_pairs(const Ints* codes, int shift, Ints* out) {
  for (int half = 0; half < 2; ++half) {
    for (int l = 0; l < 32; ++l) {
      Ints byte{};
      for (int k = 0; k < 4; ++k) byte |= ((codes[128 * half + l + 32 * k] >> shift) & 3) << (2 * k);
      out[32 * half + l] = byte;
    }
  }
}

// Four bits of each code: byte l of 32 holds the codes l and l + 32 of each 64.
inline void put_nibbles(const Ints* codes, Ints* out) {
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int l = 0; l < 32; ++l) {
      const Ints* from = codes + 64 * quarter + l;
      out[32 * quarter + l] = (from[0] & 15) | (from[32] & 15) << 4;
    }
  }
}

// The bit `shift` of each code: bit k of byte l is that of the code l + 32 k.
inline void put_bits(const Ints* codes, int shift, Ints* out) {
  for (int l = 0; l < 32; ++l) {
    Ints byte{};
    for (int k = 0; k < 8; ++k) byte |= ((codes[l + 32 * k] >> shift) & 1) << k;
    out[l] = byte;
  }
}

inline Ints encode_q2_k(const Numbers* x, const Numbers* importance, Ints* out) {
  Ints codes[kSuper];
  Steps scale, low;
  const Ints halves = search_parts<16, 3, 15>(x, importance, {-0.5f, 0.1f, 15}, codes, &scale, &low);
  for (int p = 0; p < 16; ++p) out[p] = scale.codes[p] | low.codes[p] << 4;
  put_pairs(codes, 0, out + 16);
  put_half(halves & 0xffff, out + 80);
  put_half((halves >> 16) & 0xffff, out + 82);
  return no_number(halves) | no_number(halves >> 16);
}

template <int width>
inline Ints encode_q45_k(const Numbers* x, const Numbers* importance, Ints* out) {
  Ints codes[kSuper];
  Steps scale, low;
  const Tries coarse = width == 4 ? Tries{-1.0f, 0.1f, 20} : Tries{-0.5f, 0.1f, 15};
  const Ints halves = search_parts<32, (1 << width) - 1, 63>(x, importance, coarse, codes, &scale, &low);
  put_half(halves & 0xffff, out);
  put_half((halves >> 16) & 0xffff, out + 2);
  for (int p = 0; p < 4; ++p) {
    out[4 + p] = scale.codes[p] | (scale.codes[p + 4] >> 4) << 6;
    out[8 + p] = low.codes[p] | (low.codes[p + 4] >> 4) << 6;
    out[12 + p] = (scale.codes[p + 4] & 15) | (low.codes[p + 4] & 15) << 4;
  }
  if (width == 5) put_bits(codes, 4, out + 16);
  put_nibbles(codes, out + (width == 5 ? 48 : 16));
  return no_number(halves) | no_number(halves >> 16);
}

inline Ints encode_q3_k(const Numbers* x, const Numbers* importance, Ints* out) {
  Ints codes[kSuper], steps[16];
  Numbers scales[16], sums[16], weight[16], whole;
  const Numbers spread =
      importance == nullptr ? Numbers{} : 2.0f * sum_of_squares<kSuper>(x) / static_cast<float>(kSuper);
  for (int p = 0; p < 16; ++p) {
    const Numbers* from = x + 16 * p;
    if (importance != nullptr) {
      weigh<16>(from, importance + 16 * p, spread, weight);
      sums[p] = sum<16>(weight);
      scales[p] = search_symmetric<16>(from, weight, 4, codes + 16 * p);
    } else {
      scales[p] = descend_symmetric<16>(from, 4, codes + 16 * p);
    }
  }
  if (importance != nullptr) {
    whole = search_symmetric<16>(scales, sums, 32, steps);
  } else {
    const Numbers peak = extremes<16>(scales).peak, inverse = -32.0f / peak;
    const Ints some = peak != 0.0f;
    for (int p = 0; p < 16; ++p) {
      steps[p] = some & (clip((nearest(inverse * scales[p]) << 24) >> 24, -32, 31) + 32);
    }
    whole = some ? 1.0f / inverse : Numbers{};
  }
  const Ints half = to_half(whole);
  for (int p = 0; p < 16; ++p) {
    const Numbers scale = from_half(half) * to_float(steps[p] - 32);
    round_again<16>(x + 16 * p, scale, Numbers{}, -4, 3, codes + 16 * p);
  }
  put_bits(codes, 2, out);
  put_pairs(codes, 0, out + 32);
  for (int p = 0; p < 8; ++p) out[96 + p] = (steps[p] & 15) | (steps[p + 8] & 15) << 4;
  for (int p = 0; p < 4; ++p) {
    out[104 + p] = steps[p] >> 4 | (steps[p + 4] >> 4) << 2 | (steps[p + 8] >> 4) << 4 | (steps[p + 12] >> 4) << 6;
  }
  put_half(half, out + 108);
  return no_number(half);
}

inline Ints encode_q6_k(const Numbers* x, const Numbers* importance, Ints* out) {
  Ints codes[kSuper];
  Numbers scales[16], squares[16];
  for (int p = 0; p < 16; ++p) {
    const Numbers* from = x + 16 * p;
    for (int j = 0; j < 16; ++j) squares[j] = from[j] * from[j];
    scales[p] = search_symmetric<16>(from, importance == nullptr ? squares : importance + 16 * p, 32, codes + 16 * p);
  }
  const Extremes range = extremes<16>(scales);
  const Ints some = ~(range.size < kNothing);
  const Numbers inverse = -128.0f / range.peak;
  const Ints half = to_half(1.0f / inverse) & some;
  for (int p = 0; p < 16; ++p) {
    const Ints step = least(nearest(inverse * scales[p]), Ints{} + 127);
    const Numbers scale = from_half(half) * to_float((step << 24) >> 24);
    round_again<16>(x + 16 * p, scale, Numbers{}, -32, 31, codes + 16 * p);
    out[192 + p] = step & some;
  }
  for (int j = 0; j < kSuper; ++j) codes[j] &= some;
  for (int part = 0; part < 2; ++part) {
    for (int l = 0; l < 64; ++l) {
      const Ints* from = codes + 128 * part + l;
      out[64 * part + l] = (from[0] & 15) | (from[64] & 15) << 4;
    }
  }
  put_pairs(codes, 4, out + 128);
  put_half(half, out + 208);
  return no_number(half);
}

inline Ints encode_iq4_xs(const Numbers* x, const Numbers* importance, Ints* out) {
  Numbers scales[8], weight[32];
  const Numbers spread = sum_of_squares<kSuper>(x) * (2.0f / kSuper);
  for (int p = 0; p < 8; ++p) {
    const Numbers* from = x + 32 * p;
    for (int j = 0; j < 32; ++j) weight[j] = from[j] * from[j];
    if (importance != nullptr) weigh<32>(from, importance + 32 * p, spread, weight);
    scales[p] = search_table(from, weight);
  }
  const Numbers whole = -extremes<8>(scales).peak / 32.0f, inverse = inverse_of(whole);
  Ints high{};
  for (int p = 0; p < 8; ++p) {
    const Ints step = clip(nearest(inverse * scales[p]), -32, 31);
    const Numbers part_inverse = inverse_of(whole * to_float(step));
    Ints codes[32];
    for (int j = 0; j < 32; ++j) codes[j] = table_code(part_inverse * x[32 * p + j]);
    put_codes<4>(codes, out + 8 + 16 * p);
    const Ints stored = step + 32;
    high |= (stored >> 4) << (2 * p);
    out[4 + p / 2] = p % 2 == 0 ? stored & 15 : out[4 + p / 2] | (stored & 15) << 4;
  }
  put_half(to_half(whole), out);
  put_half(high, out + 2);
  return no_number(to_half(whole));
}
