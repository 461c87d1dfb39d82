// Numbers of several blocks at once: lane i of a register belongs to block i of a group of kBlocks.
//
// ggml adds up the numbers of a block one after the other, and its bytes depend on that order. Here each lane does so
// too, so that a register works on as many blocks as it has lanes, with ggml's roundings in every one.
//
// Included by body.h only, hence no include guard.

constexpr int kBlocks = Lanes::kWidth;
typedef float Numbers __attribute__((vector_size(4 * kBlocks)));
typedef int32_t Ints __attribute__((vector_size(4 * kBlocks)));  // and masks: -1 where true

#define XLATHE_INLINE inline __attribute__((always_inline))

XLATHE_INLINE Ints bits(Numbers v) { return reinterpret_cast<Ints>(v); }
XLATHE_INLINE Numbers number(Ints v) { return reinterpret_cast<Numbers>(v); }
XLATHE_INLINE Numbers to_float(Ints v) { return __builtin_convertvector(v, Numbers); }
XLATHE_INLINE Numbers absolute(Numbers v) { return number(bits(v) & 0x7fffffff); }
XLATHE_INLINE Numbers root(Numbers v) { return Numbers(Lanes::sqrt(Lanes::Float(v))); }
XLATHE_INLINE Ints least(Ints a, Ints b) { return a < b ? a : b; }
XLATHE_INLINE Ints clip(Ints v, int low, int high) {
  v = v < low ? Ints{} + low : v;
  return v > high ? Ints{} + high : v;
}
XLATHE_INLINE bool any(Ints mask) {
  int32_t found = 0;
  for (int i = 0; i < kBlocks; ++i) found |= mask[i];
  return found != 0;
}

// The nearest integer, halves to even, of |v| < 2**22; of others what ggml's trick with the mantissa gives.
XLATHE_INLINE Ints nearest(Numbers v) { return (bits(v + 12582912.0f) & 0x007fffff) - 0x00400000; }

// As a cast to int8 on x86: the low byte of the truncated number, and 0 for what is no int32.
XLATHE_INLINE Ints low_byte(Numbers v) {
  const Ints fits = absolute(v) < 2147483648.0f;
  return (__builtin_convertvector(fits ? v : Numbers{}, Ints) << 24) >> 24;
}

// float16, rounded to nearest even, in the low 16 bits; 0x7c00 and more where it is no number.
XLATHE_INLINE Ints to_half(Numbers v) {
  const Ints sign = (bits(v) >> 16) & 0x8000, size = bits(v) & 0x7fffffff;
  const Ints normal = (size - 0x38000000 + 0x0fff + ((size >> 13) & 1)) >> 13;
  const Ints small = bits(number(size) + 0.5f) - 0x3f000000;
  const Ints half = size < 0x38800000 ? small : normal;
  return sign | (size >= 0x47800000 || half > 0x7c00 ? Ints{} + 0x7c00 : half);
}
XLATHE_INLINE Ints no_number(Ints half) { return (half & 0x7c00) == 0x7c00; }
XLATHE_INLINE Numbers from_half(Ints half) {
  const Numbers size = number((half & 0x7fff) << 13) * number(Ints{} + 0x77800000);  // 2**112
  return number(bits(size) | ((half & 0x8000) << 16));
}

// Transposes n numbers of each block: x[j][i] = from[i][j].
template <int n>
inline void load(const float* const* from, Numbers* x) {
  float* to = reinterpret_cast<float*>(x);
  for (int i = 0; i < kBlocks; ++i) {
    for (int j = 0; j < n; ++j) to[j * kBlocks + i] = from[i][j];
  }
}

// Byte j of block i is the low byte of at[j][i].
template <int size>
inline void store(const Ints* at, uint8_t* out, int64_t blocks) {
  const int32_t* from = reinterpret_cast<const int32_t*>(at);
  for (int64_t i = 0; i < blocks; ++i) {
    for (int j = 0; j < size; ++j) out[i * size + j] = static_cast<uint8_t>(from[j * kBlocks + i]);
  }
}

template <int n>
inline Numbers sum_of_squares(const Numbers* x) {
  Numbers sum{};
  for (int j = 0; j < n; ++j) sum += x[j] * x[j];
  return sum;
}

struct Extremes {
  Numbers size, peak;  // the largest |x| and the first x of that size
};

template <int n>
inline Extremes extremes(const Numbers* x) {
  Extremes found{};
  for (int j = 0; j < n; ++j) {
    const Ints larger = absolute(x[j]) > found.size;
    found.size = larger ? absolute(x[j]) : found.size;
    found.peak = larger ? x[j] : found.peak;
  }
  return found;
}
