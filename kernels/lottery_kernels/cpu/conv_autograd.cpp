// Gradients of the convolution operators, for CPU and CUDA: autograd functions that call back through the dispatcher.
#include "autograd.h"

namespace lottery {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using Ints = at::IntArrayRef;
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

// Arguments that carry no gradient.
struct Rest {
  at::TensorList index;
  Ints shape, block, stride, padding, dilation;
  int64_t groups;
};

using ForwardSignature = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, at::TensorList, Ints, Ints,
                                Ints, Ints, int64_t);

Tensor call_conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, const Rest& rest) {
  static const auto op = find_operator<ForwardSignature>("lottery_kernels::conv2d");
  return op.call(x, values, bias, rest.index, rest.shape, rest.stride, rest.padding, rest.dilation, rest.groups);
}

using GradientSignature = Tensor(const Tensor&, const Tensor&, at::TensorList, Ints, Ints, Ints, Ints, Ints, int64_t);

Tensor call_dgrad(const Tensor& dy, const Tensor& values, Ints x_shape, const Rest& rest) {
  static const auto op = find_operator<GradientSignature>("lottery_kernels::conv2d_dgrad");
  return op.call(dy, values, rest.index, rest.shape, x_shape, rest.stride, rest.padding, rest.dilation, rest.groups);
}

Tensor call_wgrad(const Tensor& dy, const Tensor& x, const Rest& rest) {
  static const auto op = find_operator<GradientSignature>("lottery_kernels::conv2d_wgrad");
  return op.call(dy, x, rest.index, rest.shape, rest.block, rest.stride, rest.padding, rest.dilation, rest.groups);
}

// relu: the output of a ReLU behind which dy is the gradient.
Gradients call_backward(const Tensor& dy, const Tensor& x, const Tensor& values, const Rest& rest,
                        std::array<bool, 3> wanted, const std::optional<Tensor>& relu = std::nullopt) {
  using Signature = Gradients(const Tensor&, const Tensor&, const Tensor&, at::TensorList, Ints, Ints, Ints, Ints,
                              int64_t, std::array<bool, 3>, const std::optional<Tensor>&);
  static const auto op = find_operator<Signature>("lottery_kernels::conv2d_backward");
  return op.call(dy, x, values, rest.index, rest.shape, rest.stride, rest.padding, rest.dilation, rest.groups, wanted,
                 relu);
}

// Gradient in an x of the same shape as `like`, of which nothing else is read.
Tensor gradient_like(const Tensor& like, const Tensor& dy, const Tensor& values, const Rest& rest) {
  if (dy.is_cpu()) return std::get<0>(call_backward(dy, like, values, rest, {true, false, false}));
  std::vector<int64_t> shape;
  for (const c10::SymInt& size : like.sym_sizes()) shape.push_back(size.guard_int(__FILE__, __LINE__));
  return call_dgrad(dy, values, shape, rest);
}

void save(AutogradContext* ctx, variable_list tensors, const Rest& rest) {
  tensors.insert(tensors.end(), rest.index.begin(), rest.index.end());
  ctx->save_for_backward(std::move(tensors));
  auto& data = ctx->saved_data;
  data["shape"] = rest.shape, data["block"] = rest.block, data["stride"] = rest.stride;
  data["padding"] = rest.padding, data["dilation"] = rest.dilation, data["groups"] = rest.groups;
}

// What a node saved: `operands` tensors, then the index.
struct Saved {
  variable_list tensors;
  std::vector<int64_t> shape, block, stride, padding, dilation;
  Rest rest;

  explicit Saved(AutogradContext* ctx, size_t operands = 2)
      : tensors(ctx->get_saved_variables()), shape(ints(ctx, "shape")), block(ints(ctx, "block")),
        stride(ints(ctx, "stride")), padding(ints(ctx, "padding")), dilation(ints(ctx, "dilation")),
        rest{at::TensorList(tensors).slice(operands), shape, block, stride, padding, dilation,
             ctx->saved_data["groups"].toInt()} {}

  static std::vector<int64_t> ints(AutogradContext* ctx, const char* name) {
    return ctx->saved_data[name].toIntVector();
  }
};

struct Conv2dFunction : Function<Conv2dFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                        const Rest& rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {x, values}, rest);
    ctx->saved_data["bias"] = bias.has_value();
    return call_conv2d(x, values, bias, rest);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    const Tensor &dy = grads[0], &x = saved.tensors[0], &values = saved.tensors[1];
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)};
    Tensor dx, dvalues, dbias;
    if (dy.is_cpu()) {  // one pass over dy for all
      std::tie(dx, dvalues, dbias) = call_backward(dy, x, values, saved.rest, wanted);
      return {wanted[0] ? dx : Tensor(), wanted[1] ? dvalues : Tensor(), wanted[2] ? dbias : Tensor(), {}};
    }
    if (wanted[0]) dx = gradient_like(x, dy, values, saved.rest);
    if (wanted[1]) dvalues = call_wgrad(dy, x, saved.rest);
    if (wanted[2]) dbias = dy.sum({0, 2, 3});
    return {dx, dvalues, dbias, {}};
  }
};

// On the CPU alone.
struct Conv2dReluFunction : Function<Conv2dReluFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                        const Rest& rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find_operator<ForwardSignature>("lottery_kernels::conv2d_relu");
    const Tensor y =
        op.call(x, values, bias, rest.index, rest.shape, rest.stride, rest.padding, rest.dilation, rest.groups);
    save(ctx, {x, values, y}, rest);
    ctx->saved_data["bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx, 3);
    const Tensor &x = saved.tensors[0], &values = saved.tensors[1], &y = saved.tensors[2];
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)};
    const auto [dx, dvalues, dbias] = call_backward(grads[0], x, values, saved.rest, wanted, y);
    return {wanted[0] ? dx : Tensor(), wanted[1] ? dvalues : Tensor(), wanted[2] ? dbias : Tensor(), {}};
  }
};

