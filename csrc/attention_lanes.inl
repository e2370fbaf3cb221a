// Attention to few cells with the mean of the heads' weights and planar output: vectors contain
// neighbouring pixels of a row. The cells that any of 16 pixels attends to are weighted for all 16,
// with weights of 0 where they lie outside a pixel's rectangle. Neither the softmax nor the output
// then needs a transposition, and every store to a plane is a whole cache line.

constexpr int64_t kMostLaneCells = 64;
constexpr int64_t kMostLaneRows = 16;
constexpr int kLanePlanes = 4;  // channels of the values that are summed at a time
// Vectors of pixels that are summed together, 16 pixels if there are enough registers: half a cache
// line that is written past the caches long before the other half takes several times as long.
constexpr int kTogether = kMaxBlock >= kRowVecs ? kRowVecs : 1;

// Cells that 16 pixels of a row from column x on attend to: columns [first, end).
struct LaneCells {
  int64_t first, end;
};

UPFEAT_INLINE LaneCells lane_cells(const WindowAttention& attention, int64_t x) {
  const int64_t width = attention.queries->size[3], end = smaller(x + kTile, width);
  LaneCells cells{attention.columns[x], attention.columns[width + x]};
  for (int64_t i = x + 1; i < end; ++i) {
    if (attention.columns[i] < cells.first) cells.first = attention.columns[i];
    if (attention.columns[width + i] > cells.end) cells.end = attention.columns[width + i];
  }
  return cells;
}

// The most cells that 16 pixels attend to.
static int64_t most_lane_cells(const WindowAttention& attention) {
  const int64_t width = attention.queries->size[3], height = attention.queries->size[2];
  int64_t across = 0, down = 0;
  for (int64_t x = 0; x < width; x += kTile) {
    const LaneCells cells = lane_cells(attention, x);
    if (cells.end - cells.first > across) across = cells.end - cells.first;
  }
  for (int64_t y = 0; y < height; ++y) {
    const int64_t rows = attention.rows[height + y] - attention.rows[y];
    if (rows > down) down = rows;
  }
  return across * down;
}

static bool lanes_fit(const WindowJob& job) {
  return job.planar && job.blocks.count == 1 && job.most_rows <= kMostLaneRows &&
         most_lane_cells(job.attention) <= kMostLaneCells;
}

struct LaneScratch {
  float *room, *query;    // (kTile, heads.total), and its transpose
  float *logits, *masks;  // (cells, kTile) of one head; (columns of cells, kTile): 0 or -infinity
  float *weights;         // (cells, rows, kTile)
};

static int64_t lane_scratch(const WindowJob& job, char* at, LaneScratch* out) {
  int64_t used = 0;
  const auto take = [&](int64_t count) {
    float* place = reinterpret_cast<float*>(at + used);
    used += count * 4;
    return place;
  };
  LaneScratch s{};
  s.room = take(kTile * job.heads.total);
  s.query = take(kTile * job.heads.total);
  s.logits = take(kMostLaneCells * kTile);
  s.masks = take(kMostLaneCells * kTile);
  s.weights = take(kMostLaneCells * job.most_rows * kTile);
  if (out) *out = s;
  return used;
}

// True if the channels of a row can be read in place: float32 in whole vectors.
UPFEAT_INLINE bool is_plain(const Row& row, int64_t channels) {
  return row.channel_stride == 1 && row.dtype == UPFEAT_FLOAT32 && channels % kLanes == 0;
}

