// Rows of the encoder of the neighbourhood upsampler: of its layers, of the image and of s[0].

#if defined(__AVX512F__)
constexpr int kPixels = 12, kVecs = 2;
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kPixels = 6, kVecs = 2;
#else
constexpr int kPixels = 3, kVecs = 2;
#endif

// A 3x3 or 1x1 layer: `runs` runs of `inputs` contiguous floats.
struct Runs {
  const float* weight;  // (runs, inputs, width)
  const float* bias;    // (width,)
  int64_t runs, inputs;
};

// sum[p][v] += in[p][i] * weight[i][v] over a run of inputs.
template <int kCount>
UPFEAT_INLINE void add_run(Vec (*sum)[kVecs], const float* in, int64_t step, int64_t inputs,
                           const float* weight, int64_t width) {
  for (int64_t i = 0; i < inputs; ++i) {
    Vec w[kVecs];
    UPFEAT_UNROLL
    for (int v = 0; v < kVecs; ++v) w[v] = load(weight + i * width + v * kLanes);
    UPFEAT_UNROLL
    for (int p = 0; p < kCount; ++p) {
      const Vec value = splat(in[p * step + i]);
      UPFEAT_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[p][v] += value * w[v];
    }
  }
}

// out[p][...] = bias + sum over runs, for kCount pixels `step` floats apart in each run.
template <int kCount>
UPFEAT_APART void multiply_block(const Runs& layer, const float* const* in, int64_t step,
                              int64_t width, float* out) {
  for (int64_t c = 0; c < width; c += kVecs * kLanes) {
    Vec sum[kCount][kVecs];
    UPFEAT_UNROLL
    for (int p = 0; p < kCount; ++p) {
      UPFEAT_UNROLL
      for (int v = 0; v < kVecs; ++v) sum[p][v] = load(layer.bias + c + v * kLanes);
    }
    for (int64_t run = 0; run < layer.runs; ++run) {
      add_run<kCount>(sum, in[run], step, layer.inputs,
                      layer.weight + run * layer.inputs * width + c, width);
    }
    UPFEAT_UNROLL
    for (int p = 0; p < kCount; ++p) {
      UPFEAT_UNROLL
      for (int v = 0; v < kVecs; ++v) store(out + p * width + c + v * kLanes, sum[p][v]);
    }
  }
}

// As multiply_block, for any number of pixels of a row.
static void multiply_row(const Runs& layer, const float* const* rows, int64_t step, int64_t width,
                      int64_t pixels, float* out) {
  const float* in[3] = {rows[0], rows[layer.runs > 1 ? 1 : 0], rows[layer.runs > 2 ? 2 : 0]};
  int64_t x = 0;
  for (; x + kPixels <= pixels; x += kPixels) {
    multiply_block<kPixels>(layer, in, step, width, out + x * width);
    for (const float*& run : in) run += kPixels * step;
  }
  for (; x < pixels; ++x) {
    multiply_block<1>(layer, in, step, width, out + x * width);
    for (const float*& run : in) run += step;
  }
}

// sin(x) for |x| <= kFar: reduction by a multiple of pi in four parts, then a Taylor polynomial on
// |r| <= pi/2 (error 6e-8).
constexpr float kFar = 8192.0f;

UPFEAT_INLINE Vec sine(Vec x) {
  const Vec magic = splat(12582912.0f);
  const Vec shifted = x * 0.318309886f + magic;
  const Vec whole = shifted - magic;
  Vec r = x - whole * 3.140625f;
  r = r - whole * 0.0009670257568359375f;
  r = r - whole * 6.2771141529083252e-7f;
  r = r - whole * 1.2154201256553420e-10f;
  const Vec t = r * r;
  Vec p = splat(-1.0f / 39916800.0f);
  p = p * t + 1.0f / 362880.0f;
  p = p * t - 1.0f / 5040.0f;
  p = p * t + 1.0f / 120.0f;
  p = p * t - 1.0f / 6.0f;
  const Vec value = r + r * t * p;
  return as_float(as_bits(value) ^ (as_bits(shifted) << 31));
}

// Replaces a row by its sines. If a value is beyond kFar, where `sine` loses digits, the whole row
// is computed in double.
static void sine_row(float* row, int64_t count) {
  Vec most{};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec x = load(row + i);
    most = max(most, max(x, -x));
  }
  bool far = false;
  for (int i = 0; i < kLanes; ++i) far |= !(most[i] <= kFar);
  for (int64_t i = 0; far && i < count; ++i) {
    row[i] = static_cast<float>(__builtin_sin(static_cast<double>(row[i])));
  }
  for (int64_t i = 0; !far && i < count; i += kLanes) store(row + i, sine(load(row + i)));
}

static void gelu_row(float* row, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(row + i, gelu(load(row + i)));
}

struct HalvedColumn {
  int64_t offset, count;  // offset of the first column, in floats; number of columns
};

struct LaidColumn {
  int64_t left, right;  // offsets of the two columns, in floats
  float share;          // weight of the right column
};

