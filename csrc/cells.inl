// Key products of a tile's pixels with the cells around them, and sums over cells for few channels;
// vectors contain neighbouring pixels.
//
// The 16 columns of a tile are in a few cells, whose neighbourhoods together are `columns` columns
// of the grid. The products of every pixel with all cells in these columns are computed, and then
// each pixel selects those with the cells around it: a few superfluous multiply-adds, but neither
// sums across vectors nor transposed keys.

constexpr int kMostShifts = static_cast<int>(kTile);
constexpr int kCellBlock = kTileVecs <= 2 ? 6 : (kTileVecs <= 4 ? 3 : 1);
constexpr int kLaneChannels = 8;

// The cells of one tile. A cell beyond the grid is replaced by the nearest cell in it.
struct TileCells {
  int64_t rows, columns;  // cells that any of the tile's pixels reads
  int64_t below;          // offset, in cells, of the second row of pixels' cells from the first's
  int64_t shifts;         // the cells of a pixel begin at one of the columns 0 .. shifts - 1
  IVec at_shift[kMostShifts][kRowVecs];
  const float* base;
  int64_t* offsets;  // (rows, columns), in floats from `base`
};

UPFEAT_INLINE int64_t within(int64_t index, int64_t size) {
  return index < 0 ? 0 : (index < size ? index : size - 1);
}

// Largest number of cells of a tile: all 2 rows and kTile columns of pixels are in different cells.
UPFEAT_INLINE int64_t most_tile_cells(const Axis& rows, const Axis& columns) {
  return (rows.taps + 1) * (columns.taps + kTile - 1);
}

// Fills the part of TileCells that is the same for all tiles of a pair of rows: offsets of the
// rows.
static void find_cell_rows(CoarseRows& coarse, const Axis& rows, int64_t group, TileCells& cells,
                           int64_t* row_offsets) {
  const int64_t first = rows.own[2 * group], radius = rows.taps / 2;
  cells.below = rows.own[smaller(2 * group + 1, rows.out - 1)] - first;
  cells.rows = rows.taps + cells.below;
  const int64_t low = within(first - radius, rows.in);
  const int64_t high = within(first + cells.below + radius, rows.in);
  find_rows(coarse, low, high - low + 1, row_offsets);
  // Backwards, so that no offset is overwritten before it is read.
  for (int64_t a = cells.rows - 1; a >= 0; --a) {
    row_offsets[a] = row_offsets[within(first - radius + a, rows.in) - low];
  }
}

static void find_cell_columns(const CoarseRows& coarse, const Axis& columns, int64_t tile,
                              const int64_t* row_offsets, TileCells& cells) {
  const int64_t start = tile * kTile, radius = columns.taps / 2;
  const int64_t* own = columns.own + start;
  const int64_t last = smaller(columns.out - start, kTile) - 1;
  cells.base = coarse_base(coarse);
  cells.shifts = own[last] - own[0] + 1;
  cells.columns = columns.taps + cells.shifts - 1;
  int32_t shift[kTile];
  for (int64_t i = 0; i < kTile; ++i) {
    shift[i] = static_cast<int32_t>(own[smaller(i, last)] - own[0]);
  }
  for (int64_t k = 0; k < cells.shifts; ++k) {
    for (int v = 0; v < kRowVecs; ++v) {
      const IVec at = *reinterpret_cast<const LooseIVec*>(shift + v * kLanes);
      cells.at_shift[k][v] = at == static_cast<int32_t>(k);
    }
  }
  for (int64_t a = 0; a < cells.rows; ++a) {
    for (int64_t b = 0; b < cells.columns; ++b) {
      cells.offsets[a * cells.columns + b] =
          row_offsets[a] + within(own[0] - radius + b, columns.in) * coarse.step;
    }
  }
}

