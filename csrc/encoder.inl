// Layers of convolutional image encoders. The steps before a convolution (a group norm, given as a
// scale and a shift, SiLU, a rotation by position, or unit scale) are applied as pixels are read,
// and the steps after it (bias, residual, the sums that the next norm needs) as pixels are written.

constexpr int64_t kLayerStrip = kDenseRows;  // pixels that are processed at a time

struct LayerJob {
  Layer layer;
  int64_t in_width, out_width;  // channels in whole vectors
  char* scratch;
  int64_t worker_bytes;
  int64_t row_tasks, rows_per_task, column_tasks;
  const char* right;  // the weights, packed; with winograd, kWinogradMatrices of them
  const float *factors, *columns;  // with digits.inl: of inputs, and of columns of the weights
};

// True if rows can be read without a copy: channels-last float32, with channels in whole vectors.
UPFEAT_INLINE bool is_dense(const UpfeatTensor& tensor) {
  return tensor.dtype == UPFEAT_FLOAT32 && tensor.stride[1] == 1 && tensor.size[1] % kLanes == 0;
}
// Returns `count` pixels of a row as float32, `pitch` floats apart: in place, or copied to `room`.
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

// Replaces a pixel's channels x and y, i and i + pair, by x cos - y sin and y cos + x sin. The
// tables are (cos, sin) of the row's and of the column's angle, the sum of which is the pixel's
// angle.
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

// Neighbouring pixels of a row.
struct Strip {
  int64_t y, x, count;
};

// Prefetches a strip that will be read or written soon, one cache line at a time: memory is idle
// while products are computed, and a prefetch of the whole strip at once would stall other
// accesses.
struct Fetch {
  const char *at, *end;

  UPFEAT_MEMBER void begin(const UpfeatTensor& tensor, int64_t batch, const Strip& strip) {
    at = end = nullptr;
    const Row row = row_of(tensor, batch, strip.y);
    if (!is_dense(tensor) || row.column_stride != tensor.size[1]) return;
    at = static_cast<const char*>(row.at(0, strip.x));
    end = at + strip.count * tensor.size[1] * 4;
  }
  UPFEAT_MEMBER void step() {
    if (at >= end) return;
    __builtin_prefetch(at, 1, 2);
    at += 64;
  }
#if !defined(UPFEAT_PARTS)
  // Returns the next `bytes` bytes as memory to prefetch during a product, or prefetches them at
  // once if the product has fewer inputs than there are cache lines.
  UPFEAT_MEMBER Ahead during(int64_t inputs, int64_t bytes) {
    const char* from = at;
    const int64_t stride = (bytes + inputs - 1) / inputs;
    if (stride > 64) {
      for (int64_t i = 0; i < bytes; i += 64) step();
      return Ahead{from, 0};
    }
    if (at >= end) return Ahead{reinterpret_cast<const char*>(this), 0};
    at += stride * inputs;
    return Ahead{from, stride};
  }
#endif
};

// Applies an activation to kCount vectors.
template <int kCount>
UPFEAT_INLINE void activate(Activation activation, Vec* x) {
  if (activation == kSilu) {
    silu<kCount>(x);
  } else if (activation == kRelu) {
    UPFEAT_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = max(splat(0.0f), x[i]);  // NaN stays
  }
}

// Applies a scale, a shift and perhaps an activation to kCount vectors of channels.
template <int kCount>
UPFEAT_INLINE void norm_channels(const float* from, const float* scale, const float* shift,
                                 Activation activation, float* to) {
  Vec value[kCount];
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) {
    value[i] = load(from + i * kLanes) * load(scale + i * kLanes) + load(shift + i * kLanes);
  }
  activate<kCount>(activation, value);
  UPFEAT_UNROLL
  for (int i = 0; i < kCount; ++i) store(to + i * kLanes, value[i]);
}

