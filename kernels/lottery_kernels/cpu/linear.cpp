// CPU kernels of the linear operators. x [N, in] and dy [N, out] are packed into panels (panel.h), the sums over live
// blocks are those of sparse_matmul.h. Results do not depend on the number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "panel.h"
#include "sparse_matmul.h"

namespace lottery {
namespace {

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

Tensor empty_activation(const Tensor& like, int64_t features) {  // batch innermost
  return at::empty_strided({like.size(0), features}, {1, like.size(0)}, like.options());
}

// Threads worth waking for `work` vector multiply-adds; shares [0, n) run on them.
template <class F>
void in_shares(int64_t work, const F& share) {
  constexpr int64_t kWorth = 8192;
  const int64_t n = std::clamp<int64_t>(work / kWorth, 1, at::get_num_threads());
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) share(i, n);
  });
}

// A whole activation in panels [batch / T, features, T], `features` padded to whole blocks with zeros.
template <class S>
struct Panels {
  static constexpr int T = kPanel<S>;
  int64_t count, features;
  Tensor buffer;
  S* data;

  Panels(const Activation<const S>& x, int64_t padded, const Tensor& like)
      : count((x.batch + T - 1) / T), features(padded) {
    buffer = at::empty({count * features * T}, like.options());
    data = buffer.mutable_data_ptr<S>();
    const int64_t stripes = (features + kStripe - 1) / kStripe;
    in_shares(count * features * 4, [&](int64_t i, int64_t n) {
      const int64_t f0 = stripes * i / n * kStripe, f1 = std::min(features, stripes * (i + 1) / n * kStripe);
      const int64_t real = std::clamp(x.features, f0, f1);
      for (int64_t p = 0; p < count; ++p) {
        pack<S, T>(x, p * T, f0, real, panel(p));
        std::memset(panel(p) + real * T, 0, (f1 - real) * T * sizeof(S));
      }
    });
  }

  S* panel(int64_t p) const { return data + p * features * T; }

 private:
  static constexpr int64_t kStripe = 16;
};

template <class S>
void forward(const Tensor& x, const S* values, const S* bias, const Weight& weight, Tensor& y) {
  constexpr int T = kPanel<S>;
  const Panels<S> panels(read<S>(x), weight.columns.lines * weight.c, x);
  const Activation<S> to = written<S>(y);
  const BlockShape block = weight.forward();
  const Entries& rows = weight.rows;
  const int64_t cost = total_cost(rows), work = cost * panels.count;
  in_shares(work * block.size() * 4, [&](int64_t i, int64_t n) {
    const int64_t begin = work * i / n, end = work * (i + 1) / n;
    for (int64_t p = begin / std::max<int64_t>(cost, 1); p < panels.count && p * cost < end; ++p) {
      const int64_t last = line_at(rows, std::min(end - p * cost, cost));
      const S* panel = panels.panel(p);
      const auto source = [&](int64_t k) { return panel + int64_t(rows.other[k]) * block.ins * T; };
      for (int64_t row = line_at(rows, begin - p * cost); row < last; ++row) {
        const int64_t o = row * weight.r;
        multiply_line<S>(
            rows, row, values, block, T, source,
            [&](int64_t out) { return bias && o + out < weight.out ? bias[o + out] : S(0); },
            [&](int64_t out, const Vec<S>* sums) {
              if (o + out < weight.out) write_row<S, T>(to, p * T, o + out, sums);
            });
      }
    }
  });
}

// What a backward pass asks for; null: not wanted.
template <class S>
struct Gradients {
  Tensor* dx;
  S* dvalues;
  S* dbias;
};

// One thread's share of the backward pass: block columns [begin, end) of all panels.
template <class S>
class ColumnShare {
  static constexpr int T = kPanel<S>;
  static constexpr int V = T / kLanes<S>;

 public:
  ColumnShare(const Panels<S>& dy, const Activation<const S>& x, const Activation<S>& dx, const S* values,
              const Weight& weight, const Gradients<S>& wanted, S* dots)
      : dy_(dy), x_(x), dx_(dx), values_(values), weight_(weight), wanted_(wanted), dots_(dots) {}

