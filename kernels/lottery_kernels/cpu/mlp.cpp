// Linear layers one behind another, with or without ReLU behind each, as one operator: activations between them stay in
// panels, ReLU costs no pass of its own, and autograd sees one node.
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd.h"
#include "linear_backward.h"

namespace lottery {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// What describes a layer beside its tensors, as the operator takes it: five numbers.
struct Form {
  int64_t out, in;
  bool bias, relu;
  int64_t index;  // number of its index arrays

  static constexpr int64_t kNumbers = 5;
};

// The operator's arguments but x: values and biases of the layers one after another, and their index arrays.
struct Layers {
  at::TensorList parameters, index;
  at::IntArrayRef forms;

  int64_t count() const { return int64_t(forms.size()) / Form::kNumbers; }

  Form form(int64_t i) const {
    const auto n = forms.slice(i * Form::kNumbers, Form::kNumbers);
    return {n[0], n[1], n[2] != 0, n[3] != 0, n[4]};
  }

  // Calls visit(i, form, values, bias, index) for every layer.
  template <class Visit>
  void each(const Visit& visit) const {
    TORCH_CHECK(count() > 0 && int64_t(forms.size()) == count() * Form::kNumbers, "layers must hold ", Form::kNumbers,
                " numbers for each of at least one layer, got ", forms.size());
    size_t parameter = 0, array = 0;
    for (int64_t i = 0; i < count(); ++i) {
      const Form form = this->form(i);
      const size_t next = parameter + 1 + form.bias;
      TORCH_CHECK(next <= parameters.size() && form.index >= 0 && array + form.index <= index.size(),
                  "layers tells of more tensors than there are");
      visit(i, form, parameters[parameter], form.bias ? parameters[next - 1] : Tensor(),
            index.slice(array, form.index));
      parameter = next, array += form.index;
    }
    TORCH_CHECK(parameter == parameters.size() && array == index.size(), "layers tells of fewer tensors than there are");
  }
};

// As kernels can read it: autograd hands on tensors whose negation is only marked, and zeros that lie nowhere. Operators
// that call one another through the dispatcher need not care.
Tensor readable(const Tensor& t) { return t.is_neg() || t._is_zerotensor() ? t.clone() : t; }

// A layer as the kernels take it.
struct Layer {
  Form form;
  Weight weight;
  Tensor values, bias;
};

std::vector<Layer> checked(const Tensor& x, const Layers& layers) {
  std::vector<Layer> found;
  found.reserve(layers.count());
  layers.each([&](int64_t i, const Form& form, const Tensor& values, const Tensor& bias, at::TensorList index) {
    TORCH_CHECK(values.dim() == 3, "values of layer ", i, " must be [nnz, r, c], got ", values.sizes());
    const std::array<int64_t, 2> shape{form.out, form.in};
    found.push_back({form, Weight(index, shape, values.sizes().slice(1)), {}, {}});
    Layer& layer = found.back();
    layer.values = layer.weight.alive_only(readable(values));
    TORCH_CHECK(values.scalar_type() == x.scalar_type(), "values of layer ", i, " are ", values.scalar_type(), ", x is ",
                x.scalar_type());
    if (form.bias) layer.bias = checked_bias(readable(bias), form.out, x.scalar_type());
    const int64_t inputs = i == 0 ? form.in : found[i - 1].form.out;
    TORCH_CHECK(form.in == inputs, "layer ", i, " takes ", form.in, " features, the one before gives ", inputs);
  });
  check_input("x", x, found[0].form.in, x.scalar_type());
  return found;
}

// Width of the panels that all layers share, in vectors. A layer that alone would take wider ones sums in another order
// here: its gradients differ by rounding.
template <class S>
int shared_width(const std::vector<Layer>& layers, int64_t batch) {
  int64_t features = 0;
  for (const Layer& layer : layers) features = std::max({features, layer.form.in, layer.form.out});
  return panel_width<S>(features, batch);
}

// Where what lies between the layers is kept: of every panel [rows, T] the features of all of them, one layer's behind
// another's, each padded to whole blocks of both its neighbours.
template <class S, int T>
class Between {
 public:
  Between(int64_t batch, const std::vector<Layer>& layers) : panels_((batch + T - 1) / T) {
    for (size_t i = 0; i + 1 < layers.size(); ++i) {
      const Weight &before = layers[i].weight, &after = layers[i + 1].weight;
      places_.push_back({rows_, before.out, std::max(before.rows.lines * before.r, after.columns.lines * after.c)});
      rows_ += places_.back().padded;
    }
  }

