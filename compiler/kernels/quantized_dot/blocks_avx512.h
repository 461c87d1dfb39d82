// Codes and scales as registers of AVX-512, by type. Included inside that namespace of foreach_isa.h.
//
// Halves that meet in memory are waited for: a load of 64 bytes after two stores of 32 takes longer than all else here.

// 32 bytes in both halves.
XLATHE_INLINE __m512i twice(const uint8_t* p) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// `low` in the lower half's words, `high` in the upper half's.
XLATHE_INLINE __m512i halves(int low, int high) {
  return _mm512_inserti64x4(_mm512_set1_epi32(low), _mm256_set1_epi32(high), 1);
}

// The 4 lowest bits of bytes, and above them those bits of `high` that `mask` has.
XLATHE_INLINE __m512i below(__m512i low, __m512i high, int8_t mask) {
  const __m512i four = _mm512_and_si512(low, _mm512_set1_epi8(15));
  return _mm512_ternarylogic_epi32(four, high, _mm512_set1_epi8(mask), /*first | second & third*/ 0xF8);
}

XLATHE_INLINE __m512i unit_codes(Q4_0, const uint8_t* block, int) {
  const auto load = [&](int at) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + at)); };
  const __m512i both = _mm512_mask_broadcast_i32x4(_mm512_broadcast_i32x4(load(2)), 0xFF00, load(20));
  const __m512i shifts = _mm512_broadcast_i64x4(_mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  return _mm512_and_si512(_mm512_srlv_epi32(both, shifts), _mm512_set1_epi8(15));
}

XLATHE_INLINE __m512i unit_codes(Q8_0, const uint8_t* block, int) {
  const auto load = [&](int at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + at)); };
  return _mm512_inserti64x4(_mm512_castsi256_si512(load(2)), load(36), 1);
}

XLATHE_INLINE __m512i unit_codes(Q4_K, const uint8_t* block, int unit) {
  return _mm512_and_si512(_mm512_srlv_epi32(twice(block + 16 + 32 * unit), halves(0, 4)), _mm512_set1_epi8(15));
}

XLATHE_INLINE __m512i unit_codes(Q5_K, const uint8_t* block, int unit) {
  const __m512i low = _mm512_srlv_epi32(twice(block + 48 + 32 * unit), halves(0, 4));
  const __m512i high = _mm512_rolv_epi32(twice(block + 16), halves(4 - 2 * unit, 3 - 2 * unit));
  return below(low, high, 16);
}

XLATHE_INLINE __m512i unit_codes(Q6_K, const uint8_t* block, int unit) {
  const int first = unit % 2 * 4;  // of a byte's bits
  const __m512i low = _mm512_srli_epi32(_mm512_loadu_si512(block + unit / 2 * 64), first);
  const __m512i high = _mm512_rolv_epi32(twice(block + 128 + unit / 2 * 32), halves(4 - first, 2 - first));
  return below(low, high, 48);
}

// Of a value a part of 16 or 32 columns those of 64 columns, the first of which is in `part`: four columns a lane.
template <int kPart>
XLATHE_INLINE __m512i part_of_lanes(int part) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_srli_epi32(lanes, kPart == 16 ? 2 : 3), _mm512_set1_epi32(part));
}

XLATHE_INLINE __m512 times(Steps steps, float scale) {
  const __m512i wide = _mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(steps));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(wide), _mm512_set1_ps(scale));
}

// The float16 that two blocks begin with, in the lowest lanes.
XLATHE_INLINE __m512 first_halves(const uint8_t* first, const uint8_t* second) {
  uint16_t low, high;
  __builtin_memcpy(&low, first, sizeof low);
  __builtin_memcpy(&high, second, sizeof high);
  return _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi32_si128(static_cast<int32_t>(low | uint32_t{high} << 16))));
}
