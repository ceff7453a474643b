// The inner loops: sums over the live blocks of one block row (or, through the transpose, one block column).
//
// A source is whatever the live blocks multiply: rows of T batch entries side by side. `Rows` says where the rows of
// block k begin; a linear layer looks them up in a packed panel, a convolution adds the offset of a tap.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vector.h"

namespace lottery {

// A pattern's arrays, seen from the block rows or (transposed) from the block columns.
struct Entries {
  const int32_t* ptr;       // [lines + 1]: where the entries of a line begin
  const int32_t* other;     // [nnz]: block column, or block row in the transpose
  const int32_t* position;  // [nnz]: where an entry lies in values; null: at its own number
  int64_t lines;

  int64_t nnz() const { return ptr[lines]; }
  int64_t at(int64_t k) const { return position ? position[k] : k; }
};

// Block `values[position]` as a matrix [outs, ins] of the product at hand: [r, c] forward, [c, r] in the transpose.
struct BlockShape {
  int64_t outs, ins;
  int64_t out_stride, in_stride;

  int64_t size() const { return outs * ins; }
};

// Entries per line that cost as much as beginning a line: for shares of equal work.
constexpr int64_t kLineCost = 4;

inline int64_t total_cost(const Entries& e) { return e.nnz() + kLineCost * e.lines; }

// First line behind which at least `cost` lies: the lines [line_at(a), line_at(b)) share out the work (a, b].
inline int64_t line_at(const Entries& e, int64_t cost) {
  int64_t low = 0, high = e.lines;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (e.ptr[middle] + kLineCost * middle < cost) low = middle + 1;
    else high = middle;
  }
  return low;
}

// sums[R][V] += blocks k0 … k1, their outputs [out, out + R), times vectors [0, V) of the source.
// INS: inputs of a block where known at compile time, else 0.
template <class S, int R, int V, int INS, class Rows>
inline void multiply(Vec<S> (&sums)[R][V], const Entries& e, int64_t k0, int64_t k1, const S* values,
                     const BlockShape& block, int64_t out, int64_t row_stride, const Rows& rows) {
  const int64_t ins = INS ? INS : block.ins;
  for (int64_t k = k0; k < k1; ++k) {
    const S* w = values + e.at(k) * block.size() + out * block.out_stride;
    const S* source = rows(k);
    for (int64_t i = 0; i < ins; ++i, w += block.in_stride, source += row_stride) {
      Vec<S> x[V];
      for (int v = 0; v < V; ++v) x[v] = R > 1 ? load_once(source + v * kLanes<S>) : load(source + v * kLanes<S>);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] += w[r * block.out_stride] * x[v];
    }
  }
}

// Terms that are added one by one; sums of so many are added in turn. The rounding error of a long row stays that of a
// blocked dense product.
constexpr int64_t kTerms = 32;

// Outputs [out, out + R) of one line, PANEL vectors wide, in register tiles: `first(r)` is what a row of sums begins with,
// `write(r, V, v, part)` takes a finished row's vectors [v, v + V).
template <class S, int PANEL, int R, int INS, class Rows, class First, class Write>
inline void multiply_rows(const Entries& e, int64_t line, const S* values, const BlockShape& block, int64_t out,
                          int64_t row_stride, const Rows& rows, const First& first, const Write& write) {
  constexpr int FIT = kRegisters / 2 / R;  // the rest is for the source and the weights
  constexpr int V = PANEL <= FIT ? PANEL : FIT >= 4 ? 4 : FIT >= 2 ? 2 : 1;
  const int64_t end = e.ptr[line + 1], run = INS ? kTerms / INS : std::max<int64_t>(1, kTerms / block.ins);
  for (int tile = 0; tile < PANEL; tile += V) {
    const auto source = [&](int64_t k) { return rows(k) + tile * kLanes<S>; };
    Vec<S> done[R][V];
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) done[r][v] = splat<S>(first(r));
    for (int64_t k = e.ptr[line]; k < end; k += run) {
      Vec<S> sums[R][V] = {};
      multiply<S, R, V, INS>(sums, e, k, std::min(k + run, end), values, block, out, row_stride, source);
      for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) done[r][v] += sums[r][v];
    }
#pragma GCC unroll 4  // else the sums would lie in memory
    for (int r = 0; r < R; ++r) write(r, std::integral_constant<int, V>{}, tile, done[r]);
  }
}

// All outputs of one line, in register tiles of up to four rows. `first(o)` and `write(o, …)` take an output's number within
// the block.
template <class S, int PANEL, class Rows, class First, class Write>
inline void multiply_line(const Entries& e, int64_t line, const S* values, const BlockShape& block, int64_t row_stride,
                          const Rows& rows, const First& first, const Write& write) {
  if (block.size() == 1)
    return multiply_rows<S, PANEL, 1, 1>(e, line, values, block, 0, row_stride, rows, first, write);
  int64_t out = 0;
  const auto tile = [&]<int R>(std::integral_constant<int, R>) {
    multiply_rows<S, PANEL, R, 0>(
        e, line, values, block, out, row_stride, rows, [&](int r) { return first(out + r); },
        [&](int r, auto vectors, int v, Vec<S>* part) __attribute__((always_inline)) {
          write(out + r, vectors, v, part);
        });
    out += R;
  };
  while (block.outs - out >= 4) tile(std::integral_constant<int, 4>{});
  if (block.outs - out == 3) tile(std::integral_constant<int, 3>{});
  if (block.outs - out == 2) tile(std::integral_constant<int, 2>{});
  if (block.outs - out == 1) tile(std::integral_constant<int, 1>{});
}

