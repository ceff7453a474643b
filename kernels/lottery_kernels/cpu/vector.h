// One vector register of floats or doubles, through compiler extensions: AVX-512, AVX2, SSE and NEON alike.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace lottery {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <class S>
struct VectorOf {
  typedef S type __attribute__((vector_size(kVectorBytes)));
};

template <class S>
using Vec = typename VectorOf<S>::type;

template <class S>
constexpr int kLanes = kVectorBytes / int(sizeof(S));

template <class S>
inline Vec<S> load(const S* p) {  // any alignment
  Vec<S> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class S>
inline void store(S* p, Vec<S> v) {
  std::memcpy(p, &v, sizeof v);
}

// The first `count` entries alone, fewer than there are lanes; the others are zero.
#if defined(__AVX512F__)
template <class S>
inline Vec<S> load_part(const S* p, int64_t count) {
  const uint32_t mask = (uint32_t(1) << count) - 1;
  if constexpr (std::is_same_v<S, float>) return Vec<S>(_mm512_maskz_loadu_ps(__mmask16(mask), p));
  else return Vec<S>(_mm512_maskz_loadu_pd(__mmask8(mask), p));
}

template <class S>
inline void store_part(S* p, Vec<S> v, int64_t count) {
  const uint32_t mask = (uint32_t(1) << count) - 1;
  if constexpr (std::is_same_v<S, float>) _mm512_mask_storeu_ps(p, __mmask16(mask), __m512(v));
  else _mm512_mask_storeu_pd(p, __mmask8(mask), __m512d(v));
}
#else
// Not inlined: the vector's address would be taken, and with it the vectors beside it would lie in memory.
template <class S>
[[gnu::noinline]] Vec<S> load_part(const S* p, int64_t count) {
  Vec<S> v = {};
  std::memcpy(&v, p, count * sizeof(S));
  return v;
}

template <class S>
[[gnu::noinline]] void store_part(S* p, Vec<S> v, int64_t count) {
  std::memcpy(p, &v, count * sizeof(S));
}
#endif

template <class S>
inline Vec<S> splat(S s) {
  return Vec<S>{} + s;
}

// A value loaded here stays in its register: compilers fold a load into each of its uses, but loads are what is scarce.
template <class S>
inline Vec<S> load_once(const S* p) {
  Vec<S> v = load(p);
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// max(x, 0) as torch's ReLU: NaN stays.
template <class S>
inline Vec<S> relu(Vec<S> x) {
  return x < Vec<S>{} ? Vec<S>{} : x;
}

// ReLU's gradient as torch's: `dy` where its output `y` is not zero.
template <class S>
inline Vec<S> relu_gradient(Vec<S> y, Vec<S> dy) {
  return y <= Vec<S>{} ? Vec<S>{} : dy;
}

template <class S, int HALF, int... I>
inline Vec<S> interleave_half(Vec<S> a, Vec<S> b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (HALF * kLanes<S> / 2 + I / 2 + (I % 2) * kLanes<S>)...);
#else
  using Index = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vec<Index>{(HALF * kLanes<S> / 2 + I / 2 + (I % 2) * kLanes<S>)...});
#endif
}

// a0 b0 a1 b1 … of the lower halves
template <class S>
inline Vec<S> interleave_low(Vec<S> a, Vec<S> b) {
  return interleave_half<S, 0>(a, b, std::make_integer_sequence<int, kLanes<S>>{});
}

// … and of the upper halves
template <class S>
inline Vec<S> interleave_high(Vec<S> a, Vec<S> b) {
  return interleave_half<S, 1>(a, b, std::make_integer_sequence<int, kLanes<S>>{});
}

// Transposes a square of kLanes rows in registers: log2(lanes) perfect shuffles.
template <class S>
inline void transpose(Vec<S>* rows) {
  constexpr int L = kLanes<S>;
  Vec<S> other[L];
#pragma GCC unroll 8
  for (int stage = 1; stage < L; stage *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < L / 2; ++i) {
      other[2 * i] = interleave_low<S>(rows[i], rows[i + L / 2]);
      other[2 * i + 1] = interleave_high<S>(rows[i], rows[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = other[i];
  }
}

// Lane i of the result is the sum of rows[i]; every lane adds in the same order.
template <class S>
inline Vec<S> sum_each(const Vec<S>* rows) {
  constexpr int L = kLanes<S>;
  Vec<S> sums[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) sums[i] = rows[i];
#pragma GCC unroll 8
  for (int half = L / 2; half > 0; half /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i)
      sums[i] = interleave_low<S>(sums[i], sums[i + half]) + interleave_high<S>(sums[i], sums[i + half]);
  return sums[0];
}

}  // namespace lottery
