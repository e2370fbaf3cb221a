// Tiles of weights: read from a tensor, or computed from keys or from guidance.

// Rows of keys kept by a worker: all that a pair of output rows and its taps read. A row is
// [key width][pitch], with column x of the image at radius + x, reflected on both sides.
struct Keys {
  float* rows;    // (slots, width, pitch)
  int64_t* held;  // (slots,) the image row in each slot, -1 for none
  int64_t slots, width, pitch, batch;
};

struct Maker {
  const WeightSource* source;
  const UpfeatTensor* image;  // keys or guidance
  int64_t radius, side, taps, width, height, columns;
  float* spatial;   // (taps,)
  Keys keys;        // of this worker
  float* guidance;  // [G][2][kTile], this worker's tile of guidance
  float* hidden;    // [max(D, T)][2][kTile]
  float* input;     // [T + G][2][kTile]
};

UPFEAT_INLINE int64_t reflect(int64_t index, int64_t size) {
  if (size == 1) return 0;
  const int64_t period = 2 * (size - 1);
  index %= period;
  if (index < 0) index += period;
  return index < size ? index : period - index;
}

UPFEAT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
UPFEAT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static void fill_spatial(const WeightSource& source, float* spatial) {
  const int64_t side = 2 * source.radius + 1;
  for (int64_t k = 0; k < side * side; ++k) {
    // With radius 0 both coordinates are -1, as in linspace(-1, 1, 1).
    const double step = source.radius ? 1.0 / static_cast<double>(source.radius) : 0.0;
    const double y = static_cast<double>(k / side) * step - 1,
                 x = static_cast<double>(k % side) * step - 1;
    const double e = -(y * y + x * x) / (2 * source.sigma_spatial * source.sigma_spatial);
    spatial[k] = e < static_cast<double>(kFaint) ? 0 : static_cast<float>(__builtin_exp(e));
  }
}

// out[o] = bias[o] + sum_i weight[o][i] * in[i] over a tile of pixels, o in [first, first + kOut).
template <int kOut>
static void dense_block(const float* weight, const float* bias, int64_t inputs, const float* in,
                        float* out) {
  Vec sum[kOut][kTileVecs];
  UPFEAT_UNROLL
  for (int o = 0; o < kOut; ++o) {
    UPFEAT_UNROLL
    for (int v = 0; v < kTileVecs; ++v) sum[o][v] = splat(bias[o]);
  }
  for (int64_t i = 0; i < inputs; ++i) {
    Vec value[kTileVecs];
    UPFEAT_UNROLL
    for (int v = 0; v < kTileVecs; ++v) {
      value[v] = load(in + i * kTilePixels + v * kLanes);
    }
    UPFEAT_UNROLL
    for (int o = 0; o < kOut; ++o) {
      const Vec w = splat(weight[o * inputs + i]);
      UPFEAT_UNROLL
      for (int v = 0; v < kTileVecs; ++v) sum[o][v] += w * value[v];
    }
  }
  UPFEAT_UNROLL
  for (int o = 0; o < kOut; ++o) {
    UPFEAT_UNROLL
    for (int v = 0; v < kTileVecs; ++v) {
      store(out + o * kTilePixels + v * kLanes, sum[o][v]);
    }
  }
}

static void dense(const float* weight, const float* bias, int64_t outputs, int64_t inputs,
                  const float* in, float* out) {
  constexpr int kOut = kLanes == 16 ? 7 : (kLanes == 8 ? 3 : 1);
  int64_t o = 0;
  for (; o + kOut <= outputs; o += kOut) {
    dense_block<kOut>(weight + o * inputs, bias + o, inputs, in, out + o * kTilePixels);
  }
  for (; o < outputs; ++o) {
    dense_block<1>(weight + o * inputs, bias + o, inputs, in, out + o * kTilePixels);
  }
}

static void gelu_tile(float* tile, int64_t features) {
  for (int64_t i = 0; i < features * kTilePixels; i += kLanes)
    store(tile + i, gelu(load(tile + i)));
}

// Reads two pieces of kTile columns of image row y, [channels][2][kTile]; 0 outside the image.
static void read_two_pieces(const UpfeatTensor& image, int64_t batch, int64_t y, int64_t x,
                            float* tile) {
  const Row row = row_of(image, batch, y);
  for (int64_t c = 0; c < image.size[1]; ++c) {
    float* to = tile + c * kTilePixels;
    const int64_t have = smaller(image.size[3] - x, kTilePixels);
    read_run(row.at(c, x), row.column_stride, row.dtype, have, to);
    for (int64_t i = have; i < kTilePixels; ++i) to[i] = 0;
  }
}

