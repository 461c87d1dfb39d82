// Rows of x, copied into panels that are multiplied together.
#ifndef XLATHE_KERNELS_QUANTIZED_DOT_PANELS_H_
#define XLATHE_KERNELS_QUANTIZED_DOT_PANELS_H_

#include <cstdint>
#include <memory>
#include <new>

namespace xlathe {

// M rows in as few panels of at most `largest` rows as will do, of about the same height.
struct Panels {
  int64_t m, count;

  Panels(int64_t m, int64_t largest) : m(m), count((m + largest - 1) / largest) {}
  int64_t begin(int64_t panel) const { return panel * m / count; }  // begin(count) is M
};

struct FreeAligned {
  void operator()(void* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

// `count` values, not initialized, the first of which begins a cache line: loads of AVX-512 take twice as long where
// they span two.
template <typename T>
std::unique_ptr<T[], FreeAligned> aligned_array(int64_t count) {
  return std::unique_ptr<T[], FreeAligned>(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t{64})));
}

}  // namespace xlathe

#endif  // XLATHE_KERNELS_QUANTIZED_DOT_PANELS_H_
