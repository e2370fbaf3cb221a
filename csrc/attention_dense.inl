// Attention for tiles of many pixels with matrix tiles (AMX), if the machine has them. The cells'
// keys and values are packed as right operands, and reused while the next tiles attend to the same
// cells.

#if defined(UPFEAT_PARTS)

constexpr int64_t kMostPacked = int64_t{16} << 20;
constexpr int64_t kMostHeads = 16;  // most heads whose mean can be computed here

struct DenseCells {
  char *keys, *values;      // keys of every head; values of all blocks, one after the other
  char *queries, *shares;   // queries of every head; weights of one block
  int64_t batch, cells[4];  // the image and the cells of which keys and values are packed
};

UPFEAT_INLINE int64_t dense_depth(const WindowJob& job) { return whole_vectors(job.heads.equal); }

static DenseCells* dense_cells(const WindowJob& job, int64_t pack, char* at) {
  DenseCells* dense = reinterpret_cast<DenseCells*>(at);
  dense->batch = -1;
  dense->queries = at + (sizeof(DenseCells) + 63) / 64 * 64;
  dense->shares = dense->queries + job.heads.count * left_bytes(dense_depth(job));
  dense->keys = dense->shares + left_bytes(pack);
  dense->values = dense->keys + job.heads.count * right_bytes(dense_depth(job), pack);
  return dense;
}
static int64_t dense_cells_bytes(const WindowJob& job, int64_t pack) {
  int64_t values = 0;
  for (int64_t n = 0; n < job.blocks.count; ++n) {
    values += right_bytes(pack, whole_vectors(block_size(job.blocks, n)));
  }
  return (sizeof(DenseCells) + 63) / 64 * 64 + left_bytes(pack) + values +
         job.heads.count * (left_bytes(dense_depth(job)) + right_bytes(dense_depth(job), pack));
}
static bool dense_fits(const WindowJob& job) {
  if (job.blocks.count == 1 && job.heads.count > kMostHeads) return false;
  return dense_cells_bytes(job, pack_pitch(job.most_cells)) <= kMostPacked;
}

static void dense_start(const WindowJob& job, const WindowScratch& s, const WindowTile& tile) {
  DenseCells& dense = *s.cells;
  bool same = dense.batch == tile.batch;
  for (int i = 0; i < 4; ++i) same = same && dense.cells[i] == tile.cells[i];
  if (same) return;
  dense.batch = tile.batch;
  for (int i = 0; i < 4; ++i) dense.cells[i] = tile.cells[i];
  start_tile(job, s, tile);
  const int64_t depth = dense_depth(job), width = whole_vectors(tile.count);
  for (int64_t n = 0; n < job.heads.count; ++n) {
    pack_right([&](int64_t k) UPFEAT_LAMBDA { return s.keys + (n * depth + k) * s.pack; }, depth,
               width, dense.keys + n * right_bytes(depth, width));
  }
  const int64_t columns = tile.cells[3] - tile.cells[2];
  char* values = dense.values;
  int64_t at = 0;
  for (int64_t n = 0; n < job.blocks.count; ++n) {
    const int64_t channels = whole_vectors(block_size(job.blocks, n));
    pack_right([&](int64_t k) UPFEAT_LAMBDA {
      return job.values_last + s.value_row[k / columns] + k % columns * job.blocks.total + at;
    }, tile.count, channels, values);
    values += right_bytes(tile.count, channels);
    at += channels;
  }
}

// Computes the results of a strip of pixels, to s.result.
static void dense_strip(const WindowJob& job, const WindowScratch& s, const WindowTile& tile,
                        int64_t first, int64_t count) {
  const DenseCells& dense = *s.cells;
  const int64_t depth = dense_depth(job), heads = job.heads.count;
  const int64_t width = whole_vectors(tile.count);
  const float scale = static_cast<float>(job.attention.scale);
  read_strip(*job.attention.queries, job.heads, tile, first, count, s.query);
  for (int64_t n = 0; n < heads; ++n) {
    char* left = dense.queries + n * left_bytes(depth);
    for (int64_t i = 0; i < count; ++i) {
      const float* query = s.query + i * job.heads.total + n * depth;
      for (int64_t block = 0; block < dense_blocks(depth); ++block) {
        put_left(left, depth, i, block, depth,
                 [&](int64_t c) UPFEAT_LAMBDA { return load(query + c); });
      }
    }
    const Operands operands{left, dense.keys + n * right_bytes(depth, width)};
    multiply_dense(count, &operands, 1, depth, width, 0, width, s.logits + n * kStrip * s.pack,
                   s.pack);
  }
  // The mean over heads is computed when the weights are packed as an operand.
  const bool mean = job.blocks.count == 1 && heads > 1;
  const char* values = dense.values;
  int64_t at = 0;
  for (int64_t n = 0; n < job.blocks.count; ++n) {
    const int64_t channels = whole_vectors(block_size(job.blocks, n));
    const int64_t several = mean ? heads : 1;
    for (int64_t i = 0; i < count; ++i) {
      float* logits = s.logits + (n * kStrip + i) * s.pack;
      Vec share[kMostHeads];
      for (int64_t head = 0; head < several; ++head) {
        share[head] = open_softmax(logits + head * kStrip * s.pack, tile.count, scale) *
                      (1.0f / static_cast<float>(several));
      }
      for (int64_t block = 0; block < dense_blocks(tile.count); ++block) {
        put_left(dense.shares, tile.count, i, block, width, [&](int64_t c) UPFEAT_LAMBDA {
          Vec sum = load(logits + c) * share[0];
          for (int64_t head = 1; head < several; ++head) {
            sum += load(logits + head * kStrip * s.pack + c) * share[head];
          }
          return sum;
        });
      }
    }
    if (channels) {
      const Operands operands{dense.shares, values};
      multiply_dense(count, &operands, 1, tile.count, channels, 0, channels, s.result + at,
                     job.blocks.total);
    }
    values += right_bytes(tile.count, channels);
    at += channels;
  }
}

#else

struct DenseCells {};

static int64_t dense_cells_bytes(const WindowJob&, int64_t) { return 0; }
static DenseCells* dense_cells(const WindowJob&, int64_t, char*) { return nullptr; }
static bool dense_fits(const WindowJob&) { return false; }
static void dense_start(const WindowJob&, const WindowScratch&, const WindowTile&) {}
static void dense_strip(const WindowJob&, const WindowScratch&, const WindowTile&, int64_t,
                        int64_t) {}

#endif