// Reads the queries of `count` pixels, and transposes them: (heads.total, kTile).
static void lane_queries(const WindowJob& job, const LaneScratch& s, int64_t batch, int64_t y,
                         int64_t x, int64_t count) {
  const int64_t total = job.heads.total;
  const Row row = row_of(*job.attention.queries, batch, y);
  const float* from = s.room;
  int64_t pitch = total;
  if (is_plain(row, job.heads.equal) && count == kTile) {
    from = static_cast<const float*>(row.at(0, x));
    pitch = row.column_stride;
  } else {
    for (int64_t n = 0; n < job.heads.count; ++n) {
      read_channels_last(row, n * job.heads.equal, job.heads.equal, x, count,
                         s.room + n * whole_vectors(job.heads.equal), total);
    }
    for (int64_t i = count * total; i < kTile * total; ++i) s.room[i] = 0;
  }
  for (int64_t c = 0; c < total; c += kLanes) {
    for (int64_t part = 0; part < kTile; part += kLanes) {
      Vec block[kLanes];
      UPFEAT_UNROLL
      for (int i = 0; i < kLanes; ++i) block[i] = load(from + (part + i) * pitch + c);
      transpose(block);
      UPFEAT_UNROLL
      for (int i = 0; i < kLanes; ++i) store(s.query + (c + i) * kTile + part, block[i]);
    }
  }
}

// Computes to[j] = the sum over `depth` channels of the queries of kLanes pixels times the keys of
// cell j, for kCells cells.
template <int kCells>
UPFEAT_INLINE void lane_products(const float* query, const float* const* keys, int64_t depth,
                                 float* to) {
  Vec sum[kCells];
  UPFEAT_UNROLL
  for (int j = 0; j < kCells; ++j) sum[j] = Vec{};
  for (int64_t d = 0; d < depth; ++d) {
    const Vec pixels = load(query + d * kTile);
    UPFEAT_UNROLL
    for (int j = 0; j < kCells; ++j) sum[j] += pixels * keys[j][d];
  }
  UPFEAT_UNROLL
  for (int j = 0; j < kCells; ++j) store(to + j * kTile, sum[j]);
}

// Computes the logits of one head, (cells, kTile).
static void lane_logits(const WindowJob& job, const LaneScratch& s, const float* const* keys,
                        int64_t cells, int64_t head) {
  constexpr int kCells = kLanes == 16 ? 8 : 4;
  const int64_t at = head * whole_vectors(job.heads.equal), depth = job.heads.equal;
  const float* from[kCells];
  for (int64_t part = 0; part < kTile; part += kLanes) {
    const float* query = s.query + at * kTile + part;
    for (int64_t cell = 0; cell < cells; cell += kCells) {
      const int64_t here = smaller(kCells, cells - cell);
      for (int64_t j = 0; j < kCells; ++j) from[j] = keys[cell + (j < here ? j : 0)] + at;
      float* to = s.logits + cell * kTile + part;
      if (here == kCells) {
        lane_products<kCells>(query, from, depth, to);
      } else {
        for (int64_t j = 0; j < here; ++j) lane_products<1>(query, from + j, depth, to + j * kTile);
      }
    }
  }
}

// Adds a softmax of the logits, times `share`, to the weights of a row of pixels, `step` floats
// apart for each cell; `add` is false for the first head.
static void lane_softmax(const LaneScratch& s, int64_t cells, int64_t across, float scale,
                         float share, bool add, float* weights, int64_t step) {
  for (int64_t part = 0; part < kTile; part += kLanes) {
    Vec most = splat(-__builtin_inff()), sum = {};
    for (int64_t cell = 0, column = 0; cell < cells; ++cell) {
      float* at = s.logits + cell * kTile + part;
      const Vec logit = load(at) * scale + load(s.masks + column * kTile + part);
      store(at, logit);
      most = max(most, logit);
      column = column + 1 < across ? column + 1 : 0;
    }
    for (int64_t cell = 0; cell < cells; ++cell) {
      float* at = s.logits + cell * kTile + part;
      const Vec power = falling_exp(load(at) - most);
      store(at, power);
      sum += power;
    }
    const Vec factor = splat(share) / sum;
    for (int64_t cell = 0; cell < cells; ++cell) {
      float* to = weights + cell * step + part;
      const Vec weight = load(s.logits + cell * kTile + part) * factor;
      store(to, add ? load(to) + weight : weight);
    }
  }
}

