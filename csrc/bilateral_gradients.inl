// Gradients of the bilateral kernel, one image at a time and in two passes:
// 1. compute the gradients of every pixel's key products, stored in planes with margins of 0;
// 2. for every row of keys, sum the gradients of products in which a key is the centre pixel's, and
//    of products in which it is a neighbour's.

struct BilateralJob {
  Maker maker;
  UpfeatTensor grad;
  UpfeatTensor target;
  Chunks chunks;
  int64_t batch;
  char* scratch;
  int64_t worker_bytes;
  float* planes;  // (taps, H, pitch): column x at 2r + x, 0 outside the image
  float* keys;    // (D, H, pitch): column x at 2r + x, reflected by r, 0 beyond that
  int64_t pitch;
  double* partial;  // (groups, 2): d/d temperature and d/d sigma of each pair of rows
};

UPFEAT_INLINE void clear(float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) from[i] = 0;
}

// Replaces `grad`, the gradient of a tile's weights, by the gradient of its products, and adds the
// tile's terms of the gradients of temperature and sigma to `partial`.
static void bilateral_tile_backward(const BilateralJob& job, const float* products, float* grad,
                                    double* partial) {
  const Maker& maker = job.maker;
  const Vec temperature = splat(static_cast<float>(maker.source->temperature));
  const double sigma = maker.source->sigma_spatial;
  for (int v = 0; v < kTileVecs; ++v) {
    const float* product = products + v * kLanes;
    float* g = grad + v * kLanes;
    Vec top = load(product) * temperature;
    for (int64_t k = 1; k < maker.taps; ++k) {
      top = max(top, load(product + k * kTilePixels) * temperature);
    }
    Vec range_sum = {}, sum = {}, weighted = {};
    for (int64_t k = 0; k < maker.taps; ++k) {
      const Vec e = falling_exp(below_top(load(product + k * kTilePixels), temperature, top));
      range_sum += e;
      sum += e * maker.spatial[k];
      weighted += e * maker.spatial[k] * load(g + k * kTilePixels);
    }
    // A weight is n / max(Z, 1e-7), with n = range * spatial and Z = sum n; where Z is clamped, the
    // divisor is a constant.
    const Vec range_scale = 1.0f / range_sum;
    const Vec total = sum * range_scale, inverse = 1.0f / max(total, splat(1e-7f));
    const IVec clamped = total < splat(1e-7f);
    const Vec mean = select(clamped, Vec{}, weighted * range_scale * inverse);
    Vec range_mean = {}, by_sigma = {};
    for (int64_t k = 0; k < maker.taps; ++k) {
      const Vec value = load(product + k * kTilePixels);
      const Vec range = falling_exp(below_top(value, temperature, top)) * range_scale;
      const Vec grad_n = (load(g + k * kTilePixels) - mean) * inverse;
      const int64_t row = k / maker.side - maker.radius, column = k % maker.side - maker.radius;
      const double unit = maker.radius ? static_cast<double>(maker.radius) : 1.0;
      // With radius 0 both coordinates are -1.
      const double distance =
          maker.radius ? static_cast<double>(row * row + column * column) / (unit * unit) : 2.0;
      const Vec shared = grad_n * range * maker.spatial[k];
      by_sigma += shared * static_cast<float>(distance / (sigma * sigma * sigma));
      range_mean += shared;
    }
    Vec by_temperature = {};
    for (int64_t k = 0; k < maker.taps; ++k) {
      const Vec value = load(product + k * kTilePixels);
      const Vec range = falling_exp(below_top(value, temperature, top)) * range_scale;
      const Vec grad_range = (load(g + k * kTilePixels) - mean) * inverse * maker.spatial[k];
      const Vec grad_logit = range * (grad_range - range_mean);
      by_temperature += grad_logit * value;
      store(g + k * kTilePixels, grad_logit * temperature);
    }
    partial[0] += static_cast<double>(lane_sum(by_temperature));
    partial[1] += static_cast<double>(lane_sum(by_sigma));
  }
}

