// CPU kernels of the convolution operators. A live block adds a constant to an address (conv_geometry.h) in a panel of
// packed sources (conv_panel.h); the sums (conv_pass.h) are those of the linear kernels (sparse_matmul.h). Results do
// not depend on the number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "conv_backward.h"
#include "conv_pass.h"
#include "conv_weight.h"
#include "image.h"
#include "shares.h"

namespace lottery {
namespace {

using at::Tensor;

template <class S>
Image<const S> read(const Tensor& x) {
  return {x.const_data_ptr<S>(), x.size(1), x.size(2), x.size(3), x.size(0)};
}

template <class S>
Image<S> written(Tensor& y) {
  return {y.mutable_data_ptr<S>(), y.size(1), y.size(2), y.size(3), y.size(0)};
}

template <class S>
Pass<S> forward_pass(const ConvWeight& weight, const Image<const S>& x) {
  const Axis down = weight.down.forward(), across = weight.across.forward();
  Pass<S> pass(down, across, {weight.in_channels(), weight.c}, {weight.out_channels(), weight.r}, x);
  pass.add_phase(down, across, weight.rows);
  return pass;
}

template <class S>
Pass<S> backward_pass(const ConvWeight& weight, const Image<const S>& dy, const Image<const S>& relu) {
  Pass<S> pass(weight.down.backward(), weight.across.backward(), {weight.out_channels(), weight.r},
               {weight.in_channels(), weight.c}, dy, relu);
  for (int64_t i = 0; i < weight.down.stride; ++i)
    for (int64_t j = 0; j < weight.across.stride; ++j)
      pass.add_phase(weight.down.backward(i), weight.across.backward(j), weight.columns);
  return pass;
}

template <class S>
void forward(const Image<const S>& x, const S* values, const S* bias, const ConvWeight& weight, bool with_relu,
             const Image<S>& y) {
  const Pass<S> pass = forward_pass<S>(weight, x);
  const Phase& phase = pass.phases[0];
  const Gather& gather = phase.gather;
  const LineSums<S> sums(gather, values, weight.forward(), pass.window.plane);
  const int64_t cost = std::max<int64_t>(1, total_cost(weight.rows)), work = cost * pass.tiles.count();
  in_shares(work * pass.tiling.rows * pass.tiling.cols * pass.tiling.vectors, [&](int64_t i, int64_t n) {
    SourcePanel<S> panel = pass.panel();
    const int64_t begin = work * i / n, end = work * (i + 1) / n;
    for (int64_t p = begin / cost; p * cost < end; ++p) {
      const Tile tile = pass.tiles[p];
      panel.pack(tile);
      const int64_t last = line_at(weight.rows, std::min(end - p * cost, cost));
      for (int64_t line = line_at(weight.rows, begin - p * cost); line < last; ++line) {
        const LineChannels channels(pass.targets, line);
        for (int64_t t = tile.row; t < tile.row_end; ++t) {
          const auto [from, to] = phase.inside[t];
          sums.run(
              gather.begin(line, from), gather.begin(line, to), panel.row(t), pass.run(tile), channels.count,
              [&](int64_t out) { return bias ? bias[channels.first + out] : S(0); },
              [&](int64_t out) { return pass.target(phase, y, channels.first + out, t, tile).rectified(with_relu); });
        }
      }
    }
    finish_streams();
  });
}

// Sums of tiles are added up in this many parts, whatever the number of threads.
constexpr int64_t kParts = 4;

// dvalues = the sum of all parts of dots, [parts, phases, live blocks of the phase].
template <class S>
void add_parts(const Pass<S>& pass, const std::vector<S>& dots, int64_t parts, int64_t size, S* dvalues) {
  const S* of_phase = dots.data();
  const int64_t stride = int64_t(dots.size()) / parts;
  for (const Phase& phase : pass.phases) {
    for (int64_t k = 0; k < phase.gather.nnz(); ++k) {
      S* to = dvalues + phase.gather.position[k] * size;
      for (int64_t i = 0; i < size; ++i) {
        S sum = of_phase[k * size + i];
        for (int64_t part = 1; part < parts; ++part) sum += of_phase[part * stride + k * size + i];
        to[i] = sum;
      }
    }
    of_phase += phase.gather.nnz() * size;
  }
}

template <class S>
void backward(const Pass<S>& pass, const ConvWeight& weight, const Image<const S>& x, const S* values,
              const ConvGradients<S>& wanted) {
  const int64_t tiles = pass.tiles.count(), parts = std::min(tiles, kParts), size = weight.r * weight.c;
  const int64_t ranges = (at::get_num_threads() + parts - 1) / parts, cost = total_cost(weight.columns);
  const int64_t count = wanted.dvalues ? weight.nnz() * size : 0;
  std::vector<S> dots(parts * count);
  const int64_t channels = wanted.dbias ? pass.source.channels : 0;
  std::vector<double> bias_sums(parts * channels);
  at::parallel_for(0, parts * ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item / ranges, range = item % ranges;
      double* const to_bias = channels && range == 0 ? bias_sums.data() + part * channels : nullptr;
      BackwardShare<S>(pass, weight, x, values, wanted, dots.data() + part * count, to_bias)
          .run(tiles * part / parts, tiles * (part + 1) / parts, line_at(weight.columns, cost * range / ranges),
               line_at(weight.columns, cost * (range + 1) / ranges));
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += bias_sums[part * channels + c];
    wanted.dbias[c] = S(sum);
  }
  if (wanted.dvalues) add_parts(pass, dots, parts, size, wanted.dvalues);
}

// Whether a backward pass packs every entry of dy: it can then add them up on the way.
bool packs_all(const ConvWeight& weight) {
  return weight.nnz() > 0 && weight.down.backward().reads_all() && weight.across.backward().reads_all();
}

// dx, dvalues and dbias (which asks for `packs_all`), where defined, in one pass over dy. relu, where defined: the output
// of a ReLU behind which dy is the gradient.
void backward(const Tensor& dy, const Tensor& relu, const Tensor& x, const Tensor& values, const ConvWeight& weight,
              Tensor& dx, Tensor& dvalues, Tensor& dbias) {
  if (dy.numel() == 0) {
    if (dvalues.defined()) dvalues.zero_();
    if (dbias.defined()) dbias.zero_();
    return;
  }
  AT_DISPATCH_FLOATING_TYPES(dy.scalar_type(), "lottery_kernels::conv2d_backward", [&] {
    using S = scalar_t;
    const Image<const S> x_image = dvalues.defined() ? read<S>(x) : Image<const S>{};
    const ConvGradients<S> wanted{dx.defined() ? written<S>(dx) : Image<S>{},
                                  dvalues.defined() ? dvalues.mutable_data_ptr<S>() : nullptr,
                                  dbias.defined() ? dbias.mutable_data_ptr<S>() : nullptr};
    const Image<const S> relu_image = relu.defined() ? read<S>(relu) : Image<const S>{};
    const S* w = dx.defined() ? values.const_data_ptr<S>() : nullptr;
    backward<S>(backward_pass<S>(weight, read<S>(dy), relu_image), weight, x_image, w, wanted);
  });
}

void check_type(const char* name, const Tensor& x, at::ScalarType dtype) {
  TORCH_CHECK(x.scalar_type() == dtype, name, " is ", x.scalar_type(), ", the weight's values are ", dtype);
}

void check_output(const char* name, const Tensor& y, const ConvWeight& weight, int64_t batch) {
  const std::array<int64_t, 4> expected{batch, weight.groups * weight.outputs, weight.down.out, weight.across.out};
  TORCH_CHECK(y.sizes() == at::IntArrayRef(expected), name, " must be ", at::IntArrayRef(expected), ", got ",
              y.sizes());
}

bool is_half(const Tensor& x) { return x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16; }

template <bool RELU>
Tensor conv2d(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias, at::TensorList index,
              at::IntArrayRef weight_shape, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
              int64_t groups) {
  if (is_half(x)) {
    const std::optional<Tensor> b = bias ? std::optional(bias->to(at::kFloat)) : std::nullopt;
    return conv2d<RELU>(x.to(at::kFloat), values.to(at::kFloat), b, index, weight_shape, stride, padding, dilation,
                        groups)
        .to(x.scalar_type());
  }
  const ConvWeight weight(index, weight_shape, values.sizes().slice(1), x.sizes(), stride, padding, dilation, groups);
  check_type("x", x, values.scalar_type());
  const Tensor live = weight.alive_only(values), from = batch_innermost(x), b = bias ? bias->contiguous() : Tensor();
  const int64_t out = groups * weight.outputs;
  if (b.defined())
    TORCH_CHECK(b.numel() == out && b.scalar_type() == x.scalar_type(), "bias must be [", out, "] of ",
                x.scalar_type(), ", got ", b.sizes(), " of ", b.scalar_type());
  Tensor y = empty_image(x, {x.size(0), out, weight.down.out, weight.across.out});
  if (y.numel() == 0) return y;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lottery_kernels::conv2d", [&] {
    using S = scalar_t;
    forward<S>(read<S>(from), live.const_data_ptr<S>(), b.defined() ? b.const_data_ptr<S>() : nullptr, weight, RELU,
               written<S>(y));
  });
  return y;
}

