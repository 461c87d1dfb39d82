// The table of IQ4_NL and IQ4_XS: a code stands for one of 16 numbers that lie closer to each other around zero.
//
// Included by body.h only.

constexpr int kLowest = -127;
constexpr float kMiddles[15] = {-115.5f, -93.5f, -74.0f, -57.0f, -42.0f, -28.5f, -16.0f, -4.5f,
                                7.0f,    19.0f,  31.5f,  45.5f,  61.0f,  79.0f,  101.0f};
constexpr int kSteps[15] = {23, 21, 18, 16, 14, 13, 12, 11, 12, 12, 13, 15, 16, 20, 24};  // from one to the next

XLATHE_INLINE Ints table_code(Numbers v) {
  Ints code{};
  for (int i = 0; i < 15; ++i) code -= ~(v < kMiddles[i]);
  return code;
}
XLATHE_INLINE Numbers table_value(Numbers v) {
  Ints value = Ints{} + kLowest;
  for (int i = 0; i < 15; ++i) value += ~(v < kMiddles[i]) & kSteps[i];
  return to_float(value);
}

inline Products table_products(const Numbers* x, const Numbers* weight, Numbers inverse) {
  Products sums;
  for (int j = 0; j < 32; ++j) {
    const Numbers value = table_value(inverse * x[j]);
    sums.xl += weight[j] * value * x[j];
    sums.l2 += weight[j] * value * value;
  }
  return sums;
}

// The scale of 32 numbers, x ~ scale * table[code].
inline Numbers search_table(const Numbers* x, const Numbers* weight) {
  const Extremes range = extremes<32>(x);
  const Products first = table_products(x, weight, 1.0f / (-range.peak / static_cast<float>(kLowest)));
  Numbers scale = first.l2 > 0.0f ? first.xl / first.l2 : Numbers{};
  Numbers best = scale * first.xl;
  for (int step = -7; step <= 7; ++step) {
    const Products sums = table_products(x, weight, static_cast<float>(step + kLowest) / range.peak);
    const Ints better = (sums.l2 > 0.0f) & (sums.xl * sums.xl > best * sums.l2);
    scale = better ? sums.xl / sums.l2 : scale;
    best = better ? scale * sums.xl : best;
  }
  return range.size < kNothing ? Numbers{} : scale;
}
