// The forward pass of linear layers: x [N, in] in panels (panel.h), the sums over live blocks those of sparse_matmul.h.
// Results do not depend on the number of threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <vector>

#include "alive.h"
#include "panel.h"
#include "shares.h"
#include "sparse_matmul.h"

namespace lottery {

using at::Tensor;

// The arrays of a pattern and the sizes they speak of, checked.
struct Weight {
  int64_t out, in, r, c;
  Entries rows, columns;
  Tensor alive;  // undefined: every position

  Weight(at::TensorList index, at::IntArrayRef shape, at::IntArrayRef block)
      : out(shape[0]), in(shape[1]), r(block[0]), c(block[1]) {
    TORCH_CHECK(index.size() == 5 || index.size() == 6, "index must hold 5 or 6 tensors, got ", index.size());
    for (size_t i = 0; i < 5; ++i)
      TORCH_CHECK(index[i].scalar_type() == at::kInt && index[i].is_contiguous() && index[i].is_cpu(),
                  "index[", i, "] must be a contiguous int32 tensor on the CPU");
    const int64_t nnz = index[1].numel();
    rows = {index[0].const_data_ptr<int32_t>(), index[1].const_data_ptr<int32_t>(), nullptr, (out + r - 1) / r};
    columns = {index[2].const_data_ptr<int32_t>(), index[3].const_data_ptr<int32_t>(),
               index[4].const_data_ptr<int32_t>(), (in + c - 1) / c};
    TORCH_CHECK(index[0].numel() == rows.lines + 1 && index[2].numel() == columns.lines + 1 &&
                    index[3].numel() == nnz && index[4].numel() == nnz,
                "index does not belong to a weight of shape ", shape, " with blocks of ", block);
    if (index.size() == 6) alive = index[5];
  }

  int64_t nnz() const { return rows.nnz(); }
  BlockShape forward() const { return {r, c, c, 1}; }
  BlockShape transposed() const { return {c, r, 1, c}; }

