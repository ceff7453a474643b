// CPU kernels of the convolution operators. A live block adds a constant to an address (conv_geometry.h) in a panel of
// packed sources (conv_panel.h); its sums are those of the linear kernels (sparse_matmul.h). Results do not depend on
// the number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "conv_geometry.h"
#include "conv_panel.h"

namespace lottery {
namespace {

using at::Tensor;

// The arrays of a pattern and the sizes they speak of, checked.
struct ConvWeight {
  int64_t groups, outputs, inputs, r, c;  // outputs and inputs of one group
  AxisGeometry down, across;
  Entries rows, columns;
  Tensor alive;  // undefined: every position

  ConvWeight(at::TensorList index, at::IntArrayRef shape, at::IntArrayRef block, at::IntArrayRef x_shape,
             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups)
      : groups(groups), outputs(shape[0] / groups), inputs(shape[1]), r(block[0]), c(block[1]) {
    TORCH_CHECK(x_shape.size() == 4 && x_shape[1] == inputs * groups, "x must be [N, ", inputs * groups,
                ", H, W], got ", x_shape);
    const auto axis = [&](int64_t i) {
      const int64_t padded = x_shape[2 + i] + 2 * padding[i], reach = dilation[i] * (shape[2 + i] - 1) + 1;
      TORCH_CHECK(padded >= reach, "Calculated padded input size per channel: (", x_shape[2] + 2 * padding[0], " x ",
                  x_shape[3] + 2 * padding[1], "). Kernel size: (", dilation[0] * (shape[2] - 1) + 1, " x ",
                  dilation[1] * (shape[3] - 1) + 1, "). Kernel size can't be greater than actual input size");
      return AxisGeometry{x_shape[2 + i], (padded - reach) / stride[i] + 1, shape[2 + i], stride[i], padding[i],
                          dilation[i]};
    };
    down = axis(0), across = axis(1);
    TORCH_CHECK(index.size() == 5 || index.size() == 6, "index must hold 5 or 6 tensors, got ", index.size());
    for (size_t i = 0; i < 5; ++i)
      TORCH_CHECK(index[i].scalar_type() == at::kInt && index[i].is_contiguous() && index[i].is_cpu(),
                  "index[", i, "] must be a contiguous int32 tensor on the CPU");
    const int64_t nnz = index[1].numel();
    rows = {index[0].const_data_ptr<int32_t>(), index[1].const_data_ptr<int32_t>(), nullptr, groups * row_blocks()};
    columns = {index[2].const_data_ptr<int32_t>(), index[3].const_data_ptr<int32_t>(),
               index[4].const_data_ptr<int32_t>(), groups * column_blocks()};
    TORCH_CHECK(index[0].numel() == rows.lines + 1 && index[2].numel() == columns.lines + 1 &&
                    index[3].numel() == nnz && index[4].numel() == nnz,
                "index does not belong to a weight of shape ", shape, " with blocks of ", block);
    if (index.size() == 6) alive = index[5];
  }

  int64_t nnz() const { return rows.nnz(); }
  int64_t row_blocks() const { return (outputs + r - 1) / r; }
  int64_t column_blocks() const { return (inputs + c - 1) / c; }
  bool single() const { return r * c == 1; }
  BlockShape forward() const { return {r, c, c, 1}; }
  BlockShape transposed() const { return {c, r, 1, c}; }
  ChannelGroups out_channels() const { return {groups, outputs, row_blocks() * r}; }
  ChannelGroups in_channels() const { return {groups, inputs, column_blocks() * c}; }

  Tensor alive_only(const Tensor& values) const {
    TORCH_CHECK(values.dim() == 3 && values.size(0) == nnz(), "values must be [", nnz(), ", ", r, ", ", c,
                "], got ", values.sizes());
    return alive.defined() ? at::where(alive, values, at::zeros({}, values.options())) : values.contiguous();
  }
};

// Batch innermost: seen as [C, H, W, N], contiguous.
Tensor empty_image(const Tensor& like, at::IntArrayRef shape) {
  const int64_t n = shape[0], w = shape[3], h = shape[2];
  return at::empty_strided(shape, {1, h * w * n, w * n, n}, like.options());
}

Tensor batch_innermost(const Tensor& x) {
  if (x.permute({1, 2, 3, 0}).is_contiguous()) return x;
  return empty_image(x, x.sizes()).copy_(x);
}

template <class S>
Image<const S> read(const Tensor& x) {
  return {x.const_data_ptr<S>(), x.size(1), x.size(2), x.size(3), x.size(0)};
}

template <class S>
Image<S> written(Tensor& y) {
  return {y.mutable_data_ptr<S>(), y.size(1), y.size(2), y.size(3), y.size(0)};
}

// The channels of one line of blocks.
struct LineChannels {
  int64_t first, count;

