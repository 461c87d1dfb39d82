// How the blocks of GGUF files are read, kCodes codes at a time. Included inside foreach_isa.h's namespaces.
//
// A type has kColumns columns in kBytes bytes, which are worked on together; kPart of them share a scale; its codes are
// whole numbers from -128 to 127 (kSigned) or from 0 to 63, kZero above what they stand for. `codes` returns those of
// the columns from `column` on, a multiple of kCodes. `scales` writes the scale of each part, and what is taken from
// each code times scale (kOffsets).

#if defined(XLATHE_LANES_AVX2)
constexpr int kCodes = 32;
#else
constexpr int kCodes = 16;
#endif
typedef uint8_t Codes __attribute__((vector_size(kCodes)));
typedef uint32_t CodeWords __attribute__((vector_size(kCodes)));

#define XLATHE_INLINE inline __attribute__((always_inline))

XLATHE_INLINE Codes load_codes(const uint8_t* p) {
  Codes v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The `width` lowest bits of bytes that are shifted to the right first.
XLATHE_INLINE Codes bits_from(Codes v, int shift, int width) {
  const Codes shifted = reinterpret_cast<Codes>(reinterpret_cast<CodeWords>(v) >> shift);
  return shifted & (Codes{} + static_cast<uint8_t>((1 << width) - 1));
}

// Bytes of few bits, shifted to the left.
XLATHE_INLINE Codes lifted(Codes v, int shift) {
  return reinterpret_cast<Codes>(reinterpret_cast<CodeWords>(v) << shift);
}

// Codes of 4 bits: those of columns that lie `apart` share a byte.
XLATHE_INLINE Codes nibbles(const uint8_t* p, int column, int apart) {
  const int within = column % (2 * apart);
  return bits_from(load_codes(p + column / (2 * apart) * apart + within % apart), within < apart ? 0 : 4, 4);
}

// Whole numbers of 8 bits, of which as many are used as a type has parts.
typedef int8_t Steps __attribute__((vector_size(16)));

XLATHE_INLINE Steps steps_of(uint64_t first, uint64_t second) {
  typedef uint64_t Pair __attribute__((vector_size(16)));
  return reinterpret_cast<Steps>(Pair{first, second});
}

template <int kCount>
XLATHE_INLINE void times(Steps steps, float scale, float* products) {
#if defined(XLATHE_LANES_AVX2)  // one after another they would take longer than the sums
  for (int i = 0; i < kCount; i += 8) {
    __m128i eight = reinterpret_cast<__m128i>(steps);
    if (i > 0) eight = _mm_unpackhi_epi64(eight, eight);
    const __m256 factors = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
    _mm256_storeu_ps(products + i, _mm256_mul_ps(factors, _mm256_set1_ps(scale)));
  }
#else
  for (int i = 0; i < kCount; ++i) products[i] = steps[i] * scale;
#endif
}

struct Q4_0 {
  static constexpr int kColumns = 64, kBytes = 36, kPart = 32, kZero = 8;
  static constexpr bool kSigned = false, kOffsets = false;

  static XLATHE_INLINE Codes codes(const uint8_t* block, int column) {
    const uint8_t* p = block + column / 32 * 18 + 2;
#if defined(XLATHE_LANES_AVX2)
    const __m128i both = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return bits_from(reinterpret_cast<Codes>(_mm256_set_m128i(_mm_srli_epi16(both, 4), both)), 0, 4);
#else
    return bits_from(load_codes(p), column % 32 ? 4 : 0, 4);
#endif
  }
  static XLATHE_INLINE void scales(const uint8_t* block, float* factors, float*) {
    for (int i = 0; i < 2; ++i) factors[i] = Lanes::half(block + 18 * i);
  }
};

struct Q8_0 {
  static constexpr int kColumns = 64, kBytes = 68, kPart = 32, kZero = 0;
  static constexpr bool kSigned = true, kOffsets = false;

  static XLATHE_INLINE Codes codes(const uint8_t* block, int column) {
    return load_codes(block + column / 32 * 34 + 2 + column % 32);
  }
  static XLATHE_INLINE void scales(const uint8_t* block, float* factors, float*) {
    for (int i = 0; i < 2; ++i) factors[i] = Lanes::half(block + 34 * i);
  }
};

// What Q4_K and Q5_K share: eight scales and eight offsets in six bits each, and a float16 for either.
struct SixBits {
  static constexpr int kColumns = 256, kPart = 32, kZero = 0;
  static constexpr bool kSigned = false, kOffsets = true;

  static XLATHE_INLINE float scale(const uint8_t* block) { return Lanes::half(block); }
  static XLATHE_INLINE float offset(const uint8_t* block) { return -Lanes::half(block + 2); }
  static XLATHE_INLINE void steps(const uint8_t* block, Steps& scales, Steps& offsets) {
    uint32_t words[3];
    __builtin_memcpy(words, block + 4, sizeof words);
    const uint64_t high_scales = (words[2] & 0x0F0F0F0Fu) | (words[0] >> 6 & 0x03030303u) << 4;
    const uint64_t high_offsets = (words[2] >> 4 & 0x0F0F0F0Fu) | (words[1] >> 6 & 0x03030303u) << 4;
    scales = steps_of((words[0] & 0x3F3F3F3Fu) | high_scales << 32, 0);
    offsets = steps_of((words[1] & 0x3F3F3F3Fu) | high_offsets << 32, 0);
  }
  static XLATHE_INLINE void scales(const uint8_t* block, float* factors, float* offsets) {
    Steps of_scales, of_offsets;
    steps(block, of_scales, of_offsets);
    times<8>(of_scales, scale(block), factors);
    times<8>(of_offsets, offset(block), offsets);
  }
};

struct Q4_K : SixBits {
  static constexpr int kBytes = 144;

  static XLATHE_INLINE Codes codes(const uint8_t* block, int column) { return nibbles(block + 16, column, 32); }
};

struct Q5_K : SixBits {
  static constexpr int kBytes = 176;

  static XLATHE_INLINE Codes codes(const uint8_t* block, int column) {
    const Codes high = bits_from(load_codes(block + 16 + column % 32), column / 32, 1);
    return nibbles(block + 48, column, 32) | lifted(high, 4);
  }
};

struct Q6_K {
  static constexpr int kColumns = 256, kBytes = 210, kPart = 16, kZero = 32;
  static constexpr bool kSigned = false, kOffsets = false;

  static XLATHE_INLINE Codes codes(const uint8_t* block, int column) {
    const Codes high = load_codes(block + 128 + column / 128 * 32 + column % 32);
    return nibbles(block, column, 64) | lifted(bits_from(high, column % 128 / 32 * 2, 2), 4);
  }
  static XLATHE_INLINE float scale(const uint8_t* block) { return Lanes::half(block + 208); }
  static XLATHE_INLINE float offset(const uint8_t*) { return 0; }
  static XLATHE_INLINE void steps(const uint8_t* block, Steps& scales, Steps&) {
    __builtin_memcpy(&scales, block + 192, sizeof scales);
  }
  static XLATHE_INLINE void scales(const uint8_t* block, float* factors, float*) {
    Steps of_scales;
    steps(block, of_scales, of_scales);
    times<16>(of_scales, scale(block), factors);
  }
};

#if defined(XLATHE_LANES_AVX512)
#include "blocks_avx512.h"
#endif

// Codes of 64 columns, those of register r's lanes in [r].
struct UnitCodes {
  Lanes::Bytes of[16 / Lanes::kWidth];

  template <typename Type>
  static XLATHE_INLINE UnitCodes load(const uint8_t* block, int unit) {
    UnitCodes codes;
#if defined(XLATHE_LANES_AVX512)
    codes.of[0] = reinterpret_cast<Lanes::Bytes>(unit_codes(Type{}, block, unit));
#else
#pragma GCC unroll 4
    for (int part = 0; part < kUnit / kCodes; ++part) {
      const Codes some = Type::codes(block, unit * kUnit + part * kCodes);
      __builtin_memcpy(reinterpret_cast<uint8_t*>(codes.of) + part * kCodes, &some, sizeof some);
    }
#endif
    return codes;
  }
};
