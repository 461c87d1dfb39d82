// Shapes in messages.
#ifndef XLATHE_KERNELS_SHAPE_H_
#define XLATHE_KERNELS_SHAPE_H_

#include <string>

#include "xla/ffi/api/ffi.h"

namespace xlathe {

// "[2, 3]"
inline std::string shape(xla::ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (int64_t d : dims) text += (text.size() > 1 ? ", " : "") + std::to_string(d);
  return text + "]";
}

}  // namespace xlathe

#endif  // XLATHE_KERNELS_SHAPE_H_
