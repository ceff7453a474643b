// Work shared out among threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace lottery {

// Threads worth waking for `work` vector multiply-adds; shares [0, n) run on them.
template <class F>
void in_shares(int64_t work, const F& share) {
  constexpr int64_t kWorth = 8192;
  const int64_t n = std::clamp<int64_t>(work / kWorth, 1, at::get_num_threads());
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) share(i, n);
  });
}

}  // namespace lottery
