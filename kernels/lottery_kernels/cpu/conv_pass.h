// A pass over the tiles of a convolution's targets, and the sums of one line of live blocks in it.
#pragma once

#include <array>
#include <limits>
#include <utility>

#include "conv_geometry.h"
#include "conv_panel.h"

namespace lottery {

// Channels of targets or sources, and how many of them a block has.
struct BlockedChannels {
  ChannelGroups channels;
  int64_t depth;
};

// The channels of one line of blocks.
struct LineChannels {
  int64_t first, count;

  LineChannels(const BlockedChannels& blocked, int64_t line) {
    const auto& [channels, depth] = blocked;
    const int64_t lines = channels.padded_size / depth, within = line % lines * depth;
    first = line / lines * channels.size + within;
    count = std::min(depth, channels.size - within);
  }
};

// What packing costs for each target of a tile: sources packed, dearer where a part of the batch makes short pieces of
// them, and rows shared with the tile above, which are moved.
inline double packing_cost(const Axis& down, const Window& window, const Tiling& tiling, bool whole_batch) {
  const double row = double(window.phases * window.slots) / tiling.cols, piece = whole_batch ? 0 : 2. / tiling.vectors;
  const double kept = std::max<int64_t>(0, window.rows - tiling.rows * down.walk);
  return row * (down.walk * (1 + piece) + 0.5 * kept / tiling.rows);
}

// What each target of a tile costs, its sums in registers being 1: packing, beginnings and ends of runs, and sources that
// are not in the second-level cache any more. Up to twice that cache is not dear: sparse lines read little of a panel.
inline double tile_cost(const Axis& down, const Axis& across, const Tiling& tiling, int64_t channels, int64_t batch,
                        int64_t lanes, int64_t bytes) {
  const Window window(down, across, tiling, lanes);
  const double run = 1 + 4. / (tiling.cols * tiling.vectors);
  const double panel = double(channels * window.plane * bytes) / (cache_size() / 8 * 7);
  const double misses = 0.3 * std::max(0., panel - 1) + 10 * std::max(0., panel - 2);
  return (1 + packing_cost(down, window, tiling, tiling.vectors * lanes >= batch)) * run * (1 + misses);
}

// The cheapest tiles whose runs fill the registers.
inline Tiling choose_tiling(const Axis& down, const Axis& across, int64_t channels, int64_t batch, int64_t lanes,
                            int64_t bytes) {
  constexpr int64_t kVectors = 4, kFull = 8;
  Tiling best{1, 1, 1};
  double best_cost = std::numeric_limits<double>::infinity();
  for (int64_t vectors = kVectors; vectors >= 1; vectors /= 2) {
    if (vectors > 1 && vectors * lanes >= 2 * batch) continue;
    for (int64_t parts = 1; parts <= across.targets; parts *= 2) {
      const int64_t cols = (across.targets + parts - 1) / parts;
      if (parts > 1 && cols * vectors < kFull) break;
      double last = std::numeric_limits<double>::infinity();
      for (int64_t rows = 1; rows <= down.targets; ++rows) {
        const Tiling tiling{rows, cols, vectors};
        const double cost = tile_cost(down, across, tiling, channels, batch, lanes, bytes);
        if (cost > last) break;
        if (cost <= best_cost) best = tiling, best_cost = cost;
        last = cost;
      }
    }
  }
  const int64_t tiles = (down.targets + best.rows - 1) / best.rows;
  best.rows = (down.targets + tiles - 1) / tiles;
  return best;
}

// Targets that one gather serves: all of a forward pass, those equal modulo the stride of a backward pass.
struct Phase {
  Axis down, across;
  Gather gather;
  std::vector<std::pair<int64_t, int64_t>> inside;  // rows of taps that read a source, by row of targets

  Phase(const Axis& down, const Axis& across, Gather gather)
      : down(down), across(across), gather(std::move(gather)) {
    for (int64_t t = 0; t < down.targets; ++t) inside.push_back(down.inside(t));
  }

  Tile part(Tile tile) const {
    tile.row_end = std::min(tile.row_end, down.targets);
    tile.col_end = std::min(tile.col_end, across.targets);
    return tile;
  }
};

// A pass over all tiles of targets. The sources of a tile are packed once for all phases.
template <class S>
struct Pass {
  Axis down, across;  // of all phases
  BlockedChannels sources, targets;
  Image<const S> source, relu;  // relu: null, or the output of a ReLU behind which `source` is the gradient
  Tiling tiling;
  Tiles tiles;
  Window window;
  int64_t room;  // bytes of targets that the cache would hold beside a panel
  std::vector<Phase> phases;

  Pass(const Axis& down, const Axis& across, const BlockedChannels& sources, const BlockedChannels& targets,
       const Image<const S>& source, const Image<const S>& relu = {})
      : down(down), across(across), sources(sources), targets(targets), source(source), relu(relu),
        tiling(choose_tiling(down, across, sources.channels.padded_total(), source.batch, kLanes<S>, sizeof(S))),
        tiles{tiling, tiling.vectors * kLanes<S>, down.targets, across.targets, source.batch},
        window(down, across, tiling, kLanes<S>),
        room(std::max(int64_t(cache_size()) - sources.channels.padded_total() * window.plane * int64_t(sizeof(S)),
                      int64_t(cache_size() / 4))) {}

