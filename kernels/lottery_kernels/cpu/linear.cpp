// CPU kernels of the linear operators.
#include <torch/library.h>

#include "linear_backward.h"

namespace lottery {
namespace {

// All gradients that are asked for. dx: undefined, or to be filled; and so on.
void backward(const Tensor& dy, const Tensor& x, const Tensor& values, const Weight& weight, Tensor& dx,
              Tensor& dvalues, Tensor& dbias) {
  AT_DISPATCH_FLOATING_TYPES(dy.scalar_type(), "lottery_kernels::linear_backward", [&] {
    using S = scalar_t;
    const Gradients<S> wanted{dx.defined() ? written<S>(dx) : Activation<S>{},
                              dvalues.defined() ? dvalues.mutable_data_ptr<S>() : nullptr,
                              dbias.defined() ? dbias.mutable_data_ptr<S>() : nullptr};
    std::vector<BackwardPass<S>> pass{{read<S>(dy), nullptr, dvalues.defined() ? read<S>(x) : Activation<const S>{},
                                       dx.defined() ? values.const_data_ptr<S>() : nullptr, weight, wanted}};
    with_width<2, 4, 8>(panel_width<S>(weight.out, dy.size(0)),
                        [&]<int V>(std::integral_constant<int, V>) { backward<S, V>(pass); });
  });
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
  const Tensor b = bias ? checked_bias(*bias, weight.out, x.scalar_type()) : Tensor();
  Tensor y = empty_output(x, weight.out);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lottery_kernels::linear", [&] {
    using S = scalar_t;
    const ForwardPass<S> pass{read<S>(x), live.const_data_ptr<S>(), b.defined() ? b.const_data_ptr<S>() : nullptr, weight,
                              false, written<S>(y)};
    with_width<2, 4>(forward_width<S>(panel_width<S>(weight.in, x.size(0)), x.size(0)),
                     [&]<int V>(std::integral_constant<int, V>) { forward<S, V>(pass); });
  });
  return y;
}

Tensor linear_dgrad(const Tensor& dy, const Tensor& values, at::TensorList index, at::IntArrayRef weight_shape) {
  if (is_half(dy))
    return linear_dgrad(dy.to(at::kFloat), values.to(at::kFloat), index, weight_shape).to(dy.scalar_type());
  const Weight weight(index, weight_shape, values.sizes().slice(1));
  check_input("dy", dy, weight.out, values.scalar_type());
  Tensor dx = empty_activation(dy, weight.in), none;
  backward(dy, none, weight.alive_only(values), weight, dx, none, none);
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
  Tensor dvalues = at::empty({weight.nnz(), weight.r, weight.c}, x.options()), none;
  backward(dy, x, none, weight, none, dvalues, none);
  clear_dead(weight.alive, dvalues);
  return dvalues;
}

// dx, dvalues and dbias in one pass over dy; what `wanted` leaves out comes back with no elements.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                   at::TensorList index, at::IntArrayRef weight_shape,
                                                   std::array<bool, 3> wanted) {
  if (is_half(dy)) {
    const auto [dx, dvalues, dbias] =
        linear_backward(dy.to(at::kFloat), x.to(at::kFloat), values.to(at::kFloat), index, weight_shape, wanted);
    const auto dtype = dy.scalar_type();
    return {dx.to(dtype), dvalues.to(dtype), dbias.to(dtype)};
  }
  const Weight weight(index, weight_shape, values.sizes().slice(1));
  check_input("dy", dy, weight.out, values.scalar_type());
  check_input("x", x, weight.in, values.scalar_type());
  TORCH_CHECK(x.size(0) == dy.size(0), "x and dy must have one batch size, got ", x.size(0), " and ", dy.size(0));
  Tensor dx, dvalues, dbias;
  if (wanted[0]) dx = empty_activation(dy, weight.in);
  if (wanted[1]) dvalues = at::empty(values.sizes(), values.options());
  if (wanted[2]) dbias = at::empty({weight.out}, dy.options());
  if (dy.size(0) == 0) {  // no panel would fill them
    if (wanted[1]) dvalues.zero_();
    if (wanted[2]) dbias.zero_();
  } else {
    backward(dy, x, wanted[0] ? weight.alive_only(values) : Tensor(), weight, dx, dvalues, dbias);
    if (wanted[1]) clear_dead(weight.alive, dvalues);
  }
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, dy.options()); };
  return {or_empty(dx), or_empty(dvalues), or_empty(dbias)};
}

// Shapes and strides of linear_backward, for torch.compile; the batch and the number of blocks may be symbolic.
std::tuple<Tensor, Tensor, Tensor> linear_backward_meta(const Tensor& dy, const Tensor&, const Tensor& values,
                                                        at::TensorList, at::IntArrayRef weight_shape,
                                                        std::array<bool, 3> wanted) {
  const c10::SymInt batch = dy.sym_size(0);
  const auto none = [&] { return at::empty({0}, dy.options()); };
  return {wanted[0] ? at::empty_strided_symint({batch, weight_shape[1]}, {1, batch}, dy.options()) : none(),
          wanted[1] ? at::empty_symint(values.sym_sizes(), values.options()) : none(),
          wanted[2] ? at::empty({weight_shape[0]}, dy.options()) : none()};
}

TORCH_LIBRARY_FRAGMENT(lottery_kernels, m) {
  m.def("linear_backward(Tensor dy, Tensor x, Tensor values, Tensor[] index, int[] weight_shape, bool[3] wanted)"
        " -> (Tensor, Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lottery_kernels, Meta, m) { m.impl("linear_backward", &linear_backward_meta); }

TORCH_LIBRARY_IMPL(lottery_kernels, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_dgrad", &linear_dgrad);
  m.impl("linear_wgrad", &linear_wgrad);
  m.impl("linear_backward", &linear_backward);
}

}  // namespace
}  // namespace lottery
