// A cache as it is kept, and where in it a position of a row lies.
#ifndef XLATHE_KERNELS_CACHED_ATTENTION_CACHE_H_
#define XLATHE_KERNELS_CACHED_ATTENTION_CACHE_H_

#include <cstdint>

namespace xlathe {

constexpr int64_t kNowhere = -1;

// Keys or values: numbers, or codes of 8 bits and what they are multiplied by.
struct Kept {
  const float* floats;  // [slots, k, stride], or nullptr
  const int8_t* codes;  // [slots, k, stride], or nullptr
  const float* scales;  // [slots, k], of codes
  int64_t stride, width;  // width: how many features of a head count, the first ones
};

// The slots of r rows, s a row. They are pages of a pool that a table names; without a table the row is its one page,
// which holds the positions from `page` on again: a ring.
struct Slots {
  int64_t r, s, page;
  const int32_t* table = nullptr;  // [r, s / page]
  int64_t pages = 0;               // of the pool

  // The first slot of the page that position `page * index` of a row lies in; kNowhere where the pool has no such page.
  int64_t start(int64_t row, int64_t index) const {
    if (table == nullptr) return row * s;
    const int64_t entry = table[row * (s / page) + index];
    return entry < 0 || entry >= pages ? kNowhere : entry * page;
  }

  // Calls visit(first, end, slot of first or kNowhere) for the positions of each page between `first` and `end`.
  template <typename Visit>
  void each_page(int64_t row, int64_t first, int64_t end, const Visit& visit) const {
    while (first < end) {
      const int64_t index = first / page, rest = first - index * page, left = page - rest;
      const int64_t stop = end - first < left ? end : first + left, at = start(row, index);
      visit(first, stop, at == kNowhere ? kNowhere : at + rest);
      first = stop;
    }
  }
};

}  // namespace xlathe

#endif  // XLATHE_KERNELS_CACHED_ATTENTION_CACHE_H_
