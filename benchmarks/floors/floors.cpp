// The least that a pass over tensors takes: every read once, every written once past the caches, and nothing computed;
// the least that multiply-adds take: those of registers alone; and the least that layers take as an operator with
// gradients: the calls and what they write.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cstring>
#include <numeric>
#include <vector>

#include "../../kernels/lottery_kernels/cpu/stream.h"

namespace lottery {
namespace {

// Elements [begin, end) of a tensor that are share `i` of `n`, in whole vectors.
std::pair<int64_t, int64_t> share(const at::Tensor& t, int64_t i, int64_t n) {
  const int64_t vectors = t.numel() / kLanes<float>;
  return {vectors * i / n * kLanes<float>, vectors * (i + 1) / n * kLanes<float>};
}

// Sums of elements [begin, end), in whole vectors; several at once, or additions would wait for one another.
Vec<float> read(const float* from, int64_t begin, int64_t end) {
  constexpr int CHAINS = 8, L = kLanes<float>;
  Vec<float> sums[CHAINS] = {};
  for (; begin + CHAINS * L <= end; begin += CHAINS * L)
    for (int i = 0; i < CHAINS; ++i) sums[i] += load(from + begin + i * L);
  for (; begin < end; begin += L) sums[0] += load(from + begin);
  for (int i = 1; i < CHAINS; ++i) sums[0] += sums[i];
  return sums[0];
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
        const auto [begin, end] = share(t, i, shares);
        sum += read(t.const_data_ptr<float>(), begin, end);
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

// `count` multiply-adds of single numbers, shared out among the threads; in enough chains to keep two units busy whose
// results come five cycles later.
double multiply_adds(int64_t count) {
  constexpr int CHAINS = 12;
  const int64_t rounds = count / (CHAINS * kLanes<float>), threads = at::get_num_threads();
  std::vector<float> results(threads);
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      const Vec<float> factor = splat(1.0f / count), term = splat(1.0f);
      Vec<float> chains[CHAINS];
      for (int k = 0; k < CHAINS; ++k) chains[k] = splat(float(k));  // all different, or one would do
      for (int64_t i = rounds * thread / threads; i < rounds * (thread + 1) / threads; ++i)
        for (int k = 0; k < CHAINS; ++k) chains[k] = chains[k] * factor + term;
      for (int k = 1; k < CHAINS; ++k) chains[0] += chains[k];
      results[thread] = chains[0][0];
    }
  });
  return std::accumulate(results.begin(), results.end(), 0.0);  // computed, so that compilers must compute it
}

// Zeros, written once; threads are woken for what takes longer than to wake them.
at::Tensor written(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor made = at::empty(sizes, options);
  char* const data = static_cast<char*>(made.mutable_data_ptr());
  at::parallel_for(0, int64_t(made.nbytes()), 1 << 18,
                   [&](int64_t begin, int64_t end) { std::memset(data + begin, 0, end - begin); });
  return made;
}

// Layers [N, in] -> [N, out] that compute nothing: one operator, one node of autograd, a gradient for whatever wants one.
struct Hollow : torch::autograd::Function<Hollow> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, at::TensorList parameters,
                            int64_t out) {
    torch::autograd::variable_list kept{x};
    kept.insert(kept.end(), parameters.begin(), parameters.end());
    ctx->save_for_backward(std::move(kept));
    return written({x.size(0), out}, x.options());
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list&) {
    const torch::autograd::variable_list kept = ctx->get_saved_variables();
    torch::autograd::variable_list grads(kept.size() + 1);
    for (size_t i = 0; i < kept.size(); ++i)
      if (ctx->needs_input_grad(i)) grads[i] = written(kept[i].sizes(), kept[i].options());
    return grads;
  }
};

at::Tensor hollow(const at::Tensor& x, at::TensorList parameters, int64_t out) {
  return Hollow::apply(x, parameters, out);
}

TORCH_LIBRARY(lottery_benchmarks, m) {
  m.def("traffic(Tensor[] reads, Tensor(a!)[] writes) -> ()");
  m.def("multiply_adds(int count) -> float", &multiply_adds);
  m.def("hollow(Tensor x, Tensor[] parameters, int out) -> Tensor", &hollow);
}

TORCH_LIBRARY_IMPL(lottery_benchmarks, CPU, m) { m.impl("traffic", &traffic); }

}  // namespace
}  // namespace lottery
