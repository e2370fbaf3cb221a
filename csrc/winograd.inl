// 3x3 convolutions of many channels by Winograd's minimal filtering F(2x2, 3x3), exact but for
// rounding: 16 products of matrices for 2x2 pixels in place of 36.

constexpr int64_t kWinogradMatrices = 16;

// Number of floats from one transformed matrix to the next; with a power of two, all would fall into
// one set of the cache.
UPFEAT_INLINE int64_t winograd_step(const Layer& layer) { return layer.inputs * layer.pitch + 16; }

// Computes the transformed matrices of weights, (16, inputs, pitch), rounded once.
static void winograd_matrices(const Layer& layer, float* to) {
  const int64_t count = layer.inputs * layer.pitch, step = winograd_step(layer);
  constexpr int kSome = 16;  // weights that are transformed at a time
  typedef double Numbers[kSome];
  // Along each axis, the taps are replaced by a, (a + b + c) / 2, (a - b + c) / 2, c.
  const auto spread = [](const Numbers* taps, Numbers* out, int pitch) UPFEAT_LAMBDA {
    for (int i = 0; i < kSome; ++i) {
      const double a = taps[0][i], b = taps[pitch][i], c = taps[2 * pitch][i];
      out[0][i] = a;
      out[1][i] = (a + b + c) * 0.5;
      out[2][i] = (a - b + c) * 0.5;
      out[3][i] = c;
    }
  };
  for (int64_t at = 0; at < count; at += kSome) {
    Numbers taps[9], rows[3 * 4], out[4];
    for (int tap = 0; tap < 9; ++tap) {
      const float* weight = layer.weight + tap * count + at;
      for (int i = 0; i < kSome; ++i) taps[tap][i] = static_cast<double>(weight[i]);
    }
    for (int row = 0; row < 3; ++row) spread(taps + 3 * row, rows + 4 * row, 1);
    for (int j = 0; j < 4; ++j) {
      spread(rows + j, out, 4);
      for (int k = 0; k < 4; ++k) {
        float* here = to + (4 * k + j) * step + at;
        for (int i = 0; i < kSome; ++i) here[i] = static_cast<float>(out[k][i]);
      }
    }
  }
}

#if !defined(__AMX_INT8__)

struct WinogradScratch {
  char* tiles;  // 16 left operands
  float *ring, *products, *result, *other, *sums;
};
constexpr int64_t kRingColumns = 2 * kWinogradTiles + 2;
// Number of floats of a product; with a power of two, all planes would fall into one set of the
// cache.
constexpr int64_t kWinogradPlane = kWinogradTiles * kWinogradBlock + 16;

static int64_t winograd_scratch(const LayerJob& job, char* at, WinogradScratch* out) {
  WinogradScratch s{};
  s.tiles = at;
  s.ring = reinterpret_cast<float*>(at + 16 * left_bytes(job.layer.inputs));
  s.products = s.ring + 4 * kRingColumns * job.in_width;
  s.result = s.products + 16 * kWinogradPlane;
  s.other = s.result + 2 * 2 * kWinogradTiles * job.out_width;
  s.sums = s.other + 2 * kWinogradTiles * job.out_width;
  if (out) *out = s;
  return reinterpret_cast<char*>(s.sums + 2 * job.out_width) - at;
}

// Prepares columns x - 1 to x + 2 * kWinogradTiles of row y of the input, at its place in the ring.
static void winograd_row(const LayerJob& job, const WinogradScratch& s, int64_t batch, int64_t y,
                         int64_t x) {
  const Layer& layer = job.layer;
  const UpfeatTensor& image = *layer.x;
  const int64_t width = job.in_width;
  float* line = s.ring + (y + 1) % 4 * kRingColumns * width;
  const int64_t from = mirrored(y, image.size[2], layer.reflect);
  const int64_t low = x > 0 ? x - 1 : 0;
  const int64_t high = smaller(x + 2 * kWinogradTiles + 1, image.size[3]);
  if (from < 0) {
    for (int64_t i = 0; i < kRingColumns * width; ++i) line[i] = 0;
    return;
  }
  float* inside = line + (low - (x - 1)) * width;
  prepare_pixels(job, batch, from, low, high - low, inside);
  for (int64_t i = 0; i < kRingColumns; ++i) {
    const int64_t column = x - 1 + i;
    if (column >= low && column < high) continue;
    const int64_t at = mirrored(column, image.size[3], layer.reflect);
    float* to = line + i * width;
    if (at < 0) {
      for (int64_t c = 0; c < width; ++c) to[c] = 0;
    } else {
      memcpy(to, line + (at - (x - 1)) * width, static_cast<size_t>(width) * 4);
    }
  }
}

