// Hints about the caches. Stores past them: memory that is written whole need not be read first, and what is in the caches
// stays there. Prefetches: a core fetches no further ahead by itself than the page and the run that it reads.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstdint>

#include "vector.h"

namespace lottery {

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

// `p` is aligned to a vector.
template <class S>
inline void stream(S* p, Vec<S> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m512>(v));
#elif defined(__AVX__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m256>(v));
#elif defined(__x86_64__)
  _mm_stream_ps(reinterpret_cast<float*>(p), reinterpret_cast<__m128>(v));
#else
  store(p, v);
#endif
}

// Makes streamed stores visible to other threads.
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Asks for the line at `p` in the second-level cache: more lines can be on their way there than to the first.
inline void prefetch_line(const void* p) {
  __builtin_prefetch(p, 0, 2);
  asm volatile("");  // GCC leaves out calls of functions that do nothing but prefetch
}

// The same for entries [0, count).
template <class S>
inline void prefetch(const S* from, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t i = 0; i < count; i += kLine) prefetch_line(from + i);
}

// Asks for the line at `p`, soon to be written, in the first-level cache.
inline void prefetch_to_write(const void* p) {
  __builtin_prefetch(p, 1, 3);
  asm volatile("");
}

}  // namespace lottery
