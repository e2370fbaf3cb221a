// Attention from pixels to rectangles of cells, with several heads, forward and backward.
//
// Pixels that attend to the same cells form a tile: a run of rows times a run of columns. The keys
// of a tile's cells are packed with neighbouring cells contiguous, so that inner products and the
// sum over values are both the same small matrix product: four rows of one operand with vectors of
// the other.

#include "attention_tiles.inl"
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

#include "attention_gradients.inl"
