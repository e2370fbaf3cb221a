// 1x1 convolutions in integers (digits.inl). While a strip is multiplied, the pixels of the next
// one are prepared, and the outputs that were multiplied before are written: a few vectors of
// either between products of tiles, which take as long.

#if defined(UPFEAT_PARTS)

// Prepares the pixels of a strip, and writes them as a left operand, 64 channels per step. A
// pixel's digits are written in the last step, as its largest channel must be known.
struct DigitIntake {
  const LayerJob& job;
  int64_t batch;
  float* room;    // for strips that cannot be read in place
  float* values;  // prepared pixels, two by turns
  const float *from, *source;
  int64_t pitch, next, count, channel;
  Strip strip;
  char* left;
  float* scales;
  DigitRow waiting;
  bool alone;  // pixels are prepared by prepare_pixels, one at a time

  UPFEAT_MEMBER void begin(const Strip& given, char* to, float* row_scales) {
    const Layer& layer = job.layer;
    const bool moved = layer.rotate_rows || layer.unit;
    strip = given;
    left = to;
    scales = row_scales;
    next = channel = 0;
    count = given.count;
    from = room;
    pitch = job.in_width;
    alone = moved && is_dense(*layer.x);
    if (layer.kernel != 1) {
      read_windows(job, batch, strip.y, strip.x, strip.count, room);
    } else if (!moved) {
      from = see_pixels(*layer.x, batch, strip.y, strip.x, strip.count, room, job.in_width,
                        &pitch);
    } else if (!alone) {
      prepare_pixels(job, batch, strip.y, strip.x, strip.count, room);
    }
  }
  UPFEAT_MEMBER bool ended() const { return next >= count; }
  // Number of steps of a pixel: one for every 64 channels, and one to write their digits.
  UPFEAT_MEMBER int64_t pieces() const { return digit_blocks(job.layer.inputs) + 1; }

  UPFEAT_APART_MEMBER void step() {
    if (channel == 0) open();
    if (channel < job.in_width) {
      read();
      channel += kDigitBlock;
      return;
    }
    waiting.put(scales + next);
    channel = 0;
    ++next;
  }

 private:
  UPFEAT_MEMBER void open() {
    const int64_t width = job.in_width;
    source = from + next * pitch;
    if (alone) {
      prepare_pixels(job, batch, strip.y, strip.x + next, 1, room);
      source = room;
    } else {
      const float* ahead = source + kLayerStrip * pitch;
      for (int64_t c = 0; c < width; c += 16) __builtin_prefetch(ahead + c, 0, 2);
    }
    float* to = values + (next & 1) * width;
    waiting = {to, width, left + next * kDigitBlock, digit_part(job.layer.inputs),
               _mm512_setzero_si512()};
  }
  UPFEAT_MEMBER void read() {
    const Layer& layer = job.layer;
    float* to = values + (next & 1) * job.in_width;
    if (layer.scale && !layer.rotate_rows && !layer.unit) {
      const float* scale = layer.scale + batch * layer.in_pitch;
      const float* shift = layer.shift + batch * layer.in_pitch;
      const auto norm = [&](int64_t c) UPFEAT_LAMBDA {
        return load(source + c) * load(scale + c) + load(shift + c);
      };
      if (layer.activation == kSilu) {
        keep<kSilu>(to, norm);
      } else if (layer.activation == kRelu) {
        keep<kRelu>(to, norm);
      } else {
        keep<kNoActivation>(to, norm);
      }
    } else {
      keep<kNoActivation>(to, [&](int64_t c) UPFEAT_LAMBDA { return load(source + c); });
    }
  }

  template <Activation kActivation, typename Get>
  UPFEAT_MEMBER void keep(float* to, Get get) {
    const int64_t end = smaller(channel + kDigitBlock, job.in_width);
    if (end == channel + kDigitBlock) {
      waiting.most = keep_some<kActivation, 4>(to, channel, waiting.most, get);
      return;
    }
    for (int64_t c = channel; c < end; c += kLanes) {
      waiting.most = keep_some<kActivation, 1>(to, c, waiting.most, get);
    }
  }
  template <Activation kActivation, int kCount, typename Get>
  UPFEAT_MEMBER __m512i keep_some(float* to, int64_t at, __m512i most, Get get) {
    Vec value[kCount];
    UPFEAT_UNROLL
    for (int i = 0; i < kCount; ++i) value[i] = get(at + i * kLanes);
    activate<kCount>(kActivation, value);
    UPFEAT_UNROLL
    for (int i = 0; i < kCount; ++i) {
      value[i] *= load(job.factors + at + i * kLanes);
      store(to + at + i * kLanes, value[i]);
      most = larger_bits(most, value[i]);
    }
    return most;
  }
};

