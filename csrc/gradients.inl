// Gradients of the upsampling by features and by weights. Both fold the taps; neither computes
// features on the fine grid.

struct GradientJob {
  const Axis* rows;
  const Axis* columns;
  UpfeatTensor grad;
  UpfeatTensor weights;  // for grad_features the weights, for grad_weights their gradient
  CoarseRows coarse;
  Chunks chunks;
  char* scratch;
  int64_t worker_bytes;
  // grad_features only
  UpfeatTensor target;
  float* sums;  // (B, h, w, channels) float32
  int64_t channels, colour, coloured, splits;
};

// Reads grad of one tile as [2][kTile][pitch], channels last; pixels outside the image are 0.
static void read_grad_tile(const GradientJob& job, int64_t batch, int64_t group, int64_t tile,
                           int64_t channel, int64_t channels, int64_t pitch, float* to) {
  const int64_t width = smaller(job.columns->out - tile * kTile, kTile);
  for (int64_t py = 0; py < 2; ++py) {
    const int64_t y = 2 * group + py;
    float* line = to + py * kTile * pitch;
    const bool inside = y < job.rows->out;
    if (inside) {
      read_channels_last(row_of(job.grad, batch, y), channel, channels, tile * kTile, width, line,
                         pitch);
    }
    for (int64_t x = inside ? width : 0; x < kTile; ++x) {
      memset(line + x * pitch, 0, static_cast<size_t>(pitch) * 4);
    }
  }
}

// ---- d/d weights ----

// A worker's scratch memory for products of pixels' vectors with those of the cells around them.
struct Products {
  CoarseRows coarse;
  int64_t* offsets;
  float *taps, *half, *folded, *pixels;
};

UPFEAT_INLINE int64_t products_bytes(const GradientJob& job) {
  const Axis &rows = *job.rows, &columns = *job.columns;
  const int64_t floats = rows.taps * columns.taps * kTilePixels +
                         half_folded_floats(rows, columns) + folded_floats(rows, columns) +
                         kTilePixels * job.coarse.channels;
  return coarse_bytes(job.coarse) + rounded(rows.window * 8) + rounded(floats * 4);
}

static Products place_products(const GradientJob& job, char* at) {
  const Axis &rows = *job.rows, &columns = *job.columns;
  Products products{job.coarse, nullptr, nullptr, nullptr, nullptr, nullptr};
  at = place_coarse(products.coarse, at);
  products.offsets = reinterpret_cast<int64_t*>(at);
  products.taps = reinterpret_cast<float*>(at + rounded(rows.window * 8));
  products.half = products.taps + rows.taps * columns.taps * kTilePixels;
  products.folded = products.half + half_folded_floats(rows, columns);
  products.pixels = products.folded + folded_floats(rows, columns);
  // Pixels that the last tile lacks are never written, and must be 0.
  memset(products.folded, 0, static_cast<size_t>(folded_floats(rows, columns)) * 4);
  return products;
}

// Computes products.taps for one tile.
static void make_products(const GradientJob& job, Products& products, int64_t batch, int64_t group,
                          int64_t tile) {
  const Axis &rows = *job.rows, &columns = *job.columns;
  const CoarseRows& coarse = products.coarse;
  const int64_t pitch = coarse.channels;
  if (tile == 0) find_rows(products.coarse, rows.lo[group], rows.window, products.offsets);
  const Window window{products.offsets, rows.window, columns.window, coarse.step};
  read_grad_tile(job, batch, group, tile, 0, job.grad.size[1], pitch, products.pixels);
  for (int64_t j = 0; tile * kTile + 2 * j < columns.out && 2 * j < kTile; ++j) {
    const float* pixels = products.pixels + 2 * j * pitch;
    const float* four[4] = {pixels, pixels + pitch, pixels + kTile * pitch,
                            pixels + (kTile + 1) * pitch};
    const int64_t low = columns.lo[tile * (kTile / 2) + j];
    correlate(window, coarse_base(coarse) + low * coarse.step, pitch, four,
              products.folded + 2 * j);
  }
  unfold(rows, columns, group, tile, products.folded, products.half, products.taps);
}

static void grad_weights_task(void* context, int64_t task, int worker) {
  const GradientJob& job = *static_cast<GradientJob*>(context);
  const int64_t batch = task / job.chunks.count, chunk = task % job.chunks.count;
  Products products = place_products(job, job.scratch + worker * job.worker_bytes);
  start_coarse(products.coarse, batch);
  const int64_t end = smaller((chunk + 1) * job.chunks.size, job.rows->groups);
  for (int64_t group = chunk * job.chunks.size; group < end; ++group) {
    for (int64_t tile = 0; tile < job.columns->tiles; ++tile) {
      make_products(job, products, batch, group, tile);
      write_tile(job.weights, batch, 2 * group, tile * kTile, products.taps);
    }
  }
}

