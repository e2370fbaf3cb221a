// Tiles of attention: their cells and pixels, packed, and the weights of a strip of pixels.

constexpr int64_t kStrip = 32;  // pixels that are processed at a time

// Blocks of a tensor's channels, each padded to whole vectors.
struct Padded {
  const int64_t* sizes;  // number of channels of each block, or null if all have `equal`
  int64_t equal, count, total;
};

UPFEAT_INLINE int64_t block_size(const Padded& layout, int64_t n) {
  return layout.sizes ? layout.sizes[n] : layout.equal;
}
UPFEAT_INLINE Padded padded_blocks(const int64_t* sizes, int64_t equal, int64_t count) {
  Padded layout{sizes, equal, count, 0};
  for (int64_t n = 0; n < count; ++n) layout.total += whole_vectors(block_size(layout, n));
  return layout;
}

struct WindowJob {
  WindowAttention attention;
  Padded heads, blocks;  // channels of queries and keys; of values
  int64_t grid_rows, grid_columns, pitch;
  float* keys_across;    // (B, h, heads.total, pitch): columns contiguous
  float* keys_last;      // (B, h, w, heads.total); backward only
  float* values_last;    // (B, h, w, blocks.total)
  float* values_across;  // (B, h, blocks.total, pitch); backward only
  // Runs of pixel rows and columns that attend to the same cells: first pixel of each, and the end.
  const int64_t *row_run, *column_run;
  int64_t row_runs, column_runs, most_cells;
  int64_t tasks_per_image, runs_per_task;
  char* scratch;
  int64_t worker_bytes;
  // Backward: gradients of keys and values, one band of grid rows for each task.
  float *grad_keys, *grad_values;
  const int64_t *band_first, *band_offset;  // each task's band: first grid row; offset in rows
  bool planar, streamed;
  bool dense;         // whether matrix tiles are used for runs of many pixels
  int64_t most_rows;  // most pixel rows of a run
};

// With fewer pixels, packing their cells takes longer than matrix tiles save.
constexpr int64_t kDensePixels = 128;

struct DenseCells;
static int64_t dense_cells_bytes(const WindowJob& job, int64_t pack);
static DenseCells* dense_cells(const WindowJob& job, int64_t pack, char* at);

// Scratch memory of one worker.
struct WindowScratch {
  float *keys, *values;              // packed: (heads.total, pack), (blocks.total, pack)
  float *query, *logits, *weights;   // (strip, heads.total), (heads, strip, pack) twice
  float *result, *other;             // (strip, blocks.total), (strip, heads.total)
  float* lines;                      // (rows, kTile, blocks.total), for planar output
  int64_t *key_row, *value_row;      // offsets of the rows of cells
  int64_t pack;
  DenseCells* cells;
};

UPFEAT_INLINE int64_t pack_pitch(int64_t cells) { return whole_vectors(cells) + kLanes; }

static int64_t window_scratch(const WindowJob& job, bool backward, char* at, WindowScratch* out) {
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    float* place = reinterpret_cast<float*>(at + used);
    used += (count * 4 + 63) / 64 * 64;
    return place;
  };
  const int64_t pack = pack_pitch(job.most_cells), heads = job.heads.count;
  WindowScratch s{};
  s.pack = pack;
  s.keys = take(job.heads.total * pack + kLanes);
  if (backward) s.values = take(job.blocks.total * pack + kLanes);
  s.query = take(kStrip * job.heads.total);
  s.logits = take(heads * kStrip * pack);
  s.weights = take(heads * kStrip * pack);
  s.result = take(kStrip * job.blocks.total);
  if (backward) s.other = take(kStrip * job.heads.total);
  if (!backward) s.lines = take(job.planar ? job.most_rows * kTile * job.blocks.total : 0);
  s.key_row = reinterpret_cast<int64_t*>(take(2 * job.grid_rows));
  s.value_row = reinterpret_cast<int64_t*>(take(2 * job.grid_rows));
  if (!backward && job.dense) {
    char* place = reinterpret_cast<char*>(take(dense_cells_bytes(job, pack) / 4));
    if (out) s.cells = dense_cells(job, pack, place);
  }
  if (out) *out = s;
  return used;
}

