// F(2x2, 3x3) in integers (digits.inl). While one pair of rows is multiplied, the next one is
// prepared and transformed.

#if defined(UPFEAT_PARTS)

// Number of floats from one transformed matrix to the next; with a power of two, all would fall
// into one set of the cache.
UPFEAT_INLINE int64_t winograd_step(const Layer& layer) { return layer.inputs * layer.pitch + 16; }

struct WinogradScratch {
  char* tiles[2];    // 16 left operands, of this pair of rows and of the next
  float* scales[2];  // (16, kWinogradTiles)
  int32_t* levels[2];
  float *ring, *values, *products, *result, *other, *sums;
  double* totals;
};

static int64_t winograd_scratch(const LayerJob& job, char* at, WinogradScratch* out) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* place = at + used;
    used += (bytes + 63) / 64 * 64;
    return place;
  };
  const auto floats = [&](int64_t count) { return reinterpret_cast<float*>(take(count * 4)); };
  WinogradScratch s{};
  for (int i = 0; i < 2; ++i) {
    s.tiles[i] = take(16 * digit_left_bytes(job.layer.inputs));
    s.scales[i] = floats(16 * kWinogradTiles);
    s.levels[i] = reinterpret_cast<int32_t*>(take(kLevels * kLevelPlane * 4));
  }
  s.ring = floats(4 * kLineColumns * job.in_width);
  s.values = floats(4 * job.in_width);
  s.products = floats(16 * (kWinogradTiles * job.out_width + 16));
  s.result = floats(4 * kWinogradTiles * job.out_width);
  s.other = floats(2 * kWinogradTiles * job.out_width);
  s.sums = floats(2 * job.out_width);
  s.totals = reinterpret_cast<double*>(floats(4 * job.out_width));
  if (out) *out = s;
  return used;
}

// Prepares columns x - 1 to x + 2 * kWinogradTiles of two rows, and transforms them and the two
// rows before: a step prepares two pixels, or computes a row of four operands.
struct TileIntake {
  const LayerJob& job;
  const WinogradScratch& s;
  int64_t batch, x, tiles;
  int64_t y;     // the first of the four rows
  int64_t next;  // index of the step
  int side;

  static constexpr int64_t kRowSteps = kLineColumns / 2 + 1;

  UPFEAT_MEMBER void begin(int64_t first, int at, int64_t prepared) {
    y = first;
    side = at;
    next = prepared * kRowSteps;
  }
  UPFEAT_MEMBER int64_t steps() const { return 4 * kRowSteps + 4 * tiles; }
  UPFEAT_MEMBER bool ended() const { return next >= steps(); }

  UPFEAT_APART_MEMBER void step() {
    const int64_t at = next++;
    if (at >= 4 * kRowSteps) {
      transform((at - 4 * kRowSteps) / 4, at % 4);
    } else {
      prepare(y + at / kRowSteps, at % kRowSteps);
    }
  }

 private:
  UPFEAT_MEMBER float* line(int64_t row) const {
    return s.ring + (row + 1) % 4 * kLineColumns * job.in_width;
  }

  // Prepares columns 2 * part and 2 * part + 1 of a line; in the last part, those that are
  // mirrored.
  UPFEAT_MEMBER void prepare(int64_t row, int64_t part) {
    const UpfeatTensor& image = *job.layer.x;
    const int64_t width = job.in_width, from = mirrored(row, image.size[2], job.layer.reflect);
    float* to = line(row);
    if (from < 0) {
      if (!part) memset(to, 0, static_cast<size_t>(kLineColumns * width) * 4);
      return;
    }
    const int64_t low = x > 0 ? 0 : 1, high = smaller(image.size[3] - x + 1, kLineColumns);
    if (part < kLineColumns / 2) {
      const int64_t begin = 2 * part > low ? 2 * part : low, end = smaller(2 * part + 2, high);
      if (begin >= end) return;
      prepare_pixels(job, batch, from, x - 1 + begin, end - begin, to + begin * width);
      return;
    }
    for (int64_t i = 0; i < kLineColumns; i = i < low ? high : i + 1) {
      const int64_t at = mirrored(x - 1 + i, image.size[3], job.layer.reflect);
      if (i >= low && i < high) continue;
      const size_t bytes = static_cast<size_t>(width) * 4;
      if (at < 0) {
        memset(to + i * width, 0, bytes);
      } else {
        memcpy(to + i * width, to + (at - x + 1) * width, bytes);
      }
    }
  }

