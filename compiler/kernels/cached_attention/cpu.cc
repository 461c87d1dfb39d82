// cached_attention on CPU: each token reads the slots of its own row that it sees, where they lie in the cache.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

#include "../isa.h"
#include "../parallel.h"
#include "../shape.h"
#include "cache.h"

namespace xlathe {

constexpr int kParts = 16;   // partial sums of a score
constexpr int kBlock = 64;   // positions whose values are summed before they are added to the output
constexpr int kHeads = 8;    // query heads that are worked on together
constexpr int kLines = 32;   // and heads of several tokens
constexpr int64_t kScores = 1 << 18;  // of a tile with more than one token: what a core's cache holds

constexpr int64_t in_parts(int64_t count) { return (count + kParts - 1) / kParts * kParts; }
constexpr int64_t in_blocks(int64_t count) { return (count + kBlock - 1) / kBlock * kBlock; }

// A mask or bias [k | 1, g | 1, n, s].
template <typename T>
struct Term {
  const T* data = nullptr;
  int64_t k_stride = 0, g_stride = 0, n_stride = 0;

  const T* row(int64_t k, int64_t g, int64_t n) const {
    return data == nullptr ? nullptr : data + k * k_stride + g * g_stride + n * n_stride;
  }
};

struct CachedAttention {
  const float* q;  // [n, k, g, keys.width]
  Kept keys, values;
  Slots slots;
  Term<bool> mask;
  Term<float> bias;
  float* out;  // [n, k, g, values.width]
  int64_t n, k, g;
  float scale, softcap;  // softcap 0: none
};

// The positions first <= p < end of a row that a token sees.
struct Seen {
  int64_t row, first, end;
};

// Query heads g0 <= g < g0 + heads of one key-value head, of tokens beside each other at positions beside each other
// of one row. Together they see first <= p < end.
struct Tile {
  int64_t token, tokens, head, g0, heads, first, end;
  const Seen* seen;  // [tokens]
};

struct Scratch {
  float* q;       // [lines, in_parts(keys.width)]
  float* sums;    // [lines, in_parts(values.width)]
  float* copies;  // [kBlock, the larger of both]
  float* scores;  // [lines, whole blocks of positions]
};

}  // namespace xlathe

#define XLATHE_BODY "cached_attention/tile.h"
#include "../foreach_isa.h"

namespace ffi = xla::ffi;

