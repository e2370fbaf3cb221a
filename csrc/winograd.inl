// 3x3 convolutions of many channels by Winograd's minimal filtering, exact but for rounding. With
// AMX (winograd_digits.inl) it is F(2x2, 3x3), 16 products of matrices for 2x2 pixels in place of
// 36; otherwise F(4x4, 3x3), 36 products for 4x4 pixels in place of 144.

#if defined(UPFEAT_PARTS)

constexpr int kWinogradPixels = 2;
// Along each axis, the taps are replaced by a, (a + b + c) / 2, (a - b + c) / 2, c.
constexpr double kTapFactors[4][3] = {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};

#else

constexpr int kWinogradPixels = 4;
// Along each axis, the taps and the pixels are polynomials, which are multiplied at the points 0,
// kInner, -kInner, kOuter, -kOuter and infinity. Of the points whose powers are exact in float32,
// these have the least rounding errors: a relative error of 1e-6, half of that with
// 0, 1, -1, 2, -2.
constexpr float kInner = 0.625f, kOuter = 1.5f;
constexpr float kInner2 = kInner * kInner, kOuter2 = kOuter * kOuter;
constexpr double kZero = 1 / (double{kInner2} * double{kOuter2});
constexpr double kOne = 1 / (2 * double{kInner2} * (double{kInner2} - double{kOuter2}));
constexpr double kTwo = 1 / (2 * double{kOuter2} * (double{kOuter2} - double{kInner2}));
constexpr double kTapFactors[6][3] = {
    {kZero, 0, 0},
    {kOne, kOne * double{kInner}, kOne * double{kInner2}},
    {kOne, kOne * -double{kInner}, kOne * double{kInner2}},
    {kTwo, kTwo * double{kOuter}, kTwo * double{kOuter2}},
    {kTwo, kTwo * -double{kOuter}, kTwo * double{kOuter2}},
    {0, 0, 1}};

#endif

constexpr int kWinogradSide = kWinogradPixels + 2;  // of the square of pixels that a tile reads
constexpr int64_t kWinogradMatrices = kWinogradSide * kWinogradSide;
constexpr int64_t kWinogradColumns = 64;  // of a task
constexpr int64_t kWinogradTiles = kWinogradColumns / kWinogradPixels;
constexpr int64_t kLineColumns = kWinogradColumns + 2;  // columns of the input that they read

// Computes the transformed matrices of weights, rounded once: those of input i for outputs n to
// n + kLanes - 1 at place(i, n), `step` floats from one matrix to the next.
template <typename Place>
static void winograd_matrices(const Layer& layer, int64_t width, int64_t step, Place place) {
  typedef double Numbers[kLanes];
  const auto spread = [](const Numbers* taps, Numbers* out, int pitch) UPFEAT_LAMBDA {
    for (int point = 0; point < kWinogradSide; ++point) {
      const double* factors = kTapFactors[point];
      for (int i = 0; i < kLanes; ++i) {
        out[point * pitch][i] = taps[0][i] * factors[0] + taps[pitch][i] * factors[1] +
                                taps[2 * pitch][i] * factors[2];
      }
    }
  };
  for (int64_t input = 0; input < layer.inputs; ++input) {
    for (int64_t n = 0; n < width; n += kLanes) {
      Numbers down[kWinogradSide * 3], taps[9], across[kWinogradSide];
      for (int tap = 0; tap < 9; ++tap) {
        const float* weight = layer.weight + (tap * layer.inputs + input) * layer.pitch + n;
        for (int i = 0; i < kLanes; ++i) taps[tap][i] = static_cast<double>(weight[i]);
      }
      for (int j = 0; j < 3; ++j) spread(taps + j, down + j, 3);
      float* to = place(input, n);
      for (int k = 0; k < kWinogradSide; ++k) {
        spread(down + 3 * k, across, 1);
        for (int j = 0; j < kWinogradSide; ++j, to += step) {
          for (int i = 0; i < kLanes; ++i) to[i] = static_cast<float>(across[j][i]);
        }
      }
    }
  }
}

#if !defined(UPFEAT_PARTS)

