// Where a convolution reads: both passes as a gather, in which every live block adds a constant to the address of what
// it multiplies.
//
// Forward, targets are outputs and sources inputs. Backward, targets are inputs and sources outputs; with a stride the
// inputs fall into phases (equal modulo the stride), and every tap reaches the inputs of one phase alone.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "sparse_matmul.h"

namespace lottery {

// One spatial axis: target t, which lies at `first + step * t` of its tensor, reads source `walk * t + shift[tap]`.
struct Axis {
  int64_t targets, first, step;
  int64_t sources, walk;
  std::vector<int64_t> shift;  // [taps], ascending or descending
  std::vector<char> taken;     // [taps]: whether a tap reaches these targets

  int64_t taps() const { return int64_t(shift.size()); }
  bool takes_all() const { return std::all_of(taken.begin(), taken.end(), [](char one) { return one != 0; }); }

  // Lowest and highest shift of the taps taken; {0, -1} if there are none.
  std::pair<int64_t, int64_t> span() const {
    std::pair<int64_t, int64_t> found{0, -1};
    for (int64_t tap = 0; tap < taps(); ++tap) {
      if (!taken[tap]) continue;
      if (found.second < found.first) found = {shift[tap], shift[tap]};
      found = {std::min(found.first, shift[tap]), std::max(found.second, shift[tap])};
    }
    return found;
  }

  // Whether every source is read by some target; of axes that walk by one.
  bool reads_all() const {
    const auto [low, high] = span();
    return low <= 0 && targets - 1 + high >= sources - 1;
  }

  // Taps [begin, end) outside of which none reads a source for target t.
  std::pair<int64_t, int64_t> inside(int64_t t) const {
    const auto reads = [&](int64_t tap) {
      const int64_t source = walk * t + shift[tap];
      return taken[tap] && source >= 0 && source < sources;
    };
    int64_t begin = 0, end = taps();
    while (begin < end && !reads(begin)) ++begin;
    while (begin < end && !reads(end - 1)) --end;
    return {begin, end};
  }
};

struct AxisGeometry {
  int64_t in, out, taps, stride, padding, dilation;

  Axis forward() const {
    Axis axis{out, 0, 1, in, stride, std::vector<int64_t>(taps), std::vector<char>(taps, 1)};
    for (int64_t tap = 0; tap < taps; ++tap) axis.shift[tap] = tap * dilation - padding;
    return axis;
  }

  // The targets of one phase.
  Axis backward(int64_t phase) const {
    const int64_t targets = phase < in ? (in - phase + stride - 1) / stride : 0;
    Axis axis{targets, phase, stride, out, 1, std::vector<int64_t>(taps), std::vector<char>(taps)};
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t distance = phase + padding - tap * dilation;
      axis.taken[tap] = distance % stride == 0;
      axis.shift[tap] = distance / stride;
    }
    return axis;
  }

  // The targets of all phases: those of the same number share their sources.
  Axis backward() const {
    Axis axis{(in + stride - 1) / stride, 0, 1, out, 1, std::vector<int64_t>(taps), std::vector<char>(taps)};
    for (int64_t phase = 0; phase < stride; ++phase) {
      const Axis one = backward(phase);
      for (int64_t tap = 0; tap < taps; ++tap)
        if (one.targets > 0 && one.taken[tap]) axis.shift[tap] = one.shift[tap], axis.taken[tap] = 1;
    }
    return axis;
  }
};

// Targets that share one panel of packed sources: of each phase `rows` × `cols` positions, `vectors` vectors of batch
// entries each.
struct Tiling {
  int64_t rows, cols, vectors;
};

// The packed sources of one tile, [channels, rows, phases, slots, batch chunk]. A walk along the columns is one of
// `phases` runs of consecutive slots. Rows outside the image are left out, columns outside are zero.
struct Window {
  int64_t lowest_row, lowest_col;  // shift of the first source row and column against walk × first target
  int64_t rows, phases, slots;
  int64_t row, plane;  // elements of a row (all phases) and of a channel

