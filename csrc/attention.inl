// Attention from pixels to rectangles of cells, with several heads, forward and backward.
//
// Pixels that attend to the same cells form a tile: a run of rows times a run of columns. The keys
// of a tile's cells are packed with neighbouring cells contiguous, so that inner products and the
// sum over values are both the same small matrix product: four rows of one operand with vectors of
// the other.

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

#include "attention_dense.inl"

// Sums the values with the weights of a strip's pixels, to s.result.
static void strip_values(const WindowJob& job, const WindowScratch& s, const WindowTile& tile,
                         int64_t count) {
  const int64_t rows = (count + 3) / 4 * 4;
  const float* shares = shares_mean(job) ? s.weights : s.logits;
  int64_t at = 0;
  for (int64_t n = 0; n < job.blocks.count; ++n) {
    const int64_t vectors = whole_vectors(block_size(job.blocks, n)) / kLanes;
    if (vectors) {
      multiply_rows(rows, shares + n * kStrip * s.pack, s.pack, 1, job.values_last + at,
                    s.value_row, tile.cells[1] - tile.cells[0], tile.cells[3] - tile.cells[2],
                    job.blocks.total, s.result + at, job.blocks.total, vectors);
    }
    at += vectors * kLanes;
  }
}

// Computes a tile. Planar output that is `kept` is copied to lines of several tiles.
static void window_tile_forward(const WindowJob& job, const WindowScratch& s,
                                const WindowTile& tile, bool kept) {
  const int64_t pixels = tile.rows * tile.columns;
  if (tile.dense) {
    dense_start(job, s, tile);
  } else {
    start_tile(job, s, tile);
  }
  for (int64_t first = 0; first < pixels; first += kStrip) {
    const int64_t count = smaller(kStrip, pixels - first);
    if (tile.dense) {
      dense_strip(job, s, tile, first, count);
    } else {
      strip_weights(job, s, tile, first, count, shares_mean(job));
      strip_values(job, s, tile, count);
    }
    if (kept) {
      keep_strip(job, s, tile, first, count);
    } else {
      write_strip(*job.attention.out, job.blocks, tile, first, count, s.result,
                  job.planar && job.streamed);
    }
  }
}

// Writes planar output in whole lines of kTile columns: pieces of a line would be evicted from the
// caches several times. Runs of columns are split where lines end, and the results of a line with
// several runs are collected.
static void planar_rows(const WindowJob& job, const WindowScratch& s, int64_t batch,
                        int64_t row_run) {
  const UpfeatTensor& out = *job.attention.out;
  int64_t run = 0;
  for (int64_t x = 0; x < out.size[3]; x += kTile) {
    const int64_t end = smaller(x + kTile, out.size[3]);
    WindowTile tile{};
    bool kept = false;
    for (int64_t column = x; column < end; column += tile.columns) {
      while (job.column_run[run + 1] <= column) ++run;
      tile = window_tile(job, batch, row_run, run);
      tile.x = column;
      tile.columns = smaller(job.column_run[run + 1], end) - column;
      kept = tile.columns < end - x;
      window_tile_forward(job, s, tile, kept);
    }
    if (!kept) continue;
    tile.x = x;
    tile.columns = end - x;
    for (int64_t row = 0; row < tile.rows; ++row) {
      write_strip(out, job.blocks, tile, row * tile.columns, tile.columns,
                  s.lines + row * kTile * job.blocks.total, job.streamed);
    }
  }
}

#include "attention_lanes.inl"

static void window_task(void* context, int64_t task, int worker) {
  const WindowJob& job = *static_cast<const WindowJob*>(context);
  WindowScratch s;
  window_scratch(job, false, job.scratch + worker * job.worker_bytes, &s);
  const int64_t batch = task / job.tasks_per_image, row_run = task % job.tasks_per_image;
  if (job.dense) dense_begin();
  if (job.planar) {
    planar_rows(job, s, batch, row_run);
  } else {
    for (int64_t run = 0; run < job.column_runs; ++run) {
      window_tile_forward(job, s, window_tile(job, batch, row_run, run), false);
    }
  }
  if (job.dense) dense_end();
  if (job.streamed) fence_streams();
}

