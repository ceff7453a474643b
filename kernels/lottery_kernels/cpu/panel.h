// Activations packed for the inner loops: a panel [features, T] holds T batch entries side by side.
//
// Each thread packs the panel that it is about to use into a buffer that it keeps, so that the panel is in its cache and
// no fresh pages are touched. Packing makes every row of a panel whole, aligned vectors whatever the strides and the batch size (tails are zero),
// keeps rows that are used together together (a leading dimension that is a power of two would fight for few cache
// sets), and transposes row-major activations on the way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vector.h"

namespace lottery {

// A matrix [batch, features] of any strides.
template <class S>
struct Activation {
  S* data;
  int64_t batch, features;
  int64_t batch_stride, feature_stride;
};

// Copies features [f0, f1) of batch entries [n0, n0 + T) to `panel + f * T`; entries past the batch become zero.
template <class S, int T>
inline void pack(const Activation<const S>& x, int64_t n0, int64_t f0, int64_t f1, S* panel) {
  const int64_t count = std::min<int64_t>(T, x.batch - n0);
  const S* source = x.data + n0 * x.batch_stride;
  if (x.batch_stride == 1) {
    for (int64_t f = f0; f < f1; ++f) {
      S* to = panel + f * T;
      const S* from = source + f * x.feature_stride;
      if (count == T) {
        std::memcpy(to, from, T * sizeof(S));
      } else {
        std::memcpy(to, from, count * sizeof(S));
        std::memset(to + count, 0, (T - count) * sizeof(S));
      }
    }
    return;
  }
  int64_t f = f0;
  if (x.feature_stride == 1) {
    constexpr int L = kLanes<S>;
    for (; f + L <= f1; f += L) {
      for (int t = 0; t < T; t += L) {
        Vec<S> rows[L];
        for (int i = 0; i < L; ++i)
          rows[i] = t + i < count ? load(source + (t + i) * x.batch_stride + f) : Vec<S>{};
        transpose<S>(rows);
        for (int i = 0; i < L; ++i) store(panel + (f + i) * T + t, rows[i]);
      }
    }
  }
  for (; f < f1; ++f)
    for (int t = 0; t < T; ++t)
      panel[f * T + t] = t < count ? source[t * x.batch_stride + f * x.feature_stride] : S(0);
}

// Writes T batch entries, starting at n0, of one feature of a batch-innermost activation; those past the batch fall away.
template <class S, int T>
inline void write_row(const Activation<S>& y, int64_t n0, int64_t f, const Vec<S>* row) {
  S* to = y.data + f * y.feature_stride + n0;
  const int64_t count = std::min<int64_t>(T, y.batch - n0);
  if (count == T) {
    for (int v = 0; v < T / kLanes<S>; ++v) store(to + v * kLanes<S>, row[v]);
  } else {
    std::memcpy(to, row, count * sizeof(S));
  }
}

// The panels of an activation, one at a time, with `padded >= x.features` features: those beyond are zero.
template <class S, int T>
class Panels {
 public:
  Panels(const Activation<const S>& x, int64_t padded) : x_(x), padded_(padded) {}

  int64_t count() const { return (x_.batch + T - 1) / T; }

  // Valid until the next call in this thread.
  const S* operator[](int64_t p) const {
    if (x_.batch_stride == 1 && x_.feature_stride == T && x_.features == padded_ && x_.batch == T) return x_.data;
    thread_local std::vector<S> buffer;
    if (int64_t(buffer.size()) < padded_ * T) buffer.resize(padded_ * T);
    pack<S, T>(x_, p * T, 0, x_.features, buffer.data());
    std::memset(buffer.data() + x_.features * T, 0, (padded_ - x_.features) * T * sizeof(S));
    return buffer.data();
  }

 private:
  Activation<const S> x_;
  int64_t padded_;
};

}  // namespace lottery
