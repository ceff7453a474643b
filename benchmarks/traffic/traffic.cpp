// The least that a pass over tensors takes: every read once, every written once past the caches, and nothing computed.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../../kernels/lottery_kernels/cpu/stream.h"

namespace lottery {
namespace {

// Elements [begin, end) of a tensor that are share `i` of `n`, in whole vectors.
std::pair<int64_t, int64_t> share(const at::Tensor& t, int64_t i, int64_t n) {
  const int64_t vectors = t.numel() / kLanes<float>;
  return {vectors * i / n * kLanes<float>, vectors * (i + 1) / n * kLanes<float>};
}

// Reads and writes side by side in shares of a few KiB, as a kernel does that works tile by tile.
void traffic(at::TensorList reads, at::TensorList writes) {
  int64_t largest = 0;
  for (const at::TensorList list : {reads, writes})
    for (const at::Tensor& t : list) {
      TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_non_overlapping_and_dense() && is_aligned(t.const_data_ptr()),
                  "traffic takes dense, aligned tensors of float32");
      largest = std::max(largest, t.numel());
    }
  const int64_t shares = std::max<int64_t>(1, largest / 2048);
  at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      Vec<float> sum = {};
      for (const at::Tensor& t : reads) {
        const float* from = t.const_data_ptr<float>();
        const auto [begin, end] = share(t, i, shares);
        for (int64_t k = begin; k < end; k += kLanes<float>) sum += load(from + k);
      }
      for (const at::Tensor& t : writes) {
        float* to = t.mutable_data_ptr<float>();
        const auto [begin, end] = share(t, i, shares);
        for (int64_t k = begin; k < end; k += kLanes<float>) stream(to + k, sum);
      }
    }
    finish_streams();
  });
}

TORCH_LIBRARY(lottery_benchmarks, m) { m.def("traffic(Tensor[] reads, Tensor(a!)[] writes) -> ()"); }

TORCH_LIBRARY_IMPL(lottery_benchmarks, CPU, m) { m.impl("traffic", &traffic); }

}  // namespace
}  // namespace lottery
