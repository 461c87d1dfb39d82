// The instruction sets that kernels are compiled for, and the choice among them at run time.
#ifndef XLATHE_KERNELS_ISA_H_
#define XLATHE_KERNELS_ISA_H_

#include <optional>
#include <string_view>

namespace xlathe {

enum class Isa { kAvx512, kAvx2, kNeon, kPortable };

// "avx512", "avx2", "neon" or "portable"; "auto" is the best that this CPU has. Nullopt where it has none
// of that name.
std::optional<Isa> find_isa(std::string_view name);

}  // namespace xlathe

// XLATHE_SELECT(isa, f): the `f` that foreach_isa.h compiled for `isa`.
#if defined(__x86_64__)
#define XLATHE_SELECT(isa, f) \
  ((isa) == Isa::kAvx512 ? avx512::f : (isa) == Isa::kAvx2 ? avx2::f : portable::f)
#elif defined(__aarch64__)
#define XLATHE_SELECT(isa, f) ((isa) == Isa::kNeon ? neon::f : portable::f)
#else
#define XLATHE_SELECT(isa, f) portable::f
#endif

#endif  // XLATHE_KERNELS_ISA_H_
