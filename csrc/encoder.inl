// Layers of convolutional image encoders: what stands before a convolution (a group norm that is
// already a scale and a shift, SiLU, a rotation by place, or unit scale) is done as pixels are read,
// what stands behind it (bias, residual, the sums that the next norm needs) as they are written.

constexpr int64_t kLayerStrip = kDenseRows;     // pixels at work at a time
constexpr int64_t kWinogradTiles = kDenseRows;  // 2x2 pixels each
constexpr int64_t kWinogradBlock = 64;  // output channels at a time

struct LayerJob {
  Layer layer;
  int64_t in_width, out_width;  // channels in whole vectors
  char* scratch;
  int64_t worker_bytes;
  int64_t row_tasks, rows_per_task, column_tasks;
  const char* right;  // the weights, packed; 16 of them with winograd
};

UPFEAT_INLINE Vec silu(Vec x) {
  const Vec below = exp(-x) + 1.0f;
#if defined(__AVX512F__)
  // A division takes as long as four steps of this: 14 bits, doubled.
  const Vec guess = (Vec)_mm512_rcp14_ps((__m512)below);
  return x * (guess * (2.0f - below * guess));
#else
  return x / below;
#endif
}

// Channels-last float32 rows whose channels fill whole vectors need not be copied to be read.
UPFEAT_INLINE bool is_dense(const UpfeatTensor& tensor) {
  return tensor.dtype == UPFEAT_FLOAT32 && tensor.stride[1] == 1 && tensor.size[1] % kLanes == 0;
}
// `count` pixels of a row as float32, one `pitch` after the other: in place, or in `room`.
UPFEAT_INLINE const float* see_pixels(const UpfeatTensor& tensor, int64_t batch, int64_t y,
                                      int64_t x, int64_t count, float* room, int64_t width,
                                      int64_t* pitch) {
  const Row row = row_of(tensor, batch, y);
  if (is_dense(tensor)) {
    *pitch = row.column_stride;
    return static_cast<const float*>(row.at(0, x));
  }
  read_channels_last(row, 0, tensor.size[1], x, count, room, width);
  *pitch = width;
  return room;
}

// x cos - y sin and y cos + x sin of a pixel's channels i and i + pair; tables are (cos, sin) of
// the row's and of the column's angle, which add up.
static void rotate_pixel(float* x, const float* row, const float* column, int64_t channels,
                         int64_t pair) {
  const auto turn = [&](int64_t c, float own, float partner) {
    const float cosine = row[c] * column[c] - row[channels + c] * column[channels + c];
    const float sine = row[channels + c] * column[c] + row[c] * column[channels + c];
    return own * cosine + partner * sine;
  };
  for (int64_t block = 0; block < channels; block += 2 * pair) {
    int64_t i = block;
    for (; i + kLanes <= block + pair; i += kLanes) {
      const int64_t j = i + pair;
      const Vec first = load(x + i), second = load(x + j);
      const Vec cos_i = load(row + i) * load(column + i) -
                        load(row + channels + i) * load(column + channels + i);
      const Vec sin_i = load(row + channels + i) * load(column + i) +
                        load(row + i) * load(column + channels + i);
      const Vec cos_j = load(row + j) * load(column + j) -
                        load(row + channels + j) * load(column + channels + j);
      const Vec sin_j = load(row + channels + j) * load(column + j) +
                        load(row + j) * load(column + channels + j);
      store(x + i, first * cos_i - second * sin_i);
      store(x + j, second * cos_j + first * sin_j);
    }
    for (; i < block + pair; ++i) {
      const int64_t j = i + pair;
      const float first = x[i], second = x[j];
      x[i] = turn(i, first, -second);
      x[j] = turn(j, second, first);
    }
  }
}

// Asks for pixels that will be read or written soon: memory is idle while products are made.
UPFEAT_INLINE void fetch_pixels(const UpfeatTensor& tensor, int64_t batch, int64_t y, int64_t x,
                                int64_t count) {
  if (!is_dense(tensor) || x >= tensor.size[3] || y >= tensor.size[2]) return;
  const Row row = row_of(tensor, batch, y);
  const int64_t bytes = tensor.size[1] * 4;
  for (int64_t i = 0; i < smaller(count, tensor.size[3] - x); ++i) {
    const char* pixel = static_cast<const char*>(row.at(0, x + i));
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(pixel + at, 0, 2);
  }
}

