// Blocks of 32 numbers: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and IQ4_NL.
//
// Included by body.h only. `weight` is null where no importance is known. Codes are rounded with the scale before it
// becomes float16. Each returns a mask of the blocks whose scale float16 does not hold.

constexpr Tries kFine{-0.9f, 0.05f, 36};

XLATHE_INLINE Numbers inverse_of(Numbers scale) { return scale != 0.0f ? 1.0f / scale : Numbers{}; }

inline void put_half(Ints half, Ints* out) {
  out[0] = half & 255;
  out[1] = half >> 8;
}

// Codes j and j + 16 share a byte; of five bits the highest lies in 4 bytes of their own, before the others.
template <int width>
inline void put_codes(const Ints* codes, Ints* out) {
  if (width == 5) {
    for (int byte = 0; byte < 4; ++byte) {
      out[byte] = Ints{};
      for (int bit = 0; bit < 8; ++bit) out[byte] |= ((codes[8 * byte + bit] >> 4) & 1) << bit;
    }
    out += 4;
  }
  for (int j = 0; j < 16; ++j) out[j] = (codes[j] & 15) | (codes[j + 16] & 15) << 4;
}

// Q4_0, Q5_0: x ~ scale * (code - half), where the largest x has the code 0.
template <int width>
inline Ints encode_symmetric(const Numbers* x, const Numbers* weight, Ints* out) {
  constexpr int half = 1 << (width - 1);
  Ints codes[32];
  Numbers scale;
  if (weight != nullptr) {
    scale = search_symmetric<32>(x, weight, half, codes);
  } else {
    scale = extremes<32>(x).peak / static_cast<float>(-half);
    const Numbers inverse = inverse_of(scale);
    for (int j = 0; j < 32; ++j) codes[j] = least(low_byte(x[j] * inverse + (half + 0.5f)), Ints{} + (2 * half - 1));
  }
  put_half(to_half(scale), out);
  put_codes<width>(codes, out + 2);
  return no_number(to_half(scale));
}

// Q4_1, Q5_1: x ~ scale * code + least.
template <int width>
inline Ints encode_affine(const Numbers* x, const Numbers* weight, Ints* out) {
  constexpr int most = (1 << width) - 1;
  Ints codes[32];
  Numbers scale, low;
  if (weight != nullptr) {
    const Affine found = search_affine<32, false>(x, weight, most, kFine, codes);
    scale = found.scale;
    low = -found.least;
  } else {
    Numbers high = x[0];
    low = x[0];
    for (int j = 1; j < 32; ++j) {
      low = x[j] < low ? x[j] : low;
      high = x[j] > high ? x[j] : high;
    }
    scale = (high - low) / static_cast<float>(most);
    const Numbers inverse = inverse_of(scale);
    for (int j = 0; j < 32; ++j) {
      const Ints code = low_byte((x[j] - low) * inverse + 0.5f);
      codes[j] = width == 4 ? least(code, Ints{} + most) : code;
    }
  }
  put_half(to_half(scale), out);
  put_half(to_half(low), out + 2);
  put_codes<width>(codes, out + 4);
  return no_number(to_half(scale)) | no_number(to_half(low));
}

// Q8_0: x ~ scale * code, halves rounded away from zero.
inline Ints encode_q8_0(const Numbers* x, const Numbers*, Ints* out) {
  const Numbers scale = extremes<32>(x).size / 127.0f, inverse = inverse_of(scale);
  const Numbers below_half = Numbers{} + 0x1.fffffep-2f;  // 0.5 itself would also lift the number just below a half
  put_half(to_half(scale), out);
  for (int j = 0; j < 32; ++j) {
    const Numbers scaled = x[j] * inverse;
    out[2 + j] = low_byte(scaled + number(bits(below_half) | (bits(scaled) & INT32_MIN)));
  }
  return no_number(to_half(scale));
}

inline Ints encode_iq4_nl(const Numbers* x, const Numbers* weight, Ints* out) {
  const Numbers scale = search_table(x, weight), inverse = inverse_of(scale);
  Ints codes[32];
  for (int j = 0; j < 32; ++j) codes[j] = table_code(inverse * x[j]);
  put_half(to_half(scale), out);
  put_codes<4>(codes, out + 2);
  return no_number(to_half(scale));
}