  // Computes operands 4 * i to 4 * i + 3 of a tile.
  UPFEAT_MEMBER void transform(int64_t tile, int64_t i) {
    const int64_t width = job.in_width, size = digit_left_bytes(job.layer.inputs);
    // The rows whose sum or difference is read.
    const float* one = line(y + (i == 0 ? 0 : i == 2 ? 2 : 1)) + 2 * tile * width;
    const float* other = line(y + (i == 2 ? 1 : i == 3 ? 3 : 2)) + 2 * tile * width;
    const float sign = i == 1 ? 1.0f : -1.0f;
    __m512i most[4];
    UPFEAT_UNROLL
    for (int j = 0; j < 4; ++j) most[j] = _mm512_setzero_si512();
    for (int64_t c = 0; c < width; c += kLanes) {
      const Vec factor = load(job.factors + c);
      Vec down[4];
      UPFEAT_UNROLL
      for (int j = 0; j < 4; ++j) {
        down[j] = (load(one + j * width + c) + load(other + j * width + c) * sign) * factor;
      }
      const Vec across[4] = {down[0] - down[2], down[1] + down[2], down[2] - down[1],
                             down[1] - down[3]};
      UPFEAT_UNROLL
      for (int j = 0; j < 4; ++j) {
        store(s.values + j * width + c, across[j]);
        most[j] = larger_bits(most[j], across[j]);
      }
    }
    char* to = s.tiles[side] + 4 * i * size + tile * kDigitBlock;
    float* scales = s.scales[side] + 4 * i * kWinogradTiles + tile;
    for (int j = 0; j < 4; ++j) {
      const DigitRow row{s.values + j * width, width, to + j * size, digit_part(job.layer.inputs),
                         most[j]};
      row.put(scales + j * kWinogradTiles);
    }
  }
};

// Writes 32 outputs of all tiles of one product from its levels, eight tiles per step.
struct ProductOutlet {
  int64_t pitch, count, next;
  const int32_t* levels;
  const float* scales;
  float* to;
  bool wide;

  UPFEAT_MEMBER bool ended() const { return next >= count; }
  UPFEAT_APART_MEMBER void step() {
    const int64_t end = smaller(next + 8, count);
    for (; next < end; ++next) {
      const Vec scale = splat(scales[next]);
      store(to + next * pitch, level_sum(levels + next * 32) * scale);
      if (wide) store(to + next * pitch + 16, level_sum(levels + next * 32 + 16) * scale);
    }
  }
};

// Computes the pixels of every tile, (2, 2 * kWinogradTiles, out_width), from its 16 products.
static void winograd_outputs(const LayerJob& job, const WinogradScratch& s, int64_t tiles) {
  const int64_t width = job.out_width, plane = kWinogradTiles * width + 16;
  const int64_t second = 2 * kWinogradTiles * width;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t c = 0; c < width; c += kLanes) {
      const float* from = s.products + tile * width + c;
      const Vec unit = load(job.columns + c);
      Vec down[2][4];
      UPFEAT_UNROLL
      for (int j = 0; j < 4; ++j) {
        const Vec m0 = load(from + j * plane), m1 = load(from + (4 + j) * plane);
        const Vec m2 = load(from + (8 + j) * plane), m3 = load(from + (12 + j) * plane);
        down[0][j] = m0 + m1 + m2;
        down[1][j] = m1 - m2 - m3;
      }
      float* to = s.result + 2 * tile * width + c;
      UPFEAT_UNROLL
      for (int i = 0; i < 2; ++i) {
        store(to + i * second, (down[i][0] + down[i][1] + down[i][2]) * unit);
        store(to + i * second + width, (down[i][1] - down[i][2] - down[i][3]) * unit);
      }
    }
  }
}