// What stands before the convolution, on `count` pixels of a row: (count, in_width).
static void prepare_pixels(const LayerJob& job, int64_t batch, int64_t y, int64_t x, int64_t count,
                           float* pixels) {
  const Layer& layer = job.layer;
  const int64_t width = job.in_width;
  int64_t pitch;
  const float* from = see_pixels(*layer.x, batch, y, x, count, pixels, width, &pitch);
  if (layer.scale && !layer.rotate_rows) {
    const float* scale = layer.scale + batch * layer.in_pitch;
    const float* shift = layer.shift + batch * layer.in_pitch;
    for (int64_t i = 0; i < count; ++i) {
      float* pixel = pixels + i * width;
      for (int64_t c = 0; c < width; c += kLanes) {
        const Vec value = load(from + i * pitch + c) * load(scale + c) + load(shift + c);
        store(pixel + c, layer.silu ? silu(value) : value);
      }
    }
  } else if (from != pixels) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < width; c += kLanes) {
        store(pixels + i * width + c, load(from + i * pitch + c));
      }
    }
  }
  if (layer.rotate_rows) {
    const float* row = layer.rotate_rows + y * 2 * layer.inputs;
    for (int64_t i = 0; i < count; ++i) {
      rotate_pixel(pixels + i * width, row, layer.rotate_columns + (x + i) * 2 * layer.inputs,
                   layer.inputs, layer.pair);
    }
  }
  if (layer.unit) {
    for (int64_t i = 0; i < count; ++i) {
      float* pixel = pixels + i * width;
      Vec sum = {};
      for (int64_t c = 0; c < width; c += kLanes) sum += load(pixel + c) * load(pixel + c);
      const Vec mean = total_of(sum) * (1.0f / static_cast<float>(layer.inputs));
      const float scale = 1.0f / __builtin_sqrtf(mean[0] + static_cast<float>(layer.epsilon));
      for (int64_t c = 0; c < width; c += kLanes) store(pixel + c, load(pixel + c) * scale);
    }
  }
}

// Bias, residual and sums of kBlock vectors of channels; the sums of squares lie `width` behind.
template <int kBlock>
UPFEAT_APART void finish_channels(int64_t count, const float* from, int64_t width,
                                  const float* bias, const float* residual,
                                  int64_t residual_pitch, float* to, int64_t pitch, float* sums) {
  Vec add[kBlock], sum[kBlock], squares[kBlock];
  UPFEAT_UNROLL
  for (int m = 0; m < kBlock; ++m) {
    add[m] = bias ? load(bias + m * kLanes) : Vec{};
    sum[m] = squares[m] = Vec{};
  }
  for (int64_t i = 0; i < count; ++i) {
    UPFEAT_UNROLL
    for (int m = 0; m < kBlock; ++m) {
      Vec value = load(from + i * width + m * kLanes) + add[m];
      if (residual) value += load(residual + i * residual_pitch + m * kLanes);
      store(to + i * pitch + m * kLanes, value);
      sum[m] += value;
      squares[m] += value * value;
    }
  }
  UPFEAT_UNROLL
  for (int m = 0; m < kBlock; ++m) {
    store(sums + m * kLanes, sum[m]);
    store(sums + width + m * kLanes, squares[m]);
  }
}