  LineChannels(const ChannelGroups& channels, int64_t depth, int64_t line) {
    const int64_t lines = channels.padded_size / depth, within = line % lines * depth;
    first = line / lines * channels.size + within;
    count = std::min(depth, channels.size - within);
  }
};

// Chooses tiles whose panel fits the second-level cache.
Tiling choose_tiling(const Axis& down, const Axis& across, int64_t channels, int64_t batch, int64_t lanes,
                     int64_t bytes) {
  constexpr int64_t kCache = 640 << 10, kVectors = 4;
  const auto fits = [&](const Tiling& t) {
    return channels * Window(down, across, t, lanes).plane * bytes <= kCache;
  };
  Tiling tiling{1, across.targets, kVectors};
  while (tiling.vectors > 1 && tiling.vectors * lanes >= 2 * batch) tiling.vectors /= 2;
  while (tiling.vectors > 1 && tiling.vectors * tiling.cols >= 16 && !fits(tiling)) tiling.vectors /= 2;
  while (tiling.vectors * tiling.cols > 16 && !fits(tiling)) tiling.cols = (tiling.cols + 1) / 2;
  while (tiling.rows < down.targets && fits({tiling.rows + 1, tiling.cols, tiling.vectors})) ++tiling.rows;
  const int64_t tiles = (down.targets + tiling.rows - 1) / tiling.rows;
  tiling.rows = (down.targets + tiles - 1) / tiles;
  return tiling;
}

// A pass over all tiles of the targets of one gather.
template <class S>
struct Pass {
  Axis down, across;
  ChannelGroups source_channels, target_channels;
  int64_t source_depth, target_depth;  // channels of a block
  Image<const S> source;
  Tiling tiling;
  Tiles tiles;
  Window window;
  Gather gather;

  Pass(const Axis& down, const Axis& across, const ChannelGroups& source_channels,
       const ChannelGroups& target_channels, int64_t source_depth, int64_t target_depth, const Entries& entries,
       const Image<const S>& source)
      : down(down), across(across), source_channels(source_channels), target_channels(target_channels),
        source_depth(source_depth), target_depth(target_depth), source(source),
        tiling(choose_tiling(down, across, source_channels.padded_total(), source.batch, kLanes<S>, sizeof(S))),
        tiles{tiling, tiling.vectors * kLanes<S>, down.targets, across.targets, source.batch},
        window(down, across, tiling, kLanes<S>),
        gather(entries, source_channels.groups, source_channels.padded_size / source_depth, source_depth, down, across,
               window, tiles.chunk) {}

  SourcePanel<S> panel() const { return {source, source_channels, down, across, window, tiles}; }

  template <class T>
  TargetRow<T> target(const Image<T>& image, int64_t channel, int64_t t, const Tile& tile) const {
    T* begin = image.row(channel, down.first + down.step * t) + (across.first + across.step * tile.col) * image.batch;
    return TargetRow<T>{begin + tile.n0, image.batch, across.step, tiling.vectors, image.batch - tile.n0};
  }

  int64_t run(const Tile& tile) const { return (tile.col_end - tile.col) * tiling.vectors; }
};

template <class S>
Pass<S> forward_pass(const ConvWeight& weight, const Image<const S>& x) {
  return {weight.down.forward(), weight.across.forward(), weight.in_channels(), weight.out_channels(), weight.c, weight.r,
          weight.rows, x};
}

template <class S>
Pass<S> backward_pass(const ConvWeight& weight, const Image<const S>& dy, int64_t phase_down, int64_t phase_across) {
  return {weight.down.backward(phase_down), weight.across.backward(phase_across), weight.out_channels(),
          weight.in_channels(), weight.r, weight.c, weight.columns, dy};
}

// Calls f(std::integral_constant<int, V>, v) for register tiles that cover vectors [0, total).
template <int V, class F>
inline void cover(int64_t total, const F& f, int64_t v = 0) {
  for (; total - v >= V; v += V) f(std::integral_constant<int, V>{}, v);
  if constexpr (V > 1) cover<V / 2>(total, f, v);
}

// Sums over the live blocks of one line, for one row of targets: those of channel `out` of the line begin with
// `first(out)` and go to `targets[out]`.
template <class S>
class LineSums {
 public:
  LineSums(const Gather& gather, const S* values, const BlockShape& block, int64_t plane)
      : gather_(gather), entries_(gather.entries()), values_(values), block_(block), plane_(plane) {}

