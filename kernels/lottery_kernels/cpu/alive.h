// Values of live blocks whose mask is finer than the block: dead positions count as zero whatever they hold, NaN too.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

namespace lottery {

namespace detail {

// `to` may be `from`.
inline void copy_alive(const at::Tensor& alive, const at::Tensor& from, const at::Tensor& to) {
  TORCH_CHECK(alive.scalar_type() == at::kBool && alive.is_contiguous() && alive.is_cpu() &&
                  alive.sizes() == from.sizes(),
              "index[5] must be a contiguous bool tensor in the shape of values, ", from.sizes(), ", on the CPU");
  AT_DISPATCH_FLOATING_TYPES(from.scalar_type(), "lottery_kernels::alive_only", [&] {
    const bool* live = alive.const_data_ptr<bool>();
    const scalar_t* source = from.const_data_ptr<scalar_t>();
    scalar_t* target = to.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, from.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) target[i] = live[i] ? source[i] : scalar_t(0);
    });
  });
}

}  // namespace detail

// Contiguous `values` [nnz, r, c], zero where not alive; `alive` undefined: as they are.
inline at::Tensor alive_only(const at::Tensor& alive, const at::Tensor& values) {
  if (!alive.defined()) return values.contiguous();
  at::Tensor live = at::empty(values.sizes(), values.options());
  detail::copy_alive(alive, values.contiguous(), live);
  return live;
}

// The same in place, for contiguous `values`.
inline void clear_dead(const at::Tensor& alive, const at::Tensor& values) {
  if (alive.defined()) detail::copy_alive(alive, values, values);
}

}  // namespace lottery
