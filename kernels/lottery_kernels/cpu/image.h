// Batch-innermost images: [N, C, H, W] seen from outside, [C, H, W, N] in memory.
#pragma once

#include <ATen/ATen.h>

#include "memory.h"

namespace lottery {

inline bool is_batch_innermost(const at::Tensor& x) { return x.permute({1, 2, 3, 0}).is_contiguous(); }

inline at::Tensor empty_image(const at::Tensor& like, at::IntArrayRef shape) {
  const int64_t n = shape[0], w = shape[3], h = shape[2];
  const std::array<int64_t, 4> strides{1, h * w * n, w * n, n};
  const size_t needed = shape[1] * h * w * n * like.element_size();
  const bool is_to_be_filled = at::globalContext().deterministicAlgorithms();  // torch then fills with NaN
  if (needed < kLargePage || is_to_be_filled) return at::empty_strided(shape, strides, like.options());
  const size_t bytes = in_large_pages(needed);
  void* data = Pool::instance().take(bytes);
  const auto give_back = [bytes](void* block) { Pool::instance().give_back(block, bytes); };
  return at::from_blob(data, shape, strides, give_back, like.options());
}

inline at::Tensor empty_image_symint(const at::Tensor& like) {
  const c10::SymInt n = like.sym_size(0), h = like.sym_size(2), w = like.sym_size(3);
  return at::empty_strided_symint(like.sym_sizes(), {1, h * w * n, w * n, n}, like.options());
}

inline at::Tensor batch_innermost(const at::Tensor& x) {
  return is_batch_innermost(x) ? x : empty_image(x, x.sizes()).copy_(x);
}

}  // namespace lottery