  void add_phase(const Axis& down, const Axis& across, const Entries& entries) {
    const int64_t others = sources.channels.padded_size / sources.depth;
    phases.emplace_back(
        down, across,
        Gather(entries, sources.channels.groups, others, sources.depth, down, across, window, tiles.chunk));
  }

  SourcePanel<S> panel() const { return {source, relu, sources.channels, down, across, window, tiles}; }

  template <class T>
  TargetRow<T> target(const Phase& phase, const Image<T>& image, int64_t channel, int64_t t, const Tile& tile) const {
    const Axis &down = phase.down, &across = phase.across;
    T* begin = image.row(channel, down.first + down.step * t) + (across.first + across.step * tile.col) * image.batch;
    const bool past_cache = !std::is_const_v<T> && image.bytes() > room;
    return {begin + tile.n0, image.batch, across.step, tiling.vectors, image.batch - tile.n0, past_cache};
  }

  // vectors of a row of targets in a tile
  int64_t run(const Tile& tile) const { return (tile.col_end - tile.col) * tiling.vectors; }
};

// Calls f(std::integral_constant<int, V>, v) for register tiles that cover vectors [0, total).
template <int V, class F>
inline void cover(int64_t total, const F& f, int64_t v = 0) {
  for (; total - v >= V; v += V) f(std::integral_constant<int, V>{}, v);
  if constexpr (V > 1) cover<V / 2>(total, f, v);
}

// Terms that are added one by one; sums of so many are added in turn. The rounding error of a long line stays that of a
// blocked dense product.
constexpr int64_t kRun = 64;

// Sums over the live blocks of one line, for one row of targets: those of channel `out` of the line begin with
// `first(out)` and go to `targets[out]`.
template <class S>
class LineSums {
 public:
  LineSums(const Gather& gather, const S* values, const BlockShape& block, int64_t plane)
      : gather_(gather), entries_(gather.entries()), values_(values), block_(block), plane_(plane) {}

  template <class First, class Targets>
  void run(int64_t k0, int64_t k1, const S* base, int64_t vectors, int64_t outs, const First& first,
           const Targets& targets) const {
    if (block_.size() == 1) return rows<1, 1>(k0, k1, base, vectors, 0, first, targets);
    int64_t out = 0;
    for (; outs - out >= 4; out += 4) rows<4, 0>(k0, k1, base, vectors, out, first, targets);
    for (; outs - out >= 2; out += 2) rows<2, 0>(k0, k1, base, vectors, out, first, targets);
    for (; outs - out >= 1; out += 1) rows<1, 0>(k0, k1, base, vectors, out, first, targets);
  }

 private:
  template <int R, int INS, class First, class Targets>
  void rows(int64_t k0, int64_t k1, const S* base, int64_t vectors, int64_t out, const First& first,
            const Targets& targets) const {
    constexpr int L = kLanes<S>;
    // of each output, what its sums begin with and where they go
    const auto ends = [&]<int... r>(std::integer_sequence<int, r...>) {
      return std::pair{std::array<S, R>{first(out + r)...}, std::array<TargetRow<S>, R>{targets(out + r)...}};
    }(std::make_integer_sequence<int, R>{});
    cover<kRegisters / 2 / R>(vectors, [&]<int V>(std::integral_constant<int, V>, int64_t v) {
      alignas(kVectorBytes) S sums[R * V * L];
      add<R, V, INS>(k0, k1, base + v * L, out, sums);
      for (int r = 0; r < R; ++r) ends.second[r].template put<V>(v, sums + r * V * L, ends.first[r]);
    });
  }

  // sums[R][V] of one register tile. Not inlined: what becomes of the sums would take registers from the loop.
  template <int R, int V, int INS>
  [[gnu::noinline]] void add(int64_t k0, int64_t k1, const S* at, int64_t out, S* to) const {
    constexpr int L = kLanes<S>;
    const int64_t run = std::max<int64_t>(1, kRun / (INS ? INS : block_.ins));
    int64_t k = k0;
    do {
      const int64_t end = std::min(k + run, k1);
      Vec<S> sums[R][V] = {};
      multiply<S, R, V, INS>(sums, entries_, k, end, values_, block_, out, plane_,
                             [&](int64_t k) { return at + gather_.offset[k]; });
      for (int r = 0; r < R; ++r)
        for (int i = 0; i < V; ++i) {
          S* sum = to + (r * V + i) * L;
          store(sum, k == k0 ? sums[r][i] : load(sum) + sums[r][i]);
        }
      k = end;
    } while (k < k1);
  }

  const Gather& gather_;
  Entries entries_;
  const S* values_;
  BlockShape block_;
  int64_t plane_;
};

}  // namespace lottery
