// cached_attention on CPU: each token reads the slots of its own row that it sees, where they lie in the cache.

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

#include "../isa.h"
#include "../parallel.h"
#include "../shape.h"

namespace xlathe {

constexpr int kParts = 16;   // partial sums of a score
constexpr int kBlock = 64;   // slots whose values are summed before they are added to the output
constexpr int kHeads = 8;    // query heads that are worked on together

constexpr int64_t in_parts(int64_t count) { return (count + kParts - 1) / kParts * kParts; }

// A mask or bias [k | 1, g | 1, n, s].
template <typename T>
struct Term {
  const T* data = nullptr;
  int64_t k_stride = 0, g_stride = 0, n_stride = 0;

  const T* row(int64_t k, int64_t g, int64_t n, int64_t slot) const {
    return data == nullptr ? nullptr : data + k * k_stride + g * g_stride + n * n_stride + slot;
  }
};

struct CachedAttention {
  const float* q;       // [n, k, g, d]
  const float* keys;    // [r, s, k, d]
  const float* values;  // [r, s, k, e]
  Term<bool> mask;
  Term<float> bias;
  float* out;  // [n, k, g, e]
  int64_t n, r, s, k, g, d, e;
  float scale, softcap;  // softcap 0: none
};

// Query heads g0 <= g < g0 + count of one token and key-value head, and the slots first <= slot < end they see.
struct Heads {
  int64_t token, kv_head, g0, count, row, first, end;
};

struct Scratch {
  float* q;       // [kHeads, in_parts(d)]
  float* sums;    // [kHeads, in_parts(e)]
  float* block;   // [kBlock, the larger of both]
  float* scores;  // [kHeads, in_parts(s)]
};

}  // namespace xlathe

#define XLATHE_BODY "cached_attention/heads.h"
#include "../foreach_isa.h"

namespace ffi = xla::ffi;