// What stands behind it, on `count` pixels (count, out_width); they are written. `other` has room
// for as many, `sums` for (2, out_width).
static void finish_pixels(const LayerJob& job, int64_t batch, int64_t y, int64_t x, int64_t count,
                          float* pixels, float* other, float* sums, double* partial) {
  const Layer& layer = job.layer;
  const int64_t width = job.out_width;
  const float* residual = nullptr;
  int64_t residual_pitch = 0, pitch = width;
  if (layer.residual) {
    residual = see_pixels(*layer.residual, batch, y, x, count, other, width, &residual_pitch);
  }
  const Row row = row_of(*layer.out, batch, y);
  const bool dense = is_dense(*layer.out);
  float* to = pixels;
  if (dense) {
    to = static_cast<float*>(row.at(0, x));
    pitch = row.column_stride;
  }
  int64_t c = 0;
  for (; c + 4 * kLanes <= width; c += 4 * kLanes) {
    finish_channels<4>(count, pixels + c, width, layer.bias ? layer.bias + c : nullptr,
                       residual ? residual + c : nullptr, residual_pitch, to + c, pitch, sums + c);
  }
  for (; c < width; c += kLanes) {
    finish_channels<1>(count, pixels + c, width, layer.bias ? layer.bias + c : nullptr,
                       residual ? residual + c : nullptr, residual_pitch, to + c, pitch, sums + c);
  }
  if (!dense) write_channels_last(row, 0, layer.outputs, x, count, pixels, width, false);
  if (!partial) return;
  const int64_t size = layer.outputs / layer.groups;
  for (int64_t c = 0; c < layer.outputs; ++c) {
    partial[c / size * 2] += static_cast<double>(sums[c]);
    partial[c / size * 2 + 1] += static_cast<double>(sums[width + c]);
  }
}

UPFEAT_INLINE double* partial_of(const LayerJob& job, int64_t task) {
  if (!job.layer.partial) return nullptr;
  double* partial = job.layer.partial + task * job.layer.groups * 2;
  for (int64_t i = 0; i < job.layer.groups * 2; ++i) partial[i] = 0;
  return partial;
}

// Row or column -1 and n mirrored; or -1 for zeros.
UPFEAT_INLINE int64_t mirrored(int64_t index, int64_t length, bool reflect) {
  if (index >= 0 && index < length) return index;
  if (!reflect || index > length) return -1;
  if (length == 1) return 0;
  return index < 0 ? 1 : length - 2;
}

// 3x3 windows of few channels as rows of a matrix, (count, in_width).
static void read_windows(const LayerJob& job, int64_t batch, int64_t y, int64_t x, int64_t count,
                         float* pixels) {
  const UpfeatTensor& image = *job.layer.x;
  const int64_t channels = image.size[1];
  for (int64_t i = 0; i < count * job.in_width; ++i) pixels[i] = 0;
  for (int64_t tap = 0; tap < 9; ++tap) {
    const int64_t from = mirrored(y + tap / 3 - 1, image.size[2], job.layer.reflect);
    if (from < 0) continue;
    const Row row = row_of(image, batch, from);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = mirrored(x + i + tap % 3 - 1, image.size[3], job.layer.reflect);
      if (at < 0) continue;
      float* to = pixels + i * job.in_width + tap * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] = read_one(row.at(c, at), 0, row.dtype);
    }
  }
}

static void pointwise_task(void* context, int64_t task, int worker) {
  const LayerJob& job = *static_cast<const LayerJob*>(context);
  const Layer& layer = job.layer;
  char* left = job.scratch + worker * job.worker_bytes;
  float* pixels = reinterpret_cast<float*>(left + left_bytes(layer.inputs));
  float* result = pixels + kLayerStrip * job.in_width;
  float* other = result + kLayerStrip * job.out_width;
  float* sums = other + kLayerStrip * job.out_width;
  double* partial = partial_of(job, task);
  const int64_t batch = task / job.row_tasks, first = task % job.row_tasks * job.rows_per_task;
  const int64_t end = smaller(first + job.rows_per_task, layer.out->size[2]);
  const int64_t width = layer.out->size[3];
  memset(left, 0, static_cast<size_t>(left_bytes(layer.inputs)));
  dense_begin();
  for (int64_t y = first; y < end; ++y) {
    for (int64_t x = 0; x < width; x += kLayerStrip) {
      const int64_t count = smaller(kLayerStrip, width - x);
      if (layer.kernel == 1) {
        prepare_pixels(job, batch, y, x, count, pixels);
      } else {
        read_windows(job, batch, y, x, count, pixels);
      }
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < job.in_width; c += kLanes) {
          put_left(left, layer.inputs, i, c, load(pixels + i * job.in_width + c));
        }
      }
      const bool last = x + kLayerStrip >= width;
      fetch_pixels(*layer.x, batch, last ? y + 1 : y, last ? 0 : x + kLayerStrip, kLayerStrip);
      fetch_pixels(layer.residual ? *layer.residual : *layer.out, batch, y, x, count);
      multiply_dense(count, left, layer.inputs, job.right, job.out_width, 0, job.out_width, result,
                     job.out_width);
      finish_pixels(job, batch, y, x, count, result, other, sums, partial);
    }
  }
  dense_end();
}

