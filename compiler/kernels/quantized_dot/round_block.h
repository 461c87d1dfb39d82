// A block of activations as whole numbers times a step. Included inside foreach_isa.h's namespaces.

// The largest magnitude becomes kLargest, at most 2**23 - 1; ties go to even. Returns the step.
template <int32_t kLargest, int kCount>
inline float round_block(const float* x, int32_t (&whole)[kCount]) {
  uint32_t bits[kCount], largest_bits = 0;  // of magnitudes: NaN is above infinity, and that above all others
  __builtin_memcpy(bits, x, sizeof bits);
  for (int i = 0; i < kCount; ++i) {
    const uint32_t magnitude = bits[i] & 0x7FFFFFFFu;
    largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
  }
  float largest;
  __builtin_memcpy(&largest, &largest_bits, sizeof largest);
  const float inverse = largest > 1e-30f ? kLargest / largest : 0.0f;
  float shifted[kCount];  // by 2**23, where floats are whole numbers and their lowest 23 bits are the magnitude
  for (int i = 0; i < kCount; ++i) shifted[i] = __builtin_fabsf(x[i]) * inverse + 0x1p23f;
  uint32_t shifted_bits[kCount];
  __builtin_memcpy(shifted_bits, shifted, sizeof shifted_bits);
  for (int i = 0; i < kCount; ++i) {
    const int32_t magnitude = static_cast<int32_t>(shifted_bits[i] & 0x7FFFFFu);
    whole[i] = static_cast<int32_t>(bits[i]) < 0 ? -magnitude : magnitude;
  }
  return largest * (1.0f / kLargest);
}
