// `Lanes`: a register of floats and the operations kernels need, one definition an instruction set.
//
// Included by foreach_isa.h only, hence no include guard. kWidth floats fit a register. madd(a, b, c) is
// a * b + c, rounded once everywhere but on `portable`, which rounds twice. keep(v) holds a loaded value in
// its register: GCC would rather load it again in each instruction that uses it, and loads are what is short.
// spread(v, r) is register r of those that hold each of 4 floats four times in a row.
// fold(v) adds 16 floats in halves: i and i + 8, then i and i + 4, i and i + 2, 0 and 1.

#if defined(XLATHE_LANES_AVX512)

struct Lanes {
  using Float = __m512;
  typedef int32_t Int __attribute__((vector_size(sizeof(Float))));
  static constexpr int kWidth = 16;
  static Float zero() { return _mm512_setzero_ps(); }
  static Float all(float x) { return _mm512_set1_ps(x); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Float from_int(Int v) { return _mm512_cvtepi32_ps(reinterpret_cast<__m512i>(v)); }
  static Float spread(__m128 v, int) {
    const __m512i each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(each, _mm512_castps128_ps512(v));
  }
  static Float keep(Float v) {
    asm("" : "+v"(v));
    return v;
  }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float madd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
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
  static constexpr int kWidth = 8;
  static Float zero() { return _mm256_setzero_ps(); }
  static Float all(float x) { return _mm256_set1_ps(x); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Float from_int(Int v) { return _mm256_cvtepi32_ps(reinterpret_cast<__m256i>(v)); }
  static Float spread(__m128 v, int r) {
    const __m256i each = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(v), _mm256_add_epi32(each, _mm256_set1_epi32(2 * r)));
  }
  static Float keep(Float v) {
    asm("" : "+x"(v));
    return v;
  }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float madd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
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
  static constexpr int kWidth = 4;
  static Float zero() { return vdupq_n_f32(0.0f); }
  static Float all(float x) { return vdupq_n_f32(x); }
  static Float load(const float* p) { return vld1q_f32(p); }
  static Float load(const int8_t* p) {
    const int8_t four[8] = {p[0], p[1], p[2], p[3]};
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(four)))));
  }
  static Float from_int(Int v) { return __builtin_convertvector(v, Float); }
  static Float spread(Float v, int r) { return vdupq_n_f32(v[r]); }
  static Float keep(Float v) { return v; }
  static void store(float* p, Float v) { vst1q_f32(p, v); }
  static Float madd(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
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
  static constexpr int kWidth = 4;
  static Float zero() { return Float{}; }
  static Float all(float x) { return Float{x, x, x, x}; }
  static Float load(const float* p) { return Float{p[0], p[1], p[2], p[3]}; }
  static Float load(const int8_t* p) {
    return Float{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                 static_cast<float>(p[3])};
  }
  static Float from_int(Int v) { return __builtin_convertvector(v, Float); }
  static Float spread(Float v, int r) { return Float{v[r], v[r], v[r], v[r]}; }
  static Float keep(Float v) { return v; }
  static void store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof v); }
  static Float madd(Float a, Float b, Float c) { return a * b + c; }
  static float fold(const Float (&v)[4]) {
    const Float four = (v[0] + v[2]) + (v[1] + v[3]);
    return (four[0] + four[2]) + (four[1] + four[3]);
  }
};

#endif
