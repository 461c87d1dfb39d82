// A product with a weight in the packed blocks of GGUF files, as its kernel reads it.
#ifndef XLATHE_KERNELS_QUANTIZED_DOT_BLOCKS_H_
#define XLATHE_KERNELS_QUANTIZED_DOT_BLOCKS_H_

#include <cstdint>
#include <optional>
#include <string_view>

namespace xlathe {

constexpr int kUnit = 64;  // columns that 16 lanes of 4 hold

struct BlocksDot {
  const void* x;  // as the kernel's `pack` leaves it, x_width entries a row
  int64_t x_width;
  const uint8_t* weight;  // [N, bytes of a row]
  int64_t row;            // bytes of a row
  float* y;               // [M, N]
  int64_t m, n, k;
};

// The arithmetic of a type of blocks, and how it takes x: `entry` bytes for so many columns.
struct BlocksKernel {
  int64_t entry, columns;
  void (*pack)(const float* x, int64_t rows, int64_t k, void* packed);
  void (*rows)(const BlocksDot& op, int64_t n0, int64_t n1);
};

enum class BlockType { kQ4_0, kQ8_0, kQ4_K, kQ5_K, kQ6_K };

struct BlockSize {
  BlockType type;
  int64_t columns, bytes;
};

// The type of a name as GGUF has it; nullopt where no kernel reads it.
inline std::optional<BlockSize> find_block_type(std::string_view name) {
  if (name == "Q4_0") return BlockSize{BlockType::kQ4_0, 32, 18};
  if (name == "Q8_0") return BlockSize{BlockType::kQ8_0, 32, 34};
  if (name == "Q4_K") return BlockSize{BlockType::kQ4_K, 256, 144};
  if (name == "Q5_K") return BlockSize{BlockType::kQ5_K, 256, 176};
  if (name == "Q6_K") return BlockSize{BlockType::kQ6_K, 256, 210};
  return std::nullopt;
}

}  // namespace xlathe

#endif  // XLATHE_KERNELS_QUANTIZED_DOT_BLOCKS_H_