namespace xlathe {
namespace {

// Below this many multiply-adds, waking another thread costs more than it saves.
constexpr int64_t kParallelWork = 1 << 18;

struct Slots {
  int64_t row, first, end;
};

// What a token sees. Nothing where its row or position is none of the cache's, as those of padding.
Slots seen(int64_t row, int64_t position, const CachedAttention& op, int64_t window) {
  if (row < 0 || row >= op.r || position < 0) return {0, 0, 0};
  const int64_t first = window == 0 ? 0 : std::max<int64_t>(0, position - window + 1);
  return {row, first, std::max(first, std::min(position + 1, op.s))};
}

void attend_heads(const CachedAttention& op, const Heads& heads, Isa isa) {
  if (heads.first == heads.end) {
    const int64_t head = (heads.token * op.k + heads.kv_head) * op.g + heads.g0;
    std::fill_n(op.out + head * op.e, heads.count * op.e, 0.0f);
    return;
  }
  const int64_t d = in_parts(op.d), e = in_parts(op.e), wide = kBlock * std::max(d, e);
  std::vector<float> floats(kHeads * (d + e + in_parts(heads.end - heads.first)) + wide);
  float* sums = floats.data() + kHeads * d;
  float* block = sums + kHeads * e;
  XLATHE_SELECT(isa, attend)(op, heads, {floats.data(), sums, block, block + wide});
}

// A term broadcast over heads through strides of 0; nullopt where it has another shape or dtype.
template <ffi::DataType kDtype, typename T>
std::optional<Term<T>> term(const ffi::RemainingArgs& terms, size_t index, const CachedAttention& op) {
  const auto buffer = terms.get<ffi::BufferR4<kDtype>>(index);
  if (!buffer) return std::nullopt;
  const auto dims = buffer->dimensions();
  if ((dims[0] != op.k && dims[0] != 1) || (dims[1] != op.g && dims[1] != 1) || dims[2] != op.n ||
      dims[3] != op.s) {
    return std::nullopt;
  }
  const int64_t of_one = op.n * op.s;
  return Term<T>{buffer->typed_data(), dims[0] == 1 ? 0 : dims[1] * of_one, dims[1] == 1 ? 0 : of_one, op.s};
}

ffi::Error cached_attention_f32(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> q, ffi::BufferR4<ffi::F32> keys,
                                ffi::BufferR4<ffi::F32> values, ffi::BufferR1<ffi::S32> rows,
                                ffi::BufferR1<ffi::S32> positions, ffi::RemainingArgs terms,
                                ffi::ResultBufferR4<ffi::F32> out, float scale, float softcap, int64_t window,
                                bool masked, bool biased, std::string_view isa_wanted) {
  const auto x = q.dimensions(), c = keys.dimensions(), v = values.dimensions(), y = out->dimensions();
  CachedAttention op{q.typed_data(), keys.typed_data(), values.typed_data(), {}, {}, out->typed_data(),
                     x[0], c[0], c[1], x[1], x[2], x[3], v[3], scale, softcap};
  if (c[2] != op.k || c[3] != op.d || v[0] != op.r || v[1] != op.s || v[2] != op.k || y[0] != op.n ||
      y[1] != op.k || y[2] != op.g || y[3] != op.e || rows.dimensions()[0] != op.n ||
      positions.dimensions()[0] != op.n) {
    return ffi::Error::InvalidArgument(
        "cached_attention: expected q [n, k, g, d], keys [r, s, k, d], values [r, s, k, e], rows [n], "
        "positions [n], out [n, k, g, e]; found q " + shape(x) + ", keys " + shape(c) + ", values " + shape(v) +
        ", rows " + shape(rows.dimensions()) + ", positions " + shape(positions.dimensions()) + ", out " +
        shape(y));
  }
  if (window < 0) {
    return ffi::Error::InvalidArgument("cached_attention: expected a window of at least 1, or 0 for none; found " +
                                       std::to_string(window));
  }
  const auto mask = masked ? term<ffi::PRED, bool>(terms, 0, op) : Term<bool>{};
  const auto bias = biased ? term<ffi::F32, float>(terms, masked, op) : Term<float>{};
  if (terms.size() != size_t{masked} + size_t{biased} || !mask || !bias) {
    return ffi::Error::InvalidArgument(
        "cached_attention: expected terms [k | 1, g | 1, n, s]: a bool mask where masked, then a float32 bias "
        "where biased");
  }
  op.mask = *mask;
  op.bias = *bias;
  const std::optional<Isa> isa = find_isa(isa_wanted);
  if (!isa) {
    return ffi::Error::InvalidArgument("cached_attention: this CPU cannot run isa \"" +
                                       std::string(isa_wanted) + "\"");
  }

  std::vector<Slots> slots(op.n);
  int64_t work = 0;
  for (int64_t i = 0; i < op.n; ++i) {
    slots[i] = seen(rows.typed_data()[i], positions.typed_data()[i], op, window);
    work += (slots[i].end - slots[i].first) * op.k * op.g * (op.d + op.e);
  }
  const int64_t groups = (op.g + kHeads - 1) / kHeads;
  const auto item = [&](int64_t i) {
    const int64_t g0 = i % groups * kHeads, kv_head = i / groups % op.k, token = i / groups / op.k;
    const auto [row, first, end] = slots[token];
    attend_heads(op, {token, kv_head, g0, std::min<int64_t>(kHeads, op.g - g0), row, first, end}, *isa);
  };
  const int64_t items = op.n * op.k * groups;
  if (work < kParallelWork) {
    for (int64_t i = 0; i < items; ++i) item(i);
  } else {
    parallel_for(pool, items, item);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace xlathe

XLA_FFI_DEFINE_HANDLER_SYMBOL(xlathe_cached_attention_f32, xlathe::cached_attention_f32,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR4<ffi::F32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::BufferR4<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<bool>("masked")
                                  .Attr<bool>("biased")
                                  .Attr<std::string_view>("isa"));