// Writes the outputs of a strip from its levels, 32 outputs of all pixels at a time.
struct DigitOutlet {
  const LayerJob& job;
  int64_t batch;
  float *room, *other;  // for strips that cannot be written, or whose residual cannot be read
  float* sums;          // (2, out_width) of one strip
  double* totals;       // (2, out_width) of the task
  Strip strip;
  const int32_t* levels;
  const float *scales, *residual;
  float* to;
  int64_t pitch, residual_pitch, first, next;

  UPFEAT_MEMBER bool ended() const { return next >= strip.count; }

  // Begins outputs [n, n + 32) of a strip.
  UPFEAT_MEMBER void begin(const Strip& given, const int32_t* computed, const float* row_scales,
                           int64_t n) {
    strip = given;
    levels = computed;
    scales = row_scales;
    first = n;
    next = 0;
    if (n) return;
    const Layer& layer = job.layer;
    residual = nullptr;
    if (layer.residual) {
      residual = see_pixels(*layer.residual, batch, strip.y, strip.x, strip.count, other,
                            job.out_width, &residual_pitch);
    }
    to = room;
    pitch = job.out_width;
    if (is_dense(*layer.out)) {
      const Row row = row_of(*layer.out, batch, strip.y);
      to = static_cast<float*>(row.at(0, strip.x));
      pitch = row.column_stride;
    }
  }

  // Writes the next four pixels.
  UPFEAT_APART_MEMBER void step() {
    const int64_t end = smaller(next + 4, strip.count);
    if (first + 16 < job.out_width) {
      write<2>(end);
    } else {
      write<1>(end);
    }
    next = end;
    if (ended()) add_sums();
  }

 private:
  template <int kVectors>
  UPFEAT_MEMBER void write(int64_t end) {
    const float* bias = job.layer.bias;
    Vec add[kVectors], unit[kVectors], sum[kVectors], squares[kVectors];
    UPFEAT_UNROLL
    for (int m = 0; m < kVectors; ++m) {
      const int64_t c = first + m * kLanes;
      add[m] = bias ? load(bias + c) : Vec{};
      unit[m] = load(job.columns + c);
      sum[m] = next ? load(sums + c) : Vec{};
      squares[m] = next ? load(sums + job.out_width + c) : Vec{};
    }
    for (int64_t i = next; i < end; ++i) {
      const Vec scale = splat(scales[i]);
      UPFEAT_UNROLL
      for (int m = 0; m < kVectors; ++m) {
        const int64_t c = first + m * kLanes;
        Vec value = level_sum(levels + i * 32 + m * kLanes) * (unit[m] * scale) + add[m];
        if (residual) value += load(residual + i * residual_pitch + c);
        store(to + i * pitch + c, value);
        sum[m] += value;
        squares[m] += value * value;
      }
    }
    UPFEAT_UNROLL
    for (int m = 0; m < kVectors; ++m) {
      store(sums + first + m * kLanes, sum[m]);
      store(sums + job.out_width + first + m * kLanes, squares[m]);
    }
  }

  // Adds the sums to the totals, and writes a strip that was not written in place.
  UPFEAT_MEMBER void add_sums() {
    const int64_t end = smaller(first + 32, job.out_width), width = job.out_width;
    if (job.layer.partial) {
      const auto add = [&](int64_t c) UPFEAT_LAMBDA {
        const __m512d sum = _mm512_cvtps_pd(_mm256_load_ps(sums + c));
        _mm512_store_pd(totals + c, _mm512_add_pd(_mm512_load_pd(totals + c), sum));
      };
      for (int64_t c = first; c < end; c += 8) {
        add(c);
        add(width + c);
      }
    }
    if (end == width && to == room) {
      write_channels_last(row_of(*job.layer.out, batch, strip.y), 0, job.layer.outputs, strip.x,
                          strip.count, room, width, false);
    }
  }
};

struct PointwiseScratch {
  char* left[2];
  int32_t* levels[2];
  float *values, *room, *result, *other, *sums, *scales;
  double* totals;
};

