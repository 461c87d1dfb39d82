// `Lanes`: a register of floats and the operations kernels need, one definition an instruction set.
//
// Included by foreach_isa.h only, hence no include guard. kWidth floats fit a register, of which there are kFile.
// madd(a, b, c) is a * b + c, rounded once everywhere but on `portable`, which rounds twice. keep(v) holds a loaded
// value in its register: GCC would rather load it again in each instruction that uses it, and loads are what is short.
// spread(v, r) is register r of those that hold each of 4 floats four times in a row.
// fold(v) adds 16 floats in halves: i and i + 8, then i and i + 4, i and i + 2, 0 and 1.
// half(p) is the float16 at p, also where denormal numbers are taken for zero. widen(v) is 4 bfloat16 as floats. add_products(a, x, b, y, sums) adds a * x and b * y to sums, four
// bytes to each; a and b are at most 15, x and y are signed.

#if !defined(XLATHE_LANES_AVX512) && !defined(XLATHE_LANES_AVX2)

// a * x + b * y of 16 bytes as `Lanes::add_products` has them, summed by fours.
typedef int32_t FourInts __attribute__((vector_size(16)));
typedef uint8_t SixteenBytes __attribute__((vector_size(16)));
inline __attribute__((always_inline)) FourInts sums_of_fours(SixteenBytes a, SixteenBytes x, SixteenBytes b,
                                                             SixteenBytes y) {
  typedef int8_t Signed __attribute__((vector_size(16)));
  typedef int16_t Shorts __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef int64_t Longs __attribute__((vector_size(32)));
  const auto wide = [](SixteenBytes v) { return __builtin_convertvector(reinterpret_cast<Signed>(v), Shorts); };
  const Ints ones = reinterpret_cast<Ints>(wide(a) * wide(x) + wide(b) * wide(y));
  const Longs twos = reinterpret_cast<Longs>((ones << 16 >> 16) + (ones >> 16));
  return __builtin_convertvector(twos + (twos >> 32), FourInts);  // the lower halves
}

#endif

#if defined(XLATHE_LANES_AVX512)

struct Lanes {
  using Float = __m512;
  typedef int32_t Int __attribute__((vector_size(sizeof(Float))));
  typedef uint8_t Bytes __attribute__((vector_size(sizeof(Float))));
  static constexpr int kWidth = 16, kFile = 32;
  static Float zero() { return _mm512_setzero_ps(); }
  static Float all(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Float from_int(Int v) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(v)); }
  static Bytes load_bytes(const void* p) {
    Bytes v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static __m128 widen(uint64_t v) {
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_cvtsi64_si128(static_cast<int64_t>(v))));
  }
  static Int add_products(Bytes a, Bytes x, Bytes b, Bytes y, Int sums) {
    const __m512i first = _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(a),
                                              reinterpret_cast<__m512i>(x));
    return reinterpret_cast<Int>(
        _mm512_dpbusd_epi32(first, reinterpret_cast<__m512i>(b), reinterpret_cast<__m512i>(y)));
  }
  static Float spread(__m128 v, int) {
    const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(each, _mm512_castps128_ps512(v));
  }
  static Float keep(Float v) {
    asm("" : "+v"(v));
    return v;
  }
  static float half(const uint8_t* p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
  }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float madd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float sqrt(Float v) { return _mm512_sqrt_ps(v); }
  static float fold(const Float (&v)[1]) {
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v[0]), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v[0]), high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

#elif defined(XLATHE_LANES_AVX2)

struct Lanes {
  using Float = __m256;
  typedef int32_t Int __attribute__((vector_size(sizeof(Float))));
  typedef uint8_t Bytes __attribute__((vector_size(sizeof(Float))));
  static constexpr int kWidth = 8, kFile = 16;
  static Float zero() { return _mm256_setzero_ps(); }
  static Float all(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Float from_int(Int v) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(v)); }
  static Bytes load_bytes(const void* p) {
    Bytes v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static __m128 widen(uint64_t v) {
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_cvtsi64_si128(static_cast<int64_t>(v))));
  }
  static Int add_products(Bytes a, Bytes x, Bytes b, Bytes y, Int sums) {
    const __m256i first = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(x));
    const __m256i second = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(b), reinterpret_cast<__m256i>(y));
    const __m256i fours = _mm256_add_epi16(first, second);
    return sums + reinterpret_cast<Int>(_mm256_madd_epi16(fours, _mm256_set1_epi16(1)));
  }
  static Float spread(__m128 v, int r) {
    const __m256i each = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(v), _mm256_add_epi32(each, _mm256_set1_epi32(2 * r)));
  }
  static Float keep(Float v) {
    asm("" : "+x"(v));
    return v;
  }
  static float half(const uint8_t* p) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
  }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float madd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float sqrt(Float v) { return _mm256_sqrt_ps(v); }
  static float fold(const Float (&v)[2]) {
    const __m256 eight = _mm256_add_ps(v[0], v[1]);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
};