// Sums kLanePlanes channels of the values for kUnits vectors of pixels, to `sums` (channels,
// units, kLanes).
template <int kUnits>
UPFEAT_APART void lane_sums(const float* const* values, int64_t cells, int64_t channel,
                            const float* weights, int64_t step, float* sums) {
  Vec sum[kLanePlanes][kUnits];
  UPFEAT_UNROLL
  for (int c = 0; c < kLanePlanes; ++c) {
    UPFEAT_UNROLL
    for (int i = 0; i < kUnits; ++i) sum[c][i] = Vec{};
  }
  for (int64_t cell = 0; cell < cells; ++cell, weights += step) {
    const float* value = values[cell] + channel;
    Vec weight[kUnits];
    UPFEAT_UNROLL
    for (int i = 0; i < kUnits; ++i) weight[i] = in_register(load(weights + i * kLanes));
    UPFEAT_UNROLL
    for (int c = 0; c < kLanePlanes; ++c) {
      const Vec one = splat(value[c]);
      UPFEAT_UNROLL
      for (int i = 0; i < kUnits; ++i) sum[c][i] += one * weight[i];
    }
  }
  UPFEAT_UNROLL
  for (int c = 0; c < kLanePlanes; ++c) {
    UPFEAT_UNROLL
    for (int i = 0; i < kUnits; ++i) store(sums + (c * kUnits + i) * kLanes, sum[c][i]);
  }
}

UPFEAT_INLINE void lane_sums_of(int units, const float* const* values, int64_t cells,
                                int64_t channel, const float* weights, int64_t step, float* sums) {
  switch (units) {
    case 1:
      return lane_sums<1>(values, cells, channel, weights, step, sums);
    case 2:
      return lane_sums<2>(values, cells, channel, weights, step, sums);
    case 3:
      return lane_sums<kMaxBlock >= 3 ? 3 : 1>(values, cells, channel, weights, step, sums);
    case 4:
      return lane_sums<kMaxBlock >= 4 ? 4 : 1>(values, cells, channel, weights, step, sums);
    case 5:
      return lane_sums<kMaxBlock >= 5 ? 5 : 1>(values, cells, channel, weights, step, sums);
    default:
      return lane_sums<kMaxBlock >= 6 ? 6 : 1>(values, cells, channel, weights, step, sums);
  }
}

// Writes `units` vectors of pixels of kLanePlanes channels to `places`, which are those of channel
// 0; `wide` pixels of each are inside.
static void write_lanes(const WindowJob& job, int64_t channel, int units, float* const* places,
                        const int64_t* wide, const float* sums) {
  const UpfeatTensor& out = *job.attention.out;
  const int64_t have = smaller(kLanePlanes, out.size[1] - channel);
  for (int64_t c = 0; c < have; ++c) {
    const int64_t plane = (channel + c) * out.stride[1];
    for (int i = 0; i < units; ++i) {
      const float* from = sums + (c * units + i) * kLanes;
      float* to = places[i] + plane;
      if (wide[i] == kLanes && kTogether == kRowVecs && job.streamed &&
          reinterpret_cast<uintptr_t>(to - i % kTogether * kLanes) % 64 == 0) {
        stream(to, load(from));
      } else if (wide[i] == kLanes) {
        store(to, load(from));
      } else {
        for (int64_t lane = 0; lane < wide[i]; ++lane) to[lane] = from[lane];
      }
    }
  }
}

// As write_lanes, for other types than float32.
static void write_halves(const WindowJob& job, int64_t batch, int64_t y, int64_t x,
                         int64_t channel, int64_t unit, int units, const float* sums) {
  const UpfeatTensor& out = *job.attention.out;
  const int64_t have = smaller(kLanePlanes, out.size[1] - channel);
  for (int64_t c = 0; c < have; ++c) {
    for (int64_t i = 0; i < units; ++i) {
      const int64_t column = x + (unit + i) % kRowVecs * kLanes;
      const int64_t wide = smaller(kLanes, out.size[3] - column);
      if (wide <= 0) continue;
      write_run(row_of(out, batch, y + (unit + i) / kRowVecs).at(channel + c, column), 1, out.dtype,
                wide, sums + (c * units + i) * kLanes);
    }
  }
}