static int64_t pointwise_scratch(const LayerJob& job, char* at, PointwiseScratch* out) {
  int64_t used = 0;
  const auto take = [&](int64_t bytes) {
    char* place = at + used;
    used += (bytes + 63) / 64 * 64;
    return place;
  };
  PointwiseScratch s{};
  for (char*& left : s.left) left = take(digit_left_bytes(job.layer.inputs));
  for (int32_t*& levels : s.levels) {
    levels = reinterpret_cast<int32_t*>(take(kLevels * kLevelPlane * 4));
  }
  const int64_t in = job.in_width * 4, wide = job.out_width * 4;
  s.values = reinterpret_cast<float*>(take(2 * in));
  s.room = reinterpret_cast<float*>(take(kLayerStrip * in));
  s.result = reinterpret_cast<float*>(take(kLayerStrip * wide));
  s.other = reinterpret_cast<float*>(take(kLayerStrip * wide));
  s.sums = reinterpret_cast<float*>(take(2 * wide));
  s.scales = reinterpret_cast<float*>(take(3 * kLayerStrip * 4));
  s.totals = reinterpret_cast<double*>(take(4 * wide));
  if (out) *out = s;
  return used;
}

static void pointwise_task(void* context, int64_t task, int worker) {
  const LayerJob& job = *static_cast<const LayerJob*>(context);
  const Layer& layer = job.layer;
  PointwiseScratch s;
  pointwise_scratch(job, job.scratch + worker * job.worker_bytes, &s);
  zero_totals(job, s.totals);
  const int64_t batch = task / job.row_tasks, first = task % job.row_tasks * job.rows_per_task;
  const int64_t end = smaller(first + job.rows_per_task, layer.out->size[2]);
  const int64_t width = layer.out->size[3], part = digit_part(layer.inputs);
  const int64_t blocks = digit_blocks(layer.inputs), pair = digit_pair_bytes(layer.inputs);
  const int64_t calls = (job.out_width + 31) / 32 * kPauses * blocks;  // of `between`, per strip
  DigitIntake intake{job, batch, s.room, s.values, nullptr, nullptr, 0, 0, 0, 0, {}, nullptr,
                     nullptr, {}, false};
  DigitOutlet outlet{job, batch, s.result, s.other, s.sums, s.totals, {}, nullptr, nullptr,
                     nullptr, nullptr, 0, 0, 0, 0};
  Fetch fetch{nullptr, nullptr};
  dense_begin();
  Strip strip{first, 0, smaller(kLayerStrip, width)};
  intake.begin(strip, s.left[0], s.scales);
  while (!intake.ended()) intake.step();
  int turn = 0;
  for (int64_t index = 0; strip.y < end; ++index) {
    Strip following{strip.y, strip.x + kLayerStrip, 0};
    if (following.x >= width) following = {strip.y + 1, 0, 0};
    following.count = smaller(kLayerStrip, width - following.x);
    int64_t steps = 0, credit = 0;
    fetch.at = fetch.end = nullptr;
    if (following.y < end) {
      intake.begin(following, s.left[(index + 1) & 1], s.scales + (index + 1) % 3 * kLayerStrip);
      steps = following.count * intake.pieces();
      fetch.begin(layer.residual ? *layer.residual : *layer.out, batch, following);
    }
    for (int64_t n = 0; n < job.out_width; n += 32) {
      const char* right = job.right + n / 32 * pair;
      const char* next = n + 32 < job.out_width ? right + pair : job.right;
      multiply_digits(strip.count, n + 16 < job.out_width, s.left[index & 1], part, right, next,
                      blocks, s.levels[turn], [&]() UPFEAT_LAMBDA {
                        credit += steps;
                        if (credit >= calls) {
                          credit -= calls;
                          intake.step();
                        } else if (!outlet.ended()) {
                          outlet.step();
                        }
                        UPFEAT_UNROLL
                        for (int i = 0; i < 2; ++i) fetch.step();
                      });
      while (!outlet.ended()) outlet.step();
      outlet.begin(strip, s.levels[turn], s.scales + index % 3 * kLayerStrip, n);
      turn ^= 1;
    }
    while (steps && !intake.ended()) intake.step();
    strip = following;
  }
  while (!outlet.ended()) outlet.step();
  dense_end();
  add_groups(job, task, s.totals);
}

#endif
