// Activations packed for the inner loops: a panel [features, T] holds T batch entries side by side.
//
// Each thread packs the panel that it is about to use into a buffer that it keeps, so that the panel is in its cache and
// no fresh pages are touched. Packing makes every row of a panel whole, aligned vectors whatever the strides and the
// batch size (tails are zero), keeps rows that are used together together (a leading dimension that is a power of two
// would fight for few cache sets), and transposes row-major activations on the way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "memory.h"
#include "stream.h"
#include "vector.h"

namespace lottery {

constexpr int64_t kNoPanels = -1;

// A matrix [batch, features]: of any strides, or already in panels, which are as wide as feature_stride.
template <class S>
struct Activation {
  S* data;
  int64_t batch, features;
  int64_t batch_stride, feature_stride;
  int64_t panel_stride = kNoPanels;  // between panels; 0: all in one place, one after another
  int64_t padded = features;  // rows of a panel that may be read: those past `features` are zero

  // Entries p * T and so on: a whole panel, or a part of one.
  template <int T>
  S* panel(int64_t p) const {
    if (panel_stride == kNoPanels) return data + p * T * batch_stride;
    return data + p * T / feature_stride * panel_stride + p * T % feature_stride;
  }

  int64_t count(int64_t p, int width) const { return std::min<int64_t>(width, batch - p * width); }

  // Whether panels of T can be read where they are, `rows` of each.
  template <int T>
  bool in_place(int64_t rows) const {
    const bool panels = panel_stride != kNoPanels || (batch_stride == 1 && feature_stride == T);
    return panels && batch % T == 0 && padded >= rows;
  }
};

template <class S>
Activation<const S> reading(const Activation<S>& x) {
  return {x.data, x.batch, x.features, x.batch_stride, x.feature_stride, x.panel_stride, x.padded};
}

// Copies features [f0, f1) of panel p to `to + f * T`; entries past the batch become zero.
template <class S, int T>
inline void pack(const Activation<const S>& x, int64_t p, int64_t f0, int64_t f1, S* to) {
  constexpr int L = kLanes<S>;
  const int64_t count = x.count(p, T);
  const S* source = x.template panel<T>(p);
  if (x.batch_stride == 1) {
    for (int64_t f = f0; f < f1; ++f) {
      const S* from = source + f * x.feature_stride;
      for (int t = 0; t < T; t += L) {
        const int64_t left = count - t;
        store(to + f * T + t, left >= L ? load(from + t) : left > 0 ? load_part(from + t, left) : Vec<S>{});
        __builtin_prefetch(from + 4 * x.feature_stride + t);
      }
    }
    return;
  }
  int64_t f = f0;
  if (x.feature_stride == 1) {
    for (; f + L <= f1; f += L) {
      for (int t = 0; t < T; t += L) {
        const S* from = source + t * x.batch_stride + f;
        Vec<S> rows[L];
        if (t + L <= count) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) {
            rows[i] = load(from + i * x.batch_stride);
            __builtin_prefetch(from + i * x.batch_stride + 2 * L);  // rows are too many for the hardware to see
          }
        } else {
          for (int i = 0; i < L; ++i) rows[i] = t + i < count ? load(from + i * x.batch_stride) : Vec<S>{};
        }
        transpose<S>(rows);
        for (int i = 0; i < L; ++i) store(to + (f + i) * T + t, rows[i]);
      }
    }
  }
  for (; f < f1; ++f)
    for (int t = 0; t < T; ++t) to[f * T + t] = t < count ? source[t * x.batch_stride + f * x.feature_stride] : S(0);
}

// Writes `count` entries of a row, if any, where they do not lie side by side.
template <class S>
[[gnu::noinline]] void scatter(const S* row, int64_t count, int64_t stride, S* to) {
  for (int64_t t = 0; t < count; ++t) to[t * stride] = row[t];
}

