// The functions that the library calls for layers of encoders, for pooling and for preparation
// alone.

static int run_layer(const Runtime& runtime, const Layer& layer) {
  LayerJob job{};
  job.layer = layer;
  job.in_width = whole_vectors(layer.inputs);
  job.out_width = whole_vectors(layer.outputs);
  job.row_tasks = layer.row_tasks;
  job.rows_per_task = layer.rows_per_task;
  job.column_tasks = layer.column_tasks;
  const int64_t floats = kLayerStrip * (job.in_width + 2 * job.out_width) + 2 * job.out_width;
  job.worker_bytes = layer.winograd ? winograd_scratch(job, nullptr, nullptr)
                                    : 2 * left_bytes(layer.inputs) + floats * 4;
  job.worker_bytes = (job.worker_bytes + 63) / 64 * 64;
  const int64_t matrices = layer.winograd ? kWinogradMatrices : 1;
  const int64_t right = right_bytes(layer.inputs, job.out_width);
  const int64_t matrix = layer.winograd ? layer.inputs * layer.pitch * 4 : 0;
  job.scratch = static_cast<char*>(
      runtime.allocate(job.worker_bytes * runtime.workers + matrices * right + matrix));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  char* packed = job.scratch + job.worker_bytes * runtime.workers;
  for (int64_t k = 0; k < matrices; ++k) {
    const float* weight = layer.weight;
    if (layer.winograd) {
      float* to = reinterpret_cast<float*>(packed + matrices * right);
      winograd_matrix(layer, k, to);
      weight = to;
    }
    pack_right([&](int64_t row) UPFEAT_LAMBDA { return weight + row * layer.pitch; }, layer.inputs,
               job.out_width, packed + k * right);
  }
  job.right = packed;
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
  LayerJob job{};
  job.layer = layer;
  job.in_width = whole_vectors(layer.inputs);
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
  LayerJob job{};
  job.layer = layer;
  job.in_width = whole_vectors(layer.inputs);
  job.worker_bytes = kLayerStrip * job.in_width * 4;
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(runtime.workers, layer.out->size[0] * layer.out->size[2], prepare_task,
                       &job);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}
