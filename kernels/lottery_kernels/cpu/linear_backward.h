// The backward pass of linear layers: all gradients in one pass over dy, panel by panel.
//
// A share of the work is a range of block columns. Their sums over the batch are taken in one or two parts that are
// added in the end: two threads then work on panels of their own, each in its own cache. How many parts there are
// depends on the batch and not on the threads, so neither do results.
#pragma once

#include "linear_kernel.h"

namespace lottery {

// Gradients that a backward pass asks for; null data: not wanted.
template <class S>
struct Gradients {
  Activation<S> dx;
  S* dvalues;
  S* dbias;
  bool through_relu = false;  // x came out of a ReLU: dx is the gradient of what went in
};

// Parts that so many panels are summed in; panels [panels * i / parts, panels * (i + 1) / parts) are part i.
inline int64_t parts_of(int64_t panels) { return panels % 2 == 0 || panels > 8 ? 2 : 1; }

// Block columns [begin, end), and the biases of features [f0, f1).
struct ColumnRange {
  int64_t begin, end, f0, f1;
};

// A layer's backward pass; with `y`, the output of a ReLU, dy is the gradient behind that.
template <class S>
struct BackwardPass {
  Activation<const S> dy;
  const Activation<const S>* y;
  Activation<const S> x;
  const S* values;  // may be null without dx
  const Weight& weight;
  Gradients<S> wanted;
  S* sums = nullptr;  // [sums_size(parts)]
  const S* ordered = nullptr;  // values in the order of the columns, or null

  bool single() const { return weight.r * weight.c == 1; }
  int64_t size() const { return wanted.dvalues ? weight.nnz() * weight.r * weight.c : 0; }
  int64_t cost() const { return std::max<int64_t>(1, total_cost(weight.columns)); }

  // Where the sums of a part go: those of blocks into the gradients, of a second part beside them; those of single
  // weights, which come in transposed order, beside them anyway.
  int64_t sums_size(int64_t parts) const { return (single() ? parts : parts - 1) * size() + (parts - 1) * weight.out; }
  S* bias_sums(int64_t part) const { return part ? sums : wanted.dbias; }
  S* value_sums(int64_t part, int64_t parts) const {
    S* const beside = sums + (parts - 1) * weight.out;
    return single() ? beside + part * size() : part ? beside : wanted.dvalues;
  }

  // Columns of the shares (a, b] of the layer's whole cost.
  ColumnRange columns(int64_t a, int64_t b) const {
    return {line_at(weight.columns, a), line_at(weight.columns, b), weight.out * a / cost(), weight.out * b / cost()};
  }

  template <int V>
  Panels<S, V * kLanes<S>> panels() const {
    return {dy, weight.rows.lines * weight.r, y};
  }

  // Single weights that dx takes panel by panel had better be read one after another than each from a line of its own.
  int64_t ordered_size(bool again) const { return again && single() && wanted.dx.data ? weight.nnz() : 0; }

  void order_values(S* to) {
    in_shares(weight.nnz(), [&](int64_t i, int64_t n) {
      for (int64_t k = weight.nnz() * i / n; k < weight.nnz() * (i + 1) / n; ++k)
        to[k] = values[weight.columns.position[k]];
    });
    ordered = to;
  }

  // Adds the parts of the gradients up, and puts those of single weights where they belong.
  void finish(int64_t parts) const {
    if (wanted.dbias && parts == 2)
      for (int64_t f = 0; f < weight.out; ++f) wanted.dbias[f] += bias_sums(1)[f];
    if (!size()) return;
    if (single()) {
      // Few are left to one thread: threads that share out columns scatter into the same cache lines, and each would
      // fetch what the other has just written.
      constexpr int64_t kFew = 32 << 10;
      in_shares(size() <= kFew ? 0 : 4 * size(),
                [&](int64_t i, int64_t n) { place(parts, size() * i / n, size() * (i + 1) / n); });
    } else if (parts == 2) {
      in_shares(size() / kLanes<S>, [&](int64_t i, int64_t n) {
        const S* second = value_sums(1, parts);
        for (int64_t k = size() * i / n; k < size() * (i + 1) / n; ++k) wanted.dvalues[k] += second[k];
      });
    }
  }

 private:
  // Gradients [begin, end) of single weights, in the order of the columns, to where they belong.
  void place(int64_t parts, int64_t begin, int64_t end) const {
    const S *first = value_sums(0, parts), *second = value_sums(parts - 1, parts);
    for (int64_t k = begin; k < end; ++k)
      wanted.dvalues[weight.columns.position[k]] = parts == 1 ? first[k] : first[k] + second[k];
  }
};

// Whether all that the threads' caches hold together is less than an activation, which then had better be written past
// them: what is smaller, the next layer may find there. Its vectors are aligned.
template <class S>
bool outgrows_caches(const Activation<S>& to) {
  return to.panel_stride == kNoPanels && to.batch_stride == 1 && to.feature_stride % kLanes<S> == 0 &&
         is_aligned(to.data) && to.batch * to.features * sizeof(S) > at::get_num_threads() * cache_size();
}

// The backward pass of a layer over one panel.
template <class S, int V>
class PanelBackward {
  static constexpr int T = V * kLanes<S>;