  void run(int64_t begin, int64_t end) {
    // x is packed a few columns ahead: a transpose takes a vector of them at once
    const int64_t ahead = std::max<int64_t>(1, kLanes<S> / weight_.c);
    std::vector<S> x_rows(wanted_.dvalues ? ahead * weight_.c * T : 0);
    const Entries& columns = weight_.columns;
    for (int64_t p = 0; p < dy_.count; ++p) {
      DotProducts<S> dots(dots_ ? dots_ + columns.ptr[begin] : nullptr, p > 0);
      for (int64_t first = begin; first < end; first += ahead) {
        const int64_t last = std::min(first + ahead, end);
        if (wanted_.dvalues) pack_x(p, first * weight_.c, last * weight_.c, x_rows.data());
        for (int64_t column = first; column < last; ++column) {
          const S* x = x_rows.data() + (column - first) * weight_.c * T;
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
  void pack_x(int64_t p, int64_t f0, int64_t f1, S* to) {
    const int64_t real = std::min(f1, weight_.in);
    pack<S, T>(x_, p * T, f0, real, to - f0 * T);
    std::memset(to + (real - f0) * T, 0, (f1 - real) * T * sizeof(S));
  }

  const S* dy_rows(int64_t p, int64_t k) const {
    return dy_.panel(p) + int64_t(weight_.columns.other[k]) * weight_.r * T;
  }

  void single(int64_t p, int64_t column, const S* x_row, DotProducts<S>& dots) {
    const auto source = [&](int64_t k) { return dy_rows(p, k); };
    if (!wanted_.dvalues) return multiply(p, column, source);
    Vec<S> x[V], dx[V];
    for (int v = 0; v < V; ++v) x[v] = load(x_row + v * kLanes<S>);
    if (!wanted_.dx) return column_gradients<S, false>(weight_.columns, column, values_, x, dx, dots, source);
    column_gradients<S, true>(weight_.columns, column, values_, x, dx, dots, source);
    write_row<S, T>(dx_, p * T, column, dx);
  }

  void block(int64_t p, int64_t column, const S* x) {
    const auto source = [&](int64_t k) { return dy_rows(p, k); };
    if (wanted_.dx) multiply(p, column, source);
    if (!wanted_.dvalues) return;
    const Entries& columns = weight_.columns;
    for (int64_t k = columns.ptr[column]; k < columns.ptr[column + 1]; ++k)
      block_gradient<S>(source(k), weight_.r, x, weight_.c, T,
                        wanted_.dvalues + columns.position[k] * weight_.r * weight_.c, p > 0);
  }

  template <class Source>
  void multiply(int64_t p, int64_t column, const Source& source) {
    const int64_t f = column * weight_.c;
    multiply_line<S>(
        weight_.columns, column, values_, weight_.transposed(), T, source, [](int64_t) { return S(0); },
        [&](int64_t out, const Vec<S>* sums) {
          if (f + out < weight_.in) write_row<S, T>(dx_, p * T, f + out, sums);
        });
  }

  const Panels<S>& dy_;
  const Activation<const S>& x_;
  const Activation<S>& dx_;
  const S* values_;
  const Weight& weight_;
  const Gradients<S>& wanted_;
  S* dots_;
};

template <class S>
void backward(const Tensor& dy, const Tensor& x, const S* values, const Weight& weight, const Gradients<S>& wanted) {
  const Activation<const S> from = read<S>(dy);
  const Panels<S> panels(from, weight.rows.lines * weight.r, dy);
  if (!wanted.dx && !wanted.dvalues) return;
  const Activation<const S> x_from = wanted.dvalues ? read<S>(x) : Activation<const S>{};
  const Activation<S> dx_to = wanted.dx ? written<S>(*wanted.dx) : Activation<S>{};
  const bool single = weight.r * weight.c == 1;
  Tensor dots;
  if (wanted.dvalues && single) dots = at::empty({weight.nnz()}, dy.options());
  S* dots_data = dots.defined() ? dots.mutable_data_ptr<S>() : nullptr;
  const int64_t cost = total_cost(weight.columns);
  in_shares(cost * panels.count * weight.r * weight.c * 8, [&](int64_t i, int64_t n) {
    ColumnShare<S>(panels, x_from, dx_to, values, weight, wanted, dots_data)
        .run(line_at(weight.columns, cost * i / n), line_at(weight.columns, cost * (i + 1) / n));
  });
}

void check_input(const char* name, const Tensor& x, int64_t features, at::ScalarType dtype) {
  TORCH_CHECK(x.dim() == 2 && x.size(1) == features, name, " must be [N, ", features, "], got ", x.sizes());
  TORCH_CHECK(x.scalar_type() == dtype, name, " is ", x.scalar_type(), ", the weight's values are ", dtype);
}

bool is_half(const Tensor& x) { return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16; }

Tensor linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, at::TensorList index,
              at::IntArrayRef weight_shape) {
  if (is_half(x)) {
    const std::optional<Tensor> b = bias ? std::optional(bias->to(at::kFloat)) : std::nullopt;
    return linear(x.to(at::kFloat), values.to(at::kFloat), b, index, weight_shape).to(x.scalar_type());
  }
  const Weight weight(index, weight_shape, values.sizes().slice(1));
  check_input("x", x, weight.in, values.scalar_type());
  const Tensor live = weight.alive_only(values);
  const Tensor b = bias ? bias->contiguous() : Tensor();
  if (b.defined())
    TORCH_CHECK(b.numel() == weight.out && b.scalar_type() == x.scalar_type(), "bias must be [", weight.out, "] of ",
                x.scalar_type(), ", got ", b.sizes(), " of ", b.scalar_type());
  Tensor y = empty_activation(x, weight.out);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lottery_kernels::linear", [&] {
    forward<scalar_t>(x, live.const_data_ptr<scalar_t>(), b.defined() ? b.const_data_ptr<scalar_t>() : nullptr, weight,
                      y);
  });
  return y;
}

Tensor linear_dgrad(const Tensor& dy, const Tensor& values, at::TensorList index, at::IntArrayRef weight_shape) {
  if (is_half(dy))
    return linear_dgrad(dy.to(at::kFloat), values.to(at::kFloat), index, weight_shape).to(dy.scalar_type());
  const Weight weight(index, weight_shape, values.sizes().slice(1));
  check_input("dy", dy, weight.out, values.scalar_type());
  const Tensor live = weight.alive_only(values);
  Tensor dx = empty_activation(dy, weight.in);
  AT_DISPATCH_FLOATING_TYPES(dy.scalar_type(), "lottery_kernels::linear_dgrad", [&] {
    backward<scalar_t>(dy, {}, live.const_data_ptr<scalar_t>(), weight, {&dx, nullptr, nullptr});
  });
  return dx;
}

Tensor linear_wgrad(const Tensor& dy, const Tensor& x, at::TensorList index, at::IntArrayRef weight_shape,
                    at::IntArrayRef block) {
  if (is_half(dy))
    return linear_wgrad(dy.to(at::kFloat), x.to(at::kFloat), index, weight_shape, block).to(dy.scalar_type());
  const Weight weight(index, weight_shape, block);
  check_input("dy", dy, weight.out, x.scalar_type());
  check_input("x", x, weight.in, x.scalar_type());
  TORCH_CHECK(x.size(0) == dy.size(0), "x and dy must have one batch size, got ", x.size(0), " and ", dy.size(0));
  if (x.size(0) == 0) return at::zeros({weight.nnz(), weight.r, weight.c}, x.options());
  Tensor dvalues = at::empty({weight.nnz(), weight.r, weight.c}, x.options());
  AT_DISPATCH_FLOATING_TYPES(dy.scalar_type(), "lottery_kernels::linear_wgrad", [&] {
    backward<scalar_t>(dy, x, nullptr, weight, {nullptr, dvalues.mutable_data_ptr<scalar_t>(), nullptr});
  });
  return weight.alive_only(dvalues);
}

TORCH_LIBRARY_IMPL(lottery_kernels, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_dgrad", &linear_dgrad);
  m.impl("linear_wgrad", &linear_wgrad);
}

}  // namespace
}  // namespace lottery
