// Batch-innermost images: sources packed into panels, targets read and written a run of vectors at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "conv_geometry.h"
#include "memory.h"
#include "stream.h"
#include "vector.h"

namespace lottery {

// An activation [N, C, H, W] as it lies in memory: [C, H, W, N].
template <class S>
struct Image {
  S* data;
  int64_t channels, height, width, batch;

  S* row(int64_t channel, int64_t y) const { return data + (channel * height + y) * width * batch; }
  int64_t bytes() const { return channels * height * width * batch * int64_t(sizeof(S)); }
};

// Channels in groups, each padded to whole blocks: the padded number of channel c.
struct ChannelGroups {
  int64_t groups, size, padded_size;

  int64_t padded(int64_t channel) const { return channel / size * padded_size + channel % size; }
  int64_t padded_total() const { return groups * padded_size; }
};

// One tile of targets: batch entries [n0, n0 + chunk), rows [row, row_end), columns [col, col_end).
struct Tile {
  int64_t n0, row, row_end, col, col_end;
};

// The tiles of all targets: down the rows first, so that the next one shares sources with the last.
struct Tiles {
  Tiling tiling;
  int64_t chunk, rows, cols, batch;  // of a tile: batch entries; of all targets: rows, columns, batch entries

  int64_t down() const { return (rows + tiling.rows - 1) / tiling.rows; }
  int64_t across() const { return (cols + tiling.cols - 1) / tiling.cols; }
  int64_t count() const { return down() * across() * ((batch + chunk - 1) / chunk); }

  Tile operator[](int64_t i) const {
    const int64_t row = i % down() * tiling.rows, col = i / down() % across() * tiling.cols;
    return {i / down() / across() * chunk, row, std::min(row + tiling.rows, rows), col,
            std::min(col + tiling.cols, cols)};
  }
};

// Packs the sources of tiles. The buffer is the thread's own and stays in its cache.
template <class S>
class SourcePanel {
 public:
  // relu: where there is data, the output of a ReLU: what is packed is x as the gradient behind it, made the gradient
  // in front of it
  SourcePanel(const Image<const S>& x, const Image<const S>& relu, const ChannelGroups& channels, const Axis& down,
              const Axis& across, const Window& window, const Tiles& tiles)
      : x_(x), relu_(relu), channels_(channels), down_(down), across_(across), window_(window), chunk_(tiles.chunk),
        used_rows_(down.walk), used_phases_(across.walk), buffer_(buffer(channels.padded_total() * window.plane)) {
    for (int64_t tap = 0; tap < down.taps(); ++tap)
      if (down.taken[tap]) used_rows_[(down.shift[tap] - window.lowest_row) % down.walk] = 1;
    for (int64_t tap = 0; tap < across.taps(); ++tap)
      if (across.taken[tap]) used_phases_[(across.shift[tap] - window.lowest_col) % across.walk] = 1;
    if (channels.padded_size > channels.size)
      std::memset(buffer_, 0, channels.padded_total() * window.plane * sizeof(S));
  }

  void pack(const Tile& tile) {
    const int64_t top = down_.walk * tile.row + window_.lowest_row;
    const int64_t begin = std::max<int64_t>(0, top);
    const int64_t end = std::min(down_.sources, down_.walk * (tile.row_end - 1) + down_.span().second + 1);
    const bool follows = tile.n0 == tile_.n0 && tile.col == tile_.col && begin >= begin_ && begin < end_;
    const int64_t kept = follows ? end_ - begin : 0;
    for (int64_t channel = -kAhead; channel < x_.channels; ++channel) {
      prefetch_rows(channel + kAhead, begin + kept, end, tile);
      if (channel < 0) continue;
      S* plane = buffer_ + channels_.padded(channel) * window_.plane;
      if (kept > 0) std::memmove(plane, plane + (begin - begin_) * window_.row, kept * window_.row * sizeof(S));
      for (int64_t row = begin + kept; row < end; ++row)
        if (used_rows_[(row - top) % down_.walk])
          pack_row(channel, row, tile, plane + (row - begin) * window_.row);
    }
    tile_ = tile, begin_ = begin, end_ = std::max(begin, end);
  }