// Writes vectors [v, v + V) of one feature of panel p of an activation, which had better be batch-innermost; entries past
// the batch fall away. Whole rows go past the caches if `streams`: their vectors are aligned.
// Always inlined, as is what calls it: through a pointer `part` would lie in memory.
template <class S, int T, int V>
[[gnu::always_inline]] inline void write_row(const Activation<S>& y, int64_t p, int64_t f, int v, const Vec<S>* part,
                                             bool streams = false) {
  constexpr int L = kLanes<S>;
  S* to = y.template panel<T>(p) + f * y.feature_stride + v * L * y.batch_stride;
  const int64_t count = y.count(p, T) - v * L;
  if (y.batch_stride == 1 && count >= V * L) {
    for (int i = 0; i < V; ++i) streams ? stream(to + i * L, part[i]) : store(to + i * L, part[i]);
  } else if (y.batch_stride == 1) {
    for (int i = 0; i < V; ++i, to += L) {
      const int64_t left = count - i * L;
      if (left >= L) store(to, part[i]);
      else if (left > 0) store_part(to, part[i], left);
    }
  } else {
    S row[V * L];
    for (int i = 0; i < V; ++i) store(row + i * L, part[i]);
    scatter(row, std::min<int64_t>(count, V * L), y.batch_stride, to);
  }
}

// Asks for the lines that write_row will write.
template <class S, int T>
inline void prefetch_row(const Activation<S>& y, int64_t p, int64_t f) {
  if (y.batch_stride != 1 || f >= y.features) return;
  const S* to = y.template panel<T>(p) + f * y.feature_stride;
  for (int t = 0; t < T; t += kLanes<S>) prefetch_to_write(to + t);
}

// The panels of an activation, one at a time, with `padded >= x.features` features: those beyond are zero. With
// `relu`, the output of a ReLU, they are the gradient behind it. With `used`, where the live blocks of each block of
// features begin, those of no live block may hold anything.
template <class S, int T>
class Panels {
 public:
  Panels(const Activation<const S>& x, int64_t padded, const Activation<const S>* relu = nullptr)
      : x_(x), relu_(relu), padded_(padded) {}
  Panels(const Activation<const S>& x, const int32_t* used, int64_t blocks, int64_t block)
      : x_(x), relu_(nullptr), padded_(blocks * block), used_(used), block_(block) {}

  int64_t count() const { return (x_.batch + T - 1) / T; }

  // Between rows of a panel.
  int64_t stride() const { return in_place() ? x_.feature_stride : T; }

  // Valid until the next call in this thread.
  const S* operator[](int64_t p) const {
    if (in_place()) return x_.template panel<T>(p);
    thread_local Scratch<S> buffer;  // its rows are whole cache lines: a load across two would take twice as long
    S* panel = buffer.at_least(padded_ * T);
    for (int64_t f = 0; f < x_.features; f += kAhead) {
      const int64_t last = std::min(f + kAhead, x_.features);
      const bool dead = used_ && used_[f / block_] == used_[(last - 1) / block_ + 1];
      if (!dead) pack<S, T>(x_, p, f, last, panel);
    }
    std::memset(panel + x_.features * T, 0, (padded_ - x_.features) * T * sizeof(S));
    if (relu_) through_relu(p, panel);
    return panel;
  }

 private:
  static constexpr int kAhead = kLanes<S>;  // a transpose takes so many features at once

  bool in_place() const { return !relu_ && x_.template in_place<T>(padded_); }

  void through_relu(int64_t p, S* panel) const {
    alignas(kVectorBytes) S rows[kAhead * T];
    for (int64_t f = 0; f < x_.features; f += kAhead) {
      const int64_t last = std::min(f + kAhead, x_.features);
      pack<S, T>(*relu_, p, f, last, rows - f * T);
      for (int64_t i = 0; i < (last - f) * T; i += kLanes<S>) {
        S* at = panel + f * T + i;
        store(at, relu_gradient<S>(load(rows + i), load(at)));
      }
    }
  }

  Activation<const S> x_;
  const Activation<const S>* relu_;
  int64_t padded_;
  const int32_t* used_ = nullptr;
  int64_t block_ = 1;
};

}  // namespace lottery