// Gradients of unstructured values in transposed order, lane by lane: products of single weights are collected until
// a vector of them can be summed at once.
template <class S>
class DotProducts {
 public:
  DotProducts(S* to, bool add) : to_(to), add_(add) {}

  void push(Vec<S> products) {
    waiting_[count_++] = products;
    if (count_ == kLanes<S>) flush();
  }

  void finish() {
    if (count_ == 0) return;
    const int count = count_;
    for (; count_ < kLanes<S>; ++count_) waiting_[count_] = Vec<S>{};
    const Vec<S> sums = sum_each<S>(waiting_);
    for (int i = 0; i < count; ++i) to_[i] = sums[i] + (add_ ? to_[i] : S(0));
  }

 private:
  void flush() {
    const Vec<S> sums = sum_each<S>(waiting_);
    store(to_, add_ ? sums + load(to_) : sums);
    to_ += kLanes<S>;
    count_ = 0;
  }

  Vec<S> waiting_[kLanes<S>];
  S* to_;
  bool add_;
  int count_ = 0;
};

// One column of an unstructured weight, one panel: dots with x go to `dots`, and where DX the sum of value × dy to dx.
// Each row of dy is loaded once for both.
template <class S, int V, bool DX, class Rows>
inline void column_gradients(const Entries& e, int64_t column, const S* values, const Vec<S>* x, Vec<S>* dx,
                             DotProducts<S>& dots, const Rows& rows) {
  Vec<S> held[V];
  for (int v = 0; v < V; ++v) held[v] = x[v];
  for (int v = 0; v < V; ++v) dx[v] = Vec<S>{};
  const int64_t last = e.ptr[column + 1];
  for (int64_t k = e.ptr[column]; k < last;) {
    Vec<S> sums[V] = {};
    for (const int64_t stop = std::min(k + kTerms, last); k < stop; ++k) {
      const S* dy = rows(k);
      Vec<S> products = {};
      const S w = DX ? values[e.at(k)] : S(0);
      for (int v = 0; v < V; ++v) {
        const Vec<S> g = DX ? load_once(dy + v * kLanes<S>) : load(dy + v * kLanes<S>);
        products += g * held[v];
        if (DX) sums[v] += w * g;
      }
      dots.push(products);
    }
    if (DX)
      for (int v = 0; v < V; ++v) dx[v] += sums[v];
  }
}

// Gradient of one block [r, c]: to[i * c + j] = (add: +) dy row i · x row j over so many vectors, in tiles of one
// vector of dots.
template <class S>
inline void block_gradient(const S* dy, int64_t dy_stride, int64_t r, const S* x, int64_t x_stride, int64_t c,
                           int64_t vectors, S* to, bool add) {
  constexpr int L = kLanes<S>;
  constexpr int ROWS = L <= 4 ? 2 : 4;
  constexpr int COLS = L / ROWS;
  for (int64_t i = 0; i < r; i += ROWS) {
    for (int64_t j = 0; j < c; j += COLS) {
      const S *a[ROWS], *b[COLS];  // past the block: its last row, whose result is dropped
      for (int m = 0; m < ROWS; ++m) a[m] = dy + std::min(i + m, r - 1) * dy_stride;
      for (int n = 0; n < COLS; ++n) b[n] = x + std::min(j + n, c - 1) * x_stride;
      Vec<S> products[L] = {};
      for (int64_t t = 0; t < vectors * L; t += L) {
        Vec<S> bv[COLS];
        for (int n = 0; n < COLS; ++n) bv[n] = load_once(b[n] + t);
        for (int m = 0; m < ROWS; ++m) {
          const Vec<S> av = load_once(a[m] + t);
          for (int n = 0; n < COLS; ++n) products[m * COLS + n] += av * bv[n];
        }
      }
      alignas(kVectorBytes) S tile[L];
      store(tile, sum_each<S>(products));
      const int64_t rows = std::min<int64_t>(ROWS, r - i), cols = std::min<int64_t>(COLS, c - j);
      const auto write = [&](int64_t rows, int64_t cols) {
        for (int64_t m = 0; m < rows; ++m) {
          S* const row = to + (i + m) * c + j;
          for (int64_t n = 0; add && n < cols; ++n) tile[m * COLS + n] += row[n];
          for (int64_t n = 0; n < cols; ++n) row[n] = tile[m * COLS + n];
        }
      };
      if (rows == ROWS && cols == COLS) write(ROWS, COLS);
      else write(rows, cols);
    }
  }
}

// The same over a panel of V vectors.
template <class S, int V>
inline void block_gradient(const S* dy, int64_t r, const S* x, int64_t c, int64_t row_stride, S* to, bool add) {
  block_gradient<S>(dy, row_stride, r, x, row_stride, c, V, to, add);
}

}  // namespace lottery