struct Conv2dDgradFunction : Function<Conv2dDgradFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& dy, const Tensor& values, Ints x_shape, const Rest& rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {dy, values}, rest);
    return call_dgrad(dy, values, x_shape, rest);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    const Tensor &ddx = grads[0], &dy = saved.tensors[0], &values = saved.tensors[1];
    Tensor ddy, dvalues;
    if (ctx->needs_input_grad(0)) ddy = call_conv2d(ddx, values, std::nullopt, saved.rest);
    if (ctx->needs_input_grad(1)) dvalues = call_wgrad(dy, ddx, saved.rest);
    return {ddy, dvalues, {}, {}};
  }
};

struct Conv2dWgradFunction : Function<Conv2dWgradFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const Rest& rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {dy, x}, rest);
    return call_wgrad(dy, x, rest);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    const Tensor &dvalues = grads[0], &dy = saved.tensors[0], &x = saved.tensors[1];
    Tensor ddy, dx;
    if (ctx->needs_input_grad(0)) ddy = call_conv2d(x, dvalues, std::nullopt, saved.rest);
    if (ctx->needs_input_grad(1)) dx = gradient_like(x, dy, dvalues, saved.rest);
    return {ddy, dx, {}};
  }
};

struct Conv2dBackwardFunction : Function<Conv2dBackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const Tensor& values,
                               const Rest& rest, std::array<bool, 3> wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {dy, x, values}, rest);
    ctx->set_materialize_grads(false);
    auto [dx, dvalues, dbias] = call_backward(dy, x, values, rest, wanted);
    return {dx, dvalues, dbias};
  }

  // y = x ∗ W + b is linear in each of x, W and b, so its gradients' gradients are the same three products again.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx, 3);
    const Tensor &dy = saved.tensors[0], &x = saved.tensors[1], &values = saved.tensors[2];
    const Tensor &ddx = grads[0], &ddvalues = grads[1], &ddbias = grads[2];
    Tensor ddy, dx, dvalues;
    const auto add = [](Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; };
    if (ctx->needs_input_grad(0)) {
      if (ddx.defined()) add(ddy, call_conv2d(ddx, values, std::nullopt, saved.rest));
      if (ddvalues.defined()) add(ddy, call_conv2d(x, ddvalues, std::nullopt, saved.rest));
      if (ddbias.defined()) add(ddy, ddbias.reshape({1, -1, 1, 1}).expand_symint(dy.sym_sizes()));
    }
    if (ctx->needs_input_grad(1) && ddvalues.defined()) dx = gradient_like(x, dy, ddvalues, saved.rest);
    if (ctx->needs_input_grad(2) && ddx.defined()) dvalues = call_wgrad(dy, ddx, saved.rest);
    return {ddy, dx, dvalues, {}, {}};
  }
};

Tensor conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, at::TensorList index,
              Ints shape, Ints stride, Ints padding, Ints dilation, int64_t groups) {
  const auto block = block_of(values);
  return Conv2dFunction::apply(x, values, bias, Rest{index, shape, block, stride, padding, dilation, groups});
}

Tensor conv2d_dgrad(const Tensor& dy, const Tensor& values, at::TensorList index, Ints shape, Ints x_shape,
                    Ints stride, Ints padding, Ints dilation, int64_t groups) {
  const auto block = block_of(values);
  const Rest rest{index, shape, block, stride, padding, dilation, groups};
  return Conv2dDgradFunction::apply(dy, values, x_shape, rest);
}

Tensor conv2d_wgrad(const Tensor& dy, const Tensor& x, at::TensorList index, Ints shape, Ints block, Ints stride,
                    Ints padding, Ints dilation, int64_t groups) {
  return Conv2dWgradFunction::apply(dy, x, Rest{index, shape, block, stride, padding, dilation, groups});
}

Tensor conv2d_relu(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, at::TensorList index,
                   Ints shape, Ints stride, Ints padding, Ints dilation, int64_t groups) {
  const auto block = block_of(values);
  return Conv2dReluFunction::apply(x, values, bias, Rest{index, shape, block, stride, padding, dilation, groups});
}

Gradients conv2d_backward(const Tensor& dy, const Tensor& x, const Tensor& values, at::TensorList index, Ints shape,
                          Ints stride, Ints padding, Ints dilation, int64_t groups, std::array<bool, 3> wanted,
                          const std::optional<Tensor>& relu) {
  const auto block = block_of(values);
  const Rest rest{index, shape, block, stride, padding, dilation, groups};
  if (!at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(dy, x, values, rest, wanted, relu);
  }
  const Tensor in_front = relu ? at::threshold_backward(dy, *relu, 0) : dy;  // which can be differentiated again
  const variable_list all = Conv2dBackwardFunction::apply(in_front, x, values, rest, wanted);
  return {all[0], all[1], all[2]};
}

void register_autograd(torch::Library& m) {
  m.impl("conv2d", &conv2d);
  m.impl("conv2d_dgrad", &conv2d_dgrad);
  m.impl("conv2d_wgrad", &conv2d_wgrad);
}

TORCH_LIBRARY_IMPL(lottery_kernels, AutogradCPU, m) {
  register_autograd(m);
  m.impl("conv2d_backward", &conv2d_backward);
  m.impl("conv2d_relu", &conv2d_relu);
}

TORCH_LIBRARY_IMPL(lottery_kernels, AutogradCUDA, m) { register_autograd(m); }

}  // namespace
}  // namespace lottery
