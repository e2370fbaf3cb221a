// Weights over the cells around a pixel, from a query per pixel and a key per cell: key products,
// then a softmax of temperature * product - distance^2/(2 sigma^2). Weights, means of weights and
// weighted sums are computed a tile at a time.

#include "neighbourhood_gradients.inl"

constexpr int64_t kMeanGroups = 8;  // pairs of rows in a task that sums weights over cells

struct NeighbourhoodJob {
  const Axis *rows, *columns;
  const Neighbourhood* what;
  CoarseRows keys, features;
  Chunks chunks;
  bool lanes, streamed;
  // Means: sums over the pixels of each cell, (B * chunks, slots, taps, cells across).
  float* sums;
  int64_t slots;
  char* scratch;
  int64_t worker_bytes;
};

struct NeighbourhoodScratch {
  CoarseRows keys, features;
  int64_t *key_rows, *feature_rows;
  TileCells key_cells, feature_cells;
  float *pixels, *buffer, *lengths, *products, *taps, *half, *folded, *block, *columns;
};

static NeighbourhoodScratch place_neighbourhood(const NeighbourhoodJob& job, char* at,
                                                int64_t* bytes) {
  const Axis &rows = *job.rows, &columns = *job.columns;
  const Neighbourhood& what = *job.what;
  const int64_t cells = most_tile_cells(rows, columns), taps = rows.taps * columns.taps;
  const int64_t pitch = whole_vectors(what.attention.queries->size[1]);
  NeighbourhoodScratch to{};
  char* start = at;
  to.keys = job.keys;
  at = place_coarse(to.keys, at);
  if (what.out) {
    to.features = job.features;
    at = place_coarse(to.features, at);
  }
  const auto take = [&at](auto*& array, int64_t count) __attribute__((always_inline)) {
    array = reinterpret_cast<decltype(array + 0)>(at);
    at += rounded(count * static_cast<int64_t>(sizeof(*array)));
  };
  take(to.key_rows, rows.window + rows.taps + 1);
  take(to.feature_rows, rows.window + rows.taps + 1);
  take(to.key_cells.offsets, cells);
  take(to.feature_cells.offsets, cells);
  take(to.pixels, pitch * kTilePixels);
  take(to.buffer, pitch * kTile);
  if (what.attention.lengths) take(to.lengths, whole_vectors(1) * kTilePixels);
  take(to.products, cells * kTilePixels);
  take(to.taps, taps * kTilePixels);
  if (what.out) {
    take(to.half, half_folded_floats(rows, columns));
    take(to.folded, folded_floats(rows, columns));
    take(to.block, kTilePixels * larger(kTileChannels, kLaneChannels));
  }
  if (what.means) take(to.columns, job.slots * taps * columns.tiles * kTile);
  *bytes = at - start;
  return to;
}

// As softmax_vector, from products with all of a tile's cells, (rows, columns, 2, kTile), of which
// each pixel selects those of the cells around it. A logit of -infinity or NaN makes the sum NaN.
// Lengths are factors of the products of each pixel, or null.
static void softmax_of_cells(const Attention& attention, const TilePlace& place,
                             const TileCells& cells, int v, const float* products,
                             const float* lengths, float* weights) {
  Vec temperature = splat(static_cast<float>(attention.temperature));
  if (lengths) temperature *= load(lengths);
  const float fall = static_cast<float>(0.5 / (attention.sigma * attention.sigma));
  const int64_t side = place.side, below = v >= kRowVecs ? cells.below : 0;
  const IVec* at_shift = &cells.at_shift[0][v % kRowVecs];
  const float* across = place.across + v % kRowVecs * kLanes;
  Vec top = splat(-__builtin_inff());
  float* to = weights;
  for (int64_t dy = 0; dy < side; ++dy) {
    const float* from = products + (dy + below) * cells.columns * kTilePixels;
    const Vec down = splat(place.down[v / kRowVecs][dy * place.down_pitch]);
    for (int64_t dx = 0; dx < side; ++dx, from += kTilePixels, to += kTilePixels) {
      Vec product = load(from);
      for (int64_t k = 1; k < cells.shifts; ++k) {
        product = select(at_shift[k * kRowVecs], load(from + k * kTilePixels), product);
      }
      const Vec distance = load(across + dx * place.across_pitch) + down;
      const Vec logit = product * temperature - distance * fall;
      store(to, logit);
      top = max(top, logit);
    }
  }
  Vec sum{};
  const int64_t taps = side * side;
  for (int64_t k = 0; k < taps; ++k) {
    const Vec e = falling_exp(load(weights + k * kTilePixels) - top);
    store(weights + k * kTilePixels, e);
    sum += e;
  }
  const Vec scale = 1.0f / sum;
  for (int64_t k = 0; k < taps; ++k) {
    store(weights + k * kTilePixels, load(weights + k * kTilePixels) * scale);
  }
}

