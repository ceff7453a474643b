// Training-mode batch normalisation of batch-innermost images, where each channel is one contiguous row: a row stays in
// the cache between the passes over it, so that memory is read and written once. Sums are of vectors over short runs,
// and of doubles between them.
#include <ATen/Parallel.h>

#include "autograd.h"
#include "image.h"
#include "vector.h"

namespace lottery {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;
using Tensors = std::tuple<Tensor, Tensor, Tensor>;

// Sum of term(i) over i in [0, n): `vector` gives kLanes terms beginning at i, `scalar` one.
template <class S, class Vector, class Scalar>
inline double sum(int64_t n, const Vector& vector, const Scalar& scalar) {
  constexpr int64_t L = kLanes<S>, kRun = 64 * L;
  double total = 0;
  int64_t i = 0;
  while (n - i >= 4 * L) {
    Vec<S> sums[4] = {};
    for (const int64_t end = std::min(n, i + kRun); end - i >= 4 * L; i += 4 * L)
      for (int v = 0; v < 4; ++v) sums[v] += vector(i + v * L);
    const Vec<S> run = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int lane = 0; lane < L; ++lane) total += double(run[lane]);
  }
  for (; i < n; ++i) total += double(scalar(i));
  return total;
}

template <class S, class Vector, class Scalar>
inline void fill(S* to, int64_t n, const Vector& vector, const Scalar& scalar) {
  int64_t i = 0;
  for (; i + kLanes<S> <= n; i += kLanes<S>) store(to + i, vector(i));
  for (; i < n; ++i) to[i] = scalar(i);
}

// A tensor [C] that may be missing.
template <class S>
const S* pointer(const std::optional<Tensor>& t) {
  return t && t->defined() ? t->const_data_ptr<S>() : nullptr;
}

void check(const Tensor& x, const std::optional<Tensor>& weight) {
  TORCH_CHECK(is_batch_innermost(x), "x must be batch-innermost");
  TORCH_CHECK(!weight || (weight->is_contiguous() && weight->scalar_type() == x.scalar_type()),
              "weight must be contiguous and of x's type");
}

// y, mean and (biased) variance of each channel.
Tensors batch_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                   double eps) {
  check(x, weight);
  check(x, bias);
  const int64_t channels = x.size(1), size = x.numel() / std::max<int64_t>(1, channels);
  Tensor y = empty_image(x, x.sizes()), mean = at::empty({channels}, x.options()), var = at::empty_like(mean);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lottery_kernels::batch_norm", [&] {
    using S = scalar_t;
    const S *from = x.const_data_ptr<S>(), *w = pointer<S>(weight), *b = pointer<S>(bias);
    S *to = y.mutable_data_ptr<S>(), *means = mean.mutable_data_ptr<S>(), *vars = var.mutable_data_ptr<S>();
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const S* row = from + c * size;
        const double total = sum<S>(size, [&](int64_t i) { return load(row + i); }, [&](int64_t i) { return row[i]; });
        const S center = S(total / size);
        const double squares = sum<S>(
            size,
            [&](int64_t i) {
              const Vec<S> d = load(row + i) - center;
              return d * d;
            },
            [&](int64_t i) { return (row[i] - center) * (row[i] - center); });
        means[c] = center, vars[c] = S(squares / size);
        const S scale = S((w ? w[c] : S(1)) / std::sqrt(squares / size + eps)), shift = b ? b[c] : S(0);
        fill(
            to + c * size, size, [&](int64_t i) { return (load(row + i) - center) * scale + shift; },
            [&](int64_t i) { return (row[i] - center) * scale + shift; });
      }
    });
  });
  return {y, mean, var};
}