static void bilateral_products_task(void* context, int64_t task, int worker) {
  const BilateralJob& job = *static_cast<BilateralJob*>(context);
  Maker maker = job.maker;
  char* at = place_maker(maker, job.scratch + worker * job.worker_bytes);
  float* products = reinterpret_cast<float*>(at);
  float* grad = products + maker.taps * kTilePixels;
  start_rows(maker, job.batch);
  BilateralJob placed = job;
  placed.maker = maker;
  const int64_t end = smaller((task + 1) * job.chunks.size, job.chunks.groups);
  for (int64_t group = task * job.chunks.size; group < end; ++group) {
    double* partial = job.partial + 2 * group;
    partial[0] = partial[1] = 0;
    for (int64_t x = 0; x < maker.columns; x += kTile) {
      tile_products(maker, 2 * group, x, products);
      read_tile(job.grad, job.batch, 2 * group, x, grad);
      bilateral_tile_backward(placed, products, grad, partial);
      const int64_t wide = smaller(maker.columns - x, kTile);
      for (int64_t py = 0; py < 2 && 2 * group + py < maker.height; ++py) {
        for (int64_t k = 0; k < maker.taps; ++k) {
          float* line = job.planes + (k * maker.height + 2 * group + py) * job.pitch;
          float* to = line + 2 * maker.radius + x;
          const float* from = grad + (2 * k + py) * kTile;
          // Columns beyond the image get zeros of the tile.
          for (int v = 0; v < kRowVecs; ++v) store(to + v * kLanes, load(from + v * kLanes));
          if (x == 0) clear(line, 2 * maker.radius);
          if (x + kTile >= maker.columns) clear(to + wide, line + job.pitch - (to + wide));
        }
      }
    }
  }
}

constexpr int kKeySpan = kLanes == 4 ? 4 : 8;

// to[d][x] += sum over dx of plane[dx][x + shift*dx] * keys[d][x + step*dx], d in [0, kSpan):
// one row of taps. `to` may be read and written up to the next multiple of kLanes.
template <int kSpan>
static void gather_keys(float* to, int64_t to_pitch, const float* plane, int64_t plane_step,
                        const float* keys, int64_t key_pitch, int64_t key_step, int64_t side,
                        int64_t count) {
  for (int64_t x = 0; x < count; x += kLanes) {
    Vec sum[kSpan];
    UPFEAT_UNROLL
    for (int d = 0; d < kSpan; ++d) sum[d] = load(to + d * to_pitch + x);
    for (int64_t dx = 0; dx < side; ++dx) {
      const Vec g = load(plane + dx * plane_step + x);
      const float* from = keys + dx * key_step + x;
      UPFEAT_UNROLL
      for (int d = 0; d < kSpan; ++d) sum[d] += g * load(from + d * key_pitch);
    }
    UPFEAT_UNROLL
    for (int d = 0; d < kSpan; ++d) store(to + d * to_pitch + x, sum[d]);
  }
}

static void gather_key_rows(const BilateralJob& job, float* to, const float* plane,
                            int64_t plane_step, const float* keys, int64_t key_step,
                            int64_t count) {
  const int64_t key_pitch = job.maker.height * job.pitch;
  int64_t d = 0;
  for (; d + kKeySpan <= job.maker.width; d += kKeySpan) {
    gather_keys<kKeySpan>(to + d * job.pitch, job.pitch, plane, plane_step, keys + d * key_pitch,
                          key_pitch, key_step, job.maker.side, count);
  }
  for (; d < job.maker.width; ++d) {
    gather_keys<1>(to + d * job.pitch, job.pitch, plane, plane_step, keys + d * key_pitch,
                   key_pitch, key_step, job.maker.side, count);
  }
}