static void make_key_row(Maker& maker, int64_t y, float* to) {
  Keys& keys = maker.keys;
  const UpfeatStage* stage = maker.source->stage;
  if (!stage) {
    const Row row = row_of(*maker.image, keys.batch, y);
    for (int64_t d = 0; d < keys.width; ++d) {
      read_run(row.at(d, 0), row.column_stride, row.dtype, maker.columns,
               to + d * keys.pitch + maker.radius);
    }
  }
  for (int64_t x = 0; stage && x < maker.columns; x += kTilePixels) {
    read_two_pieces(*maker.image, keys.batch, y, x, maker.guidance);
    dense(stage->proj_w0, stage->proj_b0, keys.width, maker.image->size[1], maker.guidance,
          maker.hidden);
    gelu_tile(maker.hidden, keys.width);
    dense(stage->proj_w1, stage->proj_b1, keys.width, keys.width, maker.hidden, maker.input);
    for (int64_t d = 0; d < keys.width; ++d) {
      memcpy(to + d * keys.pitch + maker.radius + x, maker.input + d * kTilePixels,
             static_cast<size_t>(smaller(maker.columns - x, kTilePixels)) * 4);
    }
  }
  for (int64_t d = 0; d < keys.width; ++d) {
    float* line = to + d * keys.pitch + maker.radius;
    for (int64_t j = 1; j <= maker.radius; ++j) {
      line[-j] = line[reflect(-j, maker.columns)];
      line[maker.columns - 1 + j] = line[reflect(maker.columns - 1 + j, maker.columns)];
    }
  }
}

static const float* key_row(Maker& maker, int64_t y) {
  Keys& keys = maker.keys;
  const int64_t slot = y % keys.slots;
  float* row = keys.rows + slot * keys.width * keys.pitch;
  if (keys.held[slot] != y) {
    make_key_row(maker, y, row);
    keys.held[slot] = y;
  }
  return row;
}

// products[dy][dx][py] = <q[y + py], q[y + py + dy - r][x + dx - r]> for kSpan values of dx.
// The neighbour row y - r + line is shared by both rows of the tile.
template <int kSpan>
static void key_products(const Keys& keys, const float* const* centre, const float* line, int64_t x,
                         int64_t radius, int64_t dx, float* const* products) {
  for (int v = 0; v < kRowVecs; ++v) {
    Vec sum[2][kSpan];
    UPFEAT_UNROLL
    for (int i = 0; i < kSpan; ++i) sum[0][i] = sum[1][i] = Vec{};
    const int64_t at = x + v * kLanes;
    for (int64_t d = 0; d < keys.width; ++d) {
      const Vec q0 = load(centre[0] + d * keys.pitch + radius + at);
      const Vec q1 = load(centre[1] + d * keys.pitch + radius + at);
      const float* from = line + d * keys.pitch + at + dx;
      UPFEAT_UNROLL
      for (int i = 0; i < kSpan; ++i) {
        const Vec other = load(from + i);
        sum[0][i] += q0 * other;
        sum[1][i] += q1 * other;
      }
    }
    UPFEAT_UNROLL
    for (int py = 0; py < 2; ++py) {
      if (!products[py]) continue;
      UPFEAT_UNROLL
      for (int i = 0; i < kSpan; ++i) {
        store(products[py] + (dx + i) * kTilePixels + v * kLanes, sum[py][i]);
      }
    }
  }
}

// Computes the key products of a tile, [taps][2][kTile].
static void tile_products(Maker& maker, int64_t y, int64_t x, float* products) {
  const int64_t below = smaller(y + 1, maker.height - 1);
  const float* centre[2] = {key_row(maker, y), key_row(maker, below)};
  for (int64_t line = 0; line <= maker.side; ++line) {
    // If the image ends at row y, row y + 1 does not exist, and its last taps are not computed.
    if (line == maker.side && below == y) break;
    const float* row = key_row(maker, reflect(y - maker.radius + line, maker.height));
    float* to[2] = {line < maker.side ? products + line * maker.side * kTilePixels : nullptr,
                    line > 0 ? products + (line - 1) * maker.side * kTilePixels + kTile : nullptr};
    int64_t dx = 0;
    for (; dx + 7 <= maker.side; dx += 7) {
      key_products<7>(maker.keys, centre, row, x, maker.radius, dx, to);
    }
    for (; dx < maker.side; ++dx) {
      key_products<1>(maker.keys, centre, row, x, maker.radius, dx, to);
    }
  }
  if (below == y) {
    for (int64_t k = 0; k < maker.taps; ++k) {
      for (int v = 0; v < kRowVecs; ++v) store(products + (2 * k + 1) * kTile + v * kLanes, Vec{});
    }
  }
}

