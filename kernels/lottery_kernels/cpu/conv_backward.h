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

// One share of the backward pass: some tiles, the block columns [begin, end).
template <class S>
class BackwardShare {
  static constexpr int L = kLanes<S>;

 public:
  // dots: gradients of the values, added to, in the order of the phases' gathers; bias_sums: null, or [channels of dy],
  // added to
  BackwardShare(const Pass<S>& pass, const ConvWeight& weight, const Image<const S>& x, const S* values,
                const ConvGradients<S>& wanted, S* dots, double* bias_sums)
      : pass_(pass), weight_(weight), x_(x), values_(values), wanted_(wanted), bias_sums_(bias_sums),
        panel_(pass.panel()) {
    for (const Phase& phase : pass.phases) {
      parts_.push_back({phase, {phase.gather, values, weight.transposed(), pass.window.plane}, dots});
      if (wanted.dvalues) dots += phase.gather.nnz() * weight.r * weight.c;
    }
  }

  void run(int64_t first_tile, int64_t last_tile, int64_t begin, int64_t end) {
    for (int64_t p = first_tile; p < last_tile; ++p) {
      const Tile tile = pass_.tiles[p];
      if (weight_.nnz() > 0) panel_.pack(tile);
      if (bias_sums_) panel_.add_up(bias_sums_);
      for (int64_t line = begin; line < end; ++line)
        for (const Part& part : parts_) {
          tile_ = part.phase.part(tile);
          if (tile_.row >= tile_.row_end || tile_.col >= tile_.col_end) continue;
          if (part.phase.gather.begin(line) == part.phase.gather.begin(line + 1)) clear(part, line);
          else if (weight_.single() && wanted_.dvalues) single(part, line);
          else block(part, line);
        }
    }
    finish_streams();
  }

 private:
  struct Part {
    const Phase& phase;
    LineSums<S> sums;
    S* dots;
  };

  // dx where no live block reads.
  void clear(const Part& part, int64_t line) {
    if (!wanted_.dx.data) return;
    const LineChannels channels(pass_.targets, line);
    for (int64_t channel = channels.first; channel < channels.first + channels.count; ++channel)
      for (int64_t t = tile_.row; t < tile_.row_end; ++t) {
        const auto dx = pass_.target(part.phase, wanted_.dx, channel, t, tile_);
        alignas(kVectorBytes) constexpr S zeros[8 * L] = {};
        cover<8>(pass_.run(tile_),
                 [&]<int V>(std::integral_constant<int, V>, int64_t v) { dx.template put<V>(v, zeros, 0); });
      }
  }

  // Unstructured, a line is a channel: each row of dy is loaded once for both gradients.
  void single(const Part& part, int64_t line) {
    const Gather& gather = part.phase.gather;
    const int64_t first = gather.begin(line), count = gather.begin(line + 1) - first, vectors = pass_.run(tile_);
    const int64_t padded = (count + L - 1) / L * L;
    S* const products = scratch(padded * L);
    std::memset(products, 0, padded * L * sizeof(S));
    for (int64_t t = tile_.row; t < tile_.row_end; ++t) {
      const auto [from, to] = part.phase.inside[t];
      const Range range{first, gather.begin(line, from), gather.begin(line, to)};
      const auto x = pass_.target(part.phase, x_, line, t, tile_);
      prefetch_next(part, line, t);
      if (wanted_.dx.data) {
        const auto dx = pass_.target(part.phase, wanted_.dx, line, t, tile_);
        cover<kRegisters / 4>(vectors, [&]<int V>(std::integral_constant<int, V>, int64_t v) {
          alignas(kVectorBytes) S sums[V * L];
          gradients<V, true>(gather, range, panel_.row(t) + v * L, x, v, products, sums);
          dx.template put<V>(v, sums, 0);
        });
      } else {
        cover<kRegisters / 2>(vectors, [&]<int V>(std::integral_constant<int, V>, int64_t v) {
          gradients<V, false>(gather, range, panel_.row(t) + v * L, x, v, products, nullptr);
        });
      }
    }
    for (int64_t k = 0; k < count; k += L) {
      Vec<S> rows[L];
      for (int i = 0; i < L; ++i) rows[i] = load(products + (k + i) * L);
      const Vec<S> sums = sum_each<S>(rows);
      for (int i = 0; i < std::min<int64_t>(L, count - k); ++i) part.dots[first + k + i] += sums[i];
    }
  }

