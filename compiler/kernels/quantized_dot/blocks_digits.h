// Products of blocks with activations as digits. Included inside foreach_isa.h's namespaces.
//
// A block of 32 columns of x is held as whole numbers and their step: of 8 bits, which are one digit, or of 24 (with
// Q8_0 22) in three digits. Of each 64 columns, 16 lanes hold 4 successive ones: what a lane adds up to, the sum of
// (code - zero) * x, is exact in 32 bits. Rounded to a float it is multiplied by (scale * step) and added to the lane's
// total; then comes the offset times the lane's sum of x.

// 64 columns of one row of x. Number i is the one whose digits are digits[0][i], ..., the highest first.
template <int kDigits>
struct alignas(64) DigitColumns {
  int8_t digits[kDigits][kUnit];
  int32_t zeros[16];   // the sum of a lane's numbers times a type's zero
  float weighted[16];  // that sum times the step
  float step[16];      // of a lane
};

// x as digits: those of signed codes are at most 127, since AVX2 multiplies magnitudes and moves signs; sums of four
// products with them have 2**31 in reach, so that 22 bits are left for x.
template <typename Type, int kDigits>
struct DigitsOf {
  static constexpr int32_t kBase = Type::kSigned ? 255 : 256;
  static constexpr int32_t kLargest = kDigits == 1 ? 127 : Type::kSigned ? 64 * 255 * 255 : 127 * 65536;

  // Takes the lowest digit off a number.
  static XLATHE_INLINE int8_t take(int32_t& whole) {
    if (kDigits == 1) return static_cast<int8_t>(whole);
    if (kBase == 256) {
      const int8_t digit = static_cast<int8_t>(whole);
      whole = (whole - digit) >> 8;
      return digit;
    }
    const int32_t rest = (whole + 127 + (1 << 14) * kBase * 2) / kBase - (1 << 15);
    const int8_t digit = static_cast<int8_t>(whole - rest * kBase);
    whole = rest;
    return digit;
  }

  static XLATHE_INLINE Words raise(Words sums) { return kBase == 256 ? sums << 8 : (sums << 8) - sums; }
};

// What is taken from sums of products beside a type's own zero: AVX-512 multiplies unsigned codes with signed ones.
template <typename Type>
constexpr int32_t zero_of() {
#if defined(XLATHE_LANES_AVX512)
  return Type::kSigned ? 128 : Type::kZero;
#else
  return Type::kZero;
#endif
}

// Makes the block-th 32 columns of `packed` of as many floats.
template <typename Type, int kDigits>
XLATHE_INLINE void pack_digits(const float* x, int64_t block, DigitColumns<kDigits>& packed) {
  using Of = DigitsOf<Type, kDigits>;
  int32_t whole[32];
  const float step = round_block<Of::kLargest, 32>(x, whole);
  for (int lane = 0; lane < 8; ++lane) {
    const int32_t sum = (whole[4 * lane] + whole[4 * lane + 1]) + (whole[4 * lane + 2] + whole[4 * lane + 3]);
    packed.zeros[8 * block + lane] = sum * zero_of<Type>();
    packed.step[8 * block + lane] = step;
    packed.weighted[8 * block + lane] = static_cast<float>(sum) * step;
  }
  for (int digit = kDigits - 1; digit >= 0; --digit) {
    for (int i = 0; i < 32; ++i) packed.digits[digit][32 * block + i] = Of::take(whole[i]);
  }
}

// sums + codes * x, four bytes to each.
template <bool kSigned>
XLATHE_INLINE Words add_fours(Lanes::Bytes codes, Lanes::Bytes x, Words sums) {
#if defined(XLATHE_LANES_AVX512)
  const Lanes::Bytes positive = kSigned ? codes ^ (Lanes::Bytes{} + 128) : codes;
  return reinterpret_cast<Words>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sums), reinterpret_cast<__m512i>(positive), reinterpret_cast<__m512i>(x)));
#elif defined(XLATHE_LANES_AVX2)
  __m256i a = reinterpret_cast<__m256i>(codes), b = reinterpret_cast<__m256i>(x);
  if (kSigned) {
    b = _mm256_sign_epi8(b, a);
    a = _mm256_abs_epi8(a);
  }
  const __m256i fours = _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1));
  return sums + reinterpret_cast<Words>(fours);
#else
  return sums + reinterpret_cast<Words>(sums_of_fours(codes, x, Lanes::Bytes{}, Lanes::Bytes{}));
#endif
}

// Scales of a step's columns, and what is taken from the codes of each part: of the 64 columns from that of `part` on
// those of register r's lanes.
template <typename Type>
struct StepScales {
#if defined(XLATHE_LANES_AVX512)
  __m512 factors, offsets;