// Turns key products into weights, in place: softmax over taps, times the spatial kernel,
// normalised.
static void normalise_tile(const Maker& maker, float* tile) {
  const Vec temperature = splat(static_cast<float>(maker.source->temperature));
  for (int v = 0; v < kTileVecs; ++v) {
    float* at = tile + v * kLanes;
    Vec top = load(at) * temperature;
    for (int64_t k = 1; k < maker.taps; ++k)
      top = max(top, load(at + k * kTilePixels) * temperature);
    Vec range_sum = {}, sum = {};
    for (int64_t k = 0; k < maker.taps; ++k) {
      const Vec e = falling_exp(below_top(load(at + k * kTilePixels), temperature, top));
      const Vec product = e * maker.spatial[k];
      range_sum += e;
      sum += product;
      store(at + k * kTilePixels, product);
    }
    const Vec scale = 1.0f / max(sum, range_sum * 1e-7f);
    for (int64_t k = 0; k < maker.taps; ++k) {
      store(at + k * kTilePixels, load(at + k * kTilePixels) * scale);
    }
  }
}

// weights += fixup_scale * mlp([weights, guidance]), in place.
static void fix_up_tile(Maker& maker, int64_t y, int64_t x, float* tile) {
  const UpfeatStage& stage = *maker.source->stage;
  const int64_t inputs = maker.taps + maker.image->size[1];
  memcpy(maker.input, tile, static_cast<size_t>(maker.taps * kTilePixels) * 4);
  read_tile(*maker.image, maker.keys.batch, y, x, maker.input + maker.taps * kTilePixels);
  dense(stage.fix_w0, stage.fix_b0, maker.taps, inputs, maker.input, maker.hidden);
  gelu_tile(maker.hidden, maker.taps);
  dense(stage.fix_w1, stage.fix_b1, maker.taps, maker.taps, maker.hidden, maker.input);
  const float scale = static_cast<float>(stage.fixup_scale);
  for (int64_t i = 0; i < maker.taps * kTilePixels; i += kLanes) {
    store(tile + i, load(tile + i) + load(maker.input + i) * scale);
  }
}

UPFEAT_INLINE void make_tile(Maker& maker, int64_t batch, int64_t y, int64_t x, float* tile) {
  if (maker.source->weights) return read_tile(*maker.source->weights, batch, y, x, tile);
  tile_products(maker, y, x, tile);
  normalise_tile(maker, tile);
  if (maker.source->stage) fix_up_tile(maker, y, x, tile);
}

// Marks all rows of keys, which are those of an earlier task, as invalid.
static void start_rows(Maker& maker, int64_t batch) {
  maker.keys.batch = batch;
  for (int64_t slot = 0; slot < maker.keys.slots; ++slot) maker.keys.held[slot] = -1;
}

UPFEAT_INLINE Maker describe(const WeightSource& source) {
  Maker maker{};
  maker.source = &source;
  maker.image = source.keys ? source.keys : source.guidance;
  maker.radius = source.radius;
  maker.side = 2 * source.radius + 1;
  maker.taps = maker.side * maker.side;
  if (source.weights) return maker;
  maker.width = source.stage ? source.stage->key_width : source.keys->size[1];
  maker.height = maker.image->size[2];
  maker.columns = maker.image->size[3];
  maker.keys.slots = smaller(maker.side + 1, maker.height);
  maker.keys.width = maker.width;
  maker.keys.pitch = (maker.columns + 2 * maker.radius + kTilePixels + 15) / 16 * 16;
  return maker;
}

UPFEAT_INLINE int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes of scratch that one worker needs to make weights.
UPFEAT_INLINE int64_t maker_bytes(const Maker& maker) {
  if (maker.source->weights) return 0;
  const int64_t channels = maker.image->size[1];
  return rounded(maker.keys.slots * maker.keys.width * maker.keys.pitch * 4) +
         rounded(maker.keys.slots * 8) + rounded(maker.taps * 4) +
         (channels + larger(maker.width, maker.taps) + larger(maker.width, maker.taps + channels)) *
             kTilePixels * 4;
}

// Divides a worker's scratch memory; returns the first byte behind it.
static char* place_maker(Maker& maker, char* at) {
  if (maker.source->weights) return at;
  const int64_t channels = maker.image->size[1];
  const int64_t key_bytes = maker.keys.slots * maker.keys.width * maker.keys.pitch * 4;
  maker.keys.rows = reinterpret_cast<float*>(at);
  memset(at, 0, static_cast<size_t>(key_bytes));
  at += rounded(key_bytes);
  maker.keys.held = reinterpret_cast<int64_t*>(at);
  at += rounded(maker.keys.slots * 8);
  maker.spatial = reinterpret_cast<float*>(at);
  fill_spatial(*maker.source, maker.spatial);
  at += rounded(maker.taps * 4);
  maker.guidance = reinterpret_cast<float*>(at);
  maker.hidden = maker.guidance + channels * kTilePixels;
  maker.input = maker.hidden + larger(maker.width, maker.taps) * kTilePixels;
  return reinterpret_cast<char*>(maker.input +
                                 larger(maker.width, maker.taps + channels) * kTilePixels);
}