// Computes the weights of one tile, in scratch.taps.
static void attend_tile(const NeighbourhoodJob& job, NeighbourhoodScratch& scratch, int64_t batch,
                        int64_t group, int64_t tile) {
  const Attention& attention = job.what->attention;
  const Axis &rows = *job.rows, &columns = *job.columns;
  find_cell_columns(scratch.keys, columns, tile, scratch.key_rows, scratch.key_cells);
  read_pixels(*attention.queries, batch, 2 * group, tile * kTile, scratch.buffer, scratch.pixels);
  tile_cell_products(scratch.key_cells, scratch.pixels, attention.queries->size[1],
                     scratch.products);
  if (attention.lengths) {
    read_pixels(*attention.lengths, batch, 2 * group, tile * kTile, scratch.buffer,
                scratch.lengths);
  }
  const TilePlace place = tile_place(rows, columns, group, tile);
  for (int v = 0; v < kTileVecs; ++v) {
    softmax_of_cells(attention, place, scratch.key_cells, v, scratch.products + v * kLanes,
                     attention.lengths ? scratch.lengths + v * kLanes : nullptr,
                     scratch.taps + v * kLanes);
  }
}

// Computes the sum over cells of one tile, with the weights in scratch.taps.
static void sum_tile(const NeighbourhoodJob& job, NeighbourhoodScratch& scratch, int64_t batch,
                     int64_t group, int64_t tile) {
  const Axis &rows = *job.rows, &columns = *job.columns;
  const UpfeatTensor& out = *job.what->out;
  if (!job.lanes) {
    fold(rows, columns, group, tile, scratch.taps, scratch.half, scratch.folded);
    const Window window{scratch.feature_rows, rows.window, columns.window, scratch.features.step};
    const UpsampleTarget target{&rows, &columns, out, job.streamed};
    upsample_tile(target, scratch.features, window, batch, group, tile, scratch.folded,
                  scratch.block);
    return;
  }
  find_cell_columns(scratch.features, columns, tile, scratch.feature_rows, scratch.feature_cells);
  for (int64_t channel = 0; channel < out.size[1]; channel += kLaneChannels) {
    sum_lanes(scratch.feature_cells, columns.taps, scratch.taps, channel, scratch.block);
    UpfeatTensor part = out;
    part.data = static_cast<char*>(out.data) + channel * out.stride[1] * bytes_of(out.dtype);
    part.size[1] = smaller(out.size[1] - channel, kLaneChannels);
    write_tile(part, batch, 2 * group, tile * kTile, scratch.block);
  }
}

// Adds the weights of a tile to the sums over the pixels of each cell in one column of pixels.
static void add_to_columns(const NeighbourhoodJob& job, NeighbourhoodScratch& scratch,
                           int64_t first_cell, int64_t group, int64_t tile) {
  const Axis &rows = *job.rows, &columns = *job.columns;
  const int64_t taps = rows.taps * columns.taps, pitch = columns.tiles * kTile;
  for (int64_t py = 0; py < 2 && 2 * group + py < rows.out; ++py) {
    float* to = scratch.columns + (rows.own[2 * group + py] - first_cell) * taps * pitch +
                tile * kTile;
    const float* from = scratch.taps + py * kTile;
    for (int64_t k = 0; k < taps; ++k) {
      for (int v = 0; v < kRowVecs; ++v) {
        float* at = to + k * pitch + v * kLanes;
        store(at, load(at) + load(from + k * kTilePixels + v * kLanes));
      }
    }
  }
}

// Adds up the sums of all columns of pixels in a cell, for several taps at a time so that additions
// overlap.
static void add_columns(const NeighbourhoodJob& job, const float* from, float* sums) {
  const Axis& columns = *job.columns;
  const int64_t taps = job.rows->taps * columns.taps, pitch = columns.tiles * kTile;
  const int64_t across = job.what->means->size[3], left = columns.own[0];
  constexpr int kTogether = 5;
  for (int64_t line = 0; line < job.slots * taps; line += kTogether) {
    const int64_t count = smaller(job.slots * taps - line, kTogether);
    for (int64_t x = 0; x < columns.out;) {
      const int64_t cell = columns.own[x];
      float sum[kTogether] = {};
      for (; x < columns.out && columns.own[x] == cell; ++x) {
        for (int i = 0; i < kTogether; ++i) {
          sum[i] += from[(i < count ? line + i : line) * pitch + x];
        }
      }
      for (int64_t i = 0; i < count; ++i) sums[(line + i) * across + cell - left] = sum[i];
    }
  }
}

