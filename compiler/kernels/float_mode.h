// Floats as IEEE 754 has them on the thread of a kernel: XLA has its threads take denormal numbers for zero.
#ifndef XLATHE_KERNELS_FLOAT_MODE_H_
#define XLATHE_KERNELS_FLOAT_MODE_H_

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace xlathe {

// While it lives, numbers are rounded to nearest even and denormal ones are kept.
class ExactFloats {
 public:
#if defined(__x86_64__)
  ExactFloats() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // no exceptions, no other bits
  ~ExactFloats() { _mm_setcsr(before_); }
#elif defined(__aarch64__)
  ExactFloats() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~ExactFloats() { asm volatile("msr fpcr, %0" : : "r"(before_)); }
#endif
  ExactFloats(const ExactFloats&) = delete;
  ExactFloats& operator=(const ExactFloats&) = delete;

 private:
#if defined(__x86_64__)
  uint32_t before_;
#elif defined(__aarch64__)
  uint64_t before_;
#endif
};

}  // namespace xlathe

#endif  // XLATHE_KERNELS_FLOAT_MODE_H_
