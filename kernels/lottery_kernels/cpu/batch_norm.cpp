// Training-mode batch normalisation of batch-innermost images, with or without a ReLU behind it. Each channel is one
// contiguous row, which stays in the cache between the passes over it, so that memory is read and written once. Sums are
// of vectors over short runs, and of doubles between them. ReLU's gradient asks for the sign of its output, which is
// computed anew from x: nothing but x is kept.
#include <ATen/Parallel.h>

#include "autograd.h"
#include "image.h"
#include "stream.h"
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

// Past the caches where `streams`: the results of a whole image would not stay there.
template <class S, class Vector, class Scalar>
inline void fill(S* to, int64_t n, bool streams, const Vector& vector, const Scalar& scalar) {
  int64_t i = 0;
  if (streams && is_aligned(to)) {
    for (; i + kLanes<S> <= n; i += kLanes<S>) stream(to + i, vector(i));
  } else {
    for (; i + kLanes<S> <= n; i += kLanes<S>) store(to + i, vector(i));
  }
  for (; i < n; ++i) to[i] = scalar(i);
}

// y = relu?((x − center) · scale + shift) of one channel, in the same operations wherever it is asked for.
template <class S>
struct Affine {
  S center, scale, shift;

  template <class V>
  V operator()(V x) const {
    return (x - center) * scale + shift;
  }
};

// ReLU and its gradient as torch's, of a scalar or a vector.
template <class V>
V rectified(V x) {
  return x < V{} ? V{} : x;
}

template <class V>
V rectified_gradient(V y, V dy) {
  return y <= V{} ? V{} : dy;
}

bool outgrows_cache(const Tensor& x) { return x.nbytes() > cache_size(); }

// A tensor [C] that may be missing.
template <class S>
const S* pointer(const std::optional<Tensor>& t) {
  return t && t->defined() ? t->const_data_ptr<S>() : nullptr;
}

void check(const Tensor& x, const std::optional<Tensor>& weight) {
  TORCH_CHECK(is_batch_innermost(x), "x must be batch-innermost");
  TORCH_CHECK(!weight || !weight->defined() || (weight->is_contiguous() && weight->scalar_type() == x.scalar_type()),
              "weight must be contiguous and of x's type");
}

template <class S>
Affine<S> affine_of(int64_t c, const S* weight, const S* bias, S mean, S var, double eps) {
  return {mean, S((weight ? weight[c] : S(1)) / std::sqrt(double(var) + eps)), bias ? bias[c] : S(0)};
}

template <bool RELU, class S>
void normalize(const S* row, S* to, int64_t size, bool streams, const Affine<S>& affine) {
  const auto y = [&](auto x) {
    if constexpr (RELU) return rectified(affine(x));
    else return affine(x);
  };
  fill(
      to, size, streams, [&](int64_t i) { return y(load(row + i)); }, [&](int64_t i) { return y(row[i]); });
}

// y, mean and (biased) variance of each channel.
Tensors batch_norm(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                   bool with_relu) {
  check(x, weight);
  check(x, bias);
  const int64_t channels = x.size(1), size = x.numel() / std::max<int64_t>(1, channels);
  Tensor y = empty_image(x, x.sizes()), mean = at::empty({channels}, x.options()), var = at::empty_like(mean);
  const bool streams = outgrows_cache(x);
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
        const Affine<S> affine = affine_of<S>(c, w, b, center, vars[c], eps);
        (with_relu ? normalize<true, S> : normalize<false, S>)(row, to + c * size, size, streams, affine);
      }
      finish_streams();
    });
  });
  return {y, mean, var};
}

// Gradients of one channel from dy (its row `g`) and x: dx, and dweight and dbias.
template <bool RELU, class S>
void channel_backward(const S* g, const S* row, S* to, int64_t size, bool streams, const Affine<S>& affine,
                      double inverse, S& dweight, S& dbias) {
  const auto dy = [&](auto gradient, auto x) {  // in front of ReLU
    if constexpr (RELU) return rectified_gradient(affine(x), gradient);
    else return gradient;
  };
  const S center = affine.center;
  const double total = sum<S>(
      size, [&](int64_t i) { return dy(load(g + i), load(row + i)); }, [&](int64_t i) { return dy(g[i], row[i]); });
  const double dot = sum<S>(
      size, [&](int64_t i) { return dy(load(g + i), load(row + i)) * (load(row + i) - center); },
      [&](int64_t i) { return dy(g[i], row[i]) * (row[i] - center); });
  dweight = S(dot * inverse), dbias = S(total);
  // dx = scale · (dy − mean of dy − x̂ · mean of dy·x̂)
  const S scale = affine.scale, average = S(total / size), slope = S(dot * inverse * inverse / size);
  const auto dx = [&](auto gradient, auto x) { return (dy(gradient, x) - average - (x - center) * slope) * scale; };
  fill(
      to, size, streams, [&](int64_t i) { return dx(load(g + i), load(row + i)); },
      [&](int64_t i) { return dx(g[i], row[i]); });
}