Tensor conv2d_dgrad(const Tensor& dy, const Tensor& values, at::TensorList index, at::IntArrayRef weight_shape,
                    at::IntArrayRef x_shape, at::IntArrayRef stride, at::IntArrayRef padding,
                    at::IntArrayRef dilation, int64_t groups) {
  if (is_half(dy))
    return conv2d_dgrad(dy.to(at::kFloat), values.to(at::kFloat), index, weight_shape, x_shape, stride, padding,
                        dilation, groups)
        .to(dy.scalar_type());
  const ConvWeight weight(index, weight_shape, values.sizes().slice(1), x_shape, stride, padding, dilation, groups);
  check_type("dy", dy, values.scalar_type());
  check_output("dy", dy, weight, x_shape[0]);
  Tensor dx = empty_image(dy, x_shape), none;
  backward(batch_innermost(dy), none, none, weight.alive_only(values), weight, dx, none, none);
  return dx;
}

Tensor conv2d_wgrad(const Tensor& dy, const Tensor& x, at::TensorList index, at::IntArrayRef weight_shape,
                    at::IntArrayRef block, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                    int64_t groups) {
  if (is_half(dy))
    return conv2d_wgrad(dy.to(at::kFloat), x.to(at::kFloat), index, weight_shape, block, stride, padding, dilation,
                        groups)
        .to(dy.scalar_type());
  const ConvWeight weight(index, weight_shape, block, x.sizes(), stride, padding, dilation, groups);
  check_type("dy", dy, x.scalar_type());
  check_output("dy", dy, weight, x.size(0));
  Tensor dvalues = at::empty({weight.nnz(), weight.r, weight.c}, x.options()), none;
  backward(batch_innermost(dy), none, batch_innermost(x), none, weight, none, dvalues, none);
  clear_dead(weight.alive, dvalues);
  return dvalues;
}