  // Adds to sums[c] the sources in channel c of the tile packed last: over all tiles each source once, if the gather
  // walks by one and reads every source (`reads_all`).
  void add_up(double* sums) const {
    const auto [row, row_end] = own(down_, window_.lowest_row, tile_.row, tile_.row_end);
    const auto [col, col_end] = own(across_, window_.lowest_col, tile_.col, tile_.col_end);
    const int64_t size = (col_end - col) * chunk_, left = tile_.col + window_.lowest_col;
    for (int64_t channel = 0; channel < x_.channels; ++channel) {
      const S* plane = buffer_ + channels_.padded(channel) * window_.plane + (col - left) * chunk_;
      Vec<S> parts[4] = {};
      for (int64_t y = row; y < row_end; ++y) {
        const S* run = plane + (y - begin_) * window_.row;
        int64_t i = 0;
        for (; i + 4 * kLanes<S> <= size; i += 4 * kLanes<S>)
          for (int part = 0; part < 4; ++part) parts[part] += load(run + i + part * kLanes<S>);
        for (; i < size; i += kLanes<S>) parts[0] += load(run + i);
      }
      const Vec<S> sum = (parts[0] + parts[1]) + (parts[2] + parts[3]);
      for (int lane = 0; lane < kLanes<S>; ++lane) sums[channel] += double(sum[lane]);
    }
  }

  // What offsets of the gather are added to, for row `t` of the targets.
  const S* row(int64_t t) const { return buffer_ + (down_.walk * t - begin_) * window_.row; }

 private:
  static S* buffer(int64_t size) {
    thread_local Scratch<S> held;
    return held.at_least(size);
  }

  // Sources [first, last) of an axis that count as those of targets [begin, end).
  static std::pair<int64_t, int64_t> own(const Axis& axis, int64_t lowest, int64_t begin, int64_t end) {
    const auto inside = [&](int64_t source) { return std::clamp<int64_t>(source, 0, axis.sources); };
    return {begin == 0 ? 0 : inside(begin + lowest), end == axis.targets ? axis.sources : inside(end + lowest)};
  }

  // Sources [row, end) of a channel, those in between that are not used too.
  void prefetch_rows(int64_t channel, int64_t row, int64_t end, const Tile& tile) const {
    if (channel >= x_.channels) return;
    const int64_t left = across_.walk * tile.col + window_.lowest_col;
    const int64_t first = std::clamp<int64_t>(left, 0, x_.width);
    const int64_t last = std::clamp<int64_t>(left + window_.phases * window_.slots, first, x_.width);
    const int64_t count = std::min(chunk_, x_.batch - tile.n0);
    for (; row < end; ++row)
      for (const Image<const S>* image : {&x_, &relu_}) {
        if (!image->data) continue;
        const S* from = image->row(channel, row) + tile.n0;
        if (count == x_.batch) prefetch(from + first * x_.batch, (last - first) * x_.batch);
        else for (int64_t col = first; col < last; ++col) prefetch(from + col * x_.batch, count);
      }
  }

  void pack_row(int64_t channel, int64_t row, const Tile& tile, S* to) const {
    const int64_t left = across_.walk * tile.col + window_.lowest_col, count = std::min(chunk_, x_.batch - tile.n0);
    const int64_t phases = window_.phases, slots = window_.slots;
    const S* from = x_.row(channel, row) + tile.n0;
    const S* relu = relu_.data ? relu_.row(channel, row) + tile.n0 : nullptr;
    // columns [col, col + columns) of the image, side by side in the panel
    const auto pack_columns = [&](int64_t col, int64_t columns, S* chunk) {
      const int64_t at = col * x_.batch;
      pack_chunk(from + at, relu ? relu + at : nullptr, columns * count, columns * chunk_, chunk);
    };
    if (phases == 1 && count == x_.batch && count == chunk_) {
      // slots [first, last) lie inside the image
      const int64_t first = std::clamp<int64_t>(-left, 0, slots);
      const int64_t last = std::clamp<int64_t>(x_.width - left, first, slots);
      std::memset(to, 0, first * chunk_ * sizeof(S));
      pack_columns(left + first, last - first, to + first * chunk_);
      std::memset(to + last * chunk_, 0, (slots - last) * chunk_ * sizeof(S));
      return;
    }
    for (int64_t slot = 0, col = left; slot < slots; ++slot)
      for (int64_t phase = 0; phase < phases; ++phase, ++col) {
        if (!used_phases_[phase]) continue;
        S* chunk = to + (phase * slots + slot) * chunk_;
        if (col >= 0 && col < x_.width) pack_columns(col, 1, chunk);
        else std::memset(chunk, 0, chunk_ * sizeof(S));
      }
  }

