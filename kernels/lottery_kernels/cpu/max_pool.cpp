// Max pooling of batch-innermost images by windows that do not overlap. Gradients find the largest of a window again in
// x: no indices are kept, and dx is written once.
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
using Ints = at::IntArrayRef;

struct Windows {
  int64_t channels, height, width, batch;
  int64_t window_height, window_width, down, across;  // down, across: strides
  int64_t rows, cols;  // of the output

  Windows(Ints x, Ints kernel, Ints stride)
      : channels(x[1]), height(x[2]), width(x[3]), batch(x[0]), window_height(kernel[0]), window_width(kernel[1]),
        down(stride[0]), across(stride[1]), rows((height - window_height) / down + 1),
        cols((width - window_width) / across + 1) {
    TORCH_CHECK(window_height > 0 && window_width > 0 && window_height <= down && window_width <= across,
                "windows of ", kernel, " must not be empty or overlap, their strides are ", stride);
    TORCH_CHECK(window_height <= height && window_width <= width, "x must be at least as large as a window of ", kernel,
                ", got ", x);
  }

  std::array<int64_t, 4> output() const { return {batch, channels, rows, cols}; }
  bool cover_all() const {
    return window_height == down && window_width == across && height % down == 0 && width % across == 0;
  }

  // Calls visit(input, output) with the offsets at which each window and its result begin, shared among the threads.
  template <class Visit>
  void each(const Visit& visit) const {
    const int64_t grain = std::max<int64_t>(1, (int64_t(1) << 15) / std::max<int64_t>(1, down * width * batch));
    at::parallel_for(0, channels * rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for (int64_t col = 0; col < cols; ++col)
          visit(((row / rows * height + row % rows * down) * width + col * across) * batch, (row * cols + col) * batch);
    });
  }

  // Calls f(k, offset) for the entries of a window in the order of memory.
  template <class F>
  void entries(const F& f) const {
    for (int64_t i = 0, k = 0; i < window_height; ++i)
      for (int64_t j = 0; j < window_width; ++j, ++k) f(k, (i * width + j) * batch);
  }
};

// Calls vector(n) for runs of whole vectors that cover [0, count), the last of which may overlap the one before, or
// scalar(n) for each where there is no room for one.
template <class S, class Vector, class Scalar>
inline void over_batch(int64_t count, const Vector& vector, const Scalar& scalar) {
  constexpr int64_t L = kLanes<S>;
  if (count < L)
    for (int64_t n = 0; n < count; ++n) scalar(n);
  else
    for (int64_t n = 0; n < count; n += L) vector(std::min(n, count - L));
}

// Whether x replaces the largest so far, as torch decides: the first of equals wins, the last NaN over all.
template <class V>
inline auto wins(V x, V largest) {
  return (x > largest) | (x != x);
}

template <class V, class At>
inline V largest_of(const Windows& windows, const At& at) {
  V largest = at(0);
  windows.entries([&](int64_t, int64_t offset) {
    const V x = at(offset);
    largest = wins(x, largest) ? x : largest;
  });
  return largest;
}

// Calls put(offset, gradient) for every entry of a window.
template <class S, class V, class At, class Put>
inline void gradients(const Windows& windows, V dy, const At& at, const Put& put) {
  V largest = at(0), number{};  // of the entry that has it
  windows.entries([&](int64_t k, int64_t offset) {
    const V x = at(offset);
    const auto won = wins(x, largest);
    largest = won ? x : largest;
    number = won ? V{} + S(k) : number;
  });
  windows.entries([&](int64_t k, int64_t offset) { put(offset, number == V{} + S(k) ? dy : V{}); });
}

void check(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && is_batch_innermost(x), "x must be a batch-innermost image, got ", x.sizes(),
              " with strides ", x.strides());
}

Tensor max_pool2d(const Tensor& x, Ints kernel, Ints stride) {
  check(x);
  const Windows windows(x.sizes(), kernel, stride);
  Tensor y = empty_image(x, windows.output());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lottery_kernels::max_pool2d", [&] {
    using S = scalar_t;
    const S* from = x.const_data_ptr<S>();
    S* to = y.mutable_data_ptr<S>();
    windows.each([&](int64_t in, int64_t out) {
      over_batch<S>(
          windows.batch,
          [&](int64_t n) {
            const S* at = from + in + n;
            store(to + out + n, largest_of<Vec<S>>(windows, [&](int64_t offset) { return load(at + offset); }));
          },
          [&](int64_t n) {
            to[out + n] = largest_of<S>(windows, [&](int64_t offset) { return from[in + n + offset]; });
          });
    });
  });
  return y;
}