// Conversion of a tensor of the grid to one or both layouts, one row per task.
struct LayoutJob {
  const UpfeatTensor* tensor;
  Padded layout;
  float *last, *across;  // (B, h, w, total); (B, h, total, pitch); either may be null
  int64_t pitch;
  float* scratch;  // a row channels-last for each worker
};

static void layout_task(void* context, int64_t task, int worker) {
  const LayoutJob& job = *static_cast<const LayoutJob*>(context);
  const int64_t rows = job.tensor->size[2], columns = job.tensor->size[3];
  const int64_t total = job.layout.total;
  const Row row = row_of(*job.tensor, task / rows, task % rows);
  float* last = job.last ? job.last + task * columns * total
                         : job.scratch + worker * columns * total;
  int64_t channel = 0, at = 0;
  for (int64_t n = 0; n < job.layout.count; ++n) {
    const int64_t size = block_size(job.layout, n);
    if (size) read_channels_last(row, channel, size, 0, columns, last + at, total);
    channel += size;
    at += whole_vectors(size);
  }
  if (!job.across) return;
  float* across = job.across + task * total * job.pitch;
  for (int64_t c = 0; c < total; ++c) {
    for (int64_t x = 0; x < columns; ++x) across[c * job.pitch + x] = last[x * total + c];
    for (int64_t x = columns; x < job.pitch; ++x) across[c * job.pitch + x] = 0;
  }
}

static int lay_out(const Runtime& runtime, const UpfeatTensor& tensor, const Padded& layout,
                   float* last, float* across, int64_t pitch) {
  LayoutJob job{&tensor, layout, last, across, pitch, nullptr};
  if (!last) {
    job.scratch = static_cast<float*>(
        runtime.allocate(runtime.workers * tensor.size[3] * layout.total * 4));
    if (!job.scratch) return UPFEAT_NO_MEMORY;
  }
  runtime.parallel_for(runtime.workers, tensor.size[0] * tensor.size[2], layout_task, &job);
  if (job.scratch) runtime.release(job.scratch);
  return UPFEAT_OK;
}

// Packs the cells of a tile from (h, channels, pitch) to (channels, pack), with cells contiguous.
// Whole vectors are copied; where a row's copy writes too far, the next row's copy overwrites it.
static void pack_cells(const float* from, int64_t channels, int64_t pitch, const int64_t* cells,
                       float* to, int64_t pack) {
  const int64_t columns = cells[3] - cells[2];
  for (int64_t c = 0; c < channels; ++c) {
    float* row = to + c * pack;
    for (int64_t y = cells[0]; y < cells[1]; ++y, row += columns) {
      const float* source = from + (y * channels + c) * pitch + cells[2];
      for (int64_t x = 0; x < columns; x += kLanes) store(row + x, load(source + x));
    }
    store(row, Vec{});  // clears lanes after the last cell
  }
}

// A tile: pixels [y, y + rows) x [x, x + columns) and the cells that they attend to.
struct WindowTile {
  int64_t batch, y, rows, x, columns;
  int64_t cells[4];  // first row and end of rows, first column and end of columns
  int64_t count;     // number of cells
  bool dense;        // the run has enough pixels for matrix tiles
};

UPFEAT_INLINE WindowTile window_tile(const WindowJob& job, int64_t batch, int64_t row_run,
                                     int64_t column_run) {
  const int64_t height = job.attention.queries->size[2], width = job.attention.queries->size[3];
  WindowTile tile{};
  tile.batch = batch;
  tile.y = job.row_run[row_run];
  tile.rows = job.row_run[row_run + 1] - tile.y;
  tile.x = job.column_run[column_run];
  tile.columns = job.column_run[column_run + 1] - tile.x;
  tile.cells[0] = job.attention.rows[tile.y];
  tile.cells[1] = job.attention.rows[height + tile.y];
  tile.cells[2] = job.attention.columns[tile.x];
  tile.cells[3] = job.attention.columns[width + tile.x];
  tile.count = (tile.cells[1] - tile.cells[0]) * (tile.cells[3] - tile.cells[2]);
  tile.dense = job.dense && tile.rows * tile.columns >= kDensePixels;
  return tile;
}

// Calls body(row of pixels, first column, count, index in the strip) for the piece of a strip in
// each row of pixels.
template <typename Body>
UPFEAT_INLINE void each_piece(const WindowTile& tile, int64_t first, int64_t count, Body body) {
  for (int64_t done = 0; done < count;) {
    const int64_t pixel = first + done, x = pixel % tile.columns;
    const int64_t wide = smaller(tile.columns - x, count - done);
    body(tile.y + pixel / tile.columns, tile.x + x, wide, done);
    done += wide;
  }
}