struct WinogradScratch {
  // Prepared rows of the input, and left operands of two rows of matrices.
  float *ring, *tiles;
  float *products, *result, *other, *sums;
  double* totals;
};

// Numbers of floats from one left operand, or product, to the next; with a power of two, all would
// fall into one set of the cache.
UPFEAT_INLINE int64_t tile_plane(const LayerJob& job) {
  return kWinogradTiles * job.in_width + 16;
}
UPFEAT_INLINE int64_t product_plane(const LayerJob& job) {
  return kWinogradTiles * job.out_width + 16;
}

static int64_t winograd_scratch(const LayerJob& job, char* at, WinogradScratch* out) {
  WinogradScratch s{};
  s.ring = reinterpret_cast<float*>(at);
  s.tiles = s.ring + kWinogradSide * kLineColumns * job.in_width;
  s.products = s.tiles + 2 * kWinogradSide * tile_plane(job);
  s.result = s.products + kWinogradMatrices * product_plane(job);
  s.other = s.result + kWinogradPixels * kWinogradColumns * job.out_width;
  s.sums = s.other + kWinogradColumns * job.out_width;
  s.totals = reinterpret_cast<double*>(s.sums + 2 * job.out_width);
  if (out) *out = s;
  return reinterpret_cast<char*>(s.totals + 2 * job.out_width) - at;
}

// Returns the place of row y of the input in the ring.
UPFEAT_INLINE float* ring_line(const LayerJob& job, const WinogradScratch& s, int64_t y) {
  return s.ring + (y + 1) % kWinogradSide * kLineColumns * job.in_width;
}

// Prepares columns x - 1 to x + kWinogradColumns of row y of the input, at its place in the ring.
static void winograd_row(const LayerJob& job, const WinogradScratch& s, int64_t batch, int64_t y,
                         int64_t x) {
  const Layer& layer = job.layer;
  const UpfeatTensor& image = *layer.x;
  const int64_t width = job.in_width;
  float* line = ring_line(job, s, y);
  const int64_t from = mirrored(y, image.size[2], layer.reflect);
  if (from < 0) {
    memset(line, 0, static_cast<size_t>(kLineColumns * width) * 4);
    return;
  }
  const int64_t low = x > 0 ? x - 1 : 0;
  const int64_t high = smaller(x + kWinogradColumns + 1, image.size[3]);
  prepare_pixels(job, batch, from, low, high - low, line + (low - (x - 1)) * width);
  for (int64_t i = 0; i < kLineColumns; ++i) {
    const int64_t column = x - 1 + i;
    if (column >= low && column < high) continue;
    const int64_t at = mirrored(column, image.size[3], layer.reflect);
    const size_t bytes = static_cast<size_t>(width) * 4;
    if (at < 0) {
      memset(line + i * width, 0, bytes);
    } else {
      memcpy(line + i * width, line + (at - (x - 1)) * width, bytes);
    }
  }
}

// Evaluates pixels at the points kInner and -kInner, or kOuter and -kOuter; `other2` is the square
// of the point that is left out.
UPFEAT_INLINE void at_points(const Vec* pixels, float point, float other2, Vec* plus, Vec* minus) {
  const Vec even = pixels[4] - pixels[2] * other2;
  const Vec odd = pixels[3] - pixels[1] * other2;
  *plus = even + odd * point;
  *minus = even - odd * point;
}
// Evaluates pixels 0, 2 and 4 at 0, or pixels 1, 3 and 5 at infinity.
UPFEAT_INLINE Vec at_end(const Vec* pixels) {
  return pixels[4] + (pixels[0] * (kInner2 * kOuter2) - pixels[2] * (kInner2 + kOuter2));
}

