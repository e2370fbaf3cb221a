// Tables of coefficients that fold bicubic resizing and reflect padding into the taps (exactly), or
// that map taps to the cells around a coordinate.
#include "axis.h"

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "memory.h"

namespace upfeat {
namespace {

struct Reads {
  int count;
  int64_t cell[4];
  double share[4];
};

double cubic_near(double t) { return ((1.25 * t - 2.25) * t) * t + 1.0; }        // |t| <= 1
double cubic_far(double t) { return ((-0.75 * t + 3.75) * t - 6.0) * t + 3.0; }  // 1 < |t| < 2

int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : (value > high ? high : value);
}

Reads bicubic_reads(int64_t coordinate, int64_t in, int64_t out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double source = scale * (static_cast<double>(coordinate) + 0.5) - 0.5;
  const double floor_source = std::floor(source);
  const double t = source - floor_source;
  const double shares[4] = {cubic_far(1 + t), cubic_near(t), cubic_near(1 - t), cubic_far(2 - t)};
  Reads reads{};
  for (int i = 0; i < 4; ++i) {
    // Coefficients that are zero but for rounding would only widen the window.
    if (std::fabs(shares[i]) < 1e-12) continue;
    reads.cell[reads.count] = clamp(static_cast<int64_t>(floor_source) - 1 + i, 0, in - 1);
    reads.share[reads.count++] = shares[i];
  }
  return reads;
}

// Reflects repeatedly if need be, so that an axis may be shorter than the radius.
int64_t reflect(int64_t index, int64_t size) {
  if (size == 1) return 0;
  const int64_t period = 2 * (size - 1);
  index %= period;
  if (index < 0) index += period;
  return index < size ? index : period - index;
}

enum class Kind { kBicubic, kPadded, kCells };

struct Geometry {
  Kind kind;
  int64_t in, out, radius;
  // For kCells: coordinates on the whole axis and the first one of the output; cells on the whole
  // axis and the first one of the tensor.
  int64_t length = 0, start = 0, all = 0, first = 0;

  // The cell that contains the centre of a coordinate.
  int64_t own(int64_t coordinate) const {
    return (2 * (start + coordinate) + 1) * all / (2 * length);
  }

  Reads reads(int64_t coordinate, int64_t tap) const {
    if (kind == Kind::kPadded) return Reads{1, {coordinate + tap}, {1.0}};
    if (kind == Kind::kCells) {
      const int64_t cell = clamp(own(coordinate) + tap - radius, 0, all - 1);
      return Reads{1, {clamp(cell - first, 0, in - 1)}, {1.0}};
    }
    return bicubic_reads(reflect(coordinate + tap - radius, out), in, out);
  }
};

template <typename T>
bool allocate_array(T*& array, int64_t count) {
  array = static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))));
  if (array) std::memset(static_cast<void*>(array), 0, static_cast<size_t>(count) * sizeof(T));
  return array != nullptr;
}

bool find_windows(Axis& axis, const Geometry& geometry) {
  if (!allocate_array(axis.lo, axis.groups)) return false;
  for (int64_t group = 0; group < axis.groups; ++group) {
    int64_t low = axis.in, high = -1;
    for (int64_t y = 2 * group; y < 2 * group + 2 && y < axis.out; ++y) {
      for (int64_t tap = 0; tap < axis.taps; ++tap) {
        const Reads reads = geometry.reads(y, tap);
        for (int i = 0; i < reads.count; ++i) {
          if (reads.cell[i] < low) low = reads.cell[i];
          if (reads.cell[i] > high) high = reads.cell[i];
        }
      }
    }
    axis.lo[group] = low;
    if (high - low + 1 > axis.window) axis.window = high - low + 1;
  }
  for (int64_t group = 0; group < axis.groups; ++group) {
    if (axis.lo[group] > axis.in - axis.window) axis.lo[group] = axis.in - axis.window;
  }
  return true;
}

void widen(int64_t& first, int64_t& last, int64_t tap) {
  if (last == 0) first = tap;
  if (tap < first) first = tap;
  if (tap + 1 > last) last = tap + 1;
}

