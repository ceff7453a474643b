// Gradients of the linear operators, for CPU and CUDA: autograd functions that call back through the dispatcher.
#include "autograd.h"

namespace lottery {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

using LinearSignature = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, at::TensorList,
                               at::IntArrayRef);
using DgradSignature = Tensor(const Tensor&, const Tensor&, at::TensorList, at::IntArrayRef);
using WgradSignature = Tensor(const Tensor&, const Tensor&, at::TensorList, at::IntArrayRef, at::IntArrayRef);

Tensor call_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, at::TensorList index,
                   at::IntArrayRef shape) {
  static const auto op = find_operator<LinearSignature>("lottery_kernels::linear");
  return op.call(x, values, bias, index, shape);
}

Tensor call_dgrad(const Tensor& dy, const Tensor& values, at::TensorList index, at::IntArrayRef shape) {
  static const auto op = find_operator<DgradSignature>("lottery_kernels::linear_dgrad");
  return op.call(dy, values, index, shape);
}

Tensor call_wgrad(const Tensor& dy, const Tensor& x, at::TensorList index, at::IntArrayRef shape,
                  at::IntArrayRef block) {
  static const auto op = find_operator<WgradSignature>("lottery_kernels::linear_wgrad");
  return op.call(dy, x, index, shape, block);
}

using BackwardSignature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                             at::TensorList, at::IntArrayRef, std::array<bool, 3>);

std::tuple<Tensor, Tensor, Tensor> call_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                 at::TensorList index, at::IntArrayRef shape,
                                                 std::array<bool, 3> wanted) {
  static const auto op = find_operator<BackwardSignature>("lottery_kernels::linear_backward");
  return op.call(dy, x, values, index, shape, wanted);
}

// Arguments that carry no gradient.
struct Rest {
  at::TensorList index;
  at::IntArrayRef shape, block;
};

void save(AutogradContext* ctx, variable_list tensors, const Rest& rest) {
  tensors.insert(tensors.end(), rest.index.begin(), rest.index.end());
  ctx->save_for_backward(std::move(tensors));
  ctx->saved_data["shape"] = rest.shape;
  ctx->saved_data["block"] = rest.block;
}

// What a node saved: `operands` tensors, then the index.
struct Saved {
  variable_list tensors;
  at::TensorList index;
  std::vector<int64_t> shape, block;

  explicit Saved(AutogradContext* ctx, size_t operands = 2)
      : tensors(ctx->get_saved_variables()),
        index(at::TensorList(tensors).slice(operands)),
        shape(ctx->saved_data["shape"].toIntVector()),
        block(ctx->saved_data["block"].toIntVector()) {}
};

struct LinearFunction : Function<LinearFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                        const Rest& rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {x, values}, rest);
    ctx->saved_data["bias"] = bias.has_value();
    return call_linear(x, values, bias, rest.index, rest.shape);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    const Tensor &dy = grads[0], &x = saved.tensors[0], &values = saved.tensors[1];
    const std::array<bool, 3> wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                     ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)};
    Tensor dx, dvalues, dbias;
    if (dy.is_cpu()) {  // one pass over dy for all
      std::tie(dx, dvalues, dbias) = call_backward(dy, x, values, saved.index, saved.shape, wanted);
      return {wanted[0] ? dx : Tensor(), wanted[1] ? dvalues : Tensor(), wanted[2] ? dbias : Tensor(), {}};
    }
    if (wanted[0]) dx = call_dgrad(dy, values, saved.index, saved.shape);
    if (wanted[1]) dvalues = call_wgrad(dy, x, saved.index, saved.shape, saved.block);
    if (wanted[2]) dbias = dy.sum(0);
    return {dx, dvalues, dbias, {}};
  }
};

struct DgradFunction : Function<DgradFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& dy, const Tensor& values, const Rest& rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {dy, values}, rest);
    return call_dgrad(dy, values, rest.index, rest.shape);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    const Tensor &ddx = grads[0], &dy = saved.tensors[0], &values = saved.tensors[1];
    Tensor ddy, dvalues;
    if (ctx->needs_input_grad(0)) ddy = call_linear(ddx, values, std::nullopt, saved.index, saved.shape);
    if (ctx->needs_input_grad(1)) dvalues = call_wgrad(dy, ddx, saved.index, saved.shape, saved.block);
    return {ddy, dvalues, {}};
  }
};