struct PyramidJob {
  UpfeatTensor guidance, queries;
  const PyramidPlan* plan;
  const UpfeatPyramid* encoder;
  Runs entry;
  bool unit;
  int64_t batch, level;
  // For every column of every scale: the columns of the finer scale that are averaged, and the two
  // columns of the coarser scale that are interpolated.
  HalvedColumn* halved[kMostLevels];
  LaidColumn* laid[kMostLevels];
  float* read[kMostLevels];   // x[k], with a replicated pixel at both ends of a row
  float* seen[kMostLevels];   // s[k], then o[k]
  char* scratch;
  int64_t worker_bytes;
};

UPFEAT_INLINE Runs runs_of(const float* weight, const float* bias, int64_t runs, int64_t inputs) {
  return Runs{weight, bias, runs, inputs};
}

// Finds the values, of `fine` in all, whose mean is value `at` of `coarse`; if `coarse` does not
// divide `fine`, neighbouring means have values in common.
UPFEAT_INLINE void halved_span(int64_t fine, int64_t coarse, int64_t at, int64_t* low,
                               int64_t* high) {
  *low = at * fine / coarse;
  *high = ((at + 1) * fine + coarse - 1) / coarse;
}

// Finds the two values, of `coarse` in all, between which pixel `at` of `fine` is interpolated;
// returns the weight of the second.
UPFEAT_INLINE float laid_place(int64_t coarse, int64_t fine, int64_t at, int64_t* low,
                               int64_t* high) {
  const int64_t numerator = (2 * at + 1) * coarse - fine;
  *low = numerator < 0 ? 0 : numerator / (2 * fine);
  *high = *low + 1 < coarse ? *low + 1 : *low;
  if (numerator < 0) return 0;
  return static_cast<float>(numerator - *low * 2 * fine) / static_cast<float>(2 * fine);
}

UPFEAT_INLINE int64_t clamped(int64_t value, int64_t low, int64_t end) {
  return value < low ? low : (value >= end ? end - 1 : value);
}

// The last few rows that a worker read of the image, channels contiguous, and computed of s[0].
struct EntryRows {
  static constexpr int64_t kSlots = 4;
  float* image;  // (kSlots, columns + 2, channels)
  float* scale;  // (kSlots, columns, width)
  int64_t image_held[kSlots], scale_held[kSlots];
};

UPFEAT_INLINE int64_t entry_columns(const PyramidJob& job) {
  const PyramidSpan& columns = job.plan->columns[0].seen;
  return columns.stop - columns.start;
}

static EntryRows entry_rows(const PyramidJob& job, char* at) {
  EntryRows rows{};
  rows.image = reinterpret_cast<float*>(at);
  const int64_t image = EntryRows::kSlots * (entry_columns(job) + 2) * job.guidance.size[1];
  rows.scale = rows.image + (image + 15) / 16 * 16;
  for (int64_t i = 0; i < EntryRows::kSlots; ++i) rows.image_held[i] = rows.scale_held[i] = -1;
  return rows;
}

UPFEAT_INLINE int64_t entry_bytes(const PyramidJob& job) {
  const int64_t columns = entry_columns(job) + 2;
  const int64_t image = EntryRows::kSlots * columns * job.guidance.size[1];
  const int64_t scale = EntryRows::kSlots * columns * job.encoder->width;
  return rounded(((image + 15) / 16 * 16 + scale) * 4);
}

static const float* image_row(const PyramidJob& job, EntryRows& rows, int64_t y) {
  const UpfeatTensor& image = job.guidance;
  const PyramidSpan& columns = job.plan->columns[0].seen;
  const int64_t channels = image.size[1], count = columns.stop - columns.start + 2;
  const int64_t slot = y % EntryRows::kSlots;
  float* to = rows.image + slot * count * channels;
  if (rows.image_held[slot] == y) return to;
  const Row row = row_of(image, job.batch, y);
  const int64_t low = larger(columns.start - 1, 0);
  const int64_t high = smaller(columns.stop + 1, image.size[3]);
  const int64_t before = low - (columns.start - 1);
  for (int64_t c = 0; c < channels; ++c) {
    const char* from = static_cast<const char*>(row.at(c, low));
    float* line = to + c;
    if (row.dtype == UPFEAT_FLOAT32) {
      const float* values = reinterpret_cast<const float*>(from);
      for (int64_t x = 0; x < high - low; ++x) {
        line[(before + x) * channels] = values[x * row.column_stride];
      }
    } else {
      for (int64_t x = 0; x < high - low; ++x) {
        line[(before + x) * channels] = read_one(from, x * row.column_stride, row.dtype);
      }
    }
    if (before) line[0] = line[channels];
    if (before + high - low < count) line[(count - 1) * channels] = line[(count - 2) * channels];
  }
  rows.image_held[slot] = y;
  return to;
}

static const float* scale_row(const PyramidJob& job, EntryRows& rows, int64_t y) {
  const int64_t columns = entry_columns(job), width = job.encoder->width;
  const int64_t slot = y % EntryRows::kSlots;
  float* to = rows.scale + slot * columns * width;
  if (rows.scale_held[slot] == y) return to;
  const float* around[3];
  for (int64_t i = 0; i < 3; ++i) {
    around[i] = image_row(job, rows, clamped(y - 1 + i, 0, job.guidance.size[2]));
  }
  multiply_row(job.entry, around, job.guidance.size[1], width, columns, to);
  sine_row(to, columns * width);
  rows.scale_held[slot] = y;
  return to;
}