 public:
  // dy: panel p of it. add: to the sums that are there.
  PanelBackward(const BackwardPass<S>& pass, int64_t p, const S* dy, const Activation<S>& dx, int64_t part,
                int64_t parts, bool add)
      : weight_(pass.weight), columns_(pass.weight.columns), pass_(pass),
        values_(pass.ordered ? pass.ordered : pass.values), p_(p), dy_(dy), dx_(dx), add_(add),
        streams_(outgrows_caches(dx)),
        dvalues_(pass.wanted.dvalues ? pass.value_sums(part, parts) : nullptr), dbias_(pass.bias_sums(part)) {
    if (pass.ordered) columns_.position = nullptr;
  }

  void run(const ColumnRange& range) const {
    if (pass_.wanted.dbias) bias_gradient(range.f0, range.f1);
    if (!dx_.data && !dvalues_) return;
    // x is packed a few columns ahead: a transpose takes a vector of them at once
    const int64_t ahead = std::max<int64_t>(1, kLanes<S> / weight_.c);
    const bool needs_x = dvalues_ || pass_.wanted.through_relu;
    const bool packed = pass_.x.template in_place<T>(columns_.lines * weight_.c) && pass_.x.feature_stride == T;
    thread_local Scratch<S> x_buffer;
    S* const buffer = needs_x && !packed ? x_buffer.at_least(ahead * weight_.c * T) : nullptr;
    DotProducts<S> dots(dvalues_ && pass_.single() ? dvalues_ + columns_.ptr[range.begin] : nullptr, add_);
    for (int64_t first = range.begin; first < range.end; first += ahead) {
      const int64_t last = std::min(first + ahead, range.end);
      const bool dead = columns_.ptr[first] == columns_.ptr[last];  // dx is zero, whatever x
      if (buffer && !dead) pack_x(first * weight_.c, last * weight_.c, buffer);
      const S* const x_rows = packed ? pass_.x.template panel<T>(p_) + first * weight_.c * T : buffer;
      for (int64_t column = first; column < last; ++column) {
        const S* x = x_rows + (column - first) * weight_.c * T;
        if (pass_.single()) single(column, x, dots);
        else block(column, x);
      }
    }
    dots.finish();
    if (streams_) finish_streams();
  }

 private:
  void bias_gradient(int64_t f0, int64_t f1) const {
    DotProducts<S> sums(dbias_ + f0, add_);
    for (int64_t f = f0; f < f1; ++f) {
      Vec<S> sum = {};
      for (int v = 0; v < V; ++v) sum += load(dy_ + f * T + v * kLanes<S>);
      sums.push(sum);
    }
    sums.finish();
  }

  void pack_x(int64_t f0, int64_t f1, S* to) const {
    const int64_t real = std::min(f1, weight_.in);
    pack<S, T>(pass_.x, p_, f0, real, to - f0 * T);
    std::memset(to + (real - f0) * T, 0, (f1 - real) * T * sizeof(S));
  }

  const S* dy_rows(int64_t k) const { return dy_ + int64_t(columns_.other[k]) * weight_.r * T; }

  // Inlined, or what `dots` counts would lie in memory.
  [[gnu::always_inline]] void single(int64_t column, const S* x_row, DotProducts<S>& dots) const {
    if (!dvalues_) return multiply(column, x_row);
    const auto source = [&](int64_t k) { return dy_rows(k); };
    Vec<S> x[V], dx[V];
    for (int v = 0; v < V; ++v) x[v] = load(x_row + v * kLanes<S>);
    if (!dx_.data) return column_gradients<S, V, false>(columns_, column, values_, x, dx, dots, source);
    column_gradients<S, V, true>(columns_, column, values_, x, dx, dots, source);
    write_dx<V>(column, 0, x_row, dx);
  }

  void block(int64_t column, const S* x) const {
    if (dx_.data) multiply(column, x);
    if (!dvalues_) return;
    for (int64_t k = columns_.ptr[column]; k < columns_.ptr[column + 1]; ++k)
      block_gradient<S, V>(dy_rows(k), weight_.r, x, weight_.c, T,
                           dvalues_ + columns_.position[k] * weight_.r * weight_.c, add_);
  }

  void multiply(int64_t column, const S* x) const {
    const int64_t f = column * weight_.c;
    multiply_line<S, V>(
        columns_, column, values_, weight_.transposed(), T, [&](int64_t k) { return dy_rows(k); },
        [](int64_t) { return S(0); },
        [&]<int N>(int64_t out, std::integral_constant<int, N>, int v, Vec<S>* sums) __attribute__((always_inline)) {
          if (f + out < weight_.in) write_dx<N>(f + out, v, x + out * T, sums);
        });
  }