static void read_strip(const UpfeatTensor& tensor, const Padded& layout, const WindowTile& tile,
                       int64_t first, int64_t count, float* to) {
  each_piece(tile, first, count, [&](int64_t y, int64_t x, int64_t wide, int64_t done) {
    const Row row = row_of(tensor, tile.batch, y);
    int64_t channel = 0, at = 0;
    for (int64_t n = 0; n < layout.count; ++n) {
      const int64_t size = block_size(layout, n);
      float* here = to + done * layout.total + at;
      if (size) read_channels_last(row, channel, size, x, wide, here, layout.total);
      channel += size;
      at += whole_vectors(size);
    }
  });
  // Rows are processed in fours: the last of them may be empty, and must be 0.
  for (int64_t i = count; i < (count + 3) / 4 * 4; ++i) {
    for (int64_t c = 0; c < layout.total; ++c) to[i * layout.total + c] = 0;
  }
}

static void write_strip(const UpfeatTensor& tensor, const Padded& layout, const WindowTile& tile,
                        int64_t first, int64_t count, const float* from,
                        bool streamed = false) {
  each_piece(tile, first, count, [&](int64_t y, int64_t x, int64_t wide, int64_t done) {
    const Row row = row_of(tensor, tile.batch, y);
    int64_t channel = 0, at = 0;
    for (int64_t n = 0; n < layout.count; ++n) {
      const int64_t size = block_size(layout, n);
      const float* here = from + done * layout.total + at;
      if (size) write_channels_last(row, channel, size, x, wide, here, layout.total, streamed);
      channel += size;
      at += whole_vectors(size);
    }
  });
}

UPFEAT_INLINE IVec lanes_below(int64_t count) {
  IVec index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  const int32_t most = static_cast<int32_t>(count < kLanes ? count : kLanes);
  return index < (IVec{} + most);
}

// The sum, or the maximum, of all lanes, in every lane.
UPFEAT_INLINE Vec total_of(Vec value) {
  UPFEAT_UNROLL
  for (int lanes = kLanes; lanes > 1; lanes /= 2) value = add_halves(value, value);
  return value;
}
UPFEAT_INLINE Vec most_of(Vec value) {
  UPFEAT_UNROLL
  for (int lanes = kLanes; lanes > 1; lanes /= 2) {
    value = max(zip_low(value, value), zip_high(value, value));
  }
  return value;
}

// Replaces `count` logits by exponentials; lanes after them become 0. Returns the factor that makes
// the exponentials a softmax.
UPFEAT_INLINE Vec open_softmax(float* logits, int64_t count, float scale) {
  constexpr int64_t kFour = 4 * kLanes;
  const int64_t whole = count / kLanes * kLanes, fours = count / kFour * kFour;
  const IVec inside = lanes_below(count - whole);
  Vec tops[4];
  UPFEAT_UNROLL
  for (int i = 0; i < 4; ++i) tops[i] = splat(-__builtin_inff());
  for (int64_t k = 0; k < fours; k += kFour) {
    UPFEAT_UNROLL
    for (int i = 0; i < 4; ++i) tops[i] = max(tops[i], load(logits + k + i * kLanes) * scale);
  }
  Vec top = max(max(tops[0], tops[1]), max(tops[2], tops[3]));
  for (int64_t k = fours; k < whole; k += kLanes) top = max(top, load(logits + k) * scale);
  if (whole < count) top = max(top, select(inside, load(logits + whole) * scale, top));
  const Vec most = most_of(top), factor = splat(scale);
  Vec sum = {};
  for (int64_t k = 0; k < fours; k += kFour) {
    Vec e[4];
    UPFEAT_UNROLL
    for (int i = 0; i < 4; ++i) e[i] = below_top(load(logits + k + i * kLanes), factor, most);
    falling_exps<4>(e);
    UPFEAT_UNROLL
    for (int i = 0; i < 4; ++i) store(logits + k + i * kLanes, e[i]);
    sum += (e[0] + e[1]) + (e[2] + e[3]);
  }
  for (int64_t k = fours; k < whole; k += kLanes) {
    const Vec e = falling_exp(below_top(load(logits + k), factor, most));
    store(logits + k, e);
    sum += e;
  }
  if (whole < count) {
    const Vec e = select(inside, falling_exp(below_top(load(logits + whole), factor, most)), Vec{});
    store(logits + whole, e);
    sum += e;
  }
  return 1.0f / total_of(sum);
}

