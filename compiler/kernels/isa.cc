#include "isa.h"

#include <string>
#include <utility>
#include <vector>

namespace xlathe {
namespace {

using Named = std::pair<std::string_view, Isa>;

// What this CPU has, best first.
const std::vector<Named>& available() {
  static const std::vector<Named> isas = [] {
    std::vector<Named> found;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vnni")) {
      found.emplace_back("avx512", Isa::kAvx512);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      found.emplace_back("avx2", Isa::kAvx2);
    }
#elif defined(__aarch64__)
    found.emplace_back("neon", Isa::kNeon);
#endif
    found.emplace_back("portable", Isa::kPortable);
    return found;
  }();
  return isas;
}

}  // namespace

std::optional<Isa> find_isa(std::string_view name) {
  if (name == "auto") return available().front().second;
  for (const auto& [known, isa] : available()) {
    if (known == name) return isa;
  }
  return std::nullopt;
}

}  // namespace xlathe

// The names of what this CPU has, best first, separated by spaces.
extern "C" const char* xlathe_available_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const auto& [name, isa] : xlathe::available()) joined.append(joined.empty() ? "" : " ").append(name);
    return joined;
  }();
  return names.c_str();
}