#elif defined(XLATHE_LANES_NEON)

struct Lanes {
  using Float = float32x4_t;
  typedef int32_t Int __attribute__((vector_size(sizeof(Float))));
  typedef uint8_t Bytes __attribute__((vector_size(sizeof(Float))));
  static constexpr int kWidth = 4, kFile = 32;
  static Float zero() { return vdupq_n_f32(0.0f); }
  static Float all(float x) { return vdupq_n_f32(x); }
  static Float load(const float* p) { return vld1q_f32(p); }
  static Float load(const int8_t* p) {
    const int8_t four[8] = {p[0], p[1], p[2], p[3]};
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(four)))));
  }
  static Float from_int(Int v) { return __builtin_convertvector(v, Float); }
  static Bytes load_bytes(const void* p) {
    Bytes v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static Float widen(uint64_t v) { return vreinterpretq_f32_u32(vshll_n_u16(vcreate_u16(v), 16)); }
  static Int add_products(Bytes a, Bytes x, Bytes b, Bytes y, Int sums) { return sums + sums_of_fours(a, x, b, y); }
  static Float spread(Float v, int r) { return vdupq_n_f32(v[r]); }
  static Float keep(Float v) { return v; }
  static float half(const uint8_t* p) {
    __fp16 half;
    __builtin_memcpy(&half, p, sizeof half);
    return static_cast<float>(half);
  }
  static void store(float* p, Float v) { vst1q_f32(p, v); }
  static Float madd(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float sqrt(Float v) { return vsqrtq_f32(v); }
  static float fold(const Float (&v)[4]) {
    const float32x4_t four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
};

#else

struct Lanes {
  typedef float Float __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(sizeof(Float))));
  typedef uint8_t Bytes __attribute__((vector_size(sizeof(Float))));
  static constexpr int kWidth = 4, kFile = 16;
  static Float zero() { return Float{}; }
  static Float all(float x) { return Float{x, x, x, x}; }
  static Float load(const float* p) { return Float{p[0], p[1], p[2], p[3]}; }
  static Float load(const int8_t* p) {
    return Float{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                 static_cast<float>(p[3])};
  }
  static Float from_int(Int v) { return __builtin_convertvector(v, Float); }
  static Bytes load_bytes(const void* p) {
    Bytes v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static Float widen(uint64_t v) {
    uint16_t halves[4];
    __builtin_memcpy(halves, &v, sizeof v);
    Int bits = {halves[0], halves[1], halves[2], halves[3]};
    bits <<= 16;
    Float found;
    __builtin_memcpy(&found, &bits, sizeof bits);
    return found;
  }
  static Int add_products(Bytes a, Bytes x, Bytes b, Bytes y, Int sums) { return sums + sums_of_fours(a, x, b, y); }
  static Float spread(Float v, int r) { return Float{v[r], v[r], v[r], v[r]}; }
  static Float keep(Float v) { return v; }
  static float half(const uint8_t* p) {
    const uint32_t bits = p[0] | p[1] << 8u, fraction = bits & 1023u, exponent = bits >> 10 & 31u;
    if (exponent == 0) return (bits >> 15 ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
    const uint32_t wide = (bits >> 15) << 31 | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13;
    float value;
    __builtin_memcpy(&value, &wide, sizeof value);
    return value;
  }
  static void store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof v); }
  static Float madd(Float a, Float b, Float c) { return a * b + c; }
  static Float sqrt(Float v) {
    return Float{__builtin_sqrtf(v[0]), __builtin_sqrtf(v[1]), __builtin_sqrtf(v[2]), __builtin_sqrtf(v[3])};
  }
  static float fold(const Float (&v)[4]) {
    const Float four = (v[0] + v[2]) + (v[1] + v[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
};

#endif