  Window(const Axis& down, const Axis& across, const Tiling& tiling, int64_t lanes) {
    const auto [low_row, high_row] = down.span();
    const auto [low_col, high_col] = across.span();
    lowest_row = low_row, lowest_col = low_col;
    rows = std::min(down.sources, down.walk * (tiling.rows - 1) + high_row - low_row + 1);
    phases = across.walk;
    slots = (across.walk * (tiling.cols - 1) + high_col - low_col + across.walk) / across.walk;
    row = phases * slots * tiling.vectors * lanes;
    plane = rows * row;
    if (plane / lanes % 2 == 0) plane += lanes;  // a power of two would send all channels to the same cache sets
  }

  int64_t column_slot(int64_t shift) const {
    return (shift - lowest_col) % phases * slots + (shift - lowest_col) / phases;
  }
};

// The live blocks of a gather, by line and row of taps: `groups()` of them in each line.
struct Gather {
  int64_t taps_down;
  std::vector<int32_t> ptr;       // [lines * taps_down + 1]
  std::vector<int32_t> offset;    // [nnz]: what to add to the address of a target's row in the panel
  std::vector<int32_t> position;  // [nnz]: where the block lies in values

  int64_t nnz() const { return int64_t(offset.size()); }
  int64_t lines() const { return int64_t(ptr.size() - 1) / taps_down; }
  int64_t begin(int64_t line, int64_t tap_row = 0) const { return ptr[line * taps_down + tap_row]; }
  Entries entries() const { return {ptr.data(), offset.data(), position.data(), lines()}; }

  // others: source blocks in a group; `depth`: channels of a source block.
  Gather(const Entries& e, int64_t groups, int64_t others, int64_t depth, const Axis& down, const Axis& across,
         const Window& window, int64_t chunk)
      : taps_down(down.taps()), ptr(e.lines * down.taps() + 1), offset(e.nnz()), position(e.nnz()) {
    const int64_t width = across.taps(), taps = taps_down * width, lines_per_group = e.lines / groups;
    std::vector<int64_t> at(taps);  // offset of each tap
    for (int64_t tap = 0; tap < taps; ++tap)
      at[tap] = down.shift[tap / width] * window.row + window.column_slot(across.shift[tap % width]) * chunk;
    // one line's entries to `kept` and on; where they end
    const auto gather_line = [&](int64_t line, int64_t kept) {
      const int64_t first = line / lines_per_group * others;
      int64_t tap = 0, k = e.ptr[line];
      for (int64_t tap_row = 0; tap_row < taps_down; ++tap_row) {
        ptr[line * taps_down + tap_row] = int32_t(kept);
        for (; k < e.ptr[line + 1]; ++k) {
          while (e.other[k] >= (tap + 1) * others) ++tap;
          if (tap >= (tap_row + 1) * width) break;
          if (!down.taken[tap_row] || !across.taken[tap - tap_row * width]) continue;
          offset[kept] = int32_t((first + e.other[k] - tap * others) * depth * window.plane + at[tap]);
          position[kept++] = int32_t(e.at(k));
        }
      }
      return kept;
    };
    int64_t kept = 0;
    if (down.takes_all() && across.takes_all()) {  // then an entry keeps its number
      constexpr int64_t kWorth = 8192;  // entries worth waking a thread
      kept = e.nnz();
      at::parallel_for(0, e.lines, std::max<int64_t>(1, e.lines * kWorth / std::max<int64_t>(1, kept)),
                       [&](int64_t begin, int64_t end) {
                         for (int64_t line = begin; line < end; ++line) gather_line(line, e.ptr[line]);
                       });
    } else {
      for (int64_t line = 0; line < e.lines; ++line) kept = gather_line(line, kept);
    }
    ptr.back() = int32_t(kept);
    offset.resize(kept);
    position.resize(kept);
  }
};

}  // namespace lottery
