// The inner loops: four output pixels (2 rows x 2 columns) over one window of coarse cells.
// `folded` points to the first pixel's weights in the tile; those of the other pixels are at
// offsets 1, kTile and kTile + 1.

struct Window {
  const int64_t* row;           // offsets, in floats, of the window's rows
  int64_t rows, columns, step;  // cells, and floats from one column to the next
};

// out[i][channel] = sum over cells of weight * feature, for kBlock channel vectors.
template <int kBlock>
UPFEAT_APART void gather_block(const Window& window, const float* features, const float* folded,
                               float* const* out) {
  Vec sum[4][kBlock];
  UPFEAT_UNROLL
  for (int i = 0; i < 4; ++i) {
    UPFEAT_UNROLL
    for (int m = 0; m < kBlock; ++m) sum[i][m] = Vec{};
  }
  const float* weight = folded;
  int64_t a = 0;
  do {  // do-while, as a window is never empty: the compiler then keeps the sums in registers
    const float* cell = features + window.row[a];
    int64_t b = window.columns;
    do {
      Vec feature[kBlock];
      UPFEAT_UNROLL
      for (int m = 0; m < kBlock; ++m) feature[m] = load(cell + m * kLanes);
      UPFEAT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const Vec share = splat(weight[(i / 2) * kTile + i % 2]);
        UPFEAT_UNROLL
        for (int m = 0; m < kBlock; ++m) sum[i][m] += share * feature[m];
      }
      cell += window.step;
      weight += kTilePixels;
    } while (--b);
  } while (++a < window.rows);
  UPFEAT_UNROLL
  for (int i = 0; i < 4; ++i) {
    UPFEAT_UNROLL
    for (int m = 0; m < kBlock; ++m) store(out[i] + m * kLanes, sum[i][m]);
  }
}

// features[cell][channel] += sum over the four pixels of weight * grad.
template <int kBlock>
UPFEAT_APART void scatter_block(const Window& window, float* features, const float* folded,
                                const float* const* grad) {
  Vec g[4][kBlock];
  UPFEAT_UNROLL
  for (int i = 0; i < 4; ++i) {
    UPFEAT_UNROLL
    for (int m = 0; m < kBlock; ++m) g[i][m] = load(grad[i] + m * kLanes);
  }
  const float* weight = folded;
  for (int64_t a = 0; a < window.rows; ++a) {
    float* cell = features + window.row[a];
    for (int64_t b = 0; b < window.columns; ++b, cell += window.step, weight += kTilePixels) {
      Vec share[4];
      UPFEAT_UNROLL
      for (int i = 0; i < 4; ++i) share[i] = splat(weight[(i / 2) * kTile + i % 2]);
      UPFEAT_UNROLL
      for (int m = 0; m < kBlock; ++m) {
        Vec sum = load(cell + m * kLanes);
        UPFEAT_UNROLL
        for (int i = 0; i < 4; ++i) sum += g[i][m] * share[i];
        store(cell + m * kLanes, sum);
      }
    }
  }
}

// folded[cell] = sum over channels of feature * grad, for the four pixels.
UPFEAT_APART void correlate(const Window& window, const float* features, int64_t channels,
                            const float* const* grad, float* folded) {
  constexpr int kCells = kLanes / 4;  // 4 pixels x kCells dot products fill a vector
  const int64_t cells = window.rows * window.columns;
  for (int64_t first = 0; first < cells; first += kCells) {
    const float* cell[kCells];
    for (int j = 0; j < kCells; ++j) {
      const int64_t index = first + j < cells ? first + j : cells - 1;
      cell[j] =
          features + window.row[index / window.columns] + index % window.columns * window.step;
    }
    Vec dot[kLanes];
    UPFEAT_UNROLL
    for (int i = 0; i < kLanes; ++i) dot[i] = Vec{};
    int64_t c = 0;
    do {
      Vec g[4];
      UPFEAT_UNROLL
      for (int i = 0; i < 4; ++i) g[i] = load(grad[i] + c);
      UPFEAT_UNROLL
      for (int j = 0; j < kCells; ++j) {
        const Vec feature = load(cell[j] + c);
        UPFEAT_UNROLL
        for (int i = 0; i < 4; ++i) dot[j * 4 + i] += feature * g[i];
      }
      c += kLanes;
    } while (c < channels);
    const Vec sums = transpose_sum(dot);
    for (int j = 0; j < kCells && first + j < cells; ++j) {
      float* to = folded + (first + j) * kTilePixels;
      to[0] = sums[4 * j];
      to[1] = sums[4 * j + 1];
      to[kTile] = sums[4 * j + 2];
      to[kTile + 1] = sums[4 * j + 3];
    }
  }
}

UPFEAT_INLINE void gather(int block, const Window& window, const float* features,
                          const float* folded, float* const* out) {
  switch (block) {
    case 1:
      return gather_block<1>(window, features, folded, out);
    case 2:
      return gather_block<2>(window, features, folded, out);
    case 3:
      return gather_block<kMaxBlock >= 3 ? 3 : 1>(window, features, folded, out);
    case 4:
      return gather_block<kMaxBlock >= 4 ? 4 : 1>(window, features, folded, out);
    case 5:
      return gather_block<kMaxBlock >= 5 ? 5 : 1>(window, features, folded, out);
    default:
      return gather_block<kMaxBlock >= 6 ? 6 : 1>(window, features, folded, out);
  }
}

UPFEAT_INLINE void scatter(int block, const Window& window, float* features, const float* folded,
                           const float* const* grad) {
  switch (block) {
    case 1:
      return scatter_block<1>(window, features, folded, grad);
    case 2:
      return scatter_block<2>(window, features, folded, grad);
    case 3:
      return scatter_block<kMaxBlock >= 3 ? 3 : 1>(window, features, folded, grad);
    case 4:
      return scatter_block<kMaxBlock >= 4 ? 4 : 1>(window, features, folded, grad);
    case 5:
      return scatter_block<kMaxBlock >= 5 ? 5 : 1>(window, features, folded, grad);
    default:
      return scatter_block<kMaxBlock >= 6 ? 6 : 1>(window, features, folded, grad);
  }
}

// Channel vectors are divided evenly among as few blocks as possible.
struct Blocks {
  int64_t vectors, count;

  UPFEAT_MEMBER int64_t begin(int64_t index) const { return index * vectors / count; }
  UPFEAT_MEMBER int size(int64_t index) const {
    return static_cast<int>(begin(index + 1) - begin(index));
  }
};

UPFEAT_INLINE Blocks blocks_of(int64_t channels) {
  const int64_t vectors = (channels + kLanes - 1) / kLanes;
  return Blocks{vectors, (vectors + kMaxBlock - 1) / kMaxBlock};
}