// F(2x2, 3x3) of Winograd: 16 products of matrices in place of 36, exact but for rounding.
struct WinogradScratch {
  char* tiles;  // 16 left operands
  float *ring, *products, *result, *other, *sums;
};
constexpr int64_t kRingColumns = 2 * kWinogradTiles + 2;

static int64_t winograd_scratch(const LayerJob& job, char* at, WinogradScratch* out) {
  WinogradScratch s{};
  s.tiles = at;
  s.ring = reinterpret_cast<float*>(at + 16 * left_bytes(job.layer.inputs));
  s.products = s.ring + 4 * kRingColumns * job.in_width;
  s.result = s.products + 16 * kWinogradTiles * kWinogradBlock;
  s.other = s.result + 2 * 2 * kWinogradTiles * job.out_width;
  s.sums = s.other + 2 * kWinogradTiles * job.out_width;
  if (out) *out = s;
  return reinterpret_cast<char*>(s.sums + 2 * job.out_width) - at;
}

// Row y of the input, prepared, columns x - 1 to x + 2 * kWinogradTiles, to its place in the ring.
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
  const int64_t width = job.in_width;
  const float* lines[4];
  for (int64_t i = 0; i < 4; ++i) lines[i] = s.ring + (y + i) % 4 * kRingColumns * width;
  for (int64_t tile = 0; tile < kWinogradTiles; ++tile) {
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec down[4][4];
      UPFEAT_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int64_t at = (2 * tile + j) * width + c;
        const Vec d0 = load(lines[0] + at), d1 = load(lines[1] + at);
        const Vec d2 = load(lines[2] + at), d3 = load(lines[3] + at);
        down[0][j] = d0 - d2;
        down[1][j] = d1 + d2;
        down[2][j] = d2 - d1;
        down[3][j] = d1 - d3;
      }
      const int64_t inputs = job.layer.inputs, step = left_bytes(inputs);
      UPFEAT_UNROLL
      for (int i = 0; i < 4; ++i) {
        char* to = s.tiles + 4 * i * step;
        put_left(to, inputs, tile, c, down[i][0] - down[i][2]);
        put_left(to + step, inputs, tile, c, down[i][1] + down[i][2]);
        put_left(to + 2 * step, inputs, tile, c, down[i][2] - down[i][1]);
        put_left(to + 3 * step, inputs, tile, c, down[i][1] - down[i][3]);
      }
    }
  }
}

