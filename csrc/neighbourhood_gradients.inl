// Gradients of weights over the cells around a pixel, and the weights of an output of fewer pixels
// than cells: products are computed with the code for the gradient of the weights, with queries in
// place of the gradient and keys in place of the features.

struct AttentionJob {
  GradientJob products;  // grad: the queries; coarse: the keys; weights: the tensor to write
  UpfeatTensor grad;     // gradient of the weights; backward only
  const Attention* attention;
  double* partial;  // (B * groups, 2): d/d temperature and d/d sigma of each pair of rows
};

struct TilePlace {
  const float* down[2];  // squared distances of rows, (taps, pitch), for both rows of the tile
  const float* across;   // squared distances of columns, (taps, pitch)
  int64_t side, down_pitch, across_pitch;
};

UPFEAT_INLINE TilePlace tile_place(const Axis& rows, const Axis& columns, int64_t group,
                                   int64_t tile) {
  // The second row of the last pair may be outside the output: its distances do not matter.
  const int64_t below = smaller(2 * group + 1, rows.out - 1);
  return TilePlace{{rows.away + 2 * group, rows.away + below},
                   columns.away + tile * kTile,
                   rows.taps,
                   rows.tiles * kTile,
                   columns.tiles * kTile};
}

// Squared distances from the pixels of vector v of a tile to their tap k.
UPFEAT_INLINE Vec distance_of(const TilePlace& place, int v, int64_t k) {
  const float* down = place.down[v / kRowVecs] + k / place.side * place.down_pitch;
  const float* across = place.across + k % place.side * place.across_pitch;
  return load(across + v % kRowVecs * kLanes) + *down;
}

// Turns the key products of vector v into weights. `weights` may be `products`.
UPFEAT_INLINE void softmax_vector(const Attention& attention, const TilePlace& place, int v,
                                  const float* products, float* weights) {
  const float temperature = static_cast<float>(attention.temperature);
  const float fall = static_cast<float>(0.5 / (attention.sigma * attention.sigma));
  const int64_t taps = place.side * place.side;
  Vec top = splat(-3.4e38f), sum = {};
  for (int64_t k = 0; k < taps; ++k) {
    const Vec product = load(products + k * kTilePixels);
    const Vec logit = product * temperature - distance_of(place, v, k) * fall;
    store(weights + k * kTilePixels, logit);
    top = max(top, logit);
    sum += product * 0.0f;  // adds 0, or NaN, which max and exp would lose
  }
  for (int64_t k = 0; k < taps; ++k) {
    // Cells out of reach have no weight, even if all others are far away.
    const Vec e = select(distance_of(place, v, k) < splat(kOutOfReach),
                         falling_exp(load(weights + k * kTilePixels) - top), Vec{});
    store(weights + k * kTilePixels, e);
    sum += e;
  }
  const Vec scale = 1.0f / sum;
  for (int64_t k = 0; k < taps; ++k) {
    store(weights + k * kTilePixels, load(weights + k * kTilePixels) * scale);
  }
}

static void shrinking_task(void* context, int64_t task, int worker) {
  const AttentionJob& whole = *static_cast<AttentionJob*>(context);
  const GradientJob& job = whole.products;
  const int64_t batch = task / job.chunks.count, chunk = task % job.chunks.count;
  Products products = place_products(job, job.scratch + worker * job.worker_bytes);
  start_coarse(products.coarse, batch);
  const int64_t end = smaller((chunk + 1) * job.chunks.size, job.rows->groups);
  for (int64_t group = chunk * job.chunks.size; group < end; ++group) {
    for (int64_t tile = 0; tile < job.columns->tiles; ++tile) {
      make_products(job, products, batch, group, tile);
      const TilePlace place = tile_place(*job.rows, *job.columns, group, tile);
      for (int v = 0; v < kTileVecs; ++v) {
        float* at = products.taps + v * kLanes;
        softmax_vector(*whole.attention, place, v, at, at);
      }
      write_tile(job.weights, batch, 2 * group, tile * kTile, products.taps);
    }
  }
}

// Replaces a tile's key products by their gradients, computed from the gradient of the weights, and
// adds the tile's terms of the gradients of temperature and sigma to `partial`.
static void attend_tile_backward(const Attention& attention, const TilePlace& place,
                                 float* products, const float* grad, float* weights,
                                 double* partial) {
  const float temperature = static_cast<float>(attention.temperature);
  const double cubed = attention.sigma * attention.sigma * attention.sigma;
  const int64_t taps = place.side * place.side;
  for (int v = 0; v < kTileVecs; ++v) {
    float* product = products + v * kLanes;
    const float* g = grad + v * kLanes;
    softmax_vector(attention, place, v, product, weights);
    Vec mean = {};
    for (int64_t k = 0; k < taps; ++k) {
      mean += load(weights + k * kTilePixels) * load(g + k * kTilePixels);
    }
    Vec by_temperature = {}, by_distance = {};
    for (int64_t k = 0; k < taps; ++k) {
      const Vec logit = load(weights + k * kTilePixels) * (load(g + k * kTilePixels) - mean);
      by_temperature += logit * load(product + k * kTilePixels);
      // For a cell out of reach the weight is 0, and so is this term.
      by_distance += logit * distance_of(place, v, k);
      store(product + k * kTilePixels, logit * temperature);
    }
    partial[0] += static_cast<double>(lane_sum(by_temperature));
    partial[1] += static_cast<double>(lane_sum(by_distance)) / cubed;
  }
}