// dx, dweight, dbias.
Tensors batch_norm_backward(const Tensor& dy_any, const Tensor& x, const std::optional<Tensor>& weight,
                            const Tensor& mean, const Tensor& var, double eps) {
  const Tensor dy = batch_innermost(dy_any);
  const int64_t channels = x.size(1), size = x.numel() / std::max<int64_t>(1, channels);
  Tensor dx = empty_image(x, x.sizes()), dweight = at::empty({channels}, x.options()), dbias = at::empty_like(dweight);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lottery_kernels::batch_norm_backward", [&] {
    using S = scalar_t;
    const S *x_data = x.const_data_ptr<S>(), *dy_data = dy.const_data_ptr<S>(), *w = pointer<S>(weight);
    const S *means = mean.const_data_ptr<S>(), *vars = var.const_data_ptr<S>();
    S *to = dx.mutable_data_ptr<S>(), *dw = dweight.mutable_data_ptr<S>(), *db = dbias.mutable_data_ptr<S>();
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const S *row = x_data + c * size, *g = dy_data + c * size, center = means[c];
        const double inverse = 1 / std::sqrt(double(vars[c]) + eps);
        const double total = sum<S>(size, [&](int64_t i) { return load(g + i); }, [&](int64_t i) { return g[i]; });
        const double dot = sum<S>(
            size, [&](int64_t i) { return load(g + i) * (load(row + i) - center); },
            [&](int64_t i) { return g[i] * (row[i] - center); });
        dw[c] = S(dot * inverse), db[c] = S(total);
        // dx = scale · (dy − mean of dy − x̂ · mean of dy·x̂)
        const S scale = S((w ? w[c] : S(1)) * inverse), average = S(total / size);
        const S slope = S(dot * inverse * inverse / size);
        fill(
            to + c * size, size,
            [&](int64_t i) { return (load(g + i) - average - (load(row + i) - center) * slope) * scale; },
            [&](int64_t i) { return (g[i] - average - (row[i] - center) * slope) * scale; });
      }
    });
  });
  return {dx, dweight, dbias};
}

struct BatchNormFunction : Function<BatchNormFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find_operator<decltype(batch_norm)>("lottery_kernels::batch_norm");
    auto [y, mean, var] = op.call(x, weight, bias, eps);
    ctx->save_for_backward({x, weight.value_or(Tensor()), mean, var});
    ctx->saved_data["eps"] = eps;
    ctx->mark_non_differentiable({mean, var});
    return {y, mean, var};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &dy = grads[0], &x = saved[0], &weight = saved[1], &mean = saved[2], &var = saved[3];
    const double eps = ctx->saved_data["eps"].toDouble();
    Tensor dx, dweight, dbias;
    if (at::GradMode::is_enabled()) {  // torch's own, which can be differentiated again
      const auto row = [](const Tensor& t) { return t.permute({1, 2, 3, 0}).reshape({1, t.size(1), -1}); };
      std::tie(dx, dweight, dbias) = at::native_batch_norm_backward(
          row(dy), row(x), weight, {}, {}, mean, (var + eps).rsqrt(), true, eps, {true, weight.defined(), true});
      const auto sizes = x.sizes();
      dx = dx.reshape({sizes[1], sizes[2], sizes[3], sizes[0]}).permute({3, 0, 1, 2});
    } else {
      using Signature = Tensors(const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&,
                                const Tensor&, double);
      static const auto op = find_operator<Signature>("lottery_kernels::batch_norm_backward");
      std::tie(dx, dweight, dbias) = op.call(dy, x, weight, mean, var, eps);
    }
    return {dx, weight.defined() ? dweight : Tensor(), weight.defined() ? dbias : Tensor(), {}};
  }
};

Tensors batch_norm_autograd(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                            double eps) {
  const variable_list all = BatchNormFunction::apply(x, weight, bias, eps);
  return {all[0], all[1], all[2]};
}

// Shapes and strides, for torch.compile.
Tensors batch_norm_meta(const Tensor& x, const std::optional<Tensor>&, const std::optional<Tensor>&, double) {
  const Tensor mean = at::empty_symint({x.sym_size(1)}, x.options());
  return {empty_image_symint(x), mean, at::empty_like(mean)};
}

Tensors batch_norm_backward_meta(const Tensor&, const Tensor& x, const std::optional<Tensor>&, const Tensor& mean,
                                 const Tensor&, double) {
  return {empty_image_symint(x), at::empty_like(mean), at::empty_like(mean)};
}

TORCH_LIBRARY_FRAGMENT(lottery_kernels, m) {
  m.def("batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  m.def("batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor var, float eps)"
        " -> (Tensor, Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lottery_kernels, Meta, m) {
  m.impl("batch_norm", &batch_norm_meta);
  m.impl("batch_norm_backward", &batch_norm_backward_meta);
}

TORCH_LIBRARY_IMPL(lottery_kernels, CPU, m) {
  m.impl("batch_norm", &batch_norm);
  m.impl("batch_norm_backward", &batch_norm_backward);
}

TORCH_LIBRARY_IMPL(lottery_kernels, AutogradCPU, m) { m.impl("batch_norm", &batch_norm_autograd); }

}  // namespace
}  // namespace lottery
