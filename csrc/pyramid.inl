// The encoder of the neighbourhood upsampler: unit queries in a window of an image.
//
// s[0] = sin(conv3x3(image)), x[k] = mean of s[k-1] over 2x2, s[k] = x[k] + W gelu(conv3x3(x[k])),
// o[k] = J[k] s[k] + o[k+1] interpolated bilinearly, with matrices W and J; the queries are o[0] at
// unit length. Of every scale only the part that the window depends on is computed. s[0] is
// computed twice, a row at a time, as storing it would cost more than computing it.
//
// A pixel is a row of `width` floats, its channels, so that a 3x3 window is three contiguous runs
// and every layer is the same product: kPixels pixels times kVecs vectors of outputs in registers.

#include "pyramid_rows.inl"

// Computes one row of x[k], the mean of `count` rows of s[k-1], with the ends replicated.
static void halve_row(const PyramidJob& job, int64_t level, int64_t y, const float* const* from,
                      int64_t count) {
  const PyramidAxis& columns = job.plan->columns[level];
  const int64_t width = job.encoder->width, size = columns.read.stop - columns.read.start;
  float* row = job.read[level] + (y - job.plan->rows[level].read.start) * (size + 2) * width;
  for (int64_t x = 0; x < size; ++x) {
    const HalvedColumn column = job.halved[level][x];
    const float share = 1.0f / static_cast<float>(count * column.count);
    float* to = row + (x + 1) * width;
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec sum{};
      for (int64_t i = 0; i < count; ++i) {
        const float* at = from[i] + column.offset + c;
        for (int64_t n = 0; n < column.count; ++n) sum += load(at + n * width);
      }
      store(to + c, sum * share);
    }
  }
  memcpy(row, row + width, static_cast<size_t>(width) * 4);
  memcpy(row + (size + 1) * width, row + size * width, static_cast<size_t>(width) * 4);
}

static void halve_task(void* context, int64_t task, int worker) {
  const PyramidJob& job = *static_cast<PyramidJob*>(context);
  const int64_t level = job.level, width = job.encoder->width;
  const PyramidAxis &rows = job.plan->rows[level], &finer = job.plan->rows[level - 1];
  const PyramidAxis& across = job.plan->columns[level - 1];
  const int64_t pitch = (across.seen.stop - across.seen.start) * width;
  EntryRows entry = level == 1 ? entry_rows(job, job.scratch + worker * job.worker_bytes)
                               : EntryRows{};
  const int64_t first = rows.read.start + task * kPyramidRows;
  const int64_t last = smaller(first + kPyramidRows, rows.read.stop);
  for (int64_t y = first; y < last; ++y) {
    int64_t low, high;
    halved_span(finer.length, rows.length, y, &low, &high);
    const float* from[3] = {};
    for (int64_t i = 0; i < high - low; ++i) {
      from[i] = level == 1 ? scale_row(job, entry, low + i)
                           : job.seen[level - 1] + (low + i - finer.seen.start) * pitch;
    }
    halve_row(job, level, y, from, high - low);
  }
}

// Computes rows of s[k] from x[k].
static void correct_task(void* context, int64_t task, int worker) {
  const PyramidJob& job = *static_cast<PyramidJob*>(context);
  const UpfeatPyramid& encoder = *job.encoder;
  const int64_t level = job.level, width = encoder.width;
  const PyramidAxis &rows = job.plan->rows[level], &columns = job.plan->columns[level];
  const int64_t wide = columns.read.stop - columns.read.start + 2;
  const int64_t size = columns.seen.stop - columns.seen.start;
  const int64_t shift = columns.seen.start - columns.read.start;
  float* hidden = reinterpret_cast<float*>(job.scratch + worker * job.worker_bytes);
  const int64_t first = rows.seen.start + task * kPyramidRows;
  const int64_t last = smaller(first + kPyramidRows, rows.seen.stop);
  for (int64_t y = first; y < last; ++y) {
    const float* around[3];
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t at = clamped(y - 1 + i, rows.read.start, rows.read.stop);
      around[i] = job.read[level] + ((at - rows.read.start) * wide + shift) * width;
    }
    const float* own = around[1] + width;
    float* to = job.seen[level] + (y - rows.seen.start) * size * width;
    if (!encoder.hidden_w) {
      memcpy(to, own, static_cast<size_t>(size * width) * 4);
      continue;
    }
    const int64_t number = level - 1;
    const Runs first_product = runs_of(encoder.hidden_w + number * 9 * width * width,
                                       encoder.hidden_b + number * width, 3, 3 * width);
    const Runs second = runs_of(encoder.last_w + number * width * width,
                                  encoder.last_b + number * width, 1, width);
    multiply_row(first_product, around, width, width, size, hidden);
    gelu_row(hidden, size * width);
    const float* in[1] = {hidden};
    multiply_row(second, in, width, width, size, to);
    for (int64_t i = 0; i < size * width; i += kLanes) store(to + i, load(to + i) + load(own + i));
  }
}