// Multiplies the tiles of one pair of rows with the weights, to s.products, while the next pair is
// prepared.
static void winograd_products(const LayerJob& job, const WinogradScratch& s, int side,
                              TileIntake& intake, Fetch* fetches) {
  const int64_t inputs = job.layer.inputs, width = job.out_width, tiles = intake.tiles;
  const int64_t left = digit_left_bytes(inputs), pair = digit_pair_bytes(inputs);
  const int64_t blocks = digit_blocks(inputs), plane = kWinogradTiles * width + 16;
  const int64_t calls = 16 * ((width + 31) / 32) * kPauses * blocks;
  const int64_t steps = intake.steps() - intake.next;
  ProductOutlet outlet{width, 0, 0, nullptr, nullptr, nullptr, false};
  const char* right = job.right;
  int64_t credit = 0;
  int turn = 0;
  for (int64_t matrix = 0; matrix < 16; ++matrix) {
    for (int64_t n = 0; n < width; n += 32, right += pair) {
      const bool wide = n + 16 < width;
      const char* next = matrix == 15 && n + 32 >= width ? job.right : right + pair;
      multiply_digits(tiles, wide, s.tiles[side] + matrix * left, digit_part(inputs), right, next,
                      blocks, s.levels[turn], [&]() UPFEAT_LAMBDA {
                        credit += steps;
                        if (credit >= calls) {
                          credit -= calls;
                          intake.step();
                        } else if (!outlet.ended()) {
                          outlet.step();
                        }
                        fetches[0].step();
                        fetches[1].step();
                      });
      while (!outlet.ended()) outlet.step();
      outlet = {width, tiles, 0, s.levels[turn], s.scales[side] + matrix * kWinogradTiles,
                s.products + matrix * plane + n, wide};
      turn ^= 1;
    }
  }
  while (!outlet.ended()) outlet.step();
  while (!intake.ended()) intake.step();
}

static void winograd_task(void* context, int64_t task, int worker) {
  const LayerJob& job = *static_cast<const LayerJob*>(context);
  const Layer& layer = job.layer;
  WinogradScratch s;
  winograd_scratch(job, job.scratch + worker * job.worker_bytes, &s);
  zero_totals(job, s.totals);
  const int64_t x = task % job.column_tasks * 2 * kWinogradTiles;
  const int64_t part = task / job.column_tasks, height = layer.out->size[2];
  const int64_t batch = part / job.row_tasks, first = part % job.row_tasks * job.rows_per_task;
  const int64_t end = smaller(first + job.rows_per_task, height);
  const int64_t columns = smaller(2 * kWinogradTiles, layer.out->size[3] - x);
  const int64_t tiles = (columns + 1) / 2;
  const UpfeatTensor& target = layer.residual ? *layer.residual : *layer.out;
  TileIntake intake{job, s, batch, x, tiles, 0, 0, 0};
  dense_begin();
  intake.begin(first - 1, 0, 0);
  while (!intake.ended()) intake.step();
  int side = 0;
  for (int64_t y = first; y < end; y += 2, side ^= 1) {
    const int64_t rows = smaller(2, end - y);
    intake.next = intake.steps();
    if (y + 2 < end) intake.begin(y + 1, side ^ 1, 2);
    Fetch fetches[2] = {};
    for (int64_t row = 0; row < rows; ++row) {
      fetches[row].begin(target, batch, Strip{y + row, x, columns});
    }
    winograd_products(job, s, side, intake, fetches);
    winograd_outputs(job, s, tiles);
    for (int64_t row = 0; row < rows; ++row) {
      finish_pixels(job, batch, y + row, x, columns,
                    s.result + row * 2 * kWinogradTiles * job.out_width, s.other, s.sums,
                    s.totals);
    }
  }
  dense_end();
  add_groups(job, task, s.totals);
}

#endif