// Computes the pixels of a run of rows, in the 16 columns from x on.
static void lane_tile(const WindowJob& job, const LaneScratch& s, int64_t batch, int64_t y,
                      int64_t rows, int64_t x) {
  const WindowAttention& attention = job.attention;
  const int64_t height = attention.queries->size[2], width = attention.queries->size[3];
  const LaneCells range = lane_cells(attention, x);
  const int64_t across = range.end - range.first, top = attention.rows[y];
  const int64_t cells = (attention.rows[height + y] - top) * across;
  const float *keys[kMostLaneCells], *values[kMostLaneCells];
  for (int64_t i = 0; i < cells; ++i) {
    const int64_t cell = (batch * job.grid_rows + top + i / across) * job.grid_columns +
                         range.first + i % across;
    keys[i] = job.keys_last + cell * job.heads.total;
    values[i] = job.values_last + cell * job.blocks.total;
  }
  const int64_t count = smaller(kTile, width - x);
  for (int64_t column = 0; column < across; ++column) {
    for (int64_t i = 0; i < kTile; ++i) {
      const int64_t pixel = x + (i < count ? i : 0), cell = range.first + column;
      const bool inside =
          attention.columns[pixel] <= cell && cell < attention.columns[width + pixel];
      s.masks[column * kTile + i] = inside ? 0.0f : -__builtin_inff();
    }
  }
  const int64_t step = rows * kTile;
  for (int64_t row = 0; row < rows; ++row) {
    lane_queries(job, s, batch, y + row, x, count);
    for (int64_t head = 0; head < job.heads.count; ++head) {
      lane_logits(job, s, keys, cells, head);
      lane_softmax(s, cells, across, static_cast<float>(attention.scale),
                   1.0f / static_cast<float>(job.heads.count), head > 0,
                   s.weights + row * kTile, step);
    }
  }
  alignas(64) float sums[kLanePlanes * kMaxBlock * kLanes];
  const int64_t groups = rows * kRowVecs / kTogether, most = kMaxBlock / kTogether;
  const Blocks units{groups, (groups + most - 1) / most};
  const UpfeatTensor& out = *attention.out;
  const bool whole = out.dtype == UPFEAT_FLOAT32;
  float* places[kMostLaneRows * kRowVecs];
  int64_t wide[kMostLaneRows * kRowVecs];
  for (int64_t unit = 0; unit < rows * kRowVecs && whole; ++unit) {
    const int64_t column = x + unit % kRowVecs * kLanes, inside = smaller(kLanes, width - column);
    wide[unit] = inside > 0 ? inside : 0;
    places[unit] =
        static_cast<float*>(row_of(out, batch, y + unit / kRowVecs).at(0, inside > 0 ? column : x));
  }
  for (int64_t channel = 0; channel < attention.out->size[1]; channel += kLanePlanes) {
    for (int64_t index = 0; index < units.count; ++index) {
      const int64_t unit = units.begin(index) * kTogether;
      const int size = units.size(index) * kTogether;
      lane_sums_of(size, values, cells, channel, s.weights + unit * kLanes, step, sums);
      if (whole) {
        write_lanes(job, channel, size, places + unit, wide + unit, sums);
      } else {
        write_halves(job, batch, y, x, channel, unit, size, sums);
      }
    }
  }
}

static void lane_task(void* context, int64_t task, int worker) {
  const WindowJob& job = *static_cast<const WindowJob*>(context);
  LaneScratch s;
  lane_scratch(job, job.scratch + worker * job.worker_bytes, &s);
  const int64_t batch = task / job.tasks_per_image, run = task % job.tasks_per_image;
  const int64_t y = job.row_run[run], rows = job.row_run[run + 1] - y;
  for (int64_t x = 0; x < job.attention.out->size[3]; x += kTile) {
    lane_tile(job, s, batch, y, rows, x);
  }
  if (job.streamed) fence_streams();
}