static int grad_weights(const Runtime& runtime, const UpfeatTensor& features,
                        const UpfeatTensor& grad, const UpfeatTensor& target, const Axis& rows,
                        const Axis& columns) {
  GradientJob job{};
  job.rows = &rows;
  job.columns = &columns;
  job.grad = grad;
  job.weights = target;
  job.coarse = coarse_rows(features, rows.window);
  job.chunks = chunks_of(rows.groups, runtime.workers, grad.size[0], job.coarse.direct ? 4 : 2);
  job.worker_bytes = products_bytes(job);
  const int64_t tasks = job.chunks.count * grad.size[0];
  const int workers = static_cast<int>(smaller(runtime.workers, tasks));
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(workers, tasks, grad_weights_task, &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}

// ---- d/d features ---- Chunks of output rows are added to the coarse rows that they read. Chunks
// of one colour (even or odd) have no coarse row in common, so each colour runs in parallel. The
// division into chunks depends on the shape alone, so the order of all additions, and hence the
// result, is the same for any number of threads.

static Chunks coloured_chunks(const Axis& rows) {
  for (int64_t size = smaller(8, rows.groups); size < rows.groups; ++size) {
    bool apart = true;
    for (int64_t start = 2 * size; apart && start < rows.groups; start += size) {
      apart = rows.lo[start] >= rows.lo[start - size - 1] + rows.window;
    }
    if (apart) return Chunks{rows.groups, size, (rows.groups + size - 1) / size};
  }
  return Chunks{rows.groups, rows.groups, 1};
}

static void grad_features_task(void* context, int64_t task, int worker) {
  const GradientJob& job = *static_cast<GradientJob*>(context);
  const Axis& rows = *job.rows;
  const Axis& columns = *job.columns;
  const int64_t split = task % job.splits;
  const int64_t chunk = 2 * (task / job.splits % job.coloured) + job.colour;
  const int64_t batch = task / job.splits / job.coloured;
  char* at = job.scratch + worker * job.worker_bytes;
  int64_t* offsets = reinterpret_cast<int64_t*>(at);
  float* taps = reinterpret_cast<float*>(at + rounded(rows.window * 8));
  float* half = taps + rows.taps * columns.taps * kTilePixels;
  float* folded = half + half_folded_floats(rows, columns);
  float* grad = folded + folded_floats(rows, columns);
  float* sums = job.sums + batch * rows.in * columns.in * job.channels;
  const Blocks blocks = blocks_of(job.grad.size[1]);
  const int64_t end = smaller((chunk + 1) * job.chunks.size, rows.groups);
  for (int64_t group = chunk * job.chunks.size; group < end; ++group) {
    for (int64_t a = 0; a < rows.window; ++a) {
      offsets[a] = (rows.lo[group] + a) * columns.in * job.channels;
    }
    const Window window{offsets, rows.window, columns.window, job.channels};
    for (int64_t tile = 0; tile < columns.tiles; ++tile) {
      read_tile(job.weights, batch, 2 * group, tile * kTile, taps);
      fold(rows, columns, group, tile, taps, half, folded);
      for (int64_t index = split; index < blocks.count; index += job.splits) {
        const int64_t channel = blocks.begin(index) * kLanes;
        const int block = blocks.size(index);
        const int64_t channels = smaller(block * kLanes, job.grad.size[1] - channel);
        read_grad_tile(job, batch, group, tile, channel, channels, kTileChannels, grad);
        for (int64_t j = 0; tile * kTile + 2 * j < columns.out && 2 * j < kTile; ++j) {
          const float* pixels = grad + 2 * j * kTileChannels;
          const float* four[4] = {pixels, pixels + kTileChannels, pixels + kTile * kTileChannels,
                                  pixels + (kTile + 1) * kTileChannels};
          const int64_t low = columns.lo[tile * (kTile / 2) + j];
          scatter(block, window, sums + channel + low * job.channels, folded + 2 * j, four);
        }
      }
    }
  }
}

static void write_sums_task(void* context, int64_t task, int) {
  const GradientJob& job = *static_cast<GradientJob*>(context);
  const int64_t height = job.rows->in, width = job.columns->in;
  const float* from = job.sums + task * width * job.channels;
  write_channels_last(row_of(job.target, task / height, task % height), 0, job.target.size[1], 0,
                      width, from, job.channels, false);
}

static int grad_features(const Runtime& runtime, const UpfeatTensor& weights,
                         const UpfeatTensor& grad, const UpfeatTensor& target, const Axis& rows,
                         const Axis& columns) {
  GradientJob job{};
  job.rows = &rows;
  job.columns = &columns;
  job.grad = grad;
  job.weights = weights;
  job.target = target;
  job.chunks = coloured_chunks(rows);
  job.channels = (grad.size[1] + kLanes - 1) / kLanes * kLanes;
  const int64_t batches = grad.size[0];
  const int64_t floats = rows.taps * columns.taps * kTilePixels +
                         half_folded_floats(rows, columns) + folded_floats(rows, columns) +
                         kTilePixels * kTileChannels;
  job.worker_bytes = rounded(rows.window * 8) + rounded(floats * 4);
  const int64_t sum_bytes = batches * rows.in * columns.in * job.channels * 4;
  job.sums = static_cast<float*>(runtime.allocate(sum_bytes));
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  if (!job.sums || !job.scratch) {
    runtime.release(job.sums);
    runtime.release(job.scratch);
    return UPFEAT_NO_MEMORY;
  }
  memset(job.sums, 0, static_cast<size_t>(sum_bytes));
  for (job.colour = 0; job.colour < 2; ++job.colour) {
    job.coloured = (job.chunks.count + 1 - job.colour) / 2;
    if (!job.coloured) continue;
    // If there are few chunks, the channels are divided, too, which does not change the result.
    const int64_t share =
        (2 * runtime.workers + job.coloured * batches - 1) / (job.coloured * batches);
    job.splits = smaller(blocks_of(grad.size[1]).count, share);
    runtime.parallel_for(runtime.workers, job.splits * job.coloured * batches, grad_features_task,
                         &job);
  }
  runtime.parallel_for(runtime.workers, batches * rows.in, write_sums_task, &job);
  runtime.release(job.scratch);
  runtime.release(job.sums);
  return UPFEAT_OK;
}
