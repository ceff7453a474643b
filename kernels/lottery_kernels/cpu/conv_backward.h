// One thread's share of a convolution's backward pass.
#pragma once

#include <cstring>
#include <vector>

#include "conv_pass.h"
#include "conv_weight.h"

namespace lottery {

// Gradients that a backward pass asks for; null data: not wanted.
template <class S>
struct ConvGradients {
  Image<S> dx;
  S* dvalues;
  S* dbias;
};

// One share of the backward pass of one phase: some tiles, the block columns [begin, end).
template <class S>
class BackwardShare {
  static constexpr int L = kLanes<S>;

 public:
  // dots: gradients of the values, added to, in the order of the gather; bias_sums: null, or [channels of dy], added to
  BackwardShare(const Pass<S>& pass, const ConvWeight& weight, const Image<const S>& x, const S* values,
                const ConvGradients<S>& wanted, S* dots, double* bias_sums)
      : pass_(pass), weight_(weight), x_(x), values_(values), wanted_(wanted), dots_(dots), bias_sums_(bias_sums),
        sums_(pass.gather, values, weight.transposed(), pass.window.plane), panel_(pass.panel()) {}

  void run(int64_t first_tile, int64_t last_tile, int64_t begin, int64_t end) {
    for (int64_t p = first_tile; p < last_tile; ++p) {
      tile_ = pass_.tiles[p];
      if (pass_.gather.nnz() > 0) panel_.pack(tile_);
      if (bias_sums_) panel_.add_up(bias_sums_);
      for (int64_t line = begin; line < end; ++line) {
        if (weight_.single() && wanted_.dvalues) single(line);
        else block(line);
      }
    }
    finish_streams();
  }

 private:
  // Unstructured, a line is a channel: each row of dy is loaded once for both gradients.
  void single(int64_t line) {
    const Gather& gather = pass_.gather;
    const int64_t first = gather.begin(line), count = gather.begin(line + 1) - first;
    const int64_t padded = (count + L - 1) / L * L;
    if (int64_t(products_.size()) < padded * L) products_.resize(padded * L);
    std::memset(products_.data(), 0, padded * L * sizeof(S));
    for (int64_t t = tile_.row; t < tile_.row_end; ++t) {
      const auto [from, to] = pass_.inside[t];
      const int64_t k0 = gather.begin(line, from), k1 = gather.begin(line, to);
      const auto x = pass_.target(x_, line, t, tile_);
      if (wanted_.dx.data) {
        const auto dx = pass_.target(wanted_.dx, line, t, tile_);
        cover<kRegisters / 4>(pass_.run(tile_), [&]<int V>(std::integral_constant<int, V>, int64_t v) {
          gradients<V, true>(first, k0, k1, panel_.row(t) + v * L, v, x, &dx);
        });
      } else {
        cover<kRegisters / 2>(pass_.run(tile_), [&]<int V>(std::integral_constant<int, V>, int64_t v) {
          gradients<V, false>(first, k0, k1, panel_.row(t) + v * L, v, x, nullptr);
        });
      }
    }
    for (int64_t k = 0; k < count; k += L) {
      Vec<S> rows[L];
      for (int i = 0; i < L; ++i) rows[i] = load(products_.data() + (k + i) * L);
      const Vec<S> sums = sum_each<S>(rows);
      for (int i = 0; i < std::min<int64_t>(L, count - k); ++i) dots_[first + k + i] += sums[i];
    }
  }

  template <int V, bool DX>
  void gradients(int64_t first, int64_t k0, int64_t k1, const S* base, int64_t v, const TargetRow<const S>& x,
                 const TargetRow<S>* dx) {
    Vec<S> held[V], done[V] = {};
    for (int i = 0; i < V; ++i) held[i] = x.get(v + i);
    const Gather& gather = pass_.gather;
    for (int64_t k = k0; k < k1;) {
      Vec<S> sums[V] = {};
      for (const int64_t end = std::min(k + kRun, k1); k < end; ++k) {
        const S* dy = base + gather.offset[k];
        S* product = products_.data() + (k - first) * L;
        Vec<S> products = load(product);
        const S w = DX ? values_[gather.position[k]] : S(0);
        for (int i = 0; i < V; ++i) {
          const Vec<S> g = DX ? load_once(dy + i * L) : load(dy + i * L);
          products += g * held[i];
          if (DX) sums[i] += w * g;
        }
        store(product, products);
      }
      for (int i = 0; i < V; ++i) done[i] += sums[i];
    }
    if (DX)
      for (int i = 0; i < V; ++i) dx->put(v + i, done[i]);
  }

  void block(int64_t line) {
    const Gather& gather = pass_.gather;
    const LineChannels channels(pass_.target_channels, weight_.c, line);
    const int64_t vectors = pass_.run(tile_), stride = vectors * L;
    for (int64_t t = tile_.row; t < tile_.row_end; ++t) {
      const auto [from, to] = pass_.inside[t];
      const int64_t k0 = gather.begin(line, from), k1 = gather.begin(line, to);
      if (wanted_.dx.data)
        sums_.run(
            k0, k1, panel_.row(t), vectors, channels.count, [](int64_t) { return S(0); },
            [&](int64_t in) { return pass_.target(wanted_.dx, channels.first + in, t, tile_); });
      if (!wanted_.dvalues || k0 == k1) continue;
      x_rows_.resize(weight_.c * stride);
      for (int64_t in = 0; in < weight_.c; ++in) {
        S* to_row = x_rows_.data() + in * stride;
        if (in >= channels.count) {
          std::memset(to_row, 0, stride * sizeof(S));
          continue;
        }
        const auto x = pass_.target(x_, channels.first + in, t, tile_);
        for (int64_t v = 0; v < vectors; ++v) store(to_row + v * L, x.get(v));
      }
      for (int64_t k = k0; k < k1; ++k)
        block_gradient<S>(panel_.row(t) + gather.offset[k], pass_.window.plane, weight_.r, x_rows_.data(), stride,
                          weight_.c, vectors, dots_ + k * weight_.r * weight_.c, true);
    }
  }

  const Pass<S>& pass_;
  const ConvWeight& weight_;
  const Image<const S> x_;
  const S* values_;
  const ConvGradients<S>& wanted_;
  S* dots_;
  double* bias_sums_;
  LineSums<S> sums_;
  SourcePanel<S> panel_;
  Tile tile_{};
  std::vector<S> products_, x_rows_;
};

}  // namespace lottery
