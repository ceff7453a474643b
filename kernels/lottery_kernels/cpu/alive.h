// Values of live blocks whose mask is finer than the block, or that stick out of the weight: dead positions count as
// zero whatever they hold, NaN too.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>

namespace lottery {

namespace detail {

constexpr int64_t kAliveGrain = 1 << 16;

// As bytes: of conditions on bools compilers make no vectors.
inline const uint8_t* checked_alive(const at::Tensor& alive, const at::Tensor& values) {
  TORCH_CHECK(alive.scalar_type() == at::kBool && alive.is_contiguous() && alive.is_cpu() &&
                  alive.sizes() == values.sizes(),
              "index[5] must be a contiguous bool tensor in the shape of values, ", values.sizes(), ", on the CPU");
  return reinterpret_cast<const uint8_t*>(alive.const_data_ptr<bool>());
}

// Both contiguous.
inline bool dead_are_zero(const at::Tensor& alive, const at::Tensor& values) {
  const uint8_t* live = checked_alive(alive, values);
  std::atomic<bool> found{false};
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "lottery_kernels::dead_are_zero", [&] {
    const scalar_t* source = values.const_data_ptr<scalar_t>();
    at::parallel_for(0, values.numel(), kAliveGrain, [&](int64_t begin, int64_t end) {
      uint32_t any = 0;
      for (int64_t i = begin; i < end; ++i) any |= uint32_t(live[i] == 0) & uint32_t(source[i] != scalar_t(0));
      if (any) found = true;
    });
  });
  return !found;
}

// All contiguous; `to` may be `from`.
inline void copy_alive(const at::Tensor& alive, const at::Tensor& from, const at::Tensor& to) {
  const uint8_t* live = checked_alive(alive, from);
  AT_DISPATCH_FLOATING_TYPES(from.scalar_type(), "lottery_kernels::copy_alive", [&] {
    const scalar_t* source = from.const_data_ptr<scalar_t>();
    scalar_t* target = to.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, from.numel(), kAliveGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t value = source[i];  // read whether alive or not, so that vectors are
        target[i] = live[i] != 0 ? value : scalar_t(0);
      }
    });
  });
}

}  // namespace detail

// Contiguous `values` [nnz, r, c], zero where not alive; `alive` undefined: as they are. Where training keeps dead
// positions zero, as it does, this is `values` itself: a copy would lie in the cache of the thread that made it.
inline at::Tensor alive_only(const at::Tensor& alive, const at::Tensor& values) {
  const at::Tensor from = values.contiguous();
  if (!alive.defined() || detail::dead_are_zero(alive, from)) return from;
  at::Tensor live = at::empty(values.sizes(), values.options());
  detail::copy_alive(alive, from, live);
  return live;
}

// The same in place, for contiguous `values`. Only looks where there is nothing to clear: sums of positions outside the
// weight are zero already.
inline void clear_dead(const at::Tensor& alive, const at::Tensor& values) {
  if (alive.defined() && !detail::dead_are_zero(alive, values)) detail::copy_alive(alive, values, values);
}

}  // namespace lottery
