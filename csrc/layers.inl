// The functions that the library calls for layers of encoders, for pooling and for preparation
// alone.

#if defined(UPFEAT_PARTS)

static int64_t layer_scratch(const LayerJob& job) {
  return job.layer.winograd ? winograd_scratch(job, nullptr, nullptr)
                            : pointwise_scratch(job, nullptr, nullptr);
}
static int64_t layer_right_bytes(const LayerJob& job) {
  return digit_right_bytes(job.layer.inputs, job.out_width);
}
// Floats that are kept behind the packed weights: powers of two of inputs, factors of columns, and
// their inverses; and floats that packing needs: the transformed matrices.
static int64_t layer_floats(const LayerJob& job) { return 2 * job.in_width + 2 * job.out_width; }
static int64_t packing_floats(const LayerJob& job) {
  return job.layer.winograd ? kWinogradMatrices * winograd_step(job.layer) : 0;
}
static void place_factors(LayerJob& job, const float* floats) {
  job.factors = floats;
  job.columns = floats + 2 * job.in_width;
}

// Chooses the factors of inputs and columns, and packs the weights. weights(k, i) returns the
// outputs of input i in matrix k.
template <typename Weights>
static void pack_weights(const LayerJob& job, int64_t matrices, Weights weights, char* packed,
                         float* floats) {
  const int64_t inputs = job.layer.inputs, width = job.out_width;
  float *factors = floats, *inverses = factors + job.in_width, *columns = inverses + job.in_width;
  float* inverse_columns = columns + width;
  float most = 0;
  for (int64_t i = 0; i < inputs; ++i) {
    Vec peak = {};
    for (int64_t k = 0; k < matrices; ++k) {
      const float* row = weights(k, i);
      for (int64_t n = 0; n < width; n += kLanes) {
        const Vec weight = load(row + n);
        peak = max(max(weight, -weight), peak);
      }
    }
    // The power of two below the peak.
    factors[i] = bits_float(float_bits(most_of(peak)[0]) & 0x7f800000u);
    most = factors[i] > most ? factors[i] : most;
  }
  if (!(most >= 1e-30f && most <= 1e30f)) most = 1;
  for (int64_t i = 0; i < job.in_width; ++i) {
    const float share = i < inputs ? factors[i] / most : 1;
    factors[i] = share >= 0x1p-60f && share <= 1 ? share : 1;
    inverses[i] = 1 / factors[i];
  }
  for (int64_t n = 0; n < width; n += kLanes) {
    Vec peak = {}, bad = {};
    for (int64_t k = 0; k < matrices; ++k) {
      for (int64_t i = 0; i < inputs; ++i) {
        const Vec weight = load(weights(k, i) + n) * inverses[i];
        peak = max(max(weight, -weight), peak);
        bad += weight * 0.0f;  // NaN if a weight is not finite
      }
    }
    // As for rows (DigitRow), zeros alone have the scale of 1.
    peak = select(peak > 0.0f, max(splat(1e-30f), peak), splat(1.0f));
    store(inverse_columns + n, kLargest / peak);
    store(columns + n, peak * (kLevelUnit / kLargest) + bad);
  }
  for (int64_t k = 0; k < matrices; ++k) {
    pack_digits([&](int64_t i) UPFEAT_LAMBDA { return weights(k, i); }, inputs, width, inverses,
                inverse_columns, packed + k * layer_right_bytes(job));
  }
}

static void pack_weights(const LayerJob& job, char* packed, float* floats, float* transformed) {
  const Layer& layer = job.layer;
  if (!layer.winograd) {
    pack_weights(job, 1, [&](int64_t, int64_t i) UPFEAT_LAMBDA {
      return layer.weight + i * layer.pitch;
    }, packed, floats);
    return;
  }
  const int64_t step = winograd_step(layer);
  winograd_matrices(layer, job.out_width, step, [&](int64_t i, int64_t n) UPFEAT_LAMBDA {
    return transformed + i * layer.pitch + n;
  });
  pack_weights(job, kWinogradMatrices, [&](int64_t k, int64_t i) UPFEAT_LAMBDA {
    return transformed + k * step + i * layer.pitch;
  }, packed, floats);
}

#else

static int64_t layer_scratch(const LayerJob& job) {
  const int64_t floats = kLayerStrip * (job.in_width + 2 * job.out_width) + 6 * job.out_width;
  return job.layer.winograd ? winograd_scratch(job, nullptr, nullptr) : floats * 4;
}
static int64_t layer_right_bytes(const LayerJob& job) {
  return right_bytes(job.layer.inputs, job.out_width);
}
static int64_t layer_floats(const LayerJob&) { return 0; }
static int64_t packing_floats(const LayerJob&) { return 0; }
static void place_factors(LayerJob&, const float*) {}
static void pack_weights(const LayerJob& job, char* packed, float*, float*) {
  const Layer& layer = job.layer;
  const int64_t inputs = layer.inputs, width = job.out_width;
  if (layer.winograd) {
    winograd_matrices(layer, width, right_bytes(inputs, width) / 4,
                      [&](int64_t i, int64_t n) UPFEAT_LAMBDA {
                        return right_place(packed, inputs, width, i, n);
                      });
  } else {
    pack_right([&](int64_t i) UPFEAT_LAMBDA { return layer.weight + i * layer.pitch; }, inputs,
               width, packed);
  }
}