// Computes the left operands of a row of matrices (kPoint 0 or 5) or of two (1 or 3).
template <int kPoint>
UPFEAT_APART void winograd_inputs(const LayerJob& job, const WinogradScratch& s, int64_t y,
                                  int64_t tiles) {
  constexpr int kRows = kPoint % 5 ? 2 : 1;
  const int64_t width = job.in_width, step = tile_plane(job);
  const float* lines[kWinogradSide];
  for (int i = 0; i < kWinogradSide; ++i) lines[i] = ring_line(job, s, y - 1 + i);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t first = kWinogradPixels * tile * width + c;
      Vec down[kRows][kWinogradSide];
      UPFEAT_UNROLL
      for (int j = 0; j < kWinogradSide; ++j) {
        Vec column[kWinogradSide];
        UPFEAT_UNROLL
        for (int i = 0; i < kWinogradSide; ++i) column[i] = load(lines[i] + first + j * width);
        if (kRows == 1) {
          down[0][j] = at_end(column + kPoint / 5);
        } else {
          at_points(column, kPoint == 1 ? kInner : kOuter, kPoint == 1 ? kOuter2 : kInner2,
                    &down[0][j], &down[kRows - 1][j]);
        }
      }
      UPFEAT_UNROLL
      for (int row = 0; row < kRows; ++row) {
        Vec across[kWinogradSide];
        across[0] = at_end(down[row]);
        at_points(down[row], kInner, kOuter2, across + 1, across + 2);
        at_points(down[row], kOuter, kInner2, across + 3, across + 4);
        across[5] = at_end(down[row] + 1);
        float* to = s.tiles + row * kWinogradSide * step + tile * width + c;
        UPFEAT_UNROLL
        for (int j = 0; j < kWinogradSide; ++j) store(to + j * step, across[j]);
      }
    }
  }
}

// Computes four pixels from the products at the six points.
UPFEAT_INLINE void from_points(const Vec* m, Vec* pixels) {
  const Vec inner_sum = m[1] + m[2], inner_difference = m[1] - m[2];
  const Vec outer_sum = m[3] + m[4], outer_difference = m[3] - m[4];
  pixels[0] = m[0] + inner_sum + outer_sum;
  pixels[1] = inner_difference * kInner + outer_difference * kOuter;
  pixels[2] = inner_sum * kInner2 + outer_sum * kOuter2;
  pixels[3] =
      inner_difference * (kInner2 * kInner) + (outer_difference * (kOuter2 * kOuter) + m[5]);
}

// Computes the pixels of all tiles, (kWinogradPixels, kWinogradColumns, out_width).
static void winograd_outputs(const LayerJob& job, const WinogradScratch& s, int64_t tiles) {
  const int64_t step = product_plane(job), width = job.out_width;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const float* from = s.products + tile * width + c;
      Vec down[kWinogradPixels][kWinogradSide];
      UPFEAT_UNROLL
      for (int j = 0; j < kWinogradSide; ++j) {
        Vec products[kWinogradSide], pixels[kWinogradPixels];
        UPFEAT_UNROLL
        for (int i = 0; i < kWinogradSide; ++i) {
          products[i] = load(from + (kWinogradSide * i + j) * step);
        }
        from_points(products, pixels);
        UPFEAT_UNROLL
        for (int i = 0; i < kWinogradPixels; ++i) down[i][j] = pixels[i];
      }
      float* to = s.result + kWinogradPixels * tile * width + c;
      UPFEAT_UNROLL
      for (int i = 0; i < kWinogradPixels; ++i) {
        Vec pixels[kWinogradPixels];
        from_points(down[i], pixels);
        UPFEAT_UNROLL
        for (int j = 0; j < kWinogradPixels; ++j) {
          store(to + (i * kWinogradColumns + j) * width, pixels[j]);
        }
      }
    }
  }
}

// Pixels to prefetch during the products of a row of tiles: those that will be overwritten, and the
// rows of the input for the next row of tiles.
struct WinogradFetches {
  Fetch rows[2 * kWinogradPixels];
  int index;

  void begin(const LayerJob& job, int64_t batch, int64_t y, int64_t x, int64_t end) {
    const Layer& layer = job.layer;
    const UpfeatTensor& target = layer.residual ? *layer.residual : *layer.out;
    const int64_t width = layer.out->size[3], left = x > 0 ? x - 1 : 0;
    const int64_t columns = smaller(kWinogradColumns, width - x);
    index = 0;
    for (int64_t i = 0; i < kWinogradPixels; ++i) {
      Fetch &own = rows[i], &next = rows[kWinogradPixels + i];
      own = next = Fetch{};
      if (y + i < end) own.begin(target, batch, Strip{y + i, x, columns});
      const int64_t row = y + kWinogradPixels + 1 + i;
      if (y + kWinogradPixels < end && row < layer.x->size[2]) {
        next.begin(*layer.x, batch, Strip{row, left, smaller(x + columns + 1, width) - left});
      }
    }
  }
  UPFEAT_MEMBER void step() {
    if (rows[index].at >= rows[index].end && index < 2 * kWinogradPixels - 1) ++index;
    rows[index].step();
  }
};