  // Live weights [k0, k1) of a line, whose first is `first`.
  struct Range {
    int64_t first, k0, k1;
  };

  // products[k] += dy of weight k times vectors v … of x, lane by lane; where DX, sums[V] = the sum of weights times
  // dy.
  template <int V, bool DX>
  [[gnu::noinline]] void gradients(const Gather& gather, const Range& range, const S* base, const TargetRow<const S>& x,
                                   int64_t v, S* products, S* to) const {
    Vec<S> held[V], done[V] = {};
    for (int i = 0; i < V; ++i) held[i] = x.get(v + i);
    for (int64_t k = range.k0; k < range.k1;) {
      Vec<S> sums[V] = {};
      for (const int64_t end = std::min(k + kRun, range.k1); k < end; ++k) {
        const S* dy = base + gather.offset[k];
        S* product = products + (k - range.first) * L;
        Vec<S> sum = load(product);
        const S w = DX ? values_[gather.position[k]] : S(0);
        for (int i = 0; i < V; ++i) {
          const Vec<S> g = DX ? load_once(dy + i * L) : load(dy + i * L);
          sum += g * held[i];
          if (DX) sums[i] += w * g;
        }
        store(product, sum);
      }
      for (int i = 0; i < V; ++i) done[i] += sums[i];
    }
    if (DX)
      for (int i = 0; i < V; ++i) store(to + i * L, done[i]);
  }

  void block(const Part& part, int64_t line) {
    const Phase& phase = part.phase;
    const LineChannels channels(pass_.targets, line);
    const int64_t vectors = pass_.run(tile_), stride = vectors * L;
    for (int64_t t = tile_.row; t < tile_.row_end; ++t) {
      const auto [from, to] = phase.inside[t];
      const int64_t k0 = phase.gather.begin(line, from), k1 = phase.gather.begin(line, to);
      const bool dots = wanted_.dvalues && k0 < k1;
      S* const x_rows = scratch(weight_.c * stride);
      if (wanted_.dvalues) prefetch_next(part, line, t);
      for (int64_t in = 0; dots && in < weight_.c; ++in) {
        S* row = x_rows + in * stride;
        if (in < channels.count) pass_.target(phase, x_, channels.first + in, t, tile_).copy(vectors, row);
        else std::memset(row, 0, stride * sizeof(S));
      }
      if (wanted_.dx.data)
        part.sums.run(
            k0, k1, panel_.row(t), vectors, channels.count, [](int64_t) { return S(0); },
            [&](int64_t in) { return pass_.target(phase, wanted_.dx, channels.first + in, t, tile_); });
      for (int64_t k = k0; dots && k < k1; ++k)  // streamed stores of dx drain meanwhile
        block_gradient<S>(panel_.row(t) + phase.gather.offset[k], pass_.window.plane, weight_.r, x_rows, stride,
                          weight_.c, vectors, part.dots + k * weight_.r * weight_.c, true);
    }
  }

  // x of the row after row t of a line.
  void prefetch_next(const Part& part, int64_t line, int64_t t) const {
    if (++t == tile_.row_end) t = tile_.row, ++line;
    if (line == part.phase.gather.lines()) return;
    const LineChannels channels(pass_.targets, line);
    for (int64_t channel = channels.first; channel < channels.first + channels.count; ++channel)
      pass_.target(part.phase, x_, channel, t, tile_).prefetch(pass_.run(tile_));
  }

  // Begins at a cache line: a load across two would take twice as long. Valid until the next call in this thread.
  static S* scratch(int64_t size) {
    thread_local Scratch<S> held;
    return held.at_least(size);
  }

  const Pass<S>& pass_;
  const ConvWeight& weight_;
  const Image<const S> x_;
  const S* values_;
  const ConvGradients<S>& wanted_;
  double* bias_sums_;
  std::vector<Part> parts_;
  SourcePanel<S> panel_;
  Tile tile_{};
};

}  // namespace lottery
