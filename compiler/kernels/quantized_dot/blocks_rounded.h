// Products of blocks of 256 with activations rounded to 8 bits in blocks of as many. Included inside foreach_isa.h's
// namespaces.
//
// Of each 64 columns, 16 lanes hold 4 successive ones; over the block a lane adds up scale * code * x, whole numbers, to
// a sum that is exact in 32 bits. What zeros and offsets take away is such a sum too, of scales or offsets times sums
// of x: number i of eight is that of columns 32 i to 32 i + 31, in lane i. Rounded to floats these are multiplied by the
// two float16 of the block times the step of x and added to the lanes' totals.

struct alignas(64) RoundedBlock {
  int8_t codes[256];
  int16_t sums[16];  // of 16 columns each
  float step;
};

typedef int16_t Shorts16 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));

// Eight sums of two neighboring products.
XLATHE_INLINE Ints8 pair_products(Shorts16 a, Shorts16 b) {
#if defined(XLATHE_LANES_AVX512) || defined(XLATHE_LANES_AVX2)
  return reinterpret_cast<Ints8>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  Ints8 sums;
  for (int i = 0; i < 8; ++i) sums[i] = a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sums;
#endif
}

// Whole numbers of parts of kPart columns as those of parts of 16.
template <int kPart>
XLATHE_INLINE Shorts16 of_sixteens(Steps steps) {
#if defined(XLATHE_LANES_AVX512) || defined(XLATHE_LANES_AVX2)
  __m128i bytes = reinterpret_cast<__m128i>(steps);
  if (kPart == 32) bytes = _mm_unpacklo_epi8(bytes, bytes);
  return reinterpret_cast<Shorts16>(_mm256_cvtepi8_epi16(bytes));
#else
  Shorts16 wide;
  for (int i = 0; i < 16; ++i) wide[i] = steps[i * 16 / kPart];
  return wide;
#endif
}

// sums + scale * codes * x of register r's lanes, of the unit-th 64 columns. Codes are not negative.
template <int kPart>
XLATHE_INLINE Words add_scaled(Lanes::Bytes codes, const int8_t* x, Steps scales, int unit, int r, Words sums) {
#if defined(XLATHE_LANES_AVX512)
  // A sum of four products fits 16 bits, so that one instruction multiplies it by its scale and adds.
  const __m512i fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), reinterpret_cast<__m512i>(codes),
                                            _mm512_loadu_si512(x));
  const __m512i wide = _mm512_castsi256_si512(_mm256_cvtepi8_epi16(reinterpret_cast<__m128i>(scales)));
  const __m512i part = part_of_lanes<kPart>(unit * (kUnit / kPart));
  const __m512i factors = _mm512_maskz_permutexvar_epi16(0x55555555, part, wide);
  return reinterpret_cast<Words>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sums), fours, factors));
#elif defined(XLATHE_LANES_AVX2)
  const __m256i* at = reinterpret_cast<const __m256i*>(x) + r;
  const __m256i pairs = _mm256_maddubs_epi16(reinterpret_cast<__m256i>(codes), _mm256_loadu_si256(at));
  const int64_t ones = 0x0101010101010101, first = unit * (kUnit / kPart) + r * (32 / kPart), more = kPart == 16;
  const __m128i which = _mm_set_epi64x((first + more) * ones, first * ones);
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(reinterpret_cast<__m128i>(scales), which));
  return sums + reinterpret_cast<Words>(_mm256_madd_epi16(pairs, wide));
#else
  const Lanes::Bytes some = Lanes::load_bytes(x + 16 * r);
  const Words fours = reinterpret_cast<Words>(sums_of_fours(codes, some, Lanes::Bytes{}, Lanes::Bytes{}));
  return sums + fours * static_cast<uint32_t>(static_cast<int32_t>(scales[unit * (kUnit / kPart) + r * 16 / kPart]));
#endif
}