bool fill_tables(Axis& axis, const Geometry& geometry) {
  const int64_t window = axis.window, taps = axis.taps, rows = 2 * axis.groups;
  axis.tiles = (axis.out + kTile - 1) / kTile;
  if (!allocate_array(axis.coef, rows * window * taps) ||
      !allocate_array(axis.first, rows * window) || !allocate_array(axis.last, rows * window) ||
      !allocate_array(axis.tile_coef, axis.tiles * window * taps * kTile) ||
      !allocate_array(axis.tile_first, axis.tiles * window) ||
      !allocate_array(axis.tile_last, axis.tiles * window)) {
    return false;
  }
  for (int64_t y = 0; y < axis.out; ++y) {
    const int64_t tile = y / kTile, lane = y % kTile;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const Reads reads = geometry.reads(y, tap);
      for (int i = 0; i < reads.count; ++i) {
        const int64_t a = reads.cell[i] - axis.lo[y / 2];
        const float share = static_cast<float>(reads.share[i]);
        axis.coef[(y * window + a) * taps + tap] += share;
        axis.tile_coef[((tile * window + a) * taps + tap) * kTile + lane] += share;
        widen(axis.first[y * window + a], axis.last[y * window + a], tap);
        widen(axis.tile_first[tile * window + a], axis.tile_last[tile * window + a], tap);
      }
    }
  }
  return true;
}

// A coordinate on the border of two cells belongs to one of them, so its window has one cell more
// on one side. That cell gets no weight, so that windows are symmetric and flips commute.
bool fill_distances(Axis& axis, const Geometry& geometry) {
  const int64_t pitch = axis.tiles * kTile;
  if (!allocate_array(axis.own, axis.out)) return false;
  for (int64_t y = 0; y < axis.out; ++y) axis.own[y] = geometry.own(y) - geometry.first;
  if (!allocate_array(axis.away, axis.taps * pitch)) return false;
  const double reach = static_cast<double>(geometry.radius) + 0.5 - 1e-4;
  for (int64_t y = 0; y < axis.out; ++y) {
    const int64_t centre = (2 * (geometry.start + y) + 1) * geometry.all, own = geometry.own(y);
    for (int64_t tap = 0; tap < axis.taps; ++tap) {
      const int64_t cell = (2 * (own + tap - geometry.radius) + 1) * geometry.length;
      const double apart =
          static_cast<double>(centre - cell) / static_cast<double>(2 * geometry.length);
      axis.away[tap * pitch + y] =
          std::fabs(apart) > reach ? kOutOfReach : static_cast<float>(apart * apart);
    }
  }
  return true;
}

bool build(Axis& axis, const Geometry& geometry) {
  axis.in = geometry.in;
  axis.out = geometry.out;
  axis.taps = 2 * geometry.radius + 1;
  axis.groups = (geometry.out + 1) / 2;
  return find_windows(axis, geometry) && fill_tables(axis, geometry);
}

}  // namespace

bool bicubic_axis(Axis& axis, int64_t in, int64_t out, int64_t radius) {
  return build(axis, Geometry{Kind::kBicubic, in, out, radius});
}

bool padded_axis(Axis& axis, int64_t out, int64_t radius) {
  return build(axis, Geometry{Kind::kPadded, out + 2 * radius, out, radius});
}

bool cells_axis(Axis& axis, const CellRange& cells, int64_t length, int64_t start, int64_t out,
                int64_t radius) {
  const Geometry geometry{Kind::kCells, cells.count, out, radius, length, start, cells.all,
                          cells.first};
  return build(axis, geometry) && fill_distances(axis, geometry);
}

void free_axis(Axis& axis) {
  release(axis.lo);
  release(axis.coef);
  release(axis.first);
  release(axis.last);
  release(axis.tile_coef);
  release(axis.tile_first);
  release(axis.tile_last);
  release(axis.own);
  release(axis.away);
  axis = Axis{};
}

}  // namespace upfeat