// Computes the gradients of the inner products, in s.weights, from the heads' weights in s.logits
// and the gradients of the weights that apply to the values, in s.weights.
static void softmax_strip_backward(const WindowJob& job, const WindowScratch& s,
                                   const WindowTile& tile, int64_t rows) {
  const int64_t heads = job.heads.count;
  const bool mean = job.blocks.count == 1 && heads > 1;
  const float scale = static_cast<float>(job.attention.scale);
  const float part = mean ? 1.0f / static_cast<float>(heads) : 1.0f;
  // If heads are averaged, all read one gradient, which is stored where the first head's result is
  // written; so the first head comes last.
  for (int64_t n = heads - 1; n >= 0; --n) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* weight = s.logits + (n * kStrip + i) * s.pack;
      const float* grad = s.weights + ((mean ? 0 : n) * kStrip + i) * s.pack;
      float* to = s.weights + (n * kStrip + i) * s.pack;
      Vec sum = {};
      for (int64_t k = 0; k < tile.count; k += kLanes) sum += load(weight + k) * load(grad + k);
      const Vec total = total_of(sum);
      for (int64_t k = 0; k < tile.count; k += kLanes) {
        store(to + k, load(weight + k) * (load(grad + k) - total) * (scale * part));
      }
    }
  }
}

// rows[cell][...] += sum over the strip's pixels of shares[pixel][cell] * pixel values.
static void add_to_cells(const WindowTile& tile, const float* shares, int64_t pack, int64_t pixels,
                         const float* values, int64_t values_pitch, const int64_t* cell_row,
                         float* to, int64_t to_pitch, int64_t vectors, float* spill) {
  const int64_t columns = tile.cells[3] - tile.cells[2];
  for (int64_t cell = 0; cell < tile.count; cell += 4) {
    Product job{};
    for (int j = 0; j < 4; ++j) {
      const int64_t index = cell + j;
      // Beyond the last cell, the sums are written to `spill` and not used.
      job.a[j] = shares + (index < tile.count ? index : cell);
      job.out[j] = index < tile.count
                       ? to + cell_row[index / columns] + index % columns * to_pitch
                       : spill;
    }
    job.a_step = pack;
    job.b = values;
    job.rows = 1;
    job.columns = pixels;
    job.b_step = values_pitch;
    job.add = true;
    multiply(job, vectors);
  }
}

static void window_tile_backward(const WindowJob& job, const WindowScratch& s,
                                 const WindowTile& tile, int64_t task, float* spill) {
  start_tile(job, s, tile);
  const int64_t image = tile.batch * job.grid_rows, cells_down = tile.cells[1] - tile.cells[0];
  const int64_t cells_across = tile.cells[3] - tile.cells[2];
  pack_cells(job.values_across + image * job.blocks.total * job.pitch, job.blocks.total, job.pitch,
             tile.cells, s.values, s.pack);
  // Offsets of rows are relative to this task's band, which begins at its first grid row.
  int64_t band_key[2], band_value[2];  // offset of the first row, and step from row to row
  const int64_t first_row = tile.cells[0] - job.band_first[task];
  const int64_t first_cell =
      (job.band_offset[task] + first_row) * job.grid_columns + tile.cells[2];
  band_key[0] = first_cell * job.heads.total;
  band_key[1] = job.grid_columns * job.heads.total;
  band_value[0] = first_cell * job.blocks.total;
  band_value[1] = job.grid_columns * job.blocks.total;
  const int64_t pixels = tile.rows * tile.columns, depth = whole_vectors(job.heads.equal);
  for (int64_t first = 0; first < pixels; first += kStrip) {
    const int64_t count = smaller(kStrip, pixels - first), rows = (count + 3) / 4 * 4;
    strip_weights(job, s, tile, first, count, false);
    read_strip(*job.attention.grad, job.blocks, tile, first, count, s.result);
    if (job.grad_values) {
      const float* shares = strip_shares(job, s, tile, count);
      for (int64_t r = 0; r < cells_down; ++r) s.value_row[r] = band_value[0] + r * band_value[1];
      int64_t at = 0;
      for (int64_t n = 0; n < job.blocks.count; ++n) {
        const int64_t vectors = whole_vectors(block_size(job.blocks, n)) / kLanes;
        if (vectors) {
          add_to_cells(tile, shares + n * kStrip * s.pack, s.pack, count, s.result + at,
                       job.blocks.total, s.value_row, job.grad_values + at, job.blocks.total,
                       vectors, spill);
        }
        at += vectors * kLanes;
      }
    }
    if (!job.grad_keys && !job.attention.grad_queries) continue;
    int64_t at = 0;
    for (int64_t n = 0; n < job.blocks.count; ++n) {  // gradients of the weights of values
      const int64_t size = block_size(job.blocks, n);
      float* to = s.weights + n * kStrip * s.pack;
      if (size) {
        multiply_rows(rows, s.result + at, job.blocks.total, 1, s.values + at * s.pack, nullptr, 1,
                      size, s.pack, to, s.pack, whole_vectors(tile.count) / kLanes);
      } else {
        for (int64_t i = 0; i < rows * s.pack; ++i) to[i] = 0;
      }
      at += whole_vectors(size);
    }
    softmax_strip_backward(job, s, tile, rows);
    for (int64_t n = 0; n < job.heads.count; ++n) {
      const float* products = s.weights + n * kStrip * s.pack;
      if (job.grad_keys) {
        for (int64_t r = 0; r < cells_down; ++r) s.value_row[r] = band_key[0] + r * band_key[1];
        add_to_cells(tile, products, s.pack, count, s.query + n * depth, job.heads.total,
                     s.value_row, job.grad_keys + n * depth, job.heads.total, depth / kLanes,
                     spill);
      }
      if (job.attention.grad_queries) {
        multiply_rows(rows, products, s.pack, 1, job.keys_last + n * depth, s.key_row, cells_down,
                      cells_across, job.heads.total, s.other + n * depth, job.heads.total,
                      depth / kLanes);
      }
    }
    if (job.attention.grad_queries) {
      write_strip(*job.attention.grad_queries, job.heads, tile, first, count, s.other);
    }
  }
}