// dx, dweight, dbias.
Tensors batch_norm_backward(const Tensor& dy_any, const Tensor& x, const std::optional<Tensor>& weight,
                            const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps,
                            bool with_relu) {
  const Tensor dy = batch_innermost(dy_any);
  const int64_t channels = x.size(1), size = x.numel() / std::max<int64_t>(1, channels);
  Tensor dx = empty_image(x, x.sizes()), dweight = at::empty({channels}, x.options()), dbias = at::empty_like(dweight);
  const bool streams = outgrows_cache(x);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lottery_kernels::batch_norm_backward", [&] {
    using S = scalar_t;
    const S *x_data = x.const_data_ptr<S>(), *dy_data = dy.const_data_ptr<S>();
    const S *w = pointer<S>(weight), *b = pointer<S>(bias);
    const S *means = mean.const_data_ptr<S>(), *vars = var.const_data_ptr<S>();
    S *to = dx.mutable_data_ptr<S>(), *dw = dweight.mutable_data_ptr<S>(), *db = dbias.mutable_data_ptr<S>();
    at::parallel_for(0, channels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const Affine<S> affine = affine_of<S>(c, w, b, means[c], vars[c], eps);
        (with_relu ? channel_backward<true, S> : channel_backward<false, S>)(
            dy_data + c * size, x_data + c * size, to + c * size, size, streams, affine,
            1 / std::sqrt(double(vars[c]) + eps), dw[c], db[c]);
      }
      finish_streams();
    });
  });
  return {dx, dweight, dbias};
}

struct BatchNormFunction : Function<BatchNormFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias, double eps, bool with_relu) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, mean, var] = call(x, weight, bias, eps, with_relu);
    ctx->save_for_backward({x, weight.value_or(Tensor()), bias.value_or(Tensor()), mean, var});
    ctx->saved_data["eps"] = eps, ctx->saved_data["relu"] = with_relu;
    ctx->mark_non_differentiable({mean, var});
    return {y, mean, var};
  }

  static Tensors call(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                      double eps, bool with_relu) {
    static const auto op = find_operator<decltype(batch_norm)>("lottery_kernels::batch_norm");
    return op.call(x, weight, bias, eps, with_relu);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &mean = saved[3], &var = saved[4];
    const double eps = ctx->saved_data["eps"].toDouble();
    const bool with_relu = ctx->saved_data["relu"].toBool();
    Tensor dy = grads[0], dx, dweight, dbias;
    if (at::GradMode::is_enabled()) {  // torch's own, which can be differentiated again
      if (with_relu) {
        const auto y = [&] {
          at::AutoDispatchBelowADInplaceOrView guard;
          return std::get<0>(call(x, weight, bias, eps, true));
        };
        dy = at::threshold_backward(dy, y(), 0);
      }
      const auto row = [](const Tensor& t) { return t.permute({1, 2, 3, 0}).reshape({1, t.size(1), -1}); };
      std::tie(dx, dweight, dbias) = at::native_batch_norm_backward(
          row(dy), row(x), weight, {}, {}, mean, (var + eps).rsqrt(), true, eps, {true, weight.defined(), true});
      const auto sizes = x.sizes();
      dx = dx.reshape({sizes[1], sizes[2], sizes[3], sizes[0]}).permute({3, 0, 1, 2});
    } else {
      static const auto op = find_operator<decltype(batch_norm_backward)>("lottery_kernels::batch_norm_backward");
      std::tie(dx, dweight, dbias) = op.call(dy, x, weight, bias, mean, var, eps, with_relu);
    }
    return {dx, weight.defined() ? dweight : Tensor(), bias.defined() ? dbias : Tensor(), {}, {}};
  }
};

Tensors batch_norm_autograd(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                            double eps, bool with_relu) {
  const variable_list all = BatchNormFunction::apply(x, weight, bias, eps, with_relu);
  return {all[0], all[1], all[2]};
}

// Shapes and strides, for torch.compile.
Tensors batch_norm_meta(const Tensor& x, const std::optional<Tensor>&, const std::optional<Tensor>&, double, bool) {
  const Tensor mean = at::empty_symint({x.sym_size(1)}, x.options());
  return {empty_image_symint(x), mean, at::empty_like(mean)};
}

Tensors batch_norm_backward_meta(const Tensor&, const Tensor& x, const std::optional<Tensor>&,
                                 const std::optional<Tensor>&, const Tensor& mean, const Tensor&, double, bool) {
  return {empty_image_symint(x), at::empty_like(mean), at::empty_like(mean)};
}

TORCH_LIBRARY_FRAGMENT(lottery_kernels, m) {
  m.def("batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool relu=False) -> (Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  m.def("batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, float eps, "
        "bool relu) -> (Tensor, Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
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