#endif

static LayerJob job_of(const Layer& layer) {
  LayerJob job{};
  job.layer = layer;
  job.in_width = whole_vectors(layer.inputs);
  job.out_width = whole_vectors(layer.outputs);
  return job;
}

static int64_t floats_offset(const LayerJob& job) {
  const int64_t matrices = job.layer.winograd ? kWinogradMatrices : 1;
  return (layer_right_bytes(job) * matrices + 63) / 64 * 64;
}

static int64_t packed_bytes(const Layer& layer) {
  const LayerJob job = job_of(layer);
  return floats_offset(job) + layer_floats(job) * 4;
}

static int pack_layer(const Runtime& runtime, const Layer& layer, char* packed) {
  const LayerJob job = job_of(layer);
  float* transformed = static_cast<float*>(runtime.allocate(packing_floats(job) * 4));
  if (!transformed) return UPFEAT_NO_MEMORY;
  pack_weights(job, packed, reinterpret_cast<float*>(packed + floats_offset(job)), transformed);
  runtime.release(transformed);
  return UPFEAT_OK;
}

static int run_layer(const Runtime& runtime, const Layer& layer) {
  LayerJob job = job_of(layer);
  job.row_tasks = layer.row_tasks;
  job.rows_per_task = layer.rows_per_task;
  job.column_tasks = layer.column_tasks;
  job.worker_bytes = (layer_scratch(job) + 63) / 64 * 64;
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  job.right = layer.packed;
  place_factors(job, reinterpret_cast<const float*>(layer.packed + floats_offset(job)));
  const int64_t tasks = layer.out->size[0] * layer.row_tasks * layer.column_tasks;
  runtime.parallel_for(runtime.workers, tasks, layer.winograd ? winograd_task : pointwise_task,
                       &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}

// Averages prepared pixels over the cells of a grid. A task is one row of the grid.
static void pool_task(void* context, int64_t task, int worker) {
  const LayerJob& job = *static_cast<const LayerJob*>(context);
  const Layer& layer = job.layer;
  const UpfeatTensor &image = *layer.x, &out = *layer.out;
  float* pixels = reinterpret_cast<float*>(job.scratch + worker * job.worker_bytes);
  float* sums = pixels + kLayerStrip * job.in_width;  // (columns, in_width)
  const int64_t width = job.in_width, batch = task / out.size[2], row = task % out.size[2];
  const int64_t height = image.size[2], columns = out.size[3];
  const int64_t first = row * height / out.size[2];
  const int64_t end = ((row + 1) * height + out.size[2] - 1) / out.size[2];
  for (int64_t i = 0; i < columns * width; ++i) sums[i] = 0;
  for (int64_t y = first; y < end; ++y) {
    for (int64_t cell = 0; cell < columns; ++cell) {
      const int64_t left = cell * image.size[3] / columns;
      const int64_t right = ((cell + 1) * image.size[3] + columns - 1) / columns;
      for (int64_t x = left; x < right; x += kLayerStrip) {
        const int64_t count = smaller(kLayerStrip, right - x);
        prepare_pixels(job, batch, y, x, count, pixels);
        for (int64_t c = 0; c < width; c += kLanes) {
          Vec sum = load(sums + cell * width + c);
          for (int64_t i = 0; i < count; ++i) sum += load(pixels + i * width + c);
          store(sums + cell * width + c, sum);
        }
      }
    }
  }
  for (int64_t cell = 0; cell < columns; ++cell) {
    const int64_t left = cell * image.size[3] / columns;
    const int64_t right = ((cell + 1) * image.size[3] + columns - 1) / columns;
    const float share = 1.0f / static_cast<float>((end - first) * (right - left));
    for (int64_t c = 0; c < width; ++c) sums[cell * width + c] *= share;
  }
  write_channels_last(row_of(out, batch, row), 0, layer.inputs, 0, columns, sums, width, false);
}

static int pool_layer(const Runtime& runtime, const Layer& layer) {
  LayerJob job = job_of(layer);
  job.worker_bytes = (kLayerStrip + layer.out->size[3]) * job.in_width * 4;
  job.worker_bytes = (job.worker_bytes + 63) / 64 * 64;
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(runtime.workers, layer.out->size[0] * layer.out->size[2], pool_task, &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}

// Prepares pixels and writes them without a convolution, for instance to rotate them.
static void prepare_task(void* context, int64_t task, int worker) {
  const LayerJob& job = *static_cast<const LayerJob*>(context);
  const Layer& layer = job.layer;
  float* pixels = reinterpret_cast<float*>(job.scratch + worker * job.worker_bytes);
  const int64_t height = layer.out->size[2], width = layer.out->size[3];
  const int64_t batch = task / height, y = task % height;
  for (int64_t x = 0; x < width; x += kLayerStrip) {
    const int64_t count = smaller(kLayerStrip, width - x);
    prepare_pixels(job, batch, y, x, count, pixels);
    write_channels_last(row_of(*layer.out, batch, y), 0, layer.inputs, x, count, pixels,
                        job.in_width, false);
  }
}

static int prepare_layer(const Runtime& runtime, const Layer& layer) {
  LayerJob job = job_of(layer);
  job.worker_bytes = kLayerStrip * job.in_width * 4;
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(runtime.workers, layer.out->size[0] * layer.out->size[2], prepare_task,
                       &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}