  int64_t size() const { return panels_ * rows_ * T; }

  // What lies behind layer i, in `data` [size()].
  template <class D>
  Activation<D> view(D* data, size_t i) const {
    const Place& place = places_[i];
    return {data + place.row * T, panels_ * T, place.features, 1, T, rows_ * T, place.padded};
  }

  // Zeros in all rows past the features.
  void clear_padding(S* data) const {
    for (const Place& place : places_)
      for (int64_t p = 0; p < panels_; ++p)
        std::memset(data + (p * rows_ + place.row + place.features) * T, 0,
                    (place.padded - place.features) * T * sizeof(S));
  }

 private:
  struct Place {
    int64_t row, features, padded;
  };

  std::vector<Place> places_;
  int64_t panels_, rows_ = 0;
};

// y; `kept` receives the activations between the layers, in panels as wide as the backward pass takes them.
template <class S, int V>
Tensor forward_layers(const Tensor& x, const std::vector<Layer>& layers, Tensor& kept) {
  constexpr int T = V * kLanes<S>;
  Tensor y = empty_output(x, layers.back().form.out);
  const Between<S, T> between(x.size(0), layers);
  kept = at::empty({between.size()}, x.options());
  S* const activations = kept.mutable_data_ptr<S>();
  between.clear_padding(activations);
  std::vector<ForwardPass<S>> passes;
  passes.reserve(layers.size());
  Activation<const S> from = read<S>(x);
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const Activation<S> to = i + 1 < layers.size() ? between.view(activations, i) : written<S>(y);
    passes.push_back({from, layer.values.template const_data_ptr<S>(),
                      layer.form.bias ? layer.bias.template const_data_ptr<S>() : nullptr, layer.weight,
                      layer.form.relu, to});
    from = reading(to);
  }
  with_width<2, 4>(forward_width<S>(V, x.size(0)),
                   [&]<int F>(std::integral_constant<int, F>) { forward<S, F>(passes); });
  return y;
}

Tensor forward_layers(const Tensor& x, const std::vector<Layer>& layers, Tensor& kept) {
  Tensor y;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lottery_kernels::mlp", [&] {
    using S = scalar_t;
    with_width<2, 4, 8>(shared_width<S>(layers, x.size(0)), [&]<int V>(std::integral_constant<int, V>) {
      y = forward_layers<S, V>(readable(x), layers, kept);
    });
  });
  return y;
}

// What a backward pass starts from. y: undefined where no ReLU is behind the last layer.
struct Saved {
  Tensor dy, x, y;
  Tensor between;  // activations between the layers
};

// wanted and the result: x, then the parameters in the operator's order.
template <class S, int V>
variable_list backward_layers(const Saved& saved, const std::vector<Layer>& layers, const std::vector<bool>& wanted) {
  constexpr int T = V * kLanes<S>;
  const Tensor &dy = saved.dy, &x = saved.x;
  const bool layer_by_layer = !in_parts((x.size(0) + T - 1) / T);
  variable_list grads(wanted.size());
  const Activation<const S> gate = saved.y.defined() ? read<S>(saved.y) : Activation<const S>{};
  Activation<const S> from = read<S>(dy);
  std::vector<BackwardPass<S>> passes;
  passes.reserve(layers.size());
  const Between<S, T> between(x.size(0), layers);
  const S* const activations = saved.between.const_data_ptr<S>();
  thread_local Scratch<S> buffer;
  S* const gradients_between = layer_by_layer ? buffer.at_least(between.size()) : nullptr;
  if (layer_by_layer) between.clear_padding(gradients_between);
  size_t next = wanted.size();
  const size_t first = std::find(wanted.begin(), wanted.end(), true) - wanted.begin();
  for (size_t i = layers.size(); i-- > 0;) {
    const Layer& layer = layers[i];
    next -= 1 + layer.form.bias;
    const bool goes_on = i > 0 && first < next;
    Gradients<S> gradients{};
    if (i == 0 && wanted[0]) {
      grads[0] = empty_activation(dy, layer.form.in);
      gradients.dx = written<S>(grads[0]);
    } else if (goes_on) {
      if (layer_by_layer) gradients.dx = between.view(gradients_between, i - 1);
      gradients.through_relu = layers[i - 1].form.relu;
    }
    if (wanted[next]) {
      grads[next] = at::empty(layer.values.sizes(), dy.options());
      gradients.dvalues = grads[next].template mutable_data_ptr<S>();
    }
    if (layer.form.bias && wanted[next + 1]) {
      grads[next + 1] = at::empty({layer.form.out}, dy.options());
      gradients.dbias = grads[next + 1].template mutable_data_ptr<S>();
    }
    const Activation<const S> source = i == 0 ? read<S>(x) : between.view(activations, i - 1);
    const bool relu_behind = i + 1 == layers.size() && saved.y.defined();
    passes.push_back({from, relu_behind ? &gate : nullptr, source, layer.values.template const_data_ptr<S>(),
                      layer.weight, gradients});
    if (!goes_on) break;
    from = reading(gradients.dx);
  }
  backward<S, V>(passes);
  return grads;
}