// Computes the pixels of all tiles of rows y to y + kWinogradPixels - 1 from the prepared rows.
static void winograd_tiles(const LayerJob& job, const WinogradScratch& s, int64_t y,
                           int64_t tiles, WinogradFetches& fetches) {
  const int64_t left = tile_plane(job), product = product_plane(job);
  const int64_t right = right_bytes(job.layer.inputs, job.out_width);
  // The next matrix is prefetched during each product, as not all fit into the second-level cache.
  const int64_t calls = (tiles + 3) / 4 * blocks_of(job.out_width).count;
  const int64_t ahead_step = smaller(64, right / (calls * job.layer.inputs) + 1);
  const int64_t lines = kWinogradColumns * (job.in_width + job.out_width) / 16;
  const int64_t some = lines * kWinogradPixels / (calls * kWinogradMatrices) + 1;
  const auto multiply_row = [&](int from, int point) {
    for (int j = 0; j < kWinogradSide; ++j) {
      const int64_t k = kWinogradSide * point + j;
      Ahead ahead{job.right + (k + 1) % kWinogradMatrices * right, ahead_step};
      multiply_dense(tiles, s.tiles + (kWinogradSide * from + j) * left, job.in_width,
                     job.layer.inputs, job.right + k * right, job.out_width,
                     StoreRows{s.products + k * product, job.out_width}, [&] {
                       for (int64_t i = 0; i < some; ++i) fetches.step();
                       const Ahead now = ahead;
                       ahead.at += job.layer.inputs * ahead_step;
                       return now;
                     });
    }
  };
  winograd_inputs<0>(job, s, y, tiles);
  multiply_row(0, 0);
  winograd_inputs<1>(job, s, y, tiles);
  multiply_row(0, 1);
  multiply_row(1, 2);
  winograd_inputs<3>(job, s, y, tiles);
  multiply_row(0, 3);
  multiply_row(1, 4);
  winograd_inputs<5>(job, s, y, tiles);
  multiply_row(0, 5);
  winograd_outputs(job, s, tiles);
}

static void winograd_task(void* context, int64_t task, int worker) {
  const LayerJob& job = *static_cast<const LayerJob*>(context);
  const Layer& layer = job.layer;
  WinogradScratch s;
  winograd_scratch(job, job.scratch + worker * job.worker_bytes, &s);
  zero_totals(job, s.totals);
  const int64_t x = task % job.column_tasks * kWinogradColumns;
  const int64_t part = task / job.column_tasks;
  const int64_t batch = part / job.row_tasks, first = part % job.row_tasks * job.rows_per_task;
  const int64_t end = smaller(first + job.rows_per_task, layer.out->size[2]);
  const int64_t columns = smaller(kWinogradColumns, layer.out->size[3] - x);
  const int64_t tiles = (columns + kWinogradPixels - 1) / kWinogradPixels;
  WinogradFetches fetches;
  winograd_row(job, s, batch, first - 1, x);
  winograd_row(job, s, batch, first, x);
  for (int64_t y = first; y < end; y += kWinogradPixels) {
    for (int64_t i = 1; i <= kWinogradPixels; ++i) winograd_row(job, s, batch, y + i, x);
    fetches.begin(job, batch, y, x, end);
    winograd_tiles(job, s, y, tiles, fetches);
    for (int64_t row = 0; row < smaller(kWinogradPixels, end - y); ++row) {
      finish_pixels(job, batch, y + row, x, columns,
                    s.result + row * kWinogradColumns * job.out_width, s.other, s.sums, s.totals);
    }
  }
  add_groups(job, task, s.totals);
}

#endif