static void winograd_outputs(const LayerJob& job, const WinogradScratch& s, int64_t channel,
                             int64_t channels) {
  const int64_t step = kWinogradTiles * kWinogradBlock;
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
        multiply_dense(tiles, s.tiles + k * left, layer.inputs, job.right + k * right,
                       job.out_width, channel, channel + channels,
                       s.products + k * kWinogradTiles * kWinogradBlock, kWinogradBlock);
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

static int run_layer(const Runtime& runtime, const Layer& layer) {
  LayerJob job{};
  job.layer = layer;
  job.in_width = whole_vectors(layer.inputs);
  job.out_width = whole_vectors(layer.outputs);
  job.row_tasks = layer.row_tasks;
  job.rows_per_task = layer.rows_per_task;
  job.column_tasks = layer.column_tasks;
  const int64_t floats = kLayerStrip * (job.in_width + 2 * job.out_width) + 2 * job.out_width;
  job.worker_bytes = layer.winograd ? winograd_scratch(job, nullptr, nullptr)
                                    : left_bytes(layer.inputs) + floats * 4;
  job.worker_bytes = (job.worker_bytes + 63) / 64 * 64;
  const int64_t matrices = layer.winograd ? 16 : 1;
  const int64_t right = right_bytes(layer.inputs, job.out_width);
  job.scratch = static_cast<char*>(
      runtime.allocate(job.worker_bytes * runtime.workers + matrices * right));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  char* packed = job.scratch + job.worker_bytes * runtime.workers;
  for (int64_t k = 0; k < matrices; ++k) {
    pack_right(layer.weight + k * layer.inputs * layer.pitch, layer.pitch, layer.inputs,
               job.out_width, packed + k * right);
  }
  job.right = packed;
  const int64_t tasks = layer.out->size[0] * layer.row_tasks * layer.column_tasks;
  runtime.parallel_for(runtime.workers, tasks, layer.winograd ? winograd_task : pointwise_task,
                       &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}

// Means over the cells of a grid, of prepared pixels. A task is a row of the grid.
static void pool_task(void* context, int64_t task, int worker) {
  const LayerJob& job = *static_cast<const LayerJob*>(context);
  const Layer& layer = job.layer;
  const UpfeatTensor &image = *layer.x, &out = *layer.out;
  float* pixels = reinterpret_cast<float*>(job.scratch + worker * job.worker_bytes);
  float* sums = pixels + kLayerStrip * job.in_width;  // (columns, in_width)
  const int64_t width = job.in_width, batch = task / out.size[2], row = task % out.size[2];
  const int64_t height = image.size[2], columns = out.size[3];
  const int64_t first = row * height / out.size[2];
  const int64_t end = ((row + 1) * height + out.size[2] - 1) / out.size[2];
  for (int64_t i = 0; i < columns * width; ++i) sums[i] = 0;
  for (int64_t y = first; y < end; ++y) {
    for (int64_t cell = 0; cell < columns; ++cell) {
      const int64_t left = cell * image.size[3] / columns;
      const int64_t right = ((cell + 1) * image.size[3] + columns - 1) / columns;
      for (int64_t x = left; x < right; x += kLayerStrip) {
        const int64_t count = smaller(kLayerStrip, right - x);
        prepare_pixels(job, batch, y, x, count, pixels);
        for (int64_t c = 0; c < width; c += kLanes) {
          Vec sum = load(sums + cell * width + c);
          for (int64_t i = 0; i < count; ++i) sum += load(pixels + i * width + c);
          store(sums + cell * width + c, sum);
        }
      }
    }
  }
  for (int64_t cell = 0; cell < columns; ++cell) {
    const int64_t left = cell * image.size[3] / columns;
    const int64_t right = ((cell + 1) * image.size[3] + columns - 1) / columns;
    const float share = 1.0f / static_cast<float>((end - first) * (right - left));
    for (int64_t c = 0; c < width; ++c) sums[cell * width + c] *= share;
  }
  write_channels_last(row_of(out, batch, row), 0, layer.inputs, 0, columns, sums, width, false);
}

static int pool_layer(const Runtime& runtime, const Layer& layer) {
  LayerJob job{};
  job.layer = layer;
  job.in_width = whole_vectors(layer.inputs);
  job.worker_bytes = (kLayerStrip + layer.out->size[3]) * job.in_width * 4;
  job.worker_bytes = (job.worker_bytes + 63) / 64 * 64;
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(runtime.workers, layer.out->size[0] * layer.out->size[2], pool_task, &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}

// Pixels prepared and written as they are: a rotation alone, for one.
static void prepare_task(void* context, int64_t task, int worker) {
  const LayerJob& job = *static_cast<const LayerJob*>(context);
  const Layer& layer = job.layer;
  float* pixels = reinterpret_cast<float*>(job.scratch + worker * job.worker_bytes);
  const int64_t height = layer.out->size[2], width = layer.out->size[3];
  const int64_t batch = task / height, y = task % height;
  for (int64_t x = 0; x < width; x += kLayerStrip) {
    const int64_t count = smaller(kLayerStrip, width - x);
    prepare_pixels(job, batch, y, x, count, pixels);
    write_channels_last(row_of(*layer.out, batch, y), 0, layer.inputs, x, count, pixels,
                        job.in_width, false);
  }
}

static int prepare_layer(const Runtime& runtime, const Layer& layer) {
  LayerJob job{};
  job.layer = layer;
  job.in_width = whole_vectors(layer.inputs);
  job.worker_bytes = kLayerStrip * job.in_width * 4;
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(runtime.workers, layer.out->size[0] * layer.out->size[2], prepare_task,
                       &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}

// Features in terms of patterns: per cell, every channel's window of the grid times every pattern,
// divided by how many of the window's cells exist; the numbers read as one row for each pattern,
// a softmax down every column, and the mean of each row.
struct PatternJob {
  const UpfeatTensor *features, *out;
  const float* patterns;  // (side * side, pitch)
  int64_t count, side, pitch;
  char* scratch;
  int64_t worker_bytes, rows, width;  // channels in fours, patterns in whole vectors
};

static void pattern_task(void* context, int64_t task, int worker) {
  const PatternJob& job = *static_cast<const PatternJob*>(context);
  const UpfeatTensor& features = *job.features;
  const int64_t channels = features.size[1], taps = job.side * job.side, half = job.side / 2;
  float* windows = reinterpret_cast<float*>(job.scratch + worker * job.worker_bytes);
  float* responses = windows + job.rows * taps;
  float* dense = responses + job.rows * job.width;
  float* result = dense + channels * job.count + kLanes;
  const int64_t batch = task / features.size[2], y = task % features.size[2];
  for (int64_t x = 0; x < features.size[3]; ++x) {
    int64_t inside = 0;
    for (int64_t i = 0; i < job.rows * taps; ++i) windows[i] = 0;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t row = y + tap / job.side - half, column = x + tap % job.side - half;
      if (row < 0 || row >= features.size[2] || column < 0 || column >= features.size[3]) continue;
      ++inside;
      const Row from = row_of(features, batch, row);
      for (int64_t c = 0; c < channels; ++c) {
        windows[c * taps + tap] = read_one(from.at(c, column), 0, from.dtype);
      }
    }
    multiply_rows(job.rows, windows, taps, 1, job.patterns, nullptr, 1, taps, job.pitch, responses,
                  job.width, job.width / kLanes);
    const float share = 1.0f / static_cast<float>(inside);
    for (int64_t c = 0; c < channels; ++c) {  // without gaps, and then read in other rows
      for (int64_t k = 0; k < job.count; ++k) {
        dense[c * job.count + k] = responses[c * job.width + k] * share;
      }
    }
    for (int64_t k = 0; k < job.count; ++k) result[k] = 0;
    for (int64_t c = 0; c < channels; c += kLanes) {
      // The last column may be read past a row's end: those lanes count for nothing.
      const IVec mine = lanes_below(channels - c);
      Vec most = splat(-3.4e38f), sum = {};
      for (int64_t k = 0; k < job.count; ++k) most = max(most, load(dense + k * channels + c));
      for (int64_t k = 0; k < job.count; ++k) sum += exp(load(dense + k * channels + c) - most);
      const Vec scale = select(mine, 1.0f / sum, Vec{});
      for (int64_t k = 0; k < job.count; ++k) {
        const Vec e = exp(load(dense + k * channels + c) - most) * scale;
        result[k] += total_of(select(mine, e, Vec{}))[0];
      }
    }
    for (int64_t k = 0; k < job.count; ++k) result[k] *= 1.0f / static_cast<float>(channels);
    write_channels_last(row_of(*job.out, batch, y), 0, job.count, x, 1, result, job.width, false);
  }
}

static int run_patterns(const Runtime& runtime, const UpfeatTensor& features,
                        const float* patterns, int64_t side, int64_t pitch,
                        const UpfeatTensor& out) {
  PatternJob job{&features, &out, patterns, out.size[1], side, pitch, nullptr, 0, 0, 0};
  job.rows = (features.size[1] + 3) / 4 * 4;
  job.width = whole_vectors(job.count);
  const int64_t floats = job.rows * (side * side + job.width) + features.size[1] * job.count +
                         kLanes + job.width + kLanes;
  job.worker_bytes = (floats * 4 + 63) / 64 * 64;
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(runtime.workers, features.size[0] * features.size[2], pattern_task, &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}