variable_list backward_layers(const Saved& saved, const std::vector<Layer>& layers, const std::vector<bool>& wanted) {
  variable_list grads(wanted.size());
  if (saved.dy.size(0) == 0) {
    size_t i = 1;
    const auto zeros = [&](const Tensor& of) {
      if (wanted[i]) grads[i] = at::zeros_like(of);
      ++i;
    };
    if (wanted[0]) grads[0] = empty_activation(saved.x, saved.x.size(1));
    for (const Layer& layer : layers) {
      zeros(layer.values);
      if (layer.form.bias) zeros(layer.bias);
    }
    return grads;
  }
  AT_DISPATCH_FLOATING_TYPES(saved.x.scalar_type(), "lottery_kernels::mlp", [&] {
    using S = scalar_t;
    with_width<2, 4, 8>(shared_width<S>(layers, saved.x.size(0)), [&]<int V>(std::integral_constant<int, V>) {
      grads = backward_layers<S, V>(saved, layers, wanted);
    });
  });
  size_t next = 1;
  for (const Layer& layer : layers) {
    if (grads[next].defined()) clear_dead(layer.weight.alive, grads[next]);
    next += 1 + layer.form.bias;
  }
  return grads;
}

// The same layers one by one, for gradients of gradients.
Tensor composed(Tensor x, const Layers& layers) {
  using Signature = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, at::TensorList,
                           at::IntArrayRef);
  static const auto linear = find_operator<Signature>("lottery_kernels::linear");
  layers.each([&](int64_t, const Form& form, const Tensor& values, const Tensor& bias, at::TensorList index) {
    const std::array<int64_t, 2> shape{form.out, form.in};
    x = linear.call(x, values, form.bias ? std::optional(bias) : std::nullopt, index, shape);
    if (form.relu) x = at::relu(x);
  });
  return x;
}

// The wanted ones alone.
variable_list composed_gradients(const Tensor& dy, const Tensor& x, const Layers& layers,
                                 const std::vector<bool>& wanted) {
  variable_list inputs;
  for (size_t i = 0; i < wanted.size(); ++i)
    if (wanted[i]) inputs.push_back(i == 0 ? x : layers.parameters[i - 1]);
  return torch::autograd::grad({composed(x, layers)}, inputs, {dy}, true, true);
}

// y, and the activations between the layers for the backward pass.
std::tuple<Tensor, Tensor> mlp_forward(const Tensor& x, at::TensorList parameters, at::TensorList index,
                                       at::IntArrayRef layers) {
  Tensor between;
  Tensor y = forward_layers(x, checked(x, {parameters, index, layers}), between);
  return {std::move(y), std::move(between)};
}

