// What the autograd functions share.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace lottery {

template <class Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// (r, c) of values [nnz, r, c], whose nnz may be symbolic while torch.compile traces.
inline std::array<int64_t, 2> block_of(const at::Tensor& values) {
  return {values.sym_size(1).guard_int(__FILE__, __LINE__), values.sym_size(2).guard_int(__FILE__, __LINE__)};
}

}  // namespace lottery