// Interpolates o[k+1] at row y of scale k, and adds the result to `to`.
static void lay_over(const PyramidJob& job, int64_t level, int64_t y, float* to) {
  const PyramidAxis &rows = job.plan->rows[level], &columns = job.plan->columns[level];
  const PyramidAxis &above = job.plan->rows[level + 1], &beside = job.plan->columns[level + 1];
  const int64_t width = job.encoder->width;
  const int64_t pitch = (beside.seen.stop - beside.seen.start) * width;
  const float* base = job.seen[level + 1];
  int64_t low, high;
  const float down = laid_place(above.length, rows.length, y, &low, &high);
  const float* upper = base + (low - above.seen.start) * pitch;
  const float* lower = base + (high - above.seen.start) * pitch;
  const LaidColumn* column = job.laid[level];
  for (int64_t x = columns.out.start; x < columns.out.stop; ++x, ++column, to += width) {
    const float part = column->share;
    const float *left = upper + column->left, *right = upper + column->right;
    const float *left_below = lower + column->left, *right_below = lower + column->right;
    const float share[4] = {(1 - down) * (1 - part), (1 - down) * part, down * (1 - part),
                            down * part};
    for (int64_t c = 0; c < width; c += kLanes) {
      Vec sum = load(to + c);
      sum += load(left + c) * share[0] + load(right + c) * share[1];
      sum += load(left_below + c) * share[2] + load(right_below + c) * share[3];
      store(to + c, sum);
    }
  }
}

// Replaces s[k] by o[k], a row at a time; this is possible as o[k] depends on s[k] pixel by pixel.
static void join_task(void* context, int64_t task, int worker) {
  const PyramidJob& job = *static_cast<PyramidJob*>(context);
  const int64_t level = job.level, width = job.encoder->width;
  const PyramidAxis &rows = job.plan->rows[level], &columns = job.plan->columns[level];
  const int64_t size = columns.seen.stop - columns.seen.start;
  const int64_t count = columns.out.stop - columns.out.start;
  float* made = reinterpret_cast<float*>(job.scratch + worker * job.worker_bytes);
  const Runs join = runs_of(job.encoder->join_w + level * width * width,
                              job.encoder->join_b + level * width, 1, width);
  const int64_t first = rows.out.start + task * kPyramidRows;
  const int64_t last = smaller(first + kPyramidRows, rows.out.stop);
  for (int64_t y = first; y < last; ++y) {
    float* own = job.seen[level] + ((y - rows.seen.start) * size + columns.out.start -
                                    columns.seen.start) * width;
    const float* in[1] = {own};
    multiply_row(join, in, width, width, count, made);
    if (level + 1 < job.plan->levels) lay_over(job, level, y, made);
    memcpy(own, made, static_cast<size_t>(count * width) * 4);
  }
}

// Scales vectors x to x / max(|x|, tiny); for 0, a division by the length alone would give NaN.
static void unit_row(float* row, int64_t pixels, int64_t width) {
  for (int64_t x = 0; x < pixels; ++x, row += width) {
    Vec sum{};
    for (int64_t c = 0; c < width; c += kLanes) sum += load(row + c) * load(row + c);
    const float length = __builtin_sqrtf(lane_sum(sum));
    const float scale = 1.0f / (length > 1.17549435e-38f ? length : 1.17549435e-38f);
    for (int64_t c = 0; c < width; c += kLanes) store(row + c, load(row + c) * scale);
  }
}

