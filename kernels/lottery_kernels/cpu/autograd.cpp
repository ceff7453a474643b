// Gradients of the linear operators, for CPU and CUDA: autograd functions that call back through the dispatcher.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace lottery {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <class Signature>
const c10::TypedOperatorHandle<Signature>& handle(const char* name) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  return op;
}

using LinearSignature = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, at::TensorList,
                               at::IntArrayRef);
using DgradSignature = Tensor(const Tensor&, const Tensor&, at::TensorList, at::IntArrayRef);
using WgradSignature = Tensor(const Tensor&, const Tensor&, at::TensorList, at::IntArrayRef, at::IntArrayRef);

Tensor call_linear(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, at::TensorList index,
                   at::IntArrayRef shape) {
  return handle<LinearSignature>("lottery_kernels::linear").call(x, values, bias, index, shape);
}

Tensor call_dgrad(const Tensor& dy, const Tensor& values, at::TensorList index, at::IntArrayRef shape) {
  return handle<DgradSignature>("lottery_kernels::linear_dgrad").call(dy, values, index, shape);
}

Tensor call_wgrad(const Tensor& dy, const Tensor& x, at::TensorList index, at::IntArrayRef shape,
                  at::IntArrayRef block) {
  return handle<WgradSignature>("lottery_kernels::linear_wgrad").call(dy, x, index, shape, block);
}

// (r, c) of values [nnz, r, c], whose nnz may be symbolic while torch.compile traces.
std::array<int64_t, 2> block_of(const Tensor& values) {
  return {values.sym_size(1).guard_int(__FILE__, __LINE__), values.sym_size(2).guard_int(__FILE__, __LINE__)};
}

// Arguments that carry no gradient.
struct Rest {
  at::TensorList index;
  at::IntArrayRef shape, block;
};

void save(AutogradContext* ctx, const Tensor& one, const Tensor& other, const Rest& rest) {
  variable_list saved{one, other};
  saved.insert(saved.end(), rest.index.begin(), rest.index.end());
  ctx->save_for_backward(std::move(saved));
  ctx->saved_data["shape"] = rest.shape;
  ctx->saved_data["block"] = rest.block;
}

// What a node saved, in the order of the operator's arguments.
struct Saved {
  variable_list tensors;
  std::vector<int64_t> shape, block;

  explicit Saved(AutogradContext* ctx)
      : tensors(ctx->get_saved_variables()),
        shape(ctx->saved_data["shape"].toIntVector()),
        block(ctx->saved_data["block"].toIntVector()) {}

  at::TensorList index() const { return at::TensorList(tensors).slice(2); }
};

struct LinearFunction : Function<LinearFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                        const Rest& rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, x, values, rest);
    ctx->saved_data["bias"] = bias.has_value();
    return call_linear(x, values, bias, rest.index, rest.shape);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    const Tensor &dy = grads[0], &x = saved.tensors[0], &values = saved.tensors[1];
    Tensor dx, dvalues, dbias;
    if (ctx->needs_input_grad(0)) dx = call_dgrad(dy, values, saved.index(), saved.shape);
    if (ctx->needs_input_grad(1)) dvalues = call_wgrad(dy, x, saved.index(), saved.shape, saved.block);
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)) dbias = dy.sum(0);
    return {dx, dvalues, dbias, {}};
  }
};

struct DgradFunction : Function<DgradFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& dy, const Tensor& values, const Rest& rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, dy, values, rest);
    return call_dgrad(dy, values, rest.index, rest.shape);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    const Tensor &ddx = grads[0], &dy = saved.tensors[0], &values = saved.tensors[1];
    Tensor ddy, dvalues;
    if (ctx->needs_input_grad(0)) ddy = call_linear(ddx, values, std::nullopt, saved.index(), saved.shape);
    if (ctx->needs_input_grad(1)) dvalues = call_wgrad(dy, ddx, saved.index(), saved.shape, saved.block);
    return {ddy, dvalues, {}};
  }
};

struct WgradFunction : Function<WgradFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& dy, const Tensor& x, const Rest& rest) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, dy, x, rest);
    return call_wgrad(dy, x, rest.index, rest.shape, rest.block);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    const Tensor &dvalues = grads[0], &dy = saved.tensors[0], &x = saved.tensors[1];
    Tensor ddy, dx;
    if (ctx->needs_input_grad(0)) ddy = call_linear(x, dvalues, std::nullopt, saved.index(), saved.shape);
    if (ctx->needs_input_grad(1)) dx = call_dgrad(dy, dvalues, saved.index(), saved.shape);
    return {ddy, dx, {}};
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

void register_autograd(torch::Library& m) {
  m.impl("linear", &linear);
  m.impl("linear_dgrad", &linear_dgrad);
  m.impl("linear_wgrad", &linear_wgrad);
}

TORCH_LIBRARY_IMPL(lottery_kernels, AutogradCPU, m) { register_autograd(m); }
TORCH_LIBRARY_IMPL(lottery_kernels, AutogradCUDA, m) { register_autograd(m); }

}  // namespace
}  // namespace lottery