static void grad_attend_task(void* context, int64_t task, int worker) {
  const AttentionJob& whole = *static_cast<AttentionJob*>(context);
  const GradientJob& job = whole.products;
  const int64_t batch = task / job.chunks.count, chunk = task % job.chunks.count;
  char* at = job.scratch + worker * job.worker_bytes;
  Products products = place_products(job, at);
  float* grad = reinterpret_cast<float*>(at + products_bytes(job));
  float* weights = grad + whole.grad.size[1] * kTilePixels;
  start_coarse(products.coarse, batch);
  const int64_t end = smaller((chunk + 1) * job.chunks.size, job.rows->groups);
  for (int64_t group = chunk * job.chunks.size; group < end; ++group) {
    double* partial = whole.partial + 2 * (batch * job.rows->groups + group);
    partial[0] = partial[1] = 0;
    for (int64_t tile = 0; tile < job.columns->tiles; ++tile) {
      make_products(job, products, batch, group, tile);
      read_tile(whole.grad, batch, 2 * group, tile * kTile, grad);
      attend_tile_backward(*whole.attention, tile_place(*job.rows, *job.columns, group, tile),
                           products.taps, grad, weights, partial);
      write_tile(job.weights, batch, 2 * group, tile * kTile, products.taps);
    }
  }
}

static AttentionJob attention_job(const Runtime& runtime, const Attention& attention,
                                  const UpfeatTensor& weights, const Axis& rows,
                                  const Axis& columns) {
  AttentionJob whole{};
  GradientJob& job = whole.products;
  job.rows = &rows;
  job.columns = &columns;
  job.grad = *attention.queries;
  job.weights = weights;
  job.coarse = coarse_rows(*attention.keys, rows.window);
  job.chunks = chunks_of(rows.groups, runtime.workers, weights.size[0], job.coarse.direct ? 4 : 2);
  job.worker_bytes = products_bytes(job);
  whole.attention = &attention;
  return whole;
}

static int attend_shrinking(const Runtime& runtime, const Attention& attention,
                            const UpfeatTensor& weights, const Axis& rows, const Axis& columns) {
  AttentionJob whole = attention_job(runtime, attention, weights, rows, columns);
  GradientJob& job = whole.products;
  const int64_t tasks = job.chunks.count * weights.size[0];
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  if (!job.scratch) return UPFEAT_NO_MEMORY;
  runtime.parallel_for(runtime.workers, tasks, shrinking_task, &whole);
  runtime.release(job.scratch);
  return UPFEAT_OK;
}

// The gradient of the products is stored at full size between two passes. With it as weights, the
// gradient of the queries is a weighted sum over keys, and the gradient of the keys is one over
// queries.
static int grad_attend(const Runtime& runtime, const Attention& attention, const UpfeatTensor& grad,
                       const UpfeatTensor& grad_queries, const UpfeatTensor& grad_keys,
                       double* scalars, const Axis& rows, const Axis& columns) {
  UpfeatTensor kept = grad;
  kept.dtype = UPFEAT_FLOAT32;
  kept.stride[3] = 1;
  for (int i = 2; i >= 0; --i) kept.stride[i] = kept.stride[i + 1] * kept.size[i + 1];
  kept.data = runtime.allocate(kept.stride[0] * kept.size[0] * 4);
  AttentionJob whole = attention_job(runtime, attention, kept, rows, columns);
  GradientJob& job = whole.products;
  whole.grad = grad;
  job.worker_bytes += 2 * grad.size[1] * kTilePixels * 4;
  job.scratch = static_cast<char*>(runtime.allocate(job.worker_bytes * runtime.workers));
  const int64_t pairs = grad.size[0] * rows.groups;
  whole.partial = static_cast<double*>(runtime.allocate(pairs * 16));
  int status = UPFEAT_NO_MEMORY;
  if (kept.data && job.scratch && whole.partial) {
    runtime.parallel_for(runtime.workers, job.chunks.count * grad.size[0], grad_attend_task,
                         &whole);
    scalars[0] = scalars[1] = 0;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      scalars[0] += whole.partial[2 * pair];
      scalars[1] += whole.partial[2 * pair + 1];
    }
    WeightSource source;
    source.weights = &kept;
    source.radius = rows.taps / 2;
    status = upsample(runtime, *attention.keys, source, grad_queries, rows, columns);
    if (status == UPFEAT_OK) {
      status = grad_features(runtime, kept, *attention.queries, grad_keys, rows, columns);
    }
  }
  runtime.release(kept.data);
  runtime.release(job.scratch);
  runtime.release(whole.partial);
  return status;
}
