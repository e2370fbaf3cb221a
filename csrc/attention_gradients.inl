// Gradients of attention.

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