namespace xlathe {
namespace {

// Below this many multiply-adds, waking another thread costs more than it saves.
constexpr int64_t kParallelWork = 1 << 18;

// What a token sees: nothing where its row or position is none of the cache's, as those of padding, or where no page
// holds any of it.
Seen seen_by(int64_t row, int64_t position, const Slots& slots, int64_t window, bool ring) {
  if (row < 0 || row >= slots.r || position < 0) return {0, 0, 0};
  const int64_t reach = ring ? std::min(window == 0 ? slots.s : window, slots.s) : window == 0 ? position + 1 : window;
  const int64_t first = std::max<int64_t>(0, position + 1 - reach);
  const int64_t end = std::max(first, ring ? position + 1 : std::min(position + 1, slots.s));
  bool held = false;
  slots.each_page(row, first, end, [&](int64_t, int64_t, int64_t slot) { held |= slot != kNowhere; });
  return held ? Seen{row, first, end} : Seen{0, 0, 0};
}

// How many tokens from i on one tile takes: those that share most of what they see.
int64_t tokens_of_tile(const std::vector<Seen>& seen, int64_t i, int64_t heads) {
  int64_t count = 1;
  for (; i + count < static_cast<int64_t>(seen.size()); ++count) {
    const Seen &last = seen[i + count - 1], &next = seen[i + count];
    const int64_t lines = (count + 1) * heads;
    if (next.row != last.row || next.end != last.end + 1 || last.first == last.end || next.first == next.end) break;
    if (lines > kLines || lines * in_blocks(next.end - seen[i].first + kBlock) > kScores) break;
  }
  return count;
}

void attend_tile(const CachedAttention& op, const Tile& tile, Isa isa) {
  if (tile.first == tile.end) {
    const int64_t head = (tile.token * op.k + tile.head) * op.g + tile.g0;
    std::fill_n(op.out + head * op.values.width, tile.heads * op.values.width, 0.0f);
    return;
  }
  const int64_t d = in_parts(op.keys.width), e = in_parts(op.values.width), lines = tile.tokens * tile.heads;
  const int64_t copies = kBlock * std::max(d, e), scores = lines * in_blocks(tile.end - tile.first / kBlock * kBlock);
  const std::unique_ptr<float[]> floats(new float[lines * (d + e) + copies + scores]);
  float* sums = floats.get() + lines * d;
  float* rest = sums + lines * e;
  XLATHE_SELECT(isa, attend)(op, tile, {floats.get(), sums, rest, rest + copies});
}

void attend_all(ffi::ThreadPool& pool, const CachedAttention& op, const std::vector<Seen>& seen, Isa isa) {
  const int64_t groups = (op.g + kHeads - 1) / kHeads;
  int64_t work = 0;
  std::vector<Tile> tiles;
  for (int64_t i = 0; i < op.n; i += tiles.back().tokens) {
    const int64_t tokens = tokens_of_tile(seen, i, std::min<int64_t>(kHeads, op.g));
    tiles.push_back({i, tokens, 0, 0, 0, seen[i].first, seen[i + tokens - 1].end, &seen[i]});
    work += tokens * (tiles.back().end - seen[i].first) * op.k * op.g * (op.keys.width + op.values.width);
  }
  const auto item = [&](int64_t i) {
    Tile tile = tiles[i / groups / op.k];
    tile.head = i / groups % op.k;
    tile.g0 = i % groups * kHeads;
    tile.heads = std::min<int64_t>(kHeads, op.g - tile.g0);
    attend_tile(op, tile, isa);
  };
  const int64_t items = static_cast<int64_t>(tiles.size()) * op.k * groups;
  if (work < kParallelWork) {
    for (int64_t i = 0; i < items; ++i) item(i);
  } else {
    parallel_for(pool, items, item);
  }
}

// Whether dims are `expected`; an expected size below 0 is any.
bool fits(ffi::AnyBuffer::Dimensions dims, std::initializer_list<int64_t> expected) {
  return std::equal(dims.begin(), dims.end(), expected.begin(), expected.end(),
                    [](int64_t found, int64_t wanted) { return wanted < 0 || found == wanted; });
}

// A term broadcast over heads through strides of 0; nullopt where it has another shape or dtype.
template <ffi::DataType kDtype, typename T>
std::optional<Term<T>> term(const ffi::RemainingArgs& more, size_t index, const CachedAttention& op) {
  const auto buffer = more.get<ffi::BufferR4<kDtype>>(index);
  if (!buffer) return std::nullopt;
  const auto dims = buffer->dimensions();
  if ((dims[0] != op.k && dims[0] != 1) || (dims[1] != op.g && dims[1] != 1) || dims[2] != op.n ||
      dims[3] != op.slots.s) {
    return std::nullopt;
  }
  const int64_t of_one = op.n * op.slots.s;
  return Term<T>{buffer->typed_data(), dims[0] == 1 ? 0 : dims[1] * of_one, dims[1] == 1 ? 0 : of_one, op.slots.s};
}

// Takes the table, mask, bias and scales from the arguments behind the others into `op`; whether they are as expected.
bool take_more(const ffi::RemainingArgs& more, ffi::AnyBuffer::Dimensions cache, bool masked, bool biased, bool paged,
               CachedAttention& op) {
  const bool codes = op.keys.codes != nullptr;
  const size_t scales = size_t{masked} + size_t{biased}, table = scales + (codes ? 2 : 0);
  if (more.size() != table + size_t{paged}) return false;
  op.slots = {cache[0], cache[1], cache[1]};
  if (paged) {
    const auto pages = more.get<ffi::BufferR2<ffi::S32>>(table);
    if (!pages) return false;
    const auto dims = pages->dimensions();
    op.slots = {dims[0], dims[1] * cache[1], cache[1], pages->typed_data(), cache[0]};
  }
  const auto mask = masked ? term<ffi::PRED, bool>(more, 0, op) : Term<bool>{};
  const auto bias = biased ? term<ffi::F32, float>(more, masked, op) : Term<float>{};
  if (!mask || !bias) return false;
  op.mask = *mask;
  op.bias = *bias;
  for (int i = 0; codes && i < 2; ++i) {
    const auto buffer = more.get<ffi::BufferR3<ffi::F32>>(scales + i);
    if (!buffer || !fits(buffer->dimensions(), {cache[0], cache[1], op.k})) return false;
    (i == 0 ? op.keys : op.values).scales = buffer->typed_data();
  }
  return true;
}

template <ffi::DataType kDtype>
Kept kept(const ffi::BufferR4<kDtype>& buffer, int64_t width) {
  const int64_t stride = buffer.dimensions()[3];
  if constexpr (kDtype == ffi::F32) {
    return {buffer.typed_data(), nullptr, nullptr, stride, width};
  } else {
    return {nullptr, buffer.typed_data(), nullptr, stride, width};
  }
}

template <ffi::DataType kDtype>
ffi::Error cached_attention(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> q, ffi::BufferR4<kDtype> keys,
                            ffi::BufferR4<kDtype> values, ffi::BufferR1<ffi::S32> rows,
                            ffi::BufferR1<ffi::S32> positions, ffi::RemainingArgs more,
                            ffi::ResultBufferR4<ffi::F32> out, float scale, float softcap, int64_t window,
                            std::string_view layout, bool masked, bool biased, std::string_view isa_wanted) {
  const auto x = q.dimensions(), c = keys.dimensions(), v = values.dimensions(), y = out->dimensions();
  CachedAttention op{q.typed_data(), kept(keys, x[3]), kept(values, y[3]), {}, {}, {}, out->typed_data(),
                     x[0], x[1], x[2], scale, softcap};
  if (!fits(c, {-1, -1, op.k, x[3]}) || !fits(v, {c[0], c[1], op.k, -1}) || !fits(y, {op.n, op.k, op.g, -1}) ||
      y[3] > v[3] || rows.dimensions()[0] != op.n || positions.dimensions()[0] != op.n) {
    return ffi::Error::InvalidArgument(
        "cached_attention: expected q [n, k, g, d], keys [r, s, k, d], values [r, s, k, e], rows [n], "
        "positions [n], out [n, k, g, e or less], and paged p, page for r, s; found q " + shape(x) + ", keys " + shape(c) +
        ", values " + shape(v) + ", rows " + shape(rows.dimensions()) + ", positions " +
        shape(positions.dimensions()) + ", out " + shape(y));
  }
  const bool ring = layout == "ring", paged = layout == "paged";
  if ((!ring && !paged && layout != "contiguous") || (ring && (masked || biased))) {
    return ffi::Error::InvalidArgument(
        "cached_attention: expected a layout contiguous, paged, or ring without mask and bias; found " +
        std::string(layout));
  }
  if (window < 0) {
    return ffi::Error::InvalidArgument("cached_attention: expected a window of at least 1, or 0 for none; found " +
                                       std::to_string(window));
  }
  if (!take_more(more, c, masked, biased, paged, op)) {
    return ffi::Error::InvalidArgument(
        "cached_attention: expected terms [k | 1, g | 1, n, s], a bool mask where masked, then a float32 bias where "
        "biased; of codes two float32 scales [r, s, k]; where paged an int32 table [r, c]");
  }
  const std::optional<Isa> isa = find_isa(isa_wanted);
  if (!isa) {
    return ffi::Error::InvalidArgument("cached_attention: this CPU cannot run isa \"" +
                                       std::string(isa_wanted) + "\"");
  }
  std::vector<Seen> seen(op.n);
  for (int64_t i = 0; i < op.n; ++i) {
    seen[i] = seen_by(rows.typed_data()[i], positions.typed_data()[i], op.slots, window, ring);
  }
  attend_all(pool, op, seen, *isa);
  return ffi::Error::Success();
}

template <ffi::DataType kDtype>
auto binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::BufferR4<ffi::F32>>()
      .template Arg<ffi::BufferR4<kDtype>>()
      .template Arg<ffi::BufferR4<kDtype>>()
      .template Arg<ffi::BufferR1<ffi::S32>>()
      .template Arg<ffi::BufferR1<ffi::S32>>()
      .RemainingArgs()
      .template Ret<ffi::BufferR4<ffi::F32>>()
      .template Attr<float>("scale")
      .template Attr<float>("softcap")
      .template Attr<int64_t>("window")
      .template Attr<std::string_view>("layout")
      .template Attr<bool>("masked")
      .template Attr<bool>("biased")
      .template Attr<std::string_view>("isa");
}

}  // namespace
}  // namespace xlathe

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlathe_cached_attention_f32, xlathe::cached_attention<xla::ffi::F32>,
                              xlathe::binding<xla::ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(xlathe_cached_attention_int8, xlathe::cached_attention<xla::ffi::S8>,
                              xlathe::binding<xla::ffi::S8>());