struct WgradFunction : Function<WgradFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const Rest& rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {dy, x}, rest);
    return call_wgrad(dy, x, rest.index, rest.shape, rest.block);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    const Tensor &dvalues = grads[0], &dy = saved.tensors[0], &x = saved.tensors[1];
    Tensor ddy, dx;
    if (ctx->needs_input_grad(0)) ddy = call_linear(x, dvalues, std::nullopt, saved.index, saved.shape);
    if (ctx->needs_input_grad(1)) dx = call_dgrad(dy, dvalues, saved.index, saved.shape);
    return {ddy, dx, {}};
  }
};

struct BackwardFunction : Function<BackwardFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const Tensor& values,
                               const Rest& rest, std::array<bool, 3> wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {dy, x, values}, rest);
    ctx->set_materialize_grads(false);
    auto [dx, dvalues, dbias] = call_backward(dy, x, values, rest.index, rest.shape, wanted);
    return {dx, dvalues, dbias};
  }

  // y = x Wᵀ + b is linear in each of x, W and b, so its gradients' gradients are the same three products again.
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx, 3);
    const Tensor &dy = saved.tensors[0], &x = saved.tensors[1], &values = saved.tensors[2];
    const Tensor &ddx = grads[0], &ddvalues = grads[1], &ddbias = grads[2];
    Tensor ddy, dx, dvalues;
    const auto add = [](Tensor& sum, const Tensor& term) { sum = sum.defined() ? sum + term : term; };
    if (ctx->needs_input_grad(0)) {
      if (ddx.defined()) add(ddy, call_linear(ddx, values, std::nullopt, saved.index, saved.shape));
      if (ddvalues.defined()) add(ddy, call_linear(x, ddvalues, std::nullopt, saved.index, saved.shape));
      if (ddbias.defined()) add(ddy, ddbias.expand_symint(dy.sym_sizes()));
    }
    if (ctx->needs_input_grad(1) && ddvalues.defined()) dx = call_dgrad(dy, ddvalues, saved.index, saved.shape);
    if (ctx->needs_input_grad(2) && ddx.defined())
      dvalues = call_wgrad(dy, ddx, saved.index, saved.shape, saved.block);
    return {ddy, dx, dvalues, {}, {}};
  }
};

Tensor linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, at::TensorList index,
              at::IntArrayRef shape) {
  const auto block = block_of(values);
  return LinearFunction::apply(x, values, bias, Rest{index, shape, block});
}

Tensor linear_dgrad(const Tensor& dy, const Tensor& values, at::TensorList index, at::IntArrayRef shape) {
  const auto block = block_of(values);
  return DgradFunction::apply(dy, values, Rest{index, shape, block});
}

Tensor linear_wgrad(const Tensor& dy, const Tensor& x, at::TensorList index, at::IntArrayRef shape,
                    at::IntArrayRef block) {
  return WgradFunction::apply(dy, x, Rest{index, shape, block});
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                   at::TensorList index, at::IntArrayRef shape,
                                                   std::array<bool, 3> wanted) {
  if (!at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call_backward(dy, x, values, index, shape, wanted);
  }
  const auto block = block_of(values);
  const variable_list all = BackwardFunction::apply(dy, x, values, Rest{index, shape, block}, wanted);
  return {all[0], all[1], all[2]};
}

void register_autograd(torch::Library& m) {
  m.impl("linear", &linear);
  m.impl("linear_dgrad", &linear_dgrad);
  m.impl("linear_wgrad", &linear_wgrad);
}

TORCH_LIBRARY_IMPL(lottery_kernels, AutogradCPU, m) {
  register_autograd(m);
  m.impl("linear_backward", &linear_backward);
}

TORCH_LIBRARY_IMPL(lottery_kernels, AutogradCUDA, m) { register_autograd(m); }

}  // namespace
}  // namespace lottery
