// Compiles the file named by XLATHE_BODY once for every instruction set of this architecture.
//
// Meant to be included more than once, so it has no include guard. Each copy of the body lies in a
// namespace of its own (xlathe::avx2, ...) beside a type `Lanes` (lanes.h), and the compiler may use that
// instruction set there and nowhere else. The body must include nothing and must not call inline
// functions of the standard library: the linker could keep their copy compiled for the wrong CPU.

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define XLATHE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define XLATHE_TARGET_BEGIN(isa) \
  XLATHE_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define XLATHE_TARGET_END XLATHE_PRAGMA(clang attribute pop)
#else
#define XLATHE_TARGET_BEGIN(isa) XLATHE_PRAGMA(GCC push_options) XLATHE_PRAGMA(GCC target(isa))
#define XLATHE_TARGET_END XLATHE_PRAGMA(GCC pop_options)
#endif

#if defined(__x86_64__)

XLATHE_TARGET_BEGIN("avx512f,avx512bw,avx512vnni,f16c")
namespace xlathe::avx512 {
#define XLATHE_LANES_AVX512
#include "lanes.h"
#include XLATHE_BODY
#undef XLATHE_LANES_AVX512
}  // namespace xlathe::avx512
XLATHE_TARGET_END

XLATHE_TARGET_BEGIN("avx2,fma,f16c")
namespace xlathe::avx2 {
#define XLATHE_LANES_AVX2
#include "lanes.h"
#include XLATHE_BODY
#undef XLATHE_LANES_AVX2
}  // namespace xlathe::avx2
XLATHE_TARGET_END

#elif defined(__aarch64__)

namespace xlathe::neon {
#define XLATHE_LANES_NEON
#include "lanes.h"
#include XLATHE_BODY
#undef XLATHE_LANES_NEON
}  // namespace xlathe::neon

#endif

namespace xlathe::portable {
#include "lanes.h"
#include XLATHE_BODY
}  // namespace xlathe::portable

#undef XLATHE_BODY
#undef XLATHE_PRAGMA
#undef XLATHE_TARGET_BEGIN
#undef XLATHE_TARGET_END