// Applies the steps before the convolution to `count` pixels of a row: (count, in_width).
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
      const float* source = from + i * pitch;
      float* pixel = pixels + i * width;
      int64_t c = 0;
      for (; c + 4 * kLanes <= width; c += 4 * kLanes) {
        norm_channels<4>(source + c, scale + c, shift + c, layer.activation, pixel + c);
      }
      for (; c < width; c += kLanes) {
        norm_channels<1>(source + c, scale + c, shift + c, layer.activation, pixel + c);
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

// Adds bias and residual to kBlock vectors of channels, and sums them; the sums of squares are
// stored `width` floats after the sums.
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

// Sums of a task's outputs and of their squares, (2, out_width) in double: zero_totals() before its
// pixels, add_sums() after each strip of pixels, and add_groups() at the end.
UPFEAT_INLINE void zero_totals(const LayerJob& job, double* totals) {
  for (int64_t c = 0; c < 2 * job.out_width; ++c) totals[c] = 0;
}
UPFEAT_INLINE void add_sums(const LayerJob& job, const float* sums, double* totals) {
  if (!job.layer.partial) return;
  for (int64_t c = 0; c < 2 * job.out_width; ++c) totals[c] += static_cast<double>(sums[c]);
}
static void add_groups(const LayerJob& job, int64_t task, const double* totals) {
  if (!job.layer.partial) return;
  const int64_t groups = job.layer.groups, size = job.layer.outputs / groups;
  double* partial = job.layer.partial + task * groups * 2;
  for (int64_t i = 0; i < groups * 2; ++i) partial[i] = 0;
  for (int64_t c = 0; c < size * groups; ++c) {
    partial[c / size * 2] += totals[c];
    partial[c / size * 2 + 1] += totals[job.out_width + c];
  }
}

// Applies the steps after the convolution to `count` pixels (count, out_width), and writes them.
// `other` has room for as many pixels, `sums` for (2, out_width).
static void finish_pixels(const LayerJob& job, int64_t batch, int64_t y, int64_t x, int64_t count,
                          float* pixels, float* other, float* sums, double* totals) {
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
  add_sums(job, sums, totals);
}

// Index of the row or column to read: -1 and `length` are reflected, or give -1 for zeros.
UPFEAT_INLINE int64_t mirrored(int64_t index, int64_t length, bool reflect) {
  if (index >= 0 && index < length) return index;
  if (!reflect || index > length) return -1;
  if (length == 1) return 0;
  return index < 0 ? 1 : length - 2;
}

// Reads 3x3 windows of few channels as rows of a matrix, (count, in_width).
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

#if !defined(UPFEAT_PARTS)

// Applies the steps after the convolution to products as they are computed, four pixels at a time,
// instead of finish_pixels(): they are neither stored nor read again.
struct FinishRows {
  int64_t count, width;  // pixels; channels in whole vectors
  const float *bias, *residual;
  int64_t residual_pitch, pitch;
  float *to, *sums;

  FinishRows(const LayerJob& job, int64_t batch, const Strip& strip, float* room, float* other,
             float* sums_of_strip)
      : count(strip.count), width(job.out_width), bias(job.layer.bias), residual(nullptr),
        residual_pitch(0), pitch(job.out_width), to(room), sums(sums_of_strip) {
    const Layer& layer = job.layer;
    if (layer.residual) {
      residual = see_pixels(*layer.residual, batch, strip.y, strip.x, count, other, width,
                            &residual_pitch);
    }
    if (is_dense(*layer.out)) {
      const Row row = row_of(*layer.out, batch, strip.y);
      to = static_cast<float*>(row.at(0, strip.x));
      pitch = row.column_stride;
    }
  }

  template <int kBlock>
  UPFEAT_MEMBER void put(const Vec (&products)[4][kBlock], int64_t row, int64_t column) const {
    Vec add[kBlock], sum[kBlock], squares[kBlock];
    UPFEAT_UNROLL
    for (int m = 0; m < kBlock; ++m) {
      const int64_t c = column + m * kLanes;
      add[m] = bias ? load(bias + c) : Vec{};
      sum[m] = row ? load(sums + c) : Vec{};
      squares[m] = row ? load(sums + width + c) : Vec{};
    }
    const int64_t rows = smaller(4, count - row);
    UPFEAT_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i >= rows) break;
      const int64_t from = (row + i) * residual_pitch + column, at = (row + i) * pitch + column;
      UPFEAT_UNROLL
      for (int m = 0; m < kBlock; ++m) {
        Vec value = products[i][m] + add[m];
        if (residual) value += load(residual + from + m * kLanes);
        store(to + at + m * kLanes, value);
        sum[m] += value;
        squares[m] += value * value;
      }
    }
    UPFEAT_UNROLL
    for (int m = 0; m < kBlock; ++m) {
      store(sums + column + m * kLanes, sum[m]);
      store(sums + width + column + m * kLanes, squares[m]);
    }
  }
};

// Computes rows of a layer.
static void pointwise_task(void* context, int64_t task, int worker) {
  const LayerJob& job = *static_cast<const LayerJob*>(context);
  const Layer& layer = job.layer;
  float* left = reinterpret_cast<float*>(job.scratch + worker * job.worker_bytes);
  float* result = left + kLayerStrip * job.in_width;
  float* other = result + kLayerStrip * job.out_width;
  float* sums = other + kLayerStrip * job.out_width;
  double* totals = reinterpret_cast<double*>(sums + 2 * job.out_width);
  zero_totals(job, totals);
  const int64_t batch = task / job.row_tasks, first = task % job.row_tasks * job.rows_per_task;
  const int64_t end = smaller(first + job.rows_per_task, layer.out->size[2]);
  const int64_t width = layer.out->size[3];
  const UpfeatTensor& target = layer.residual ? *layer.residual : *layer.out;
  memset(left, 0, static_cast<size_t>(kLayerStrip * job.in_width) * 4);
  const auto following = [&](const Strip& strip) {
    Strip next{strip.y, strip.x + strip.count, 0};
    if (next.x == width) next = {strip.y + 1, 0, 0};
    next.count = next.y < end ? smaller(kLayerStrip, width - next.x) : 0;
    return next;
  };
  const int64_t products = (kLayerStrip / 4) * blocks_of(job.out_width).count;
  const int64_t fetched = kLayerStrip * (job.in_width + job.out_width) * 4 / products;
  Strip strip{first, 0, smaller(kLayerStrip, width)}, next;
  for (; strip.count; strip = next) {
    next = following(strip);
    if (layer.kernel == 1) {
      prepare_pixels(job, batch, strip.y, strip.x, strip.count, left);
    } else {
      read_windows(job, batch, strip.y, strip.x, strip.count, left);
    }
    // The pixels that will be overwritten are fetched during the products, then the next strip.
    Fetch fetches[2] = {};
    fetches[0].begin(target, batch, strip);
    if (layer.kernel == 1 && next.count) fetches[1].begin(*layer.x, batch, next);
    const FinishRows finish(job, batch, strip, result, other, sums);
    multiply_dense(strip.count, left, job.in_width, layer.inputs, job.right, job.out_width, finish,
                   [&]() UPFEAT_LAMBDA {
                     Fetch& fetch = fetches[fetches[0].at < fetches[0].end ? 0 : 1];
                     return fetch.during(layer.inputs, fetched);
                   });
    if (finish.to == result) {
      write_channels_last(row_of(*layer.out, batch, strip.y), 0, layer.outputs, strip.x,
                          strip.count, result, job.out_width, false);
    }
    add_sums(job, sums, totals);
  }
  add_groups(job, task, totals);
}

#endif