// The wanted gradients alone, in the order of `wanted`: x, then the parameters. y: where ReLU is behind the last layer.
variable_list mlp_backward(const Tensor& dy, const Tensor& x, const std::optional<Tensor>& y, const Tensor& between,
                           at::TensorList parameters, at::TensorList index, at::IntArrayRef layers,
                           const c10::List<bool>& wanted) {
  TORCH_CHECK(wanted.size() == 1 + parameters.size(), "wanted must hold ", 1 + parameters.size(),
              " entries: of x and of each parameter; got ", wanted.size());
  variable_list grads = backward_layers({readable(dy), readable(x), y.value_or(Tensor()), between},
                                        checked(x, {parameters, index, layers}), wanted.vec());
  std::erase_if(grads, [](const Tensor& grad) { return !grad.defined(); });
  return grads;
}

struct MlpFunction : Function<MlpFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, at::TensorList parameters, const Layers& layers) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find_operator<decltype(mlp_forward)>("lottery_kernels::mlp_forward");
    auto [y, between] = op.call(x, parameters, layers.index, layers.forms);
    variable_list saved{x, between, layers.form(layers.count() - 1).relu ? y : Tensor()};
    saved.insert(saved.end(), parameters.begin(), parameters.end());
    saved.insert(saved.end(), layers.index.begin(), layers.index.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["layers"] = layers.forms;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& dy) {
    const variable_list saved = ctx->get_saved_variables();
    const std::vector<int64_t> forms = ctx->saved_data["layers"].toIntVector();
    const Tensor &x = saved[0], &between = saved[1], &y = saved[2];
    Layers layers{{}, {}, forms};
    size_t parameters = 0;
    for (int64_t i = 0; i < layers.count(); ++i) parameters += 1 + layers.form(i).bias;
    layers.parameters = at::TensorList(saved).slice(3, parameters);
    layers.index = at::TensorList(saved).slice(3 + parameters);
    std::vector<bool> wanted(1 + parameters);
    for (size_t i = 0; i < wanted.size(); ++i) wanted[i] = ctx->needs_input_grad(i);
    variable_list found, grads(wanted.size() + 1);  // the last of the rest, which has none
    if (at::GradMode::is_enabled()) {
      found = composed_gradients(dy[0], x, layers, wanted);
    } else {
      static const auto op = find_operator<decltype(mlp_backward)>("lottery_kernels::mlp_backward");
      c10::List<bool> list;
      for (const bool one : wanted) list.push_back(one);
      found = op.call(dy[0], x, y.defined() ? std::optional(y) : std::nullopt, between, layers.parameters, layers.index,
                      forms, list);
    }
    for (size_t i = 0, k = 0; i < wanted.size(); ++i)
      if (wanted[i]) grads[i] = found[k++];
    return grads;
  }
};

Tensor mlp(const Tensor& x, at::TensorList parameters, at::TensorList index, at::IntArrayRef layers) {
  return std::get<0>(mlp_forward(x, parameters, index, layers));
}

Tensor mlp_autograd(const Tensor& x, at::TensorList parameters, at::TensorList index, at::IntArrayRef layers) {
  if (!at::GradMode::is_enabled()) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find_operator<decltype(mlp)>("lottery_kernels::mlp");
    return op.call(x, parameters, index, layers);
  }
  return MlpFunction::apply(x, parameters, Layers{parameters, index, layers});
}

// `parameters`: of each layer values, then the bias if it has one; `index`: the arrays of all patterns; `layers`: of each
// (out, in, whether it has a bias, whether ReLU follows, number of its index arrays).
TORCH_LIBRARY_FRAGMENT(lottery_kernels, m) {
  m.def("mlp(Tensor x, Tensor[] parameters, Tensor[] index, int[] layers) -> Tensor");
  m.def("mlp_forward(Tensor x, Tensor[] parameters, Tensor[] index, int[] layers) -> (Tensor, Tensor)");
  m.def(
      "mlp_backward(Tensor dy, Tensor x, Tensor? y, Tensor between, Tensor[] parameters, Tensor[] index, int[] layers, "
      "bool[] wanted) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(lottery_kernels, CPU, m) {
  m.impl("mlp", &mlp);
  m.impl("mlp_forward", &mlp_forward);
  m.impl("mlp_backward", &mlp_backward);
}

TORCH_LIBRARY_IMPL(lottery_kernels, AutogradCPU, m) { m.impl("mlp", &mlp_autograd); }

}  // namespace
}  // namespace lottery