// dx, dvalues and dbias in one pass over dy; what `wanted` leaves out comes back with no elements. With `relu`, the
// output of a ReLU behind the convolution, dy is the gradient behind that.
std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                   at::TensorList index, at::IntArrayRef weight_shape,
                                                   at::IntArrayRef stride, at::IntArrayRef padding,
                                                   at::IntArrayRef dilation, int64_t groups,
                                                   std::array<bool, 3> wanted, const std::optional<Tensor>& relu) {
  if (is_half(dy)) {
    const auto y = relu ? std::optional(relu->to(at::kFloat)) : std::nullopt;
    const auto [dx, dvalues, dbias] =
        conv2d_backward(dy.to(at::kFloat), x.to(at::kFloat), values.to(at::kFloat), index, weight_shape, stride,
                        padding, dilation, groups, wanted, y);
    const auto dtype = dy.scalar_type();
    return {dx.to(dtype), dvalues.to(dtype), dbias.to(dtype)};
  }
  const ConvWeight weight(index, weight_shape, values.sizes().slice(1), x.sizes(), stride, padding, dilation, groups);
  check_type("dy", dy, values.scalar_type());
  check_type("x", x, values.scalar_type());
  check_output("dy", dy, weight, x.size(0));
  if (relu) check_type("relu", *relu, values.scalar_type()), check_output("relu", *relu, weight, x.size(0));
  const bool in_pass = (wanted[0] || wanted[1]) && packs_all(weight);
  const Tensor behind = batch_innermost(dy), y = relu ? batch_innermost(*relu) : Tensor();
  const Tensor from = y.defined() && !in_pass ? at::threshold_backward(behind, y, 0) : behind;
  Tensor dx, dvalues, dbias, none;
  if (wanted[0]) dx = empty_image(dy, x.sizes());
  if (wanted[1]) dvalues = at::empty(values.sizes(), values.options());
  if (wanted[2] && in_pass) dbias = at::empty({dy.size(1)}, dy.options());
  else if (wanted[2]) dbias = from.permute({1, 2, 3, 0}).reshape({dy.size(1), -1}).sum(1);
  if (wanted[0] || wanted[1])
    backward(from, in_pass ? y : none, wanted[1] ? batch_innermost(x) : x,
             wanted[0] ? weight.alive_only(values) : none, weight, dx, dvalues, in_pass ? dbias : none);
  if (wanted[1]) clear_dead(weight.alive, dvalues);
  const auto or_empty = [&](const Tensor& t) { return t.defined() ? t : at::empty({0}, dy.options()); };
  return {or_empty(dx), or_empty(dvalues), or_empty(dbias)};
}