  template <class First, class Targets>
  void run(int64_t k0, int64_t k1, const S* base, int64_t vectors, int64_t outs, const First& first,
           const Targets& targets) const {
    if (block_.size() == 1) return rows<1, 1>(k0, k1, base, vectors, 0, first, targets);
    int64_t out = 0;
    for (; outs - out >= 4; out += 4) rows<4, 0>(k0, k1, base, vectors, out, first, targets);
    for (; outs - out >= 2; out += 2) rows<2, 0>(k0, k1, base, vectors, out, first, targets);
    for (; outs - out >= 1; out += 1) rows<1, 0>(k0, k1, base, vectors, out, first, targets);
  }

 private:
  template <int R, int INS, class First, class Targets>
  void rows(int64_t k0, int64_t k1, const S* base, int64_t vectors, int64_t out, const First& first,
            const Targets& targets) const {
    cover<kRegisters / 2 / R>(vectors, [&]<int V>(std::integral_constant<int, V>, int64_t v) {
      Vec<S> sums[R][V];
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < V; ++i) sums[r][i] = splat<S>(first(out + r));
      const S* at = base + v * kLanes<S>;
      multiply<S, R, V, INS>(sums, entries_, k0, k1, values_, block_, out, plane_,
                             [&](int64_t k) { return at + gather_.offset[k]; });
      for (int r = 0; r < R; ++r) {
        const TargetRow<S> target = targets(out + r);
        for (int i = 0; i < V; ++i) target.put(v + i, sums[r][i]);
      }
    });
  }

  const Gather& gather_;
  Entries entries_;
  const S* values_;
  BlockShape block_;
  int64_t plane_;
};

// Threads worth waking for `work` vector multiply-adds; shares [0, n) run on them.
template <class F>
void in_shares(int64_t work, const F& share) {
  constexpr int64_t kWorth = 8192;
  const int64_t n = std::clamp<int64_t>(work / kWorth, 1, at::get_num_threads());
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) share(i, n);
  });
}

template <class S>
void forward(const Image<const S>& x, const S* values, const S* bias, const ConvWeight& weight, const Image<S>& y) {
  const Pass<S> pass = forward_pass<S>(weight, x);
  const LineSums<S> sums(pass.gather, values, weight.forward(), pass.window.plane);
  const int64_t cost = std::max<int64_t>(1, total_cost(weight.rows)), work = cost * pass.tiles.count();
  in_shares(work * pass.tiling.rows * pass.tiling.cols * pass.tiling.vectors, [&](int64_t i, int64_t n) {
    SourcePanel<S> panel = pass.panel();
    const int64_t begin = work * i / n, end = work * (i + 1) / n;
    for (int64_t p = begin / cost; p * cost < end; ++p) {
      const Tile tile = pass.tiles[p];
      panel.pack(tile);
      const int64_t last = line_at(weight.rows, std::min(end - p * cost, cost));
      for (int64_t line = line_at(weight.rows, begin - p * cost); line < last; ++line) {
        const LineChannels channels(pass.target_channels, weight.r, line);
        for (int64_t t = tile.row; t < tile.row_end; ++t) {
          const auto [from, to] = pass.down.inside(t);
          sums.run(
              pass.gather.begin(line, from), pass.gather.begin(line, to), panel.row(t), pass.run(tile), channels.count,
              [&](int64_t out) { return bias ? bias[channels.first + out] : S(0); },
              [&](int64_t out) { return pass.target(y, channels.first + out, t, tile); });
        }
      }
    }
  });
}

// Gradients that a backward pass asks for; null data: not wanted.
template <class S>
struct ConvGradients {
  Image<S> dx;
  S* dvalues;
};

// One share of the backward pass of one phase: some tiles, the block columns [begin, end).
template <class S>
class BackwardShare {
  static constexpr int L = kLanes<S>;