// Reads a tile of pixels as [channels][2][kTile]; pixels outside the image are 0.
static void read_pixels(const UpfeatTensor& image, int64_t batch, int64_t y, int64_t x,
                        float* buffer, float* tile) {
  if (image.stride[3] == 1) return read_tile(image, batch, y, x, tile);
  const int64_t width = smaller(image.size[3] - x, kTile), pitch = whole_vectors(image.size[1]);
  const bool direct = width == kTile && image.dtype == UPFEAT_FLOAT32 && image.stride[1] == 1 &&
                      image.size[1] == pitch;
  for (int64_t py = 0; py < 2; ++py) {
    const bool inside = y + py < image.size[2];
    const float* from = buffer;
    int64_t step = pitch;
    if (direct && inside) {
      from = static_cast<const float*>(row_of(image, batch, y + py).at(0, x));
      step = image.stride[3];
    } else {
      memset(buffer, 0, static_cast<size_t>(kTile * pitch) * 4);
      if (inside) {
        read_channels_last(row_of(image, batch, y + py), 0, image.size[1], x, width, buffer, pitch);
      }
    }
    if (direct && inside) {  // prefetch the next tile, as memory is slower than the arithmetic
      for (int64_t i = 0; i < kTile * step; i += 16) __builtin_prefetch(from + kTile * step + i);
    }
    for (int64_t c = 0; c < pitch; c += kLanes) {
      for (int v = 0; v < kRowVecs; ++v) {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i) block[i] = load(from + (v * kLanes + i) * step + c);
        transpose(block);
        float* to = tile + c * kTilePixels + py * kTile + v * kLanes;
        for (int i = 0; i < kLanes; ++i) store(to + i * kTilePixels, block[i]);
      }
    }
  }
}

// products[i] = <pixel, key i> for kCells keys and all pixels of a tile.
template <int kCells>
UPFEAT_APART void cell_products(const float* pixels, int64_t depth, const float* base,
                                const int64_t* offsets, float* products) {
  Vec sum[kCells][kTileVecs];
  UPFEAT_UNROLL
  for (int i = 0; i < kCells; ++i) {
    UPFEAT_UNROLL
    for (int v = 0; v < kTileVecs; ++v) sum[i][v] = Vec{};
  }
  const float* key[kCells];
  UPFEAT_UNROLL
  for (int i = 0; i < kCells; ++i) key[i] = base + offsets[i];
  for (int64_t d = 0; d < depth; ++d) {
    Vec value[kTileVecs];
    UPFEAT_UNROLL
    for (int v = 0; v < kTileVecs; ++v) value[v] = load(pixels + d * kTilePixels + v * kLanes);
    UPFEAT_UNROLL
    for (int i = 0; i < kCells; ++i) {
      const Vec share = splat(key[i][d]);
      UPFEAT_UNROLL
      for (int v = 0; v < kTileVecs; ++v) sum[i][v] += share * value[v];
    }
  }
  UPFEAT_UNROLL
  for (int i = 0; i < kCells; ++i) {
    UPFEAT_UNROLL
    for (int v = 0; v < kTileVecs; ++v) {
      store(products + i * kTilePixels + v * kLanes, sum[i][v]);
    }
  }
}

// Computes the key products of a tile's pixels with all of its cells, (rows, columns, 2, kTile).
static void tile_cell_products(const TileCells& cells, const float* pixels, int64_t depth,
                               float* products) {
  const int64_t count = cells.rows * cells.columns;
  int64_t i = 0;
  for (; i + kCellBlock <= count; i += kCellBlock) {
    cell_products<kCellBlock>(pixels, depth, cells.base, cells.offsets + i,
                              products + i * kTilePixels);
  }
  for (; i < count; ++i) {
    cell_products<1>(pixels, depth, cells.base, cells.offsets + i, products + i * kTilePixels);
  }
}

// out[c] = sum over taps of weight * feature c of the tap's cell, for kLaneChannels channels from
// `channel` on: [kLaneChannels][2][kTile].
static void sum_lanes(const TileCells& cells, int64_t side, const float* taps, int64_t channel,
                      float* out) {
  for (int v = 0; v < kTileVecs; ++v) {
    Vec sum[kLaneChannels];
    UPFEAT_UNROLL
    for (int c = 0; c < kLaneChannels; ++c) sum[c] = Vec{};
    const int64_t below = v >= kRowVecs ? cells.below : 0;
    for (int64_t dy = 0; dy < side; ++dy) {
      const float* line = taps + dy * side * kTilePixels + v * kLanes;
      const int64_t* offsets = cells.offsets + (dy + below) * cells.columns;
      for (int64_t b = 0; b < cells.columns; ++b) {
        Vec weight{};
        const int64_t first = larger(b - side + 1, 0), end = smaller(b + 1, cells.shifts);
        for (int64_t k = first; k < end; ++k) {
          const Vec own = load(line + (b - k) * kTilePixels);
          weight = cells.shifts == 1 ? own : select(cells.at_shift[k][v % kRowVecs], own, weight);
        }
        const float* feature = cells.base + offsets[b] + channel;
        UPFEAT_UNROLL
        for (int c = 0; c < kLaneChannels; ++c) sum[c] += weight * feature[c];
      }
    }
    UPFEAT_UNROLL
    for (int c = 0; c < kLaneChannels; ++c) {
      store(out + c * kTilePixels + v * kLanes, sum[c]);
    }
  }
}