static void window_task_backward(void* context, int64_t task, int worker) {
  const WindowJob& job = *static_cast<const WindowJob*>(context);
  WindowScratch s;
  char* at = job.scratch + worker * job.worker_bytes;
  float* spill = reinterpret_cast<float*>(at + window_scratch(job, true, at, &s));
  const int64_t batch = task / job.tasks_per_image, part = task % job.tasks_per_image;
  const int64_t end = smaller((part + 1) * job.runs_per_task, job.row_runs);
  for (int64_t row_run = part * job.runs_per_task; row_run < end; ++row_run) {
    for (int64_t run = 0; run < job.column_runs; ++run) {
      window_tile_backward(job, s, window_tile(job, batch, row_run, run), task, spill);
    }
  }
}

// Adds up the bands of one image's tasks, in order, for one grid row per task, and writes the row.
struct BandJob {
  const WindowJob* job;
  const float* bands;
  Padded layout;
  const UpfeatTensor* out;
  float* scratch;
};

static void band_task(void* context, int64_t task, int worker) {
  const BandJob& whole = *static_cast<const BandJob*>(context);
  const WindowJob& job = *whole.job;
  const int64_t batch = task / job.grid_rows, row = task % job.grid_rows;
  const int64_t count = job.grid_columns * whole.layout.total;
  float* sum = whole.scratch + worker * count;
  for (int64_t i = 0; i < count; ++i) sum[i] = 0;
  for (int64_t part = 0; part < job.tasks_per_image; ++part) {
    const int64_t index = batch * job.tasks_per_image + part;
    const int64_t inside = row - job.band_first[index];
    const int64_t height = job.band_offset[index + 1] - job.band_offset[index];
    if (inside < 0 || inside >= height) continue;
    const float* band = whole.bands + (job.band_offset[index] + inside) * count;
    for (int64_t i = 0; i < count; ++i) sum[i] += band[i];
  }
  const Row to = row_of(*whole.out, batch, row);
  int64_t channel = 0, at = 0;
  for (int64_t n = 0; n < whole.layout.count; ++n) {
    const int64_t size = block_size(whole.layout, n);
    if (size) {
      write_channels_last(to, channel, size, 0, job.grid_columns, sum + at, whole.layout.total,
                          false);
    }
    channel += size;
    at += whole_vectors(size);
  }
}