static void softmax_row(float* logits, int64_t count, float scale) {
  const Vec share = open_softmax(logits, count, scale);
  for (int64_t k = 0; k < count; k += kLanes) store(logits + k, load(logits + k) * share);
}

// Computes the weights of every head for a strip of pixels, (heads, strip, pack), in s.logits; with
// `mean`, their mean over the heads, (strip, pack) in s.weights, and no weights in s.logits.
static void strip_weights(const WindowJob& job, const WindowScratch& s, const WindowTile& tile,
                          int64_t first, int64_t count, bool mean) {
  read_strip(*job.attention.queries, job.heads, tile, first, count, s.query);
  const int64_t rows = (count + 3) / 4 * 4, depth = whole_vectors(job.heads.equal);
  const float scale = static_cast<float>(job.attention.scale);
  const float part = 1.0f / static_cast<float>(job.heads.count);
  for (int64_t n = 0; n < job.heads.count; ++n) {
    float* logits = s.logits + n * kStrip * s.pack;
    multiply_rows(rows, s.query + n * depth, job.heads.total, 1, s.keys + n * depth * s.pack,
                  nullptr, 1, job.heads.equal, s.pack, logits, s.pack,
                  whole_vectors(tile.count) / kLanes);
    for (int64_t i = 0; i < rows; ++i, logits += s.pack) {
      if (!mean) {
        softmax_row(logits, tile.count, scale);
        continue;
      }
      const Vec share = open_softmax(logits, tile.count, scale) * part;
      float* sum = s.weights + i * s.pack;
      for (int64_t k = 0; k < tile.count; k += kLanes) {
        const Vec weight = load(logits + k) * share;
        store(sum + k, n ? load(sum + k) + weight : weight);
      }
    }
  }
}

// True if the mean of the heads' weights applies to all values.
UPFEAT_INLINE bool shares_mean(const WindowJob& job) {
  return job.blocks.count == 1 && job.heads.count > 1;
}

// Returns the weights that apply to the values: with a single block of values the mean over heads,
// (strip, pack) in s.weights, otherwise those of each head.
static const float* strip_shares(const WindowJob& job, const WindowScratch& s,
                                 const WindowTile& tile, int64_t count) {
  if (!shares_mean(job)) return s.logits;
  const int64_t rows = (count + 3) / 4 * 4, heads = job.heads.count;
  const float share = 1.0f / static_cast<float>(heads);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < tile.count; k += kLanes) {
      Vec sum = {};
      for (int64_t n = 0; n < heads; ++n) sum += load(s.logits + (n * kStrip + i) * s.pack + k);
      store(s.weights + i * s.pack + k, sum * share);
    }
  }
  return s.weights;
}

UPFEAT_INLINE void start_tile(const WindowJob& job, const WindowScratch& s,
                              const WindowTile& tile) {
  const int64_t image = tile.batch * job.grid_rows;
  pack_cells(job.keys_across + image * job.heads.total * job.pitch, job.heads.total, job.pitch,
             tile.cells, s.keys, s.pack);
  for (int64_t r = 0; r < tile.cells[1] - tile.cells[0]; ++r) {
    const int64_t cell = (image + tile.cells[0] + r) * job.grid_columns + tile.cells[2];
    s.key_row[r] = cell * job.heads.total;
    s.value_row[r] = cell * job.blocks.total;
  }
}

// Copies a strip's results, (pixels, blocks.total), to their places in lines of kTile columns.
static void keep_strip(const WindowJob& job, const WindowScratch& s, const WindowTile& tile,
                       int64_t first, int64_t count) {
  const size_t bytes = static_cast<size_t>(job.blocks.total) * 4;
  each_piece(tile, first, count, [&](int64_t y, int64_t x, int64_t wide, int64_t done) {
    const int64_t at = (y - tile.y) * kTile + x % kTile;
    memcpy(s.lines + at * job.blocks.total, s.result + done * job.blocks.total,
           static_cast<size_t>(wide) * bytes);
  });
}
