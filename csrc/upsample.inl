// Drivers: rows of groups are divided into chunks, and chunks among the workers.

struct Chunks {
  int64_t groups, size, count;
};

// Chunks for work whose results do not depend on the division: a few per worker, but not so small
// that it costs much to compute halo rows twice.
UPFEAT_INLINE Chunks chunks_of(int64_t groups, int workers, int64_t batches, int64_t share) {
  int64_t wanted = (share * workers + batches - 1) / batches;
  wanted = larger(smaller(wanted, groups / 8), smaller(workers, groups));
  const int64_t size = (groups + wanted - 1) / wanted;
  return Chunks{groups, size, (groups + size - 1) / size};
}

// Coarse rows as dense channels-last float32: read in place if the features are stored so,
// otherwise copied to a ring of rows.
struct CoarseRows {
  const UpfeatTensor* features;
  bool direct;
  int64_t channels, pitch, step, slots, batch;
  float* ring;
  int64_t* held;
};

UPFEAT_INLINE CoarseRows coarse_rows(const UpfeatTensor& features, int64_t window) {
  CoarseRows rows{};
  rows.features = &features;
  rows.channels = (features.size[1] + kLanes - 1) / kLanes * kLanes;
  rows.direct =
      features.dtype == UPFEAT_FLOAT32 && features.stride[1] == 1 && features.size[1] % kLanes == 0;
  rows.step = rows.direct ? features.stride[3] : rows.channels;
  rows.pitch = features.size[3] * rows.channels;
  rows.slots = rows.direct ? 0 : window;
  return rows;
}

UPFEAT_INLINE int64_t coarse_bytes(const CoarseRows& rows) {
  return rounded(rows.slots * rows.pitch * 4) + rounded(rows.slots * 8);
}

UPFEAT_INLINE char* place_coarse(CoarseRows& rows, char* at) {
  rows.ring = reinterpret_cast<float*>(at);
  rows.held = reinterpret_cast<int64_t*>(at + rounded(rows.slots * rows.pitch * 4));
  return at + coarse_bytes(rows);
}

UPFEAT_INLINE void start_coarse(CoarseRows& rows, int64_t batch) {
  rows.batch = batch;
  for (int64_t slot = 0; slot < rows.slots; ++slot) rows.held[slot] = -1;
}

static const float* coarse_base(const CoarseRows& rows) {
  if (!rows.direct) return rows.ring;
  return static_cast<const float*>(rows.features->data) + rows.batch * rows.features->stride[0];
}

// Finds the offsets of a window's rows from coarse_base, and copies rows to the ring if needed.
static void find_rows(CoarseRows& rows, int64_t low, int64_t window, int64_t* offsets) {
  for (int64_t a = 0; a < window; ++a) {
    const int64_t y = low + a;
    if (rows.direct) {
      offsets[a] = y * rows.features->stride[2];
      continue;
    }
    const int64_t slot = y % rows.slots;
    if (rows.held[slot] != y) {
      read_channels_last(row_of(*rows.features, rows.batch, y), 0, rows.features->size[1], 0,
                         rows.features->size[3], rows.ring + slot * rows.pitch, rows.channels);
      rows.held[slot] = y;
    }
    offsets[a] = slot * rows.pitch;
  }
}

constexpr int64_t kTileChannels = int64_t{kMaxBlock} * kLanes;

// ---- forward ----

struct UpsampleJob {
  const Axis* rows;
  const Axis* columns;
  UpfeatTensor out;
  Maker maker;
  CoarseRows coarse;
  Chunks chunks;
  bool streamed;
  char* scratch;
  int64_t worker_bytes;
};

// Planes of a large result are written past the caches: a tile writes only one line of each plane,
// and fetching that line first would double the traffic.
constexpr int64_t kStreamedBytes = int64_t{8} << 20;

UPFEAT_INLINE bool writes_in_place(const UpfeatTensor& out) {
  return out.dtype == UPFEAT_FLOAT32 && out.stride[1] == 1;
}

UPFEAT_INLINE bool writes_past_caches(const UpfeatTensor& out) {
  return out.size[0] * out.size[1] * out.size[2] * out.size[3] * 4 >= kStreamedBytes;
}

// The output to which tiles are written.
struct UpsampleTarget {
  const Axis *rows, *columns;
  const UpfeatTensor& out;
  bool streamed;
};