static void neighbourhood_task(void* context, int64_t task, int worker) {
  const NeighbourhoodJob& job = *static_cast<NeighbourhoodJob*>(context);
  const Axis &rows = *job.rows, &columns = *job.columns;
  const Neighbourhood& what = *job.what;
  const int64_t batch = task / job.chunks.count, chunk = task % job.chunks.count;
  const int64_t begin = chunk * job.chunks.size;
  const int64_t end = smaller(begin + job.chunks.size, rows.groups);
  const int64_t taps = rows.taps * columns.taps, first_cell = rows.own[2 * begin];
  int64_t bytes;
  NeighbourhoodScratch scratch =
      place_neighbourhood(job, job.scratch + worker * job.worker_bytes, &bytes);
  start_coarse(scratch.keys, batch);
  if (what.out) start_coarse(scratch.features, batch);
  const int64_t kept = job.slots * taps * columns.tiles * kTile;
  if (what.means) memset(scratch.columns, 0, static_cast<size_t>(kept) * 4);
  for (int64_t group = begin; group < end; ++group) {
    find_cell_rows(scratch.keys, rows, group, scratch.key_cells, scratch.key_rows);
    if (what.out && job.lanes) {
      find_cell_rows(scratch.features, rows, group, scratch.feature_cells, scratch.feature_rows);
    } else if (what.out) {
      find_rows(scratch.features, rows.lo[group], rows.window, scratch.feature_rows);
    }
    for (int64_t tile = 0; tile < columns.tiles; ++tile) {
      attend_tile(job, scratch, batch, group, tile);
      if (what.weights) write_tile(*what.weights, batch, 2 * group, tile * kTile, scratch.taps);
      if (what.means) add_to_columns(job, scratch, first_cell, group, tile);
      if (what.out) sum_tile(job, scratch, batch, group, tile);
    }
  }
  if (what.means) {
    add_columns(job, scratch.columns, job.sums + task * job.slots * taps * what.means->size[3]);
  }
  if (job.streamed) fence_streams();
}

static int64_t count_of(const Axis& axis, int64_t cell) {
  int64_t count = 0;
  for (int64_t i = 0; i < axis.out; ++i) count += axis.own[i] == cell;
  return count;
}

// Adds up the chunks' sums of each cell, in a fixed order, and divides by the number of pixels.
static void write_means(const NeighbourhoodJob& job) {
  const Axis &rows = *job.rows, &columns = *job.columns;
  const UpfeatTensor& means = *job.what->means;
  const int64_t taps = means.size[1], across = means.size[3], line = taps * across;
  float* row = reinterpret_cast<float*>(job.scratch);
  for (int64_t batch = 0; batch < means.size[0]; ++batch) {
    for (int64_t y = 0; y < means.size[2]; ++y) {
      const int64_t cell = rows.own[0] + y, down = count_of(rows, cell);
      for (int64_t i = 0; i < line; ++i) row[i] = 0;
      for (int64_t chunk = 0; chunk < job.chunks.count; ++chunk) {
        const int64_t first = rows.own[2 * chunk * job.chunks.size];
        const int64_t last = smaller(2 * (chunk + 1) * job.chunks.size, rows.out) - 1;
        if (cell < first || cell > rows.own[last]) continue;
        const int64_t at = (batch * job.chunks.count + chunk) * job.slots + cell - first;
        for (int64_t i = 0; i < line; ++i) row[i] += job.sums[at * line + i];
      }
      for (int64_t x = 0; x < across; ++x) {
        const float share =
            1.0f / static_cast<float>(down * count_of(columns, columns.own[0] + x));
        for (int64_t k = 0; k < taps; ++k) row[k * across + x] *= share;
      }
      const Row to = row_of(means, batch, y);
      for (int64_t k = 0; k < taps; ++k) {
        write_run(to.at(k, 0), to.column_stride, to.dtype, across, row + k * across);
      }
    }
  }
}

static int attend(const Runtime& runtime, const Neighbourhood& what, const Axis& rows,
                  const Axis& columns) {
  NeighbourhoodJob job{};
  job.rows = &rows;
  job.columns = &columns;
  job.what = &what;
  job.keys = coarse_rows(*what.attention.keys, rows.window);
  const int64_t batches = what.attention.queries->size[0];
  job.chunks = chunks_of(rows.groups, runtime.workers, batches, job.keys.direct ? 4 : 2);
  if (what.out) {
    job.features = coarse_rows(*what.features, rows.window);
    job.lanes = what.out->size[1] <= 2 * kLaneChannels && !writes_in_place(*what.out);
    job.streamed = !job.lanes && writes_past_caches(*what.out);
  }
  int64_t floats = 0;
  if (what.means) {
    const int64_t size = smaller(kMeanGroups, rows.groups);
    job.chunks = Chunks{rows.groups, size, (rows.groups + size - 1) / size};
    for (int64_t y = 0; y < rows.out; y += 2 * size) {
      const int64_t last = rows.own[smaller(y + 2 * size, rows.out) - 1];
      job.slots = larger(job.slots, last - rows.own[y] + 1);
    }
    floats = batches * job.chunks.count * job.slots * what.means->size[1] * what.means->size[3];
  }
  place_neighbourhood(job, reinterpret_cast<char*>(&job), &job.worker_bytes);  // measures only
  if (what.means) {
    const int64_t line_bytes = rounded(what.means->size[1] * what.means->size[3] * 4);
    job.worker_bytes = larger(job.worker_bytes, line_bytes);
  }
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  job.sums = static_cast<float*>(runtime.allocate(floats * 4));
  int status = UPFEAT_NO_MEMORY;
  if (job.scratch && job.sums) {
    memset(job.sums, 0, static_cast<size_t>(floats) * 4);
    runtime.parallel_for(runtime.workers, job.chunks.count * batches, neighbourhood_task, &job);
    if (what.means) write_means(job);
    status = UPFEAT_OK;
  }
  runtime.release(job.scratch);
  runtime.release(job.sums);
  return status;
}