// Eight whole numbers in the lowest of 16 lanes, as floats.
XLATHE_INLINE Lanes::Float lowest(Ints8 eight, int r) {
#if defined(XLATHE_LANES_AVX512)
  return Lanes::from_int(reinterpret_cast<Lanes::Int>(_mm512_zextsi256_si512(reinterpret_cast<__m256i>(eight))));
#else
  int32_t all[16] = {};
  __builtin_memcpy(all, &eight, sizeof eight);
  Lanes::Int lanes;
  __builtin_memcpy(&lanes, all + r * Lanes::kWidth, sizeof lanes);
  return Lanes::from_int(lanes);
#endif
}

// The way of a type of blocks of 256, as `blocks_tile` takes it.
template <typename Of>
struct Rounded {
  using Type = Of;
  using Columns = RoundedBlock;
  static constexpr int kColumns = 256;  // of an entry of x
  static constexpr int kSpan = 8192;

  static void pack(const float* x, int64_t, Columns& packed) {
    int32_t whole[256];
    packed.step = round_block<127, 256>(x, whole);
    for (int i = 0; i < 256; ++i) packed.codes[i] = static_cast<int8_t>(whole[i]);
    for (int i = 0; i < 16; ++i) {
      int32_t sum = 0;
      for (int j = 0; j < 16; ++j) sum += whole[16 * i + j];
      packed.sums[i] = static_cast<int16_t>(sum);
    }
  }

  template <int kM, int kN>
  static XLATHE_INLINE void add(Lanes::Float (&totals)[kM][kN][kBlockRegisters], const Columns* x,
                                const uint8_t* const (&blocks)[kN]) {
    Words sums[kM][kN][kBlockRegisters] = {};
    Steps scales[kN], offsets[kN] = {};
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) Type::steps(blocks[n], scales[n], offsets[n]);
    if constexpr (kM == 1) {  // it pays for one row alone, and costs time to compile
#pragma GCC unroll 4
      for (int unit = 0; unit < 4; ++unit) add_unit<kM, kN>(sums, x, blocks, scales, unit);
    } else {
#pragma GCC unroll 1
      for (int unit = 0; unit < 4; ++unit) add_unit<kM, kN>(sums, x, blocks, scales, unit);
    }
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      const float scale = Type::scale(blocks[n]), offset = Type::kZero ? -Type::kZero * scale : Type::offset(blocks[n]);
      const Shorts16 taken = of_sixteens<Type::kPart>(Type::kZero ? scales[n] : offsets[n]);
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) {
        Shorts16 x_sums;
        __builtin_memcpy(&x_sums, x[m].sums, sizeof x_sums);
        const Ints8 beside = pair_products(taken, x_sums);
#pragma GCC unroll 4
        for (int r = 0; r < kBlockRegisters; ++r) {
          Lanes::Float& total = totals[m][n][r];
          const Lanes::Float exact = Lanes::from_int(reinterpret_cast<Lanes::Int>(sums[m][n][r]));
          total = Lanes::madd(exact, Lanes::all(scale * x[m].step), total);
          if (r * Lanes::kWidth < 8) total = Lanes::madd(lowest(beside, r), Lanes::all(offset * x[m].step), total);
        }
      }
    }
  }

 private:
  template <int kM, int kN>
  static XLATHE_INLINE void add_unit(Words (&sums)[kM][kN][kBlockRegisters], const Columns* x,
                                     const uint8_t* const (&blocks)[kN], const Steps (&scales)[kN], int unit) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      const UnitCodes codes = UnitCodes::load<Type>(blocks[n], unit);
#pragma GCC unroll 4
      for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
        for (int r = 0; r < kBlockRegisters; ++r) {
          Words& sum = sums[m][n][r];
          sum = add_scaled<Type::kPart>(codes.of[r], x[m].codes + unit * kUnit, scales[n], unit, r, sum);
        }
      }
    }
  }
};