 public:
  // dots: gradients of the values, added to, in the order of the gather
  BackwardShare(const Pass<S>& pass, const ConvWeight& weight, const Image<const S>& x, const S* values,
                const ConvGradients<S>& wanted, S* dots)
      : pass_(pass), weight_(weight), x_(x), values_(values), wanted_(wanted), dots_(dots),
        sums_(pass.gather, values, weight.transposed(), pass.window.plane), panel_(pass.panel()) {}

  void run(int64_t first_tile, int64_t last_tile, int64_t begin, int64_t end) {
    for (int64_t p = first_tile; p < last_tile; ++p) {
      tile_ = pass_.tiles[p];
      if (pass_.gather.nnz() > 0) panel_.pack(tile_);
      for (int64_t line = begin; line < end; ++line) {
        if (weight_.single() && wanted_.dvalues) single(line);
        else block(line);
      }
    }
  }

 private:
  // Unstructured: each row of dy is loaded once for both gradients.
  void single(int64_t line) {
    const Gather& gather = pass_.gather;
    const int64_t first = gather.begin(line), count = gather.begin(line + 1) - first;
    const int64_t padded = (count + L - 1) / L * L;
    if (int64_t(products_.size()) < padded * L) products_.resize(padded * L);
    std::memset(products_.data(), 0, padded * L * sizeof(S));
    for (int64_t t = tile_.row; t < tile_.row_end; ++t) {
      const auto [from, to] = pass_.down.inside(t);
      const int64_t k0 = gather.begin(line, from), k1 = gather.begin(line, to);
      const auto x = pass_.target(x_, line_channel(line), t, tile_);
      if (wanted_.dx.data) {
        const auto dx = pass_.target(wanted_.dx, line_channel(line), t, tile_);
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
    Vec<S> held[V], sums[V] = {};
    for (int i = 0; i < V; ++i) held[i] = x.get(v + i);
    const Gather& gather = pass_.gather;
    for (int64_t k = k0; k < k1; ++k) {
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
    if (DX)
      for (int i = 0; i < V; ++i) dx->put(v + i, sums[i]);
  }

  void block(int64_t line) {
    const Gather& gather = pass_.gather;
    const LineChannels channels(pass_.target_channels, weight_.c, line);
    const int64_t vectors = pass_.run(tile_), stride = vectors * L;
    for (int64_t t = tile_.row; t < tile_.row_end; ++t) {
      const auto [from, to] = pass_.down.inside(t);
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

  int64_t line_channel(int64_t line) const { return line; }  // of an unstructured weight

  const Pass<S>& pass_;
  const ConvWeight& weight_;
  const Image<const S> x_;
  const S* values_;
  const ConvGradients<S>& wanted_;
  S* dots_;
  LineSums<S> sums_;
  SourcePanel<S> panel_;
  Tile tile_{};
  std::vector<S> products_, x_rows_;
};

// Sums of tiles are added up in this many parts, whatever the number of threads.
constexpr int64_t kParts = 4;

template <class S>
void backward_phase(const Pass<S>& pass, const ConvWeight& weight, const Image<const S>& x, const S* values,
                    const ConvGradients<S>& wanted) {
  const int64_t tiles = pass.tiles.count(), parts = std::min(tiles, kParts), size = weight.r * weight.c;
  const int64_t nnz = pass.gather.nnz();
  const int64_t ranges = (at::get_num_threads() + parts - 1) / parts;
  const Entries lines = pass.gather.entries();
  std::vector<S> dots(wanted.dvalues ? parts * nnz * size : 0);
  // a line's entries lie at every taps_down-th pointer
  std::vector<int32_t> ptr(lines.lines + 1);
  for (int64_t line = 0; line <= lines.lines; ++line) ptr[line] = int32_t(pass.gather.begin(line));
  const Entries whole{ptr.data(), nullptr, nullptr, lines.lines};
  const int64_t cost = total_cost(whole);
  at::parallel_for(0, parts * ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / ranges, range = item % ranges;
      BackwardShare<S>(pass, weight, x, values, wanted, dots.data() + (wanted.dvalues ? part * nnz * size : 0))
          .run(tiles * part / parts, tiles * (part + 1) / parts, line_at(whole, cost * range / ranges),
               line_at(whole, cost * (range + 1) / ranges));
    }
  });
  if (!wanted.dvalues) return;
  for (int64_t k = 0; k < nnz; ++k) {
    S* to = wanted.dvalues + pass.gather.position[k] * size;
    for (int64_t i = 0; i < size; ++i) {
      S sum = dots[k * size + i];
      for (int64_t part = 1; part < parts; ++part) sum += dots[(part * nnz + k) * size + i];
      to[i] = sum;
    }
  }
}

// dx and dvalues, where defined, in one pass over dy.
void backward(const Tensor& dy, const Tensor& x, const Tensor& values, const ConvWeight& weight, Tensor& dx,
              Tensor& dvalues) {
  if (dy.size(0) == 0) {
    if (dvalues.defined()) dvalues.zero_();
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(dy.scalar_type(), "lottery_kernels::conv2d_backward", [&] {
    using S = scalar_t;
    const Image<const S> x_image = dvalues.defined() ? read<S>(x) : Image<const S>{};
    const ConvGradients<S> wanted{dx.defined() ? written<S>(dx) : Image<S>{},
                                  dvalues.defined() ? dvalues.mutable_data_ptr<S>() : nullptr};
    const S* w = dx.defined() ? values.const_data_ptr<S>() : nullptr;
    for (int64_t i = 0; i < weight.down.stride; ++i)
      for (int64_t j = 0; j < weight.across.stride; ++j) {
        const Pass<S> pass = backward_pass<S>(weight, read<S>(dy), i, j);
        backward_phase<S>(pass, weight, x_image, w, wanted);
      }
  });
}

void check_type(const char* name, const Tensor& x, at::ScalarType dtype) {
  TORCH_CHECK(x.scalar_type() == dtype, name, " is ", x.scalar_type(), ", the weight's values are ", dtype);
}

void check_output(const Tensor& dy, const ConvWeight& weight, int64_t batch) {
  const std::array<int64_t, 4> expected{batch, weight.groups * weight.outputs, weight.down.out, weight.across.out};
  TORCH_CHECK(dy.sizes() == at::IntArrayRef(expected), "dy must be ", at::IntArrayRef(expected), ", got ", dy.sizes());
}

bool is_half(const Tensor& x) { return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16; }

Tensor conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, at::TensorList index,
              at::IntArrayRef weight_shape, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
              int64_t groups) {
  if (is_half(x)) {
    const std::optional<Tensor> b = bias ? std::optional(bias->to(at::kFloat)) : std::nullopt;
    return conv2d(x.to(at::kFloat), values.to(at::kFloat), b, index, weight_shape, stride, padding, dilation, groups)
        .to(x.scalar_type());
  }
  const ConvWeight weight(index, weight_shape, values.sizes().slice(1), x.sizes(), stride, padding, dilation, groups);
  check_type("x", x, values.scalar_type());
  const Tensor live = weight.alive_only(values), from = batch_innermost(x), b = bias ? bias->contiguous() : Tensor();
  const int64_t out = groups * weight.outputs;
  if (b.defined())
    TORCH_CHECK(b.numel() == out && b.scalar_type() == x.scalar_type(), "bias must be [", out, "] of ",
                x.scalar_type(), ", got ", b.sizes(), " of ", b.scalar_type());
  Tensor y = empty_image(x, {x.size(0), out, weight.down.out, weight.across.out});
  if (y.numel() == 0) return y;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lottery_kernels::conv2d", [&] {
    using S = scalar_t;
    forward<S>(read<S>(from), live.const_data_ptr<S>(), b.defined() ? b.const_data_ptr<S>() : nullptr, weight,
               written<S>(y));
  });
  return y;
}

Tensor conv2d_dgrad(const Tensor& dy, const Tensor& values, at::TensorList index, at::IntArrayRef weight_shape,
                    at::IntArrayRef x_shape, at::IntArrayRef stride, at::IntArrayRef padding,
                    at::IntArrayRef dilation, int64_t groups) {
  if (is_half(dy))
    return conv2d_dgrad(dy.to(at::kFloat), values.to(at::kFloat), index, weight_shape, x_shape, stride, padding,
                        dilation, groups)
        .to(dy.scalar_type());
  const ConvWeight weight(index, weight_shape, values.sizes().slice(1), x_shape, stride, padding, dilation, groups);
  check_type("dy", dy, values.scalar_type());
  check_output(dy, weight, x_shape[0]);
  Tensor dx = empty_image(dy, x_shape), none;
  backward(batch_innermost(dy), none, weight.alive_only(values), weight, dx, none);
  return dx;
}

Tensor conv2d_wgrad(const Tensor& dy, const Tensor& x, at::TensorList index, at::IntArrayRef weight_shape,
                    at::IntArrayRef block, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                    int64_t groups) {
  if (is_half(dy))
    return conv2d_wgrad(dy.to(at::kFloat), x.to(at::kFloat), index, weight_shape, block, stride, padding, dilation,
                        groups)
        .to(dy.scalar_type());
  const ConvWeight weight(index, weight_shape, block, x.sizes(), stride, padding, dilation, groups);
  check_type("dy", dy, x.scalar_type());
  check_output(dy, weight, x.size(0));
  Tensor dvalues = at::empty({weight.nnz(), weight.r, weight.c}, x.options()), none;
  backward(batch_innermost(dy), batch_innermost(x), none, weight, none, dvalues);
  return weight.alive_only(dvalues);
}

// dx, dvalues and dbias in one pass over dy; what `wanted` leaves out comes back with no elements.
std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                   at::TensorList index, at::IntArrayRef weight_shape,
                                                   at::IntArrayRef stride, at::IntArrayRef padding,
                                                   at::IntArrayRef dilation, int64_t groups,
                                                   std::array<bool, 3> wanted) {
  if (is_half(dy)) {
    const auto [dx, dvalues, dbias] =
        conv2d_backward(dy.to(at::kFloat), x.to(at::kFloat), values.to(at::kFloat), index, weight_shape, stride,
                        padding, dilation, groups, wanted);
    const auto dtype = dy.scalar_type();
    return {dx.to(dtype), dvalues.to(dtype), dbias.to(dtype)};
  }
  const ConvWeight weight(index, weight_shape, values.sizes().slice(1), x.sizes(), stride, padding, dilation, groups);
  check_type("dy", dy, values.scalar_type());
  check_type("x", x, values.scalar_type());
  check_output(dy, weight, x.size(0));
  const Tensor from = batch_innermost(dy);
  Tensor dx, dvalues, dbias;
  if (wanted[0]) dx = empty_image(dy, x.sizes());
  if (wanted[1]) dvalues = at::empty(values.sizes(), values.options());
  if (wanted[2]) dbias = from.permute({1, 2, 3, 0}).reshape({dy.size(1), -1}).sum(1);
  if (wanted[0] || wanted[1])
    backward(from, wanted[1] ? batch_innermost(x) : x, wanted[0] ? weight.alive_only(values) : Tensor(), weight, dx,
             dvalues);
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, dy.options()); };
  return {or_empty(dx), wanted[1] ? weight.alive_only(dvalues) : or_empty(dvalues), or_empty(dbias)};
}