Tensor max_pool2d_backward(const Tensor& dy_any, const Tensor& x, Ints kernel, Ints stride) {
  check(x);
  const Windows windows(x.sizes(), kernel, stride);
  TORCH_CHECK(dy_any.sizes() == Ints(windows.output()) && dy_any.scalar_type() == x.scalar_type(), "dy must be ",
              Ints(windows.output()), " of ", x.scalar_type(), ", got ", dy_any.sizes(), " of ", dy_any.scalar_type());
  const Tensor dy = batch_innermost(dy_any);
  Tensor dx = empty_image(x, x.sizes());
  if (!windows.cover_all()) dx.zero_();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "lottery_kernels::max_pool2d_backward", [&] {
    using S = scalar_t;
    const S *from = x.const_data_ptr<S>(), *gradient = dy.const_data_ptr<S>();
    S* to = dx.mutable_data_ptr<S>();
    windows.each([&](int64_t in, int64_t out) {
      over_batch<S>(
          windows.batch,
          [&](int64_t n) {
            gradients<S>(
                windows, load(gradient + out + n), [&](int64_t offset) { return load(from + in + n + offset); },
                [&](int64_t offset, Vec<S> value) { store(to + in + n + offset, value); });
          },
          [&](int64_t n) {
            gradients<S>(
                windows, gradient[out + n], [&](int64_t offset) { return from[in + n + offset]; },
                [&](int64_t offset, S value) { to[in + n + offset] = value; });
          });
    });
  });
  return dx;
}

struct MaxPoolFunction : Function<MaxPoolFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, Ints kernel, Ints stride) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = find_operator<decltype(max_pool2d)>("lottery_kernels::max_pool2d");
    ctx->save_for_backward({x});
    ctx->saved_data["kernel"] = kernel, ctx->saved_data["stride"] = stride;
    return op.call(x, kernel, stride);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor x = ctx->get_saved_variables()[0], &dy = grads[0];
    const auto kernel = ctx->saved_data["kernel"].toIntVector(), stride = ctx->saved_data["stride"].toIntVector();
    if (at::GradMode::is_enabled()) {  // torch's own, which can be differentiated again
      const std::array<int64_t, 2> padding{0, 0}, dilation{1, 1};
      const Tensor indices = [&] {
        const at::NoGradGuard guard;
        return std::get<1>(at::max_pool2d_with_indices(x, kernel, stride, padding, dilation, false));
      }();
      return {at::max_pool2d_with_indices_backward(dy, x, kernel, stride, padding, dilation, false, indices), {}, {}};
    }
    static const auto op = find_operator<decltype(max_pool2d_backward)>("lottery_kernels::max_pool2d_backward");
    return {op.call(dy, x, kernel, stride), {}, {}};
  }
};

Tensor max_pool2d_autograd(const Tensor& x, Ints kernel, Ints stride) {
  return MaxPoolFunction::apply(x, kernel, stride);
}

// Shapes and strides, for torch.compile.
Tensor max_pool2d_meta(const Tensor& x, Ints kernel, Ints stride) {
  const auto size = [&](int64_t axis) { return (x.sym_size(2 + axis) - kernel[axis]) / stride[axis] + 1; };
  const c10::SymInt n = x.sym_size(0), c = x.sym_size(1), h = size(0), w = size(1);
  return at::empty_strided_symint({n, c, h, w}, {1, h * w * n, w * n, n}, x.options());
}

Tensor max_pool2d_backward_meta(const Tensor&, const Tensor& x, Ints, Ints) { return empty_image_symint(x); }

TORCH_LIBRARY_FRAGMENT(lottery_kernels, m) {
  m.def("max_pool2d(Tensor x, int[] kernel, int[] stride) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("max_pool2d_backward(Tensor dy, Tensor x, int[] kernel, int[] stride) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(lottery_kernels, Meta, m) {
  m.impl("max_pool2d", &max_pool2d_meta);
  m.impl("max_pool2d_backward", &max_pool2d_backward_meta);
}

TORCH_LIBRARY_IMPL(lottery_kernels, CPU, m) {
  m.impl("max_pool2d", &max_pool2d);
  m.impl("max_pool2d_backward", &max_pool2d_backward);
}

TORCH_LIBRARY_IMPL(lottery_kernels, AutogradCPU, m) { m.impl("max_pool2d", &max_pool2d_autograd); }

}  // namespace
}  // namespace lottery
