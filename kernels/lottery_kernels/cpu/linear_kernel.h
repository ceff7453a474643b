// The linear kernels: x [N, in] and dy [N, out] in panels (panel.h), the sums over live blocks those of sparse_matmul.h.
// Results do not depend on the number of threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <memory>

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
    return alive.defined() ? at::where(alive, values, at::zeros({}, values.options())) : values.contiguous();
  }
};

template <class S>
Activation<const S> read(const Tensor& x) {
  return {x.const_data_ptr<S>(), x.size(0), x.size(1), x.stride(0), x.stride(1)};
}

template <class S>
Activation<S> written(Tensor& y) {
  return {y.mutable_data_ptr<S>(), y.size(0), y.size(1), y.stride(0), y.stride(1)};
}

inline Tensor empty_activation(const Tensor& like, int64_t features) {  // batch innermost
  return at::empty_strided({like.size(0), features}, {1, like.size(0)}, like.options());
}

// Panels are as wide as four vectors, or two where the batch is no wider or the cache would not hold so much of
// `features`.
template <class S>
bool wide_panels(int64_t features, int64_t batch) {
  constexpr int64_t kCache = 1280 << 10;
  return features * 4 * kVectorBytes <= kCache && batch > 2 * kLanes<S>;
}

// Whether a forward pass takes half a wide panel at a time: else two threads would pack the only one twice.
template <class S>
bool in_halves(int64_t batch) {
  return batch <= 4 * kLanes<S>;
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
    for (int64_t row = begin; row < end; ++row) {
      const int64_t o = row * weight.r;
      multiply_line<S, V>(
          weight.rows, row, values, block, stride, source,
          [&](int64_t out) { return bias && o + out < weight.out ? bias[o + out] : S(0); },
          [&](int64_t out, Vec<S>* sums) {
            if (with_relu)
              for (int v = 0; v < V; ++v) sums[v] = relu<S>(sums[v]);
            if (o + out < weight.out) write_row<S, T>(y, p, o + out, sums);
          });
    }
  }

  template <int V>
  Panels<S, V * kLanes<S>> panels() const {
    return {x, weight.columns.lines * weight.c};
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

// Gradients that a backward pass asks for; null data: not wanted.
template <class S>
struct Gradients {
  Activation<S> dx;
  S* dvalues;
  S* dbias;
  bool through_relu = false;  // x came out of a ReLU: dx is the gradient of what went in
};

// One thread's share of the backward pass: block columns [begin, end), and the biases of features [f0, f1).
template <class S, int V>
class ColumnShare {
  static constexpr int T = V * kLanes<S>;

 public:
  ColumnShare(const Panels<S, T>& dy, const Activation<const S>& x, const S* values, const Weight& weight,
              const Gradients<S>& wanted, S* dots)
      : dy_panels_(dy), x_(x), values_(values), weight_(weight), wanted_(wanted), dots_(dots) {}

  void run(int64_t begin, int64_t end, int64_t f0, int64_t f1) {
    // x is packed a few columns ahead: a transpose takes a vector of them at once
    const int64_t ahead = std::max<int64_t>(1, kLanes<S> / weight_.c);
    const bool needs_x = wanted_.dvalues || wanted_.through_relu;
    thread_local Scratch<S> x_buffer;
    S* const x_rows = needs_x ? x_buffer.at_least(ahead * weight_.c * T) : nullptr;
    const Entries& columns = weight_.columns;
    for (int64_t p = 0; p < dy_panels_.count(); ++p) {
      dy_ = dy_panels_[p];
      if (wanted_.dbias) bias_gradient(f0, f1, p > 0);
      if (!wanted_.dx.data && !wanted_.dvalues) continue;
      DotProducts<S> dots(dots_ ? dots_ + columns.ptr[begin] : nullptr, p > 0);
      for (int64_t first = begin; first < end; first += ahead) {
        const int64_t last = std::min(first + ahead, end);
        if (needs_x) pack_x(p, first * weight_.c, last * weight_.c, x_rows);
        for (int64_t column = first; column < last; ++column) {
          const S* x = x_rows + (column - first) * weight_.c * T;
          if (weight_.r * weight_.c == 1) single(p, column, x, dots);
          else block(p, column, x);
        }
      }
      if (dots_) dots.finish();
    }
    if (dots_)
      for (int64_t k = columns.ptr[begin]; k < columns.ptr[end]; ++k) wanted_.dvalues[columns.position[k]] = dots_[k];
  }

 private:
  void bias_gradient(int64_t f0, int64_t f1, bool add) {
    DotProducts<S> sums(wanted_.dbias + f0, add);
    for (int64_t f = f0; f < f1; ++f) {
      Vec<S> sum = {};
      for (int v = 0; v < V; ++v) sum += load(dy_ + f * T + v * kLanes<S>);
      sums.push(sum);
    }
    sums.finish();
  }

  void pack_x(int64_t p, int64_t f0, int64_t f1, S* to) {
    const int64_t real = std::min(f1, weight_.in);
    pack<S, T>(x_, p, f0, real, to - f0 * T);
    std::memset(to + (real - f0) * T, 0, (f1 - real) * T * sizeof(S));
  }

  const S* dy_rows(int64_t k) const { return dy_ + int64_t(weight_.columns.other[k]) * weight_.r * T; }

  void single(int64_t p, int64_t column, const S* x_row, DotProducts<S>& dots) {
    if (!wanted_.dvalues) return multiply(p, column, x_row);
    const auto source = [&](int64_t k) { return dy_rows(k); };
    Vec<S> x[V], dx[V];
    for (int v = 0; v < V; ++v) x[v] = load(x_row + v * kLanes<S>);
    if (!wanted_.dx.data) return column_gradients<S, V, false>(weight_.columns, column, values_, x, dx, dots, source);
    column_gradients<S, V, true>(weight_.columns, column, values_, x, dx, dots, source);
    write_dx(p, column, x_row, dx);
  }

  void block(int64_t p, int64_t column, const S* x) {
    if (wanted_.dx.data) multiply(p, column, x);
    if (!wanted_.dvalues) return;
    const Entries& columns = weight_.columns;
    for (int64_t k = columns.ptr[column]; k < columns.ptr[column + 1]; ++k)
      block_gradient<S, V>(dy_rows(k), weight_.r, x, weight_.c, T,
                           wanted_.dvalues + columns.position[k] * weight_.r * weight_.c, p > 0);
  }

  void multiply(int64_t p, int64_t column, const S* x) {
    const int64_t f = column * weight_.c;
    multiply_line<S, V>(
        weight_.columns, column, values_, weight_.transposed(), T, [&](int64_t k) { return dy_rows(k); },
        [](int64_t) { return S(0); },
        [&](int64_t out, Vec<S>* sums) {
          if (f + out < weight_.in) write_dx(p, f + out, x + out * T, sums);
        });
  }

  void write_dx(int64_t p, int64_t f, const S* x_row, Vec<S>* dx) {
    if (wanted_.through_relu)
      for (int v = 0; v < V; ++v) dx[v] = relu_gradient<S>(load(x_row + v * kLanes<S>), dx[v]);
    write_row<S, T>(wanted_.dx, p, f, dx);
  }

  const Panels<S, T>& dy_panels_;
  const Activation<const S>& x_;
  const S* values_;
  const Weight& weight_;
  const Gradients<S>& wanted_;
  S* dots_;
  const S* dy_ = nullptr;
};

// All that is wanted in one pass over dy; with `y`, the output of a ReLU, dy is the gradient behind that.
template <class S, int V>
void backward(const Activation<const S>& dy, const Activation<const S>* y, const Activation<const S>& x,
              const S* values, const Weight& weight, const Gradients<S>& wanted) {
  const Panels<S, V * kLanes<S>> panels(dy, weight.rows.lines * weight.r, y);
  const bool single = wanted.dvalues && weight.r * weight.c == 1;
  const auto dots = std::make_unique_for_overwrite<S[]>(single ? weight.nnz() : 0);
  const int64_t cost = total_cost(weight.columns);
  in_shares(cost * panels.count() * weight.r * weight.c * V * 2, [&](int64_t i, int64_t n) {
    ColumnShare<S, V>(panels, x, values, weight, wanted, single ? dots.get() : nullptr)
        .run(line_at(weight.columns, cost * i / n), line_at(weight.columns, cost * (i + 1) / n), weight.out * i / n,
             weight.out * (i + 1) / n);
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