// Shapes and strides of conv2d_backward, for torch.compile; the batch and the number of blocks may be symbolic.
std::tuple<Tensor, Tensor, Tensor> conv2d_backward_meta(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                        at::TensorList, at::IntArrayRef weight_shape, at::IntArrayRef,
                                                        at::IntArrayRef, at::IntArrayRef, int64_t,
                                                        std::array<bool, 3> wanted) {
  const c10::SymInt n = x.sym_size(0), h = x.sym_size(2), w = x.sym_size(3);
  const auto none = [&] { return at::empty({0}, dy.options()); };
  return {wanted[0] ? at::empty_strided_symint(x.sym_sizes(), {1, h * w * n, w * n, n}, dy.options()) : none(),
          wanted[1] ? at::empty_symint(values.sym_sizes(), values.options()) : none(),
          wanted[2] ? at::empty({weight_shape[0]}, dy.options()) : none()};
}

TORCH_LIBRARY_FRAGMENT(lottery_kernels, m) {
  m.def("conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor[] index, int[] weight_shape, int[] stride, "
        "int[] padding, int[] dilation, int groups, bool[3] wanted) -> (Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lottery_kernels, Meta, m) { m.impl("conv2d_backward", &conv2d_backward_meta); }

TORCH_LIBRARY_IMPL(lottery_kernels, CPU, m) {
  m.impl("conv2d", &conv2d);
  m.impl("conv2d_dgrad", &conv2d_dgrad);
  m.impl("conv2d_wgrad", &conv2d_wgrad);
  m.impl("conv2d_backward", &conv2d_backward);
}

}  // namespace
}  // namespace lottery