  XLATHE_INLINE void load(const uint8_t* block) {
    if constexpr (Type::kColumns == kUnit) {
      factors = first_halves(block, block + Type::kBytes / 2);
    } else {
      Steps of_scales, of_offsets;
      Type::steps(block, of_scales, of_offsets);
      factors = times(of_scales, Type::scale(block));
      if (Type::kOffsets) offsets = times(of_offsets, Type::offset(block));
    }
  }
  XLATHE_INLINE Lanes::Float factor(int part, int) const {
    return _mm512_permutexvar_ps(part_of_lanes<Type::kPart>(part), factors);
  }
  XLATHE_INLINE Lanes::Float offset(int part, int) const {
    return _mm512_permutexvar_ps(part_of_lanes<Type::kPart>(part), offsets);
  }
#else
  static constexpr int kParts = Type::kColumns / Type::kPart;
  float factors[kParts], offsets[Type::kOffsets ? kParts : 1];

  XLATHE_INLINE void load(const uint8_t* block) { Type::scales(block, factors, offsets); }
  XLATHE_INLINE Lanes::Float factor(int part, int r) const { return lanes_of(factors + part, r); }
  XLATHE_INLINE Lanes::Float offset(int part, int r) const { return lanes_of(offsets + part, r); }

 private:
  static XLATHE_INLINE Lanes::Float lanes_of(const float* parts, int r) {
    if (Type::kPart == 32) return Lanes::all(parts[r * Lanes::kWidth / 8]);
    Four four;
    __builtin_memcpy(&four, parts, sizeof four);
    return Lanes::spread(four, r);
  }
#endif
};

// totals[m][n] += the products of 64 columns of kM rows of x and kN of the weight.
template <typename Type, int kDigits, int kM, int kN>
XLATHE_INLINE void unit_accumulate(Lanes::Float (&totals)[kM][kN][kBlockRegisters], const DigitColumns<kDigits>* x,
                                   const uint8_t* const (&blocks)[kN], const StepScales<Type> (&scales)[kN], int unit) {
  const int part = unit * (kUnit / Type::kPart);
  UnitCodes codes[kN];
#pragma GCC unroll 4
  for (int n = 0; n < kN; ++n) codes[n] = UnitCodes::load<Type>(blocks[n], unit);
#pragma GCC unroll 4
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < kBlockRegisters; ++r) {
      Words whole[kN] = {}, zeros;
#pragma GCC unroll 4
      for (int digit = 0; digit < kDigits; ++digit) {
        const Lanes::Bytes digits = Lanes::load_bytes(x[m].digits[digit] + r * sizeof(Lanes::Bytes));
#pragma GCC unroll 4
        for (int n = 0; n < kN; ++n) {
          if (digit > 0) whole[n] = DigitsOf<Type, kDigits>::raise(whole[n]);
          whole[n] = add_fours<Type::kSigned>(codes[n].of[r], digits, whole[n]);
        }
      }
      __builtin_memcpy(&zeros, x[m].zeros + r * Lanes::kWidth, sizeof zeros);
      const Lanes::Float x_steps = Lanes::load(x[m].step + r * Lanes::kWidth);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) {
        if (zero_of<Type>() != 0) whole[n] -= zeros;
        const Lanes::Float factor = scales[n].factor(part, r) * x_steps;
        const Lanes::Float exact = Lanes::from_int(reinterpret_cast<Lanes::Int>(whole[n]));
        totals[m][n][r] = Lanes::madd(exact, factor, totals[m][n][r]);
        if (Type::kOffsets) {
          const Lanes::Float offset = scales[n].offset(part, r);
          const Lanes::Float weighted = Lanes::load(x[m].weighted + r * Lanes::kWidth);
          totals[m][n][r] = Lanes::madd(weighted, offset, totals[m][n][r]);
        }
      }
    }
  }
}

// The way of a type with so many digits, as `blocks_tile` takes it.
template <typename Of, int kDigits>
struct Digits {
  using Type = Of;
  using Columns = DigitColumns<kDigits>;
  static constexpr int kColumns = kUnit;  // of an entry of x
  static constexpr int kSpan = kDigits == 1 ? 4096 : 2048;

  static void pack(const float* x, int64_t columns, Columns& packed) {
    if (columns < kUnit) __builtin_memset(&packed, 0, sizeof packed);
    for (int64_t block = 0; block < columns / 32; ++block) {
      pack_digits<Type, kDigits>(x + 32 * block, block, packed);
    }
  }

  // totals[m][n] += the products of Type::kColumns columns.
  template <int kM, int kN>
  static XLATHE_INLINE void add(Lanes::Float (&totals)[kM][kN][kBlockRegisters], const Columns* x,
                                const uint8_t* const (&blocks)[kN]) {
    constexpr int kUnits = Type::kColumns / kUnit;
    StepScales<Type> scales[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) scales[n].load(blocks[n]);
    if constexpr (kM == 1) {  // it pays for one row alone, and costs time to compile
#pragma GCC unroll 4
      for (int unit = 0; unit < kUnits; ++unit) {
        unit_accumulate<Type, kDigits, kM, kN>(totals, x + unit * kM, blocks, scales, unit);
      }
    } else {
#pragma GCC unroll 1
      for (int unit = 0; unit < kUnits; ++unit) {
        unit_accumulate<Type, kDigits, kM, kN>(totals, x + unit * kM, blocks, scales, unit);
      }
    }
  }
};