// Computes row y of the queries.
static void query_row(const PyramidJob& job, EntryRows& entry, int64_t y, float* to) {
  const int64_t width = job.encoder->width;
  const PyramidAxis& columns = job.plan->columns[0];
  const int64_t count = columns.out.stop - columns.out.start;
  const Runs join = runs_of(job.encoder->join_w, job.encoder->join_b, 1, width);
  const float* in[1] = {scale_row(job, entry, y) +
                        (columns.out.start - columns.seen.start) * width};
  multiply_row(join, in, width, width, count, to);
  if (job.plan->levels > 1) lay_over(job, 0, y, to);
  if (job.unit) unit_row(to, count, width);
}

// Computes the means of queries in one row of cells; neighbouring cells may have pixels in common.
static void mean_task(void* context, int64_t task, int worker) {
  const PyramidJob& job = *static_cast<PyramidJob*>(context);
  const int64_t width = job.encoder->width;
  const PyramidAxis &rows = job.plan->rows[0], &columns = job.plan->columns[0];
  const PyramidCells &down = job.plan->cell_rows, &across = job.plan->cell_columns;
  char* at = job.scratch + worker * job.worker_bytes;
  EntryRows entry = entry_rows(job, at);
  float* made = reinterpret_cast<float*>(at + entry_bytes(job));
  float* sums = made + (columns.out.stop - columns.out.start) * width;
  int64_t low, high, left, right;
  halved_span(rows.length, down.all, down.first + task, &low, &high);
  for (int64_t i = 0; i < across.count * width; ++i) sums[i] = 0;
  for (int64_t y = low; y < high; ++y) {
    query_row(job, entry, y, made);
    for (int64_t cell = 0; cell < across.count; ++cell) {
      halved_span(columns.length, across.all, across.first + cell, &left, &right);
      const float* from = made + (left - columns.out.start) * width;
      const Vec share = splat(1.0f / static_cast<float>((high - low) * (right - left)));
      for (int64_t c = 0; c < width; c += kLanes) {
        Vec sum{};
        for (int64_t x = 0; x < right - left; ++x) sum += load(from + x * width + c);
        store(sums + cell * width + c, load(sums + cell * width + c) + sum * share);
      }
    }
  }
  write_channels_last(row_of(job.queries, job.batch, task), 0, job.queries.size[1], 0, across.count,
                      sums, width, false);
}

static void query_task(void* context, int64_t task, int worker) {
  const PyramidJob& job = *static_cast<PyramidJob*>(context);
  const int64_t width = job.encoder->width;
  const PyramidAxis &rows = job.plan->rows[0], &columns = job.plan->columns[0];
  const int64_t count = columns.out.stop - columns.out.start;
  char* at = job.scratch + worker * job.worker_bytes;
  EntryRows entry = entry_rows(job, at);
  float* made = reinterpret_cast<float*>(at + entry_bytes(job));
  const bool direct = writes_in_place(job.queries) && job.queries.size[1] == width &&
                      job.queries.stride[3] == width;
  const int64_t first = rows.out.start + task * kPyramidRows;
  const int64_t last = smaller(first + kPyramidRows, rows.out.stop);
  for (int64_t y = first; y < last; ++y) {
    const Row row = row_of(job.queries, job.batch, y - rows.out.start);
    query_row(job, entry, y, direct ? reinterpret_cast<float*>(row.data) : made);
    if (!direct) {
      write_channels_last(row, 0, job.queries.size[1], 0, count, made, width, false);
    }
  }
}

static void run_phase(const Runtime& runtime, PyramidJob& job, const PyramidSpan& rows,
                      TaskBody body) {
  const int64_t count = rows.stop - rows.start;
  runtime.parallel_for(runtime.workers, (count + kPyramidRows - 1) / kPyramidRows, body, &job);
}