static void bilateral_keys_task(void* context, int64_t y, int worker) {
  const BilateralJob& job = *static_cast<BilateralJob*>(context);
  const int64_t r = job.maker.radius, side = job.maker.side, width = job.maker.width;
  const int64_t height = job.maker.height, columns = job.maker.columns, pitch = job.pitch;
  float* centre = reinterpret_cast<float*>(job.scratch + worker * job.worker_bytes);
  float* spread = centre + width * pitch;  // column X of the padded image at r + X
  memset(centre, 0, static_cast<size_t>(2 * width * pitch) * 4);
  for (int64_t dy = 0; dy < side; ++dy) {
    const int64_t other = reflect(y + dy - r, height);
    gather_key_rows(job, centre, job.planes + (dy * side * height + y) * pitch + 2 * r,
                    height * pitch, job.keys + other * pitch + r, 1, columns);
  }
  for (int64_t padded = -r; padded < height + r; ++padded) {
    if (reflect(padded, height) != y) continue;
    for (int64_t dy = 0; dy < side; ++dy) {
      const int64_t from = padded - (dy - r);
      if (from < 0 || from >= height) continue;
      // The pixel at X - (dx - r) reads X by tap dx.
      gather_key_rows(job, spread, job.planes + (dy * side * height + from) * pitch + 2 * r,
                      height * pitch - 1, job.keys + from * pitch + 2 * r, -1, columns + 2 * r);
    }
  }
  const Row row = row_of(job.target, job.batch, y);
  for (int64_t d = 0; d < width; ++d) {
    float* line = centre + d * pitch;
    const float* add = spread + d * pitch + r;
    for (int64_t x = 0; x < columns; ++x) line[x] += add[x];
    for (int64_t j = 1; j <= r; ++j) {
      line[reflect(-j, columns)] += add[-j];
      line[reflect(columns - 1 + j, columns)] += add[columns - 1 + j];
    }
    write_run(row.at(d, 0), row.column_stride, row.dtype, columns, line);
  }
}

static void read_keys_task(void* context, int64_t y, int) {
  const BilateralJob& job = *static_cast<BilateralJob*>(context);
  const Maker& maker = job.maker;
  const Row row = row_of(*maker.image, job.batch, y);
  for (int64_t d = 0; d < maker.width; ++d) {
    float* begin = job.keys + (d * maker.height + y) * job.pitch;
    float* line = begin + 2 * maker.radius;
    clear(begin, job.pitch);
    read_run(row.at(d, 0), row.column_stride, row.dtype, maker.columns, line);
    for (int64_t j = 1; j <= maker.radius; ++j) {
      line[-j] = line[reflect(-j, maker.columns)];
      line[maker.columns - 1 + j] = line[reflect(maker.columns - 1 + j, maker.columns)];
    }
  }
}

static int grad_bilateral(const Runtime& runtime, const WeightSource& source,
                          const UpfeatTensor& grad, const UpfeatTensor& target, double* scalars) {
  BilateralJob job{};
  job.maker = describe(source);
  job.grad = grad;
  job.target = target;
  const Maker& maker = job.maker;
  job.chunks = chunks_of((maker.height + 1) / 2, runtime.workers, 1, 4);
  job.pitch = (maker.columns + 4 * maker.radius + 2 * kTile + 15) / 16 * 16;
  job.worker_bytes = rounded(larger(maker_bytes(maker) + 2 * maker.taps * kTilePixels * 4,
                                    2 * maker.width * job.pitch * 4));
  const int64_t plane_bytes = maker.taps * maker.height * job.pitch * 4;
  const int64_t key_bytes = maker.width * maker.height * job.pitch * 4;
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  job.planes = static_cast<float*>(runtime.allocate(plane_bytes));
  job.keys = static_cast<float*>(runtime.allocate(key_bytes));
  job.partial = static_cast<double*>(runtime.allocate(job.chunks.groups * 16));
  const bool have = job.scratch && job.planes && job.keys && job.partial;
  if (have) {
    scalars[0] = scalars[1] = 0;
    for (job.batch = 0; job.batch < grad.size[0]; ++job.batch) {
      runtime.parallel_for(runtime.workers, maker.height, read_keys_task, &job);
      runtime.parallel_for(runtime.workers, job.chunks.count, bilateral_products_task, &job);
      runtime.parallel_for(runtime.workers, maker.height, bilateral_keys_task, &job);
      for (int64_t group = 0; group < job.chunks.groups; ++group) {
        scalars[0] += job.partial[2 * group];
        scalars[1] += job.partial[2 * group + 1];
      }
    }
  }
  runtime.release(job.scratch);
  runtime.release(job.planes);
  runtime.release(job.keys);
  runtime.release(job.partial);
  return have ? UPFEAT_OK : UPFEAT_NO_MEMORY;
}