  // Vectors [v, v + N) of a row.
  template <int N>
  [[gnu::always_inline]] void write_dx(int64_t f, int v, const S* x_row, Vec<S>* dx) const {
    if (pass_.wanted.through_relu)
      for (int i = 0; i < N; ++i) dx[i] = relu_gradient<S>(load(x_row + (v + i) * kLanes<S>), dx[i]);
    write_row<S, T, N>(dx_, p_, f, v, dx, streams_);
  }

  const Weight& weight_;
  Entries columns_;
  const BackwardPass<S>& pass_;
  const S* const values_;
  const int64_t p_;
  const S* const dy_;
  const Activation<S>& dx_;
  const bool add_, streams_;
  S* const dvalues_;
  S* const dbias_;
};

// Calls visit(p, whether it is the first) for the panels of a part. Backwards: those that the forward pass took last are
// in the cache still.
template <class Visit>
void each_panel(int64_t panels, int64_t part, int64_t parts, const Visit& visit) {
  const int64_t begin = panels * part / parts, end = panels * (part + 1) / parts;
  for (int64_t p = end - 1; p >= begin; --p) visit(p, p == end - 1);
}

// One layer, all of whose sums have their place.
template <class S, int V>
void backward_shares(const BackwardPass<S>& pass) {
  const auto dy = pass.template panels<V>();
  const int64_t count = dy.count(), parts = parts_of(count), cost = pass.cost(), work = cost * parts;
  in_shares(cost * count * pass.weight.r * pass.weight.c * V * 2, [&](int64_t i, int64_t n) {
    const int64_t begin = work * i / n, end = work * (i + 1) / n;
    for (int64_t part = begin / cost; part * cost < end; ++part) {
      const int64_t before = part * cost;
      const ColumnRange range = pass.columns(std::max<int64_t>(begin - before, 0), std::min(end - before, cost));
      each_panel(count, part, parts, [&](int64_t p, bool first) {
        PanelBackward<S, V>(pass, p, dy[p], pass.wanted.dx, part, parts, !first).run(range);
      });
    }
  });
}

// Whether the threads have equally many parts: they can go through all layers, then, without waiting for one another.
inline bool in_parts(int64_t panels) { return parts_of(panels) % at::get_num_threads() == 0; }

// Layers one behind another, the last first, one part a thread; gradients between them never leave its cache.
template <class S, int V>
void backward_parts(const std::vector<BackwardPass<S>>& passes) {
  constexpr int T = V * kLanes<S>;
  const auto last = passes[0].template panels<V>();
  const int64_t count = last.count(), parts = parts_of(count);
  at::parallel_for(0, parts, 1, [&](int64_t part, int64_t end) {
    thread_local Scratch<S> between[2];
    for (; part < end; ++part)
      each_panel(count, part, parts, [&](int64_t p, bool first) {
        const S* dy = last[p];
        for (size_t i = 0; i < passes.size(); ++i) {
          const BackwardPass<S>& pass = passes[i];
          Activation<S> dx = pass.wanted.dx;
          if (i + 1 < passes.size()) {
            const int64_t in = pass.weight.in, rows = passes[i + 1].weight.rows.lines * passes[i + 1].weight.r;
            dx = {between[i % 2].at_least(rows * T), count * T, in, 1, T, 0, rows};
            std::memset(dx.data + in * T, 0, (rows - in) * T * sizeof(S));
          }
          PanelBackward<S, V>(pass, p, dy, dx, part, parts, !first).run({0, pass.weight.columns.lines, 0, pass.weight.out});
          dy = dx.data;
        }
      });
  });
}

// Layers one behind another, the last first: what is dx of one is dy of the next. Unless they run in parts, their dx has
// a place.
template <class S, int V>
void backward(std::vector<BackwardPass<S>>& passes) {
  const int64_t count = passes[0].template panels<V>().count(), parts = parts_of(count);
  int64_t size = 0;
  for (const auto& pass : passes) size += pass.sums_size(parts) + pass.ordered_size(count > parts);
  thread_local Scratch<S> buffer;
  S* sums = buffer.at_least(size);
  for (auto& pass : passes) {
    pass.sums = sums;
    sums += pass.sums_size(parts);
    if (const int64_t ordered = pass.ordered_size(count > parts)) pass.order_values(sums), sums += ordered;
  }
  if (in_parts(count)) {
    backward_parts<S, V>(passes);
    for (const auto& pass : passes) pass.finish(parts);
  } else {
    for (const auto& pass : passes) {
      backward_shares<S, V>(pass);
      pass.finish(parts);
    }
  }
}

}  // namespace lottery