  Tensor alive_only(const Tensor& values) const {
    TORCH_CHECK(values.dim() == 3 && values.size(0) == nnz(), "values must be [", nnz(), ", ", r, ", ", c,
                "], got ", values.sizes());
    return lottery::alive_only(alive, values);
  }
};

template <class S>
Activation<const S> read(const Tensor& x) {
  return {x.const_data_ptr<S>(), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

// Not written past the caches, however large it is: the next layer reads it.
template <class S>
Activation<S> written(Tensor& y) {
  return {y.mutable_data_ptr<S>(), y.size(0), y.size(1), y.stride(0), y.stride(1)};
}

inline Tensor empty_activation(const Tensor& like, int64_t features) {  // batch innermost
  return at::empty_strided({like.size(0), features}, {1, like.size(0)}, like.options());
}

// Outputs so narrow are row-major: most are a net's last, and its loss would convert them, which takes longer than to
// write them so. As in operators.py.
constexpr int64_t kNarrow = 16;

inline Tensor empty_output(const Tensor& like, int64_t features) {
  return features <= kNarrow ? at::empty({like.size(0), features}, like.options()) : empty_activation(like, features);
}

// How many vectors a panel is wide: no wider than the batch asks for, nor than the cache holds `features` of, and eight
// only where that leaves two panels and pads the batch no further than four.
template <class S>
int panel_width(int64_t features, int64_t batch) {
  constexpr int64_t kCache = 1280 << 10;
  const auto panels = [&](int64_t width) { return (batch + width * kLanes<S> - 1) / (width * kLanes<S>); };
  if (features * 8 * kVectorBytes <= kCache / 2 && panels(8) > 1 && panels(4) % 2 == 0) return 8;
  return features * 4 * kVectorBytes <= kCache && panels(2) > 1 ? 4 : 2;
}

// How many of them a forward pass takes at a time. Half of the only panel, or two threads would pack the whole of it;
// and of eight four: twice as many inputs stay in a cache.
template <class S>
int forward_width(int width, int64_t batch) {
  return batch <= 4 * kLanes<S> ? 2 : std::min(width, 4);
}

// Calls f with a width, one of WIDTHS, as a constant.
template <int... WIDTHS, class F>
void with_width(int width, const F& f) {
  ((width == WIDTHS ? f(std::integral_constant<int, WIDTHS>{}) : void()), ...);
}

// A layer's forward pass over one panel: y = x Wᵀ + bias, and where asked relu of it.
template <class S>
struct ForwardPass {
  Activation<const S> x;
  const S *values, *bias;  // bias may be null
  const Weight& weight;
  bool with_relu;
  Activation<S> y;

  int64_t cost() const { return std::max<int64_t>(1, total_cost(weight.rows)); }

  // Block rows [begin, end) of panel p.
  template <int V>
  void run(const Panels<S, V * kLanes<S>>& panels, int64_t p, int64_t begin, int64_t end) const {
    constexpr int T = V * kLanes<S>;
    const BlockShape block = weight.forward();
    const S* panel = panels[p];
    const int64_t stride = panels.stride();
    const auto source = [&](int64_t k) { return panel + int64_t(weight.rows.other[k]) * block.ins * stride; };
    for (int64_t i = begin; i < end; ++i) {
      // every other panel backwards: threads on neighbouring panels then do not write into the same cache lines at once
      const int64_t row = p % 2 ? begin + end - 1 - i : i, o = row * weight.r;
      for (int64_t out = 0; out < weight.r; ++out) prefetch_row<S, T>(y, p, o + out);
      multiply_line<S, V>(
          weight.rows, row, values, block, stride, source,
          [&](int64_t out) { return bias && o + out < weight.out ? bias[o + out] : S(0); },
          [&]<int N>(int64_t out, std::integral_constant<int, N>, int v, Vec<S>* sums) __attribute__((always_inline)) {
            if (with_relu)
              for (int i = 0; i < N; ++i) sums[i] = relu<S>(sums[i]);
            if (o + out < weight.out) write_row<S, T, N>(y, p, o + out, v, sums);
          });
    }
  }

  template <int V>
  Panels<S, V * kLanes<S>> panels() const {
    return {x, weight.columns.ptr, weight.columns.lines, weight.c};
  }
};

// All panels of one layer.
template <class S, int V>
void forward(const ForwardPass<S>& pass) {
  const auto panels = pass.template panels<V>();
  const Entries& rows = pass.weight.rows;
  const int64_t cost = pass.cost(), work = cost * panels.count();
  in_shares(work * pass.weight.r * pass.weight.c * V, [&](int64_t i, int64_t n) {
    const int64_t begin = work * i / n, end = work * (i + 1) / n;
    for (int64_t p = begin / cost; p * cost < end; ++p)
      pass.template run<V>(panels, p, line_at(rows, begin - p * cost), line_at(rows, std::min(end - p * cost, cost)));
  });
}

// Layers one behind another: panel by panel through all of them where the threads have equally many panels, so that a
// thread finds in its cache what it wrote; else layer by layer.
template <class S, int V>
void forward(const std::vector<ForwardPass<S>>& passes) {
  const int64_t count = passes[0].template panels<V>().count(), threads = at::get_num_threads();
  if (passes.size() == 1 || (count % threads && count < 4 * threads)) {
    for (const auto& pass : passes) forward<S, V>(pass);
    return;
  }
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (const auto& pass : passes)
        pass.template run<V>(pass.template panels<V>(), p, 0, pass.weight.rows.lines);
  });
}

inline void check_input(const char* name, const Tensor& x, int64_t features, at::ScalarType dtype) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == features, name, " must be [N, ", features, "], got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == dtype, name, " is ", x.scalar_type(), ", the weight's values are ", dtype);
}

inline Tensor checked_bias(const Tensor& bias, int64_t out, at::ScalarType dtype) {
  TORCH_CHECK(bias.numel() == out && bias.scalar_type() == dtype, "bias must be [", out, "] of ", dtype, ", got ",
              bias.sizes(), " of ", bias.scalar_type());
  return bias.contiguous();
}

}  // namespace lottery
