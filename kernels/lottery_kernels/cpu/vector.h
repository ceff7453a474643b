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

// Every other unit of a, then of b, beginning with unit ODD: units of UNIT elements, within runs of COUNT units.
template <class S, int UNIT, int COUNT, int ODD, int... I>
inline Vec<S> every_other(Vec<S> a, Vec<S> b, std::integer_sequence<int, I...>) {
  constexpr auto source = [](int i) {
    const int run = i / (UNIT * COUNT), unit = i / UNIT % COUNT;
    return (run * COUNT + (2 * unit + ODD) % COUNT) * UNIT + i % UNIT + (unit < COUNT / 2 ? 0 : kLanes<S>);
  };
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, source(I)...);
#else
  using Index = std::conditional_t<sizeof(S) == 4, int32_t, int64_t>;
  return __builtin_shuffle(a, b, Vec<Index>{source(I)...});
#endif
}

template <class S, int UNIT, int COUNT>
inline Vec<S> evens(Vec<S> a, Vec<S> b) {
  return every_other<S, UNIT, COUNT, 0>(a, b, std::make_integer_sequence<int, kLanes<S>>{});
}

template <class S, int UNIT, int COUNT>
inline Vec<S> odds(Vec<S> a, Vec<S> b) {
  return every_other<S, UNIT, COUNT, 1>(a, b, std::make_integer_sequence<int, kLanes<S>>{});
}

// Shuffles within 128 bits, and of whole 128 bits, are one instruction each on x86; any other takes a table.
template <class S>
constexpr int kUnit = 16 / int(sizeof(S));
template <class S>
constexpr int kUnits = kLanes<S> / kUnit<S>;

// Transposes squares of COUNT units: unit j of rows[i * STEP] goes to unit i of rows[j * STEP], in every run of COUNT.
template <class S, int UNIT, int COUNT, int STEP>
inline void transpose_units(Vec<S>* rows) {
  Vec<S> other[COUNT];
#pragma GCC unroll 4
  for (int stage = 1; stage < COUNT; stage *= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < COUNT / 2; ++i) {
      other[i] = evens<S, UNIT, COUNT>(rows[2 * i * STEP], rows[(2 * i + 1) * STEP]);
      other[i + COUNT / 2] = odds<S, UNIT, COUNT>(rows[2 * i * STEP], rows[(2 * i + 1) * STEP]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; ++i) rows[i * STEP] = other[i];
  }
}

// Transposes a square of kLanes rows in registers: within 128 bits, then those among one another.
template <class S>
inline void transpose(Vec<S>* rows) {
#pragma GCC unroll 4
  for (int i = 0; i < kUnits<S>; ++i) transpose_units<S, 1, kUnit<S>, 1>(rows + i * kUnit<S>);
#pragma GCC unroll 4
  for (int i = 0; i < kUnit<S>; ++i) transpose_units<S, kUnit<S>, kUnits<S>, kUnit<S>>(rows + i);
}

// Unit i of the result, in every run of COUNT, is the sum of that run's units of rows[i * STEP].
template <class S, int UNIT, int COUNT, int STEP>
inline Vec<S> sum_units(const Vec<S>* rows) {
  Vec<S> sums[COUNT];
#pragma GCC unroll 4
  for (int i = 0; i < COUNT; ++i) sums[i] = rows[i * STEP];
#pragma GCC unroll 4
  for (int half = COUNT / 2; half > 0; half /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i)
      sums[i] = evens<S, UNIT, COUNT>(sums[2 * i], sums[2 * i + 1]) + odds<S, UNIT, COUNT>(sums[2 * i], sums[2 * i + 1]);
  return sums[0];
}

// Lane i of the result is the sum of rows[i]; every lane adds in the same order.
template <class S>
inline Vec<S> sum_each(const Vec<S>* rows) {
  Vec<S> sums[kUnits<S>];
#pragma GCC unroll 4
  for (int i = 0; i < kUnits<S>; ++i) sums[i] = sum_units<S, 1, kUnit<S>, 1>(rows + i * kUnit<S>);
  return sum_units<S, kUnit<S>, kUnits<S>, 1>(sums);
}

}  // namespace lottery