static void fill_columns(PyramidJob& job, int64_t level, HalvedColumn* halved, LaidColumn* laid) {
  const PyramidAxis &columns = job.plan->columns[level], &finer = job.plan->columns[level - 1];
  const int64_t width = job.encoder->width;
  job.halved[level] = halved;
  for (int64_t x = columns.read.start; x < columns.read.stop; ++x, ++halved) {
    int64_t low, high;
    halved_span(finer.length, columns.length, x, &low, &high);
    *halved = HalvedColumn{(low - finer.seen.start) * width, high - low};
  }
  job.laid[level - 1] = laid;
  for (int64_t x = finer.out.start; x < finer.out.stop; ++x, ++laid) {
    int64_t low, high;
    const float share = laid_place(columns.length, finer.length, x, &low, &high);
    *laid = LaidColumn{(low - columns.seen.start) * width, (high - columns.seen.start) * width,
                       share};
  }
}

static int encode_pyramid(const Runtime& runtime, const UpfeatTensor& guidance,
                  const UpfeatPyramid& encoder, const PyramidPlan& plan,
                  const UpfeatTensor& queries, bool unit) {
  PyramidJob job{};
  job.guidance = guidance;
  job.queries = queries;
  job.plan = &plan;
  job.encoder = &encoder;
  job.entry = runs_of(encoder.entry_w, encoder.entry_b, 3, 3 * guidance.size[1]);
  job.unit = unit;
  int64_t floats = 0, offset[kMostLevels][2], halved = 0, laid = 0;
  for (int64_t level = 1; level < plan.levels; ++level) {
    const PyramidAxis &rows = plan.rows[level], &columns = plan.columns[level];
    halved += columns.read.stop - columns.read.start;
    laid += plan.columns[level - 1].out.stop - plan.columns[level - 1].out.start;
    offset[level][0] = floats;
    floats += (rows.read.stop - rows.read.start) * (columns.read.stop - columns.read.start + 2) *
              encoder.width;
    offset[level][1] = floats;
    floats += (rows.seen.stop - rows.seen.start) * (columns.seen.stop - columns.seen.start) *
              encoder.width;
  }
  job.worker_bytes =
      entry_bytes(job) +
      rounded((entry_columns(job) + 2 + plan.cell_columns.count) * encoder.width * 4);
  float* maps = static_cast<float*>(runtime.allocate(floats * 4));
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  char* tables = static_cast<char*>(runtime.allocate(
      halved * static_cast<int64_t>(sizeof(HalvedColumn)) +
      laid * static_cast<int64_t>(sizeof(LaidColumn))));
  if (!maps || !job.scratch || !tables) {
    runtime.release(maps);
    runtime.release(job.scratch);
    runtime.release(tables);
    return UPFEAT_NO_MEMORY;
  }
  HalvedColumn* next_halved = reinterpret_cast<HalvedColumn*>(tables);
  LaidColumn* next_laid = reinterpret_cast<LaidColumn*>(next_halved + halved);
  for (int64_t level = 1; level < plan.levels; ++level) {
    job.read[level] = maps + offset[level][0];
    job.seen[level] = maps + offset[level][1];
    fill_columns(job, level, next_halved, next_laid);
    next_halved += plan.columns[level].read.stop - plan.columns[level].read.start;
    next_laid += plan.columns[level - 1].out.stop - plan.columns[level - 1].out.start;
  }
  for (job.batch = 0; job.batch < guidance.size[0]; ++job.batch) {
    for (job.level = 1; job.level < plan.levels; ++job.level) {
      run_phase(runtime, job, plan.rows[job.level].read, halve_task);
      run_phase(runtime, job, plan.rows[job.level].seen, correct_task);
    }
    for (job.level = plan.levels - 1; job.level >= 1; --job.level) {
      run_phase(runtime, job, plan.rows[job.level].out, join_task);
    }
    if (plan.cell_rows.count) {
      runtime.parallel_for(runtime.workers, plan.cell_rows.count, mean_task, &job);
    } else {
      run_phase(runtime, job, plan.rows[0].out, query_task);
    }
  }
  runtime.release(maps);
  runtime.release(job.scratch);
  runtime.release(tables);
  return UPFEAT_OK;
}