static int add_bands(const Runtime& runtime, const WindowJob& job, const float* bands,
                     const Padded& layout, const UpfeatTensor& out) {
  BandJob whole{&job, bands, layout, &out, nullptr};
  whole.scratch = static_cast<float*>(
      runtime.allocate(runtime.workers * job.grid_columns * layout.total * 4));
  if (!whole.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(runtime.workers, out.size[0] * job.grid_rows, band_task, &whole);
  runtime.release(whole.scratch);
  return UPFEAT_OK;
}

// Fills the fields that both directions need: sizes, runs and paddings.
static WindowJob window_job(const WindowAttention& attention) {
  WindowJob job{};
  job.attention = attention;
  const UpfeatTensor &keys = *attention.keys, &values = *attention.values;
  job.heads = padded_blocks(nullptr, keys.size[1] / attention.heads, attention.heads);
  job.blocks = padded_blocks(attention.blocks, 0, attention.n_blocks);
  job.grid_rows = values.size[2];
  job.grid_columns = values.size[3];
  job.pitch = job.grid_columns + kLanes;
  job.row_run = attention.row_run;
  job.row_runs = attention.row_runs;
  job.column_run = attention.column_run;
  job.column_runs = attention.column_runs;
  job.most_cells = attention.most_cells;
  job.most_rows = attention.most_rows;
  return job;
}

static int attend_windows(const Runtime& runtime, const WindowAttention& attention) {
  WindowJob job = window_job(attention);
  const int64_t batch = attention.values->size[0], grid = batch * job.grid_rows;
  job.tasks_per_image = job.row_runs;
  job.planar = attention.out->stride[3] == 1 && attention.out->stride[1] != 1;
  job.streamed = attention.streamed;
  const bool lanes = lanes_fit(job);
  job.dense = !lanes && dense_fits(job);
  job.worker_bytes =
      lanes ? lane_scratch(job, nullptr, nullptr) : window_scratch(job, false, nullptr, nullptr);
  const int64_t keys = lanes ? grid * job.grid_columns * job.heads.total
                             : grid * job.heads.total * job.pitch + kLanes;
  const int64_t last = grid * job.grid_columns * job.blocks.total;
  char* memory = static_cast<char*>(
      runtime.allocate((keys + 16 + last + 16) * 4 + job.worker_bytes * runtime.workers));
  if (!memory) return UPFEAT_NO_MEMORY;
  job.scratch = memory;
  float* place = reinterpret_cast<float*>(memory + job.worker_bytes * runtime.workers);
  (lanes ? job.keys_last : job.keys_across) = place;
  job.values_last = place + (keys + 15) / 16 * 16;
  int status =
      lay_out(runtime, *attention.keys, job.heads, job.keys_last, job.keys_across, job.pitch);
  if (status == UPFEAT_OK) {
    status = lay_out(runtime, *attention.values, job.blocks, job.values_last, nullptr, job.pitch);
  }
  if (status == UPFEAT_OK) {
    runtime.parallel_for(runtime.workers, batch * job.tasks_per_image,
                         lanes ? lane_task : window_task, &job);
  }
  runtime.release(memory);
  return status;
}

// Gradients of keys and values are summed in bands of rows, whose number depends on the shape
// alone, and the bands are added in order: results do not depend on the number of threads.
static int grad_windows(const Runtime& runtime, const WindowAttention& attention) {
  WindowJob job = window_job(attention);
  const int64_t batch = attention.values->size[0], grid = batch * job.grid_rows;
  job.tasks_per_image = attention.bands;
  job.runs_per_task = attention.runs_per_band;
  job.band_first = attention.band_first;
  job.band_offset = attention.band_offset;
  const int64_t band_cells =
      attention.band_offset[batch * attention.bands] * job.grid_columns;
  const int64_t spill = (job.blocks.total > job.heads.total ? job.blocks.total : job.heads.total);
  job.worker_bytes = window_scratch(job, true, nullptr, nullptr) + (spill * 4 + 63) / 64 * 64;
  const int64_t counts[] = {grid * job.heads.total * job.pitch + kLanes,
                            grid * job.grid_columns * job.heads.total,
                            grid * job.grid_columns * job.blocks.total,
                            grid * job.blocks.total * job.pitch + kLanes,
                            attention.grad_keys ? band_cells * job.heads.total : 0,
                            attention.grad_values ? band_cells * job.blocks.total : 0};
  int64_t total = 0;
  for (int64_t count : counts) total += (count + 15) / 16 * 16;
  char* memory = static_cast<char*>(
      runtime.allocate(total * 4 + job.worker_bytes * runtime.workers));
  if (!memory) return UPFEAT_NO_MEMORY;
  job.scratch = memory;
  float* at = reinterpret_cast<float*>(memory + job.worker_bytes * runtime.workers);
  float* places[6];
  for (int i = 0; i < 6; ++i) {
    places[i] = at;
    at += (counts[i] + 15) / 16 * 16;
  }
  job.keys_across = places[0];
  job.keys_last = places[1];
  job.values_last = places[2];
  job.values_across = places[3];
  job.grad_keys = attention.grad_keys ? places[4] : nullptr;
  job.grad_values = attention.grad_values ? places[5] : nullptr;
  for (float* each = places[4]; each < at; ++each) *each = 0;
  int status =
      lay_out(runtime, *attention.keys, job.heads, job.keys_last, job.keys_across, job.pitch);
  if (status == UPFEAT_OK) {
    status = lay_out(runtime, *attention.values, job.blocks, job.values_last, job.values_across,
                     job.pitch);
  }
  if (status == UPFEAT_OK) {
    runtime.parallel_for(runtime.workers, batch * job.tasks_per_image, window_task_backward, &job);
    if (attention.grad_keys) {
      status = add_bands(runtime, job, job.grad_keys, job.heads, *attention.grad_keys);
    }
  }
  if (status == UPFEAT_OK && attention.grad_values) {
    status = add_bands(runtime, job, job.grad_values, job.blocks, *attention.grad_values);
  }
  runtime.release(memory);
  return status;
}
