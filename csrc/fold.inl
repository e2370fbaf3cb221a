// Conversion of weights over (2r+1)^2 fine taps (dy, dx) to weights over a window of coarse cells
// (a, b), and its transpose, one tile at a time. Layouts: taps [dy][dx][2][kTile], folded
// [a][b][2][kTile], intermediate `half` [a][dx][2][kTile].

UPFEAT_INLINE int64_t folded_floats(const Axis& rows, const Axis& columns) {
  return rows.window * columns.window * kTilePixels;
}
UPFEAT_INLINE int64_t half_folded_floats(const Axis& rows, const Axis& columns) {
  return rows.window * columns.taps * kTilePixels;
}

static void fold(const Axis& rows, const Axis& columns, int64_t group, int64_t tile,
                 const float* taps, float* half, float* folded) {
  const int64_t k = columns.taps;
  for (int64_t a = 0; a < rows.window; ++a) {
    for (int64_t py = 0; py < 2; ++py) {
      const int64_t y = (2 * group + py) * rows.window + a;
      const float* coef = rows.coef + y * k;
      for (int64_t dx = 0; dx < k; ++dx) {
        Vec sum[kRowVecs] = {};
        for (int64_t dy = rows.first[y]; dy < rows.last[y]; ++dy) {
          const float* from = taps + ((dy * k + dx) * 2 + py) * kTile;
          for (int v = 0; v < kRowVecs; ++v) sum[v] += load(from + v * kLanes) * coef[dy];
        }
        for (int v = 0; v < kRowVecs; ++v) {
          store(half + ((a * k + dx) * 2 + py) * kTile + v * kLanes, sum[v]);
        }
      }
    }
  }
  for (int64_t b = 0; b < columns.window; ++b) {
    const int64_t entry = tile * columns.window + b;
    const float* coef = columns.tile_coef + entry * k * kTile;
    for (int64_t a = 0; a < rows.window; ++a) {
      Vec sum[kTileVecs] = {};
      for (int64_t dx = columns.tile_first[entry]; dx < columns.tile_last[entry]; ++dx) {
        const float* from = half + (a * k + dx) * kTilePixels;
        for (int v = 0; v < kRowVecs; ++v) {
          const Vec share = load(coef + dx * kTile + v * kLanes);
          sum[v] += load(from + v * kLanes) * share;
          sum[v + kRowVecs] += load(from + (v + kRowVecs) * kLanes) * share;
        }
      }
      float* to = folded + (a * columns.window + b) * kTilePixels;
      for (int v = 0; v < kTileVecs; ++v) store(to + v * kLanes, sum[v]);
    }
  }
}

// The transpose of `fold`: from gradients of folded weights to gradients of taps.
static void unfold(const Axis& rows, const Axis& columns, int64_t group, int64_t tile,
                   const float* folded, float* half, float* taps) {
  const int64_t k = columns.taps;
  for (int64_t a = 0; a < rows.window; ++a) {
    float* line = half + a * k * kTilePixels;
    memset(line, 0, static_cast<size_t>(k * kTilePixels) * 4);
    for (int64_t b = 0; b < columns.window; ++b) {
      const int64_t entry = tile * columns.window + b;
      const float* coef = columns.tile_coef + entry * k * kTile;
      const float* from = folded + (a * columns.window + b) * kTilePixels;
      for (int64_t dx = columns.tile_first[entry]; dx < columns.tile_last[entry]; ++dx) {
        float* to = line + dx * kTilePixels;
        for (int v = 0; v < kTileVecs; ++v) {
          const Vec share = load(coef + dx * kTile + (v % kRowVecs) * kLanes);
          store(to + v * kLanes, load(to + v * kLanes) + load(from + v * kLanes) * share);
        }
      }
    }
  }
  memset(taps, 0, static_cast<size_t>(rows.taps * k * kTilePixels) * 4);
  for (int64_t py = 0; py < 2; ++py) {
    for (int64_t a = 0; a < rows.window; ++a) {
      const int64_t y = (2 * group + py) * rows.window + a;
      for (int64_t dy = rows.first[y]; dy < rows.last[y]; ++dy) {
        const float coef = rows.coef[y * k + dy];
        for (int64_t dx = 0; dx < k; ++dx) {
          const float* from = half + ((a * k + dx) * 2 + py) * kTile;
          float* to = taps + ((dy * k + dx) * 2 + py) * kTile;
          for (int v = 0; v < kRowVecs; ++v) {
            store(to + v * kLanes, load(to + v * kLanes) + load(from + v * kLanes) * coef);
          }
        }
      }
    }
  }
}