// Computes one tile of the output in all channels.
static void upsample_tile(const UpsampleTarget& job, const CoarseRows& coarse, const Window& window,
                          int64_t batch, int64_t group, int64_t tile, const float* folded,
                          float* block_buffer) {
  const Axis& columns = *job.columns;
  const UpfeatTensor& out = job.out;
  const int64_t width = smaller(columns.out - tile * kTile, kTile);
  const int64_t lines = smaller(job.rows->out - 2 * group, 2);
  const Blocks blocks = blocks_of(out.size[1]);
  const float* base = coarse_base(coarse);
  for (int64_t index = 0; index < blocks.count; ++index) {
    const int64_t channel = blocks.begin(index) * kLanes;
    const int block = blocks.size(index);
    const bool direct = writes_in_place(out) && channel + block * kLanes <= out.size[1];
    for (int64_t j = 0; 2 * j < width; ++j) {
      const int64_t x = tile * kTile + 2 * j;
      float* to[4];
      for (int i = 0; i < 4; ++i) {
        const int64_t py = i / 2, px = i % 2;
        to[i] = block_buffer + (py * kTile + 2 * j + px) * kTileChannels;
        if (direct && py < lines && x + px < columns.out) {
          to[i] = static_cast<float*>(out.data) + batch * out.stride[0] +
                  (2 * group + py) * out.stride[2] + (x + px) * out.stride[3] + channel;
        }
      }
      gather(block, window, base + channel + columns.lo[x / 2] * coarse.step, folded + 2 * j, to);
    }
    if (direct) continue;
    const int64_t channels = smaller(block * kLanes, out.size[1] - channel);
    for (int64_t py = 0; py < lines; ++py) {
      write_channels_last(row_of(out, batch, 2 * group + py), channel, channels, tile * kTile,
                          width, block_buffer + py * kTile * kTileChannels, kTileChannels,
                          job.streamed);
    }
  }
}

static void upsample_task(void* context, int64_t task, int worker) {
  const UpsampleJob& job = *static_cast<UpsampleJob*>(context);
  const Axis& rows = *job.rows;
  const Axis& columns = *job.columns;
  const int64_t batch = task / job.chunks.count, chunk = task % job.chunks.count;
  Maker maker = job.maker;
  CoarseRows coarse = job.coarse;
  char* at = place_maker(maker, job.scratch + worker * job.worker_bytes);
  at = place_coarse(coarse, at);
  int64_t* offsets = reinterpret_cast<int64_t*>(at);
  float* taps = reinterpret_cast<float*>(at + rounded(rows.window * 8));
  float* half = taps + rows.taps * columns.taps * kTilePixels;
  float* folded = half + half_folded_floats(rows, columns);
  float* block_buffer = folded + folded_floats(rows, columns);
  const UpsampleTarget target{&rows, &columns, job.out, job.streamed};
  start_rows(maker, batch);
  start_coarse(coarse, batch);
  const int64_t end = smaller((chunk + 1) * job.chunks.size, rows.groups);
  for (int64_t group = chunk * job.chunks.size; group < end; ++group) {
    find_rows(coarse, rows.lo[group], rows.window, offsets);
    const Window window{offsets, rows.window, columns.window, coarse.step};
    for (int64_t tile = 0; tile < columns.tiles; ++tile) {
      make_tile(maker, batch, 2 * group, tile * kTile, taps);
      fold(rows, columns, group, tile, taps, half, folded);
      upsample_tile(target, coarse, window, batch, group, tile, folded, block_buffer);
    }
  }
  if (job.streamed) fence_streams();
}

static int upsample(const Runtime& runtime, const UpfeatTensor& features,
                    const WeightSource& source, const UpfeatTensor& out, const Axis& rows,
                    const Axis& columns) {
  UpsampleJob job{
      &rows, &columns, out, describe(source), coarse_rows(features, rows.window), Chunks{},
      false, nullptr,  0};
  job.chunks = chunks_of(rows.groups, runtime.workers, out.size[0], job.coarse.direct ? 4 : 2);
  job.streamed = writes_past_caches(out);
  const int64_t floats = rows.taps * columns.taps * kTilePixels +
                         half_folded_floats(rows, columns) + folded_floats(rows, columns) +
                         kTilePixels * kTileChannels;
  job.worker_bytes = rounded(maker_bytes(job.maker)) + coarse_bytes(job.coarse) +
                     rounded(rows.window * 8) + rounded(floats * 4);
  const int64_t tasks = job.chunks.count * out.size[0];
  const int workers = static_cast<int>(smaller(runtime.workers, tasks));
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(workers, tasks, upsample_task, &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}

// ---- weights alone ----

struct WeightsJob {
  Maker maker;
  UpfeatTensor weights;
  Chunks chunks;
  char* scratch;
  int64_t worker_bytes;
};

static void weights_task(void* context, int64_t task, int worker) {
  const WeightsJob& job = *static_cast<WeightsJob*>(context);
  const int64_t batch = task / job.chunks.count, chunk = task % job.chunks.count;
  Maker maker = job.maker;
  char* at = place_maker(maker, job.scratch + worker * job.worker_bytes);
  float* taps = reinterpret_cast<float*>(at);
  start_rows(maker, batch);
  const int64_t end = smaller((chunk + 1) * job.chunks.size, job.chunks.groups);
  for (int64_t group = chunk * job.chunks.size; group < end; ++group) {
    for (int64_t x = 0; x < maker.columns; x += kTile) {
      make_tile(maker, batch, 2 * group, x, taps);
      write_tile(job.weights, batch, 2 * group, x, taps);
    }
  }
}

static int make_weights(const Runtime& runtime, const WeightSource& source,
                        const UpfeatTensor& weights) {
  WeightsJob job{describe(source), weights,
                 chunks_of((weights.size[2] + 1) / 2, runtime.workers, weights.size[0], 4), nullptr,
                 0};
  job.worker_bytes = rounded(maker_bytes(job.maker)) + job.maker.taps * kTilePixels * 4;
  const int64_t tasks = job.chunks.count * weights.size[0];
  const int workers = static_cast<int>(smaller(runtime.workers, tasks));
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(workers, tasks, weights_task, &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}