// Shapes and strides of conv2d_backward, for torch.compile; the batch and the number of blocks may be symbolic.
std::tuple<Tensor, Tensor, Tensor> conv2d_backward_meta(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                        at::TensorList, at::IntArrayRef weight_shape, at::IntArrayRef,
                                                        at::IntArrayRef, at::IntArrayRef, int64_t,
                                                        std::array<bool, 3> wanted, const std::optional<Tensor>&) {
  const auto none = [&] { return at::empty({0}, dy.options()); };
  return {wanted[0] ? empty_image_symint(x) : none(),
          wanted[1] ? at::empty_symint(values.sym_sizes(), values.options()) : none(),
          wanted[2] ? at::empty({weight_shape[0]}, dy.options()) : none()};
}

TORCH_LIBRARY_FRAGMENT(lottery_kernels, m) {
  m.def("conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor[] index, int[] weight_shape, int[] stride, "
        "int[] padding, int[] dilation, int groups, bool[3] wanted, Tensor? relu=None) -> (Tensor, Tensor, Tensor)",
        {at::Tag::pt2_compliant_tag});
  m.def("conv2d_relu(Tensor x, Tensor values, Tensor? bias, Tensor[] index, int[] weight_shape, int[] stride, "
        "int[] padding, int[] dilation, int groups) -> Tensor");
}

TORCH_LIBRARY_IMPL(lottery_kernels, Meta, m) { m.impl("conv2d_backward", &conv2d_backward_meta); }

TORCH_LIBRARY_IMPL(lottery_kernels, CPU, m) {
  m.impl("conv2d", &conv2d<false>);
  m.impl("conv2d_relu", &conv2d<true>);
  m.impl("conv2d_dgrad", &conv2d_dgrad);
  m.impl("conv2d_wgrad", &conv2d_wgrad);
  m.impl("conv2d_backward", &conv2d_backward);
}

}  // namespace
}  // namespace lottery