  // Entries [0, count), behind them zeros up to `size`, a whole number of vectors.
  static void pack_chunk(const S* from, const S* relu, int64_t count, int64_t size, S* to) {
    if (!relu && count == size) {
      std::memcpy(to, from, size * sizeof(S));
      return;
    }
    constexpr int64_t L = kLanes<S>;
    const auto value = [&](int64_t n) {
      return relu ? relu_gradient<S>(load(relu + n), load(from + n)) : load(from + n);
    };
    int64_t n = 0;
    for (; n + L <= count; n += L) store(to + n, value(n));
    if (n < count) {
      store(to + n, Vec<S>{});
      if (n > 0) store(to + count - L, value(count - L));  // over the end of the vector before
      else for (int64_t i = 0; i < count; ++i) to[i] = relu && relu[i] <= S(0) ? S(0) : from[i];
      n += L;
    }
    for (; n < size; n += L) store(to + n, Vec<S>{});
  }

  static constexpr int64_t kAhead = 2;  // channels fetched before they are packed

  const Image<const S> x_, relu_;
  const ChannelGroups channels_;
  const Axis &down_, &across_;
  const Window& window_;
  const int64_t chunk_;
  std::vector<char> used_rows_, used_phases_;
  S* buffer_;
  Tile tile_{-1, 0, 0, 0, 0};
  int64_t begin_ = 0, end_ = 0;
};

// A row of targets within a tile, as a run of vectors: `vectors` for each position.
template <class T>
class TargetRow {
  using S = std::remove_const_t<T>;

 public:
  // past_cache: whether to stream what is written
  TargetRow(T* begin, int64_t batch, int64_t step, int64_t vectors, int64_t left, bool past_cache)
      : begin_(begin), step_(step * batch), shift_(vectors == 4 ? 2 : vectors == 2 ? 1 : 0), left_(left),
        streams_(past_cache && is_aligned(begin) && batch % kLanes<S> == 0) {}

  // The same row, which what is put passes through ReLU.
  TargetRow rectified(bool with_relu) const {
    TargetRow row = *this;
    row.with_relu_ = with_relu;
    return row;
  }

  // batch entries of vector v that exist
  int64_t count(int64_t v) const { return left_ - part(v) * kLanes<S>; }

  // Entries that do not exist are zero.
  Vec<S> get(int64_t v) const {
    return count(v) >= kLanes<S> ? load(at(v)) : load_part(at(v), std::max<int64_t>(0, count(v)));
  }

  // Vectors [0, vectors) to `to`.
  void copy(int64_t vectors, S* to) const {
    for (int64_t v = 0; v < vectors; ++v) store(to + v * kLanes<S>, get(v));
  }

  void prefetch(int64_t vectors) const {
    for (int64_t v = 0; v < vectors; ++v) prefetch_line(at(v));
  }

  void put(int64_t v, Vec<S> value) const {
    if (with_relu_) value = relu<S>(value);
    if (count(v) >= kLanes<S>) streams_ ? stream(at(v), value) : store(at(v), value);
    else if (count(v) > 0) store_part(at(v), value, count(v));
  }

  // `first` + `sums` [V, lanes] to vectors v …
  template <int V>
  [[gnu::noinline]] void put(int64_t v, const S* sums, S first) const {
    const TargetRow row = *this;  // in registers: for all the compiler knows, what is written is *this
    for (int i = 0; i < V; ++i) row.put(v + i, load(sums + i * kLanes<S>) + first);
  }

 private:
  int64_t part(int64_t v) const { return v & ((1 << shift_) - 1); }
  T* at(int64_t v) const { return begin_ + (v >> shift_) * step_ + part(v) * kLanes<S>; }

  T* begin_;
  int64_t step_;
  int shift_;
  int64_t left_;
  bool streams_, with_relu_ = false;
};

}  // namespace lottery