static void winograd_inputs(const LayerJob& job, const WinogradScratch& s, int64_t y) {
  const int64_t width = job.in_width, inputs = job.layer.inputs, step = left_bytes(inputs);
  const float* lines[4];
  for (int64_t i = 0; i < 4; ++i) lines[i] = s.ring + (y + i) % 4 * kRingColumns * width;
  const float* pairs[4][2] = {
      {lines[0], lines[2]}, {lines[1], lines[2]}, {lines[2], lines[1]}, {lines[1], lines[3]}};
  for (int64_t tile = 0; tile < kWinogradTiles; ++tile) {
    for (int64_t block = 0; block < dense_blocks(inputs); ++block) {
      UPFEAT_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float* one = pairs[i][0] + 2 * tile * width;
        const float* other = pairs[i][1] + 2 * tile * width;
        // Row i of the four transformed rows: a sum of input rows for i = 1, otherwise a
        // difference.
        const auto down = [&](int j, int64_t c) UPFEAT_LAMBDA {
          const Vec a = load(one + j * width + c), b = load(other + j * width + c);
          return i == 1 ? a + b : a - b;
        };
        char* to = s.tiles + 4 * i * step;
        put_left(to, inputs, tile, block, width,
                 [&](int64_t c) UPFEAT_LAMBDA { return down(0, c) - down(2, c); });
        put_left(to + step, inputs, tile, block, width,
                 [&](int64_t c) UPFEAT_LAMBDA { return down(1, c) + down(2, c); });
        put_left(to + 2 * step, inputs, tile, block, width,
                 [&](int64_t c) UPFEAT_LAMBDA { return down(2, c) - down(1, c); });
        put_left(to + 3 * step, inputs, tile, block, width,
                 [&](int64_t c) UPFEAT_LAMBDA { return down(1, c) - down(3, c); });
      }
    }
  }
}

static void winograd_outputs(const LayerJob& job, const WinogradScratch& s, int64_t channel,
                             int64_t channels) {
  const int64_t step = kWinogradPlane;
  const int64_t second = 2 * kWinogradTiles * job.out_width;  // the second row of pixels
  for (int64_t tile = 0; tile < kWinogradTiles; ++tile) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      const float* from = s.products + tile * kWinogradBlock + c;
      Vec down[2][4];
      UPFEAT_UNROLL
      for (int j = 0; j < 4; ++j) {
        const Vec m0 = load(from + j * step), m1 = load(from + (4 + j) * step);
        const Vec m2 = load(from + (8 + j) * step), m3 = load(from + (12 + j) * step);
        down[0][j] = m0 + m1 + m2;
        down[1][j] = m1 - m2 - m3;
      }
      float* to = s.result + 2 * tile * job.out_width + channel + c;
      UPFEAT_UNROLL
      for (int i = 0; i < 2; ++i) {
        store(to + i * second, down[i][0] + down[i][1] + down[i][2]);
        store(to + i * second + job.out_width, down[i][1] - down[i][2] - down[i][3]);
      }
    }
  }
}

static void winograd_task(void* context, int64_t task, int worker) {
  const LayerJob& job = *static_cast<const LayerJob*>(context);
  const Layer& layer = job.layer;
  WinogradScratch s;
  winograd_scratch(job, job.scratch + worker * job.worker_bytes, &s);
  const int64_t left = left_bytes(layer.inputs), right = right_bytes(layer.inputs, job.out_width);
  memset(s.tiles, 0, static_cast<size_t>(16 * left));
  double* partial = partial_of(job, task);
  const int64_t x = task % job.column_tasks * 2 * kWinogradTiles;
  const int64_t part = task / job.column_tasks;
  const int64_t batch = part / job.row_tasks, first = part % job.row_tasks * job.rows_per_task;
  const int64_t height = layer.out->size[2];
  const int64_t end = smaller(first + job.rows_per_task, height);
  const int64_t columns = smaller(2 * kWinogradTiles, layer.out->size[3] - x);
  const int64_t tiles = (columns + 1) / 2;
  dense_begin();
  winograd_row(job, s, batch, first - 1, x);
  winograd_row(job, s, batch, first, x);
  for (int64_t y = first; y < end; y += 2) {
    winograd_row(job, s, batch, y + 1, x);
    winograd_row(job, s, batch, y + 2, x);
    winograd_inputs(job, s, y);
    for (int64_t channel = 0; channel < job.out_width; channel += kWinogradBlock) {
      const int64_t channels = smaller(kWinogradBlock, job.out_width - channel);
      for (int64_t k = 0; k < 16; ++k) {
        const Operands operands{s.tiles + k * left, job.right + k * right};
        multiply_dense(tiles, &operands, 1, layer.inputs, job.out_width, channel, channel + channels,
                       s.products + k * kWinogradPlane, kWinogradBlock);
      }
      winograd_outputs(job, s, channel, channels);
    }
    for (int64_t row = 0; row < smaller(2, height - y); ++row) {
      finish_pixels(job, batch, y + row, x, columns,
                    s.result + row * 2 * kWinogradTiles * job.out_width, s.other, s.sums, partial);
    }
  }
  dense_end();
}

#endif
