// `Lanes`: a register of floats and the operations kernels need, one definition an instruction set.
//
// Included by foreach_isa.h only, hence no include guard. kWidth floats fit a register. madd(a, b, c) is
// a * b + c, rounded once everywhere but on `portable`, which rounds twice. keep(v) holds a loaded value in
// its register: GCC would rather load it again in each instruction that uses it, and loads are what is short.

#if defined(XLATHE_LANES_AVX512)

struct Lanes {
  using Float = __m512;
  static constexpr int kWidth = 16;
  static Float zero() { return _mm512_setzero_ps(); }
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static Float load(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static Float keep(Float v) {
    asm("" : "+v"(v));
    return v;
  }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float madd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
};

#elif defined(XLATHE_LANES_AVX2)

struct Lanes {
  using Float = __m256;
  static constexpr int kWidth = 8;
  static Float zero() { return _mm256_setzero_ps(); }
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static Float load(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static Float keep(Float v) {
    asm("" : "+x"(v));
    return v;
  }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float madd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
};

#elif defined(XLATHE_LANES_NEON)

struct Lanes {
  using Float = float32x4_t;
  static constexpr int kWidth = 4;
  static Float zero() { return vdupq_n_f32(0.0f); }
  static Float load(const float* p) { return vld1q_f32(p); }
  static Float load(const int8_t* p) {
    const int8_t four[8] = {p[0], p[1], p[2], p[3]};
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(four)))));
  }
  static Float keep(Float v) { return v; }
  static void store(float* p, Float v) { vst1q_f32(p, v); }
  static Float madd(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
};

#else

struct Lanes {
  typedef float Float __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static Float zero() { return Float{}; }
  static Float load(const float* p) { return Float{p[0], p[1], p[2], p[3]}; }
  static Float load(const int8_t* p) {
    return Float{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
                 static_cast<float>(p[3])};
  }
  static Float keep(Float v) { return v; }
  static void store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof v); }
  static Float madd(Float a, Float b, Float c) { return a * b + c; }
};

#endif
