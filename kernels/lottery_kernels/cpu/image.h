// Batch-innermost images: [N, C, H, W] seen from outside, [C, H, W, N] in memory.
#pragma once

#include <ATen/ATen.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lottery {

inline bool is_batch_innermost(const at::Tensor& x) { return x.permute({1, 2, 3, 0}).is_contiguous(); }

// Large images in large pages: touching fresh memory in small ones costs as much as a sparse convolution.
inline void prefer_large_pages(const at::Tensor& x) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const auto begin = (reinterpret_cast<uintptr_t>(x.data_ptr()) + kPage - 1) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(x.data_ptr()) + x.nbytes()) / kPage * kPage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a mere hint
#endif
}

inline at::Tensor empty_image(const at::Tensor& like, at::IntArrayRef shape) {
  const int64_t n = shape[0], w = shape[3], h = shape[2];
  at::Tensor image = at::empty_strided(shape, {1, h * w * n, w * n, n}, like.options());
  prefer_large_pages(image);
  return image;
}

inline at::Tensor empty_image_symint(const at::Tensor& like) {
  const c10::SymInt n = like.sym_size(0), h = like.sym_size(2), w = like.sym_size(3);
  return at::empty_strided_symint(like.sym_sizes(), {1, h * w * n, w * n, n}, like.options());
}

inline at::Tensor batch_innermost(const at::Tensor& x) {
  return is_batch_innermost(x) ? x : empty_image(x, x.sizes()).copy_(x);
}

}  // namespace lottery
