// The C interface: checks shapes, builds the tables, calls the kernels. Calls that pass the checks
// read and write only inside their tensors.
#include "axis.h"
#include "checks.h"
#include "plan.h"
#include "runtime.h"
#include "upfeat.h"

namespace upfeat {
namespace {

// True if a window of this radius has tensor.size[1] taps; also bounds the radius.
bool has_taps(const UpfeatTensor& tensor, int64_t radius) {
  return radius >= 0 && radius < 32768 && tensor.size[1] == (2 * radius + 1) * (2 * radius + 1);
}

enum class Kind { kBicubic, kPadded, kCells };

// The mapping from fine pixels to the coarse cells that they read.
struct Mode {
  Kind kind;
  UpfeatWindow window;  // kCells only
};

const Mode kBicubic{Kind::kBicubic, {}}, kPadded{Kind::kPadded, {}};

bool fits(const UpfeatWindow& in, int64_t height, int64_t width, const UpfeatTensor& coarse) {
  return lies_in(in.top, height, in.height) && lies_in(in.left, width, in.width) &&
         lies_in(in.grid_top, coarse.size[2], in.grid_height) &&
         lies_in(in.grid_left, coarse.size[3], in.grid_width);
}

// True if the sizes of the coarse tensor and of the weights, (H, W), fit together in this mode.
bool sizes_fit(const UpfeatTensor& coarse, const UpfeatTensor& weights, int64_t radius,
               const Mode& mode) {
  const int64_t height = weights.size[2], width = weights.size[3];
  if (!has_taps(weights, radius) || coarse.size[0] != weights.size[0]) return false;
  if (mode.kind == Kind::kCells) {
    return coarse.size[2] >= 1 && coarse.size[3] >= 1 && fits(mode.window, height, width, coarse);
  }
  if (mode.kind == Kind::kPadded) {
    return coarse.size[2] == height + 2 * radius && coarse.size[3] == width + 2 * radius;
  }
  return coarse.size[2] >= 1 && coarse.size[3] >= 1 && height >= coarse.size[2] &&
         width >= coarse.size[3];
}

struct Axes {
  Axis rows, columns;

  bool build(const UpfeatTensor& coarse, int64_t height, int64_t width, int64_t radius,
             const Mode& mode) {
    const UpfeatWindow& in = mode.window;
    if (mode.kind == Kind::kCells) {
      return cells_axis(rows, {coarse.size[2], in.grid_height, in.grid_top}, in.height, in.top,
                        height, radius) &&
             cells_axis(columns, {coarse.size[3], in.grid_width, in.grid_left}, in.width, in.left,
                        width, radius);
    }
    if (mode.kind == Kind::kPadded) {
      return padded_axis(rows, height, radius) && padded_axis(columns, width, radius);
    }
    return bicubic_axis(rows, coarse.size[2], height, radius) &&
           bicubic_axis(columns, coarse.size[3], width, radius);
  }
  ~Axes() {
    free_axis(rows);
    free_axis(columns);
  }
};

int forward(const UpfeatTensor* features, const WeightSource& source, const UpfeatTensor& weights,
            const UpfeatTensor* out, const Mode& mode, int isa, int threads) {
  const int64_t height = weights.size[2], width = weights.size[3];
  if (!all_valid({features, out})) return UPFEAT_BAD_ARGUMENT;
  if (!sized(*out, weights.size[0], features->size[1], height, width)) return UPFEAT_BAD_ARGUMENT;
  if (is_empty(*out)) return UPFEAT_OK;
  if (!sizes_fit(*features, weights, source.radius, mode)) return UPFEAT_BAD_ARGUMENT;
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  Axes axes;
  if (!axes.build(*features, height, width, source.radius, mode)) return UPFEAT_NO_MEMORY;
  prepare_output(*out, threads);
  double work = elements(*out) * static_cast<double>(axes.rows.window * axes.columns.window);
  if (source.guidance) work += elements(weights) * static_cast<double>(weights.size[1]);
  return kernels->upsample(runtime_for(threads, work), *features, source, *out, axes.rows,
                           axes.columns);
}

int backward(const UpfeatTensor* features, const UpfeatTensor* weights, const UpfeatTensor* grad,
             const UpfeatTensor* grad_features, const UpfeatTensor* grad_weights, int64_t radius,
             const Mode& mode, int isa, int threads) {
  if (!all_valid({features, weights, grad})) return UPFEAT_BAD_ARGUMENT;
  if (grad_features && !valid(grad_features)) return UPFEAT_BAD_ARGUMENT;
  if (grad_weights && !valid(grad_weights)) return UPFEAT_BAD_ARGUMENT;
  const int64_t *f = features->size, *w = weights->size;
  if (!sizes_fit(*features, *weights, radius, mode)) return UPFEAT_BAD_ARGUMENT;
  if (!sized(*grad, w[0], f[1], w[2], w[3])) return UPFEAT_BAD_ARGUMENT;
  if (grad_features && !sized(*grad_features, f[0], f[1], f[2], f[3])) return UPFEAT_BAD_ARGUMENT;
  if (grad_weights && !sized(*grad_weights, w[0], w[1], w[2], w[3])) return UPFEAT_BAD_ARGUMENT;
  if (is_empty(*grad)) return UPFEAT_OK;
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  Axes axes;
  if (!axes.build(*features, w[2], w[3], radius, mode)) return UPFEAT_NO_MEMORY;
  const double work = elements(*grad) * static_cast<double>(axes.rows.window * axes.columns.window);
  const Runtime runtime = runtime_for(threads, work);
  int status = UPFEAT_OK;
  if (grad_features) {
    status =
        kernels->grad_features(runtime, *weights, *grad, *grad_features, axes.rows, axes.columns);
  }
  if (grad_weights && status == UPFEAT_OK) {
    prepare_output(*grad_weights, threads);
    status =
        kernels->grad_weights(runtime, *features, *grad, *grad_weights, axes.rows, axes.columns);
  }
  return status;
}

// True if weights have the batch, height and width of `image` (keys or guidance).
bool image_fits(const UpfeatTensor& image, const UpfeatTensor& weights, int64_t radius) {
  return has_taps(weights, radius) && image.size[0] == weights.size[0] &&
         image.size[2] == weights.size[2] && image.size[3] == weights.size[3];
}

int make_weights(const WeightSource& source, const UpfeatTensor& image, const UpfeatTensor* weights,
                 int isa, int threads) {
  if (!all_valid({&image, weights}) || !image_fits(image, *weights, source.radius)) {
    return UPFEAT_BAD_ARGUMENT;
  }
  if (is_empty(*weights)) return UPFEAT_OK;
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  prepare_output(*weights, threads);
  const double depth = static_cast<double>(source.stage ? weights->size[1] : image.size[1]);
  return kernels->make_weights(runtime_for(threads, elements(*weights) * (depth + 16)), source,
                               *weights);
}

// True if the output has no fewer pixels than cells, which kernels by tiles require: they process
// each cell of a tile's pixels once.
bool enlarges(const UpfeatWindow& in) {
  return in.height >= in.grid_height && in.width >= in.grid_width;
}

// Computes weights, or sums and means with weights of which only one tile at a time is in memory.
int attend(const Neighbourhood& what, const UpfeatWindow& in, int64_t radius, int isa,
           int threads) {
  const UpfeatTensor &queries = *what.attention.queries, &keys = *what.attention.keys;
  UpfeatTensor weights = queries;  // only the sizes are read
  weights.size[1] = (2 * radius + 1) * (2 * radius + 1);
  const Mode mode{Kind::kCells, in};
  if (!queries.size[1] || queries.size[1] != keys.size[1] ||
      !sizes_fit(keys, weights, radius, mode)) {
    return UPFEAT_BAD_ARGUMENT;
  }
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  Axes axes;
  if (!axes.build(keys, weights.size[2], weights.size[3], radius, mode)) return UPFEAT_NO_MEMORY;
  double work = elements(weights) * static_cast<double>(queries.size[1] + 16);
  if (what.out) {
    work += elements(*what.out) * static_cast<double>(weights.size[1]);
    prepare_output(*what.out, threads);
  }
  if (what.weights) prepare_output(*what.weights, threads);
  const Runtime runtime = runtime_for(threads, work);
  if (enlarges(in)) return kernels->attend(runtime, what, axes.rows, axes.columns);
  if (what.out || what.means) return UPFEAT_BAD_ARGUMENT;
  return kernels->attend_shrinking(runtime, what.attention, *what.weights, axes.rows, axes.columns);
}

int grad_attend(const Attention& attention, const UpfeatTensor* weights, const Mode& mode,
                int64_t radius, const UpfeatTensor* grad_queries, const UpfeatTensor* grad_keys,
                double* grad_scalars, int isa, int threads) {
  if (!all_valid({attention.queries, attention.keys, weights})) return UPFEAT_BAD_ARGUMENT;
  const int64_t *q = attention.queries->size, *k = attention.keys->size;
  if (radius < 1 || q[1] != k[1] || !sizes_fit(*attention.keys, *weights, radius, mode) ||
      !sized(*attention.queries, weights->size[0], k[1], weights->size[2], weights->size[3])) {
    return UPFEAT_BAD_ARGUMENT;
  }
  if (is_empty(*weights)) return UPFEAT_OK;
  if (!q[1]) return UPFEAT_BAD_ARGUMENT;
  if (!all_valid({grad_queries, grad_keys}) || !sized(*grad_queries, q[0], q[1], q[2], q[3]) ||
      !sized(*grad_keys, k[0], k[1], k[2], k[3])) {
    return UPFEAT_BAD_ARGUMENT;
  }
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  Axes axes;
  if (!axes.build(*attention.keys, q[2], q[3], radius, mode)) return UPFEAT_NO_MEMORY;
  const Runtime runtime = runtime_for(threads, elements(*weights) * static_cast<double>(q[1] + 16));
  return kernels->grad_attend(runtime, attention, *weights, *grad_queries, *grad_keys,
                              grad_scalars, axes.rows, axes.columns);
}

// Number of cells, along one axis, that contain the pixels of a window.
int64_t cells_across(int64_t start, int64_t count, int64_t length, int64_t cells) {
  const auto own = [&](int64_t at) { return (2 * at + 1) * cells / (2 * length); };
  return own(start + count - 1) + 1 - own(start);
}

WeightSource given(const UpfeatTensor* weights, int64_t radius) {
  WeightSource source;
  source.weights = weights;
  source.radius = radius;
  return source;
}

WeightSource bilateral(const UpfeatTensor* keys, int64_t radius, double temperature, double sigma) {
  WeightSource source;
  source.keys = keys;
  source.radius = radius;
  source.temperature = temperature;
  source.sigma_spatial = sigma;
  return source;
}

WeightSource staged(const UpfeatTensor* guidance, const UpfeatStage* stage, int64_t radius) {
  WeightSource source = bilateral(nullptr, radius, stage->temperature, stage->sigma_spatial);
  source.guidance = guidance;
  source.stage = stage;
  return source;
}

}  // namespace
}  // namespace upfeat

using namespace upfeat;

extern "C" {

int upfeat_abi(void) { return UPFEAT_ABI; }
const char* upfeat_identity(void) { return UPFEAT_IDENTITY; }

int upfeat_jbu_forward(const UpfeatTensor* features, const UpfeatTensor* weights,
                       const UpfeatTensor* out, int64_t radius, int isa, int threads) {
  if (!valid(weights)) return UPFEAT_BAD_ARGUMENT;
  return guarded([&] {
    return forward(features, given(weights, radius), *weights, out, kBicubic, isa, threads);
  });
}

int upfeat_jbu_backward(const UpfeatTensor* features, const UpfeatTensor* weights,
                        const UpfeatTensor* grad, const UpfeatTensor* grad_features,
                        const UpfeatTensor* grad_weights, int64_t radius, int isa, int threads) {
  return guarded([&] {
    return backward(features, weights, grad, grad_features, grad_weights, radius, kBicubic, isa,
                    threads);
  });
}

int upfeat_conv_forward(const UpfeatTensor* padded, const UpfeatTensor* weights,
                        const UpfeatTensor* out, int64_t radius, int isa, int threads) {
  if (!valid(weights)) return UPFEAT_BAD_ARGUMENT;
  return guarded([&] {
    return forward(padded, given(weights, radius), *weights, out, kPadded, isa, threads);
  });
}

int upfeat_conv_backward(const UpfeatTensor* padded, const UpfeatTensor* weights,
                         const UpfeatTensor* grad, const UpfeatTensor* grad_padded,
                         const UpfeatTensor* grad_weights, int64_t radius, int isa, int threads) {
  return guarded([&] {
    return backward(padded, weights, grad, grad_padded, grad_weights, radius, kPadded, isa,
                    threads);
  });
}

int upfeat_neighbourhood_forward(const UpfeatTensor* features, const UpfeatTensor* weights,
                                 const UpfeatTensor* out, const UpfeatWindow* window,
                                 int64_t radius, int isa, int threads) {
  if (!valid(weights) || !window) return UPFEAT_BAD_ARGUMENT;
  return guarded([&] {
    return forward(features, given(weights, radius), *weights, out, Mode{Kind::kCells, *window},
                   isa, threads);
  });
}

int upfeat_neighbourhood_backward(const UpfeatTensor* features, const UpfeatTensor* weights,
                                  const UpfeatTensor* grad, const UpfeatTensor* grad_features,
                                  const UpfeatTensor* grad_weights, const UpfeatWindow* window,
                                  int64_t radius, int isa, int threads) {
  if (!window) return UPFEAT_BAD_ARGUMENT;
  return guarded([&] {
    return backward(features, weights, grad, grad_features, grad_weights, radius,
                    Mode{Kind::kCells, *window}, isa, threads);
  });
}

// Returns whether there are no lengths, or one for each pixel of the queries.
static bool fits_pixels(const UpfeatTensor* lengths, const UpfeatTensor& queries) {
  const int64_t* q = queries.size;
  return !lengths || (all_valid({lengths}) && sized(*lengths, q[0], 1, q[2], q[3]));
}

int upfeat_attend_forward(const UpfeatTensor* queries, const UpfeatTensor* keys,
                          const UpfeatTensor* weights, const UpfeatWindow* window, int64_t radius,
                          double temperature, double sigma, int isa, int threads) {
  if (!window || !all_valid({queries, keys, weights})) return UPFEAT_BAD_ARGUMENT;
  const int64_t* q = queries->size;
  if (radius < 1 || !has_taps(*weights, radius) ||
      !sized(*weights, q[0], weights->size[1], q[2], q[3])) {
    return UPFEAT_BAD_ARGUMENT;
  }
  if (is_empty(*weights)) return UPFEAT_OK;
  return guarded([&] {
    return attend({{queries, keys, temperature, sigma}, weights, nullptr, nullptr, nullptr},
                  *window, radius, isa, threads);
  });
}

int upfeat_attend_means(const UpfeatTensor* queries, const UpfeatTensor* keys,
                        const UpfeatTensor* lengths, const UpfeatTensor* means,
                        const UpfeatWindow* window, int64_t radius, double temperature,
                        double sigma, int isa, int threads) {
  if (!window || !all_valid({queries, keys, means}) || radius < 1 || !has_taps(*means, radius)) {
    return UPFEAT_BAD_ARGUMENT;
  }
  const int64_t* q = queries->size;
  if (is_empty(*means)) return UPFEAT_OK;
  if (is_empty(*queries) || !fits(*window, q[2], q[3], *keys) || !enlarges(*window) ||
      !sized(*means, q[0], means->size[1],
             cells_across(window->top, q[2], window->height, window->grid_height),
             cells_across(window->left, q[3], window->width, window->grid_width)) ||
      !fits_pixels(lengths, *queries)) {
    return UPFEAT_BAD_ARGUMENT;
  }
  return guarded([&] {
    return attend({{queries, keys, temperature, sigma, lengths}, nullptr, means, nullptr, nullptr},
                  *window, radius, isa, threads);
  });
}

int upfeat_attend_sum(const UpfeatTensor* features, const UpfeatTensor* queries,
                      const UpfeatTensor* keys, const UpfeatTensor* lengths,
                      const UpfeatTensor* out, const UpfeatWindow* window, int64_t radius,
                      double temperature, double sigma, int isa, int threads) {
  if (!window || !all_valid({features, queries, keys, out}) || radius < 1) {
    return UPFEAT_BAD_ARGUMENT;
  }
  const int64_t *q = queries->size, *k = keys->size;
  if (radius >= 32768 || !sized(*out, q[0], features->size[1], q[2], q[3])) {
    return UPFEAT_BAD_ARGUMENT;
  }
  if (is_empty(*out)) return UPFEAT_OK;
  if (!sized(*features, k[0], features->size[1], k[2], k[3]) || !fits_pixels(lengths, *queries)) {
    return UPFEAT_BAD_ARGUMENT;
  }
  return guarded([&] {
    return attend({{queries, keys, temperature, sigma, lengths}, nullptr, nullptr, features, out},
                  *window, radius, isa, threads);
  });
}

int upfeat_attend_backward(const UpfeatTensor* queries, const UpfeatTensor* keys,
                           const UpfeatTensor* grad, const UpfeatTensor* grad_queries,
                           const UpfeatTensor* grad_keys, double* grad_scalars,
                           const UpfeatWindow* window, int64_t radius, double temperature,
                           double sigma, int isa, int threads) {
  if (!window || !grad_scalars) return UPFEAT_BAD_ARGUMENT;
  grad_scalars[0] = grad_scalars[1] = 0;
  return guarded([&] {
    return grad_attend({queries, keys, temperature, sigma}, grad, Mode{Kind::kCells, *window},
                       radius, grad_queries, grad_keys, grad_scalars, isa, threads);
  });
}

int upfeat_bilateral_forward(const UpfeatTensor* keys, const UpfeatTensor* weights, int64_t radius,
                             double temperature, double sigma_spatial, int isa, int threads) {
  if (!valid(keys)) return UPFEAT_BAD_ARGUMENT;
  return guarded([&] {
    return make_weights(bilateral(keys, radius, temperature, sigma_spatial), *keys, weights, isa,
                        threads);
  });
}

int upfeat_bilateral_backward(const UpfeatTensor* keys, const UpfeatTensor* grad,
                              const UpfeatTensor* grad_keys, double* grad_scalars, int64_t radius,
                              double temperature, double sigma_spatial, int isa, int threads) {
  if (!all_valid({keys, grad, grad_keys}) || !grad_scalars) return UPFEAT_BAD_ARGUMENT;
  const int64_t* k = keys->size;
  if (!image_fits(*keys, *grad, radius)) return UPFEAT_BAD_ARGUMENT;
  if (!sized(*grad_keys, k[0], k[1], k[2], k[3])) return UPFEAT_BAD_ARGUMENT;
  grad_scalars[0] = grad_scalars[1] = 0;
  if (is_empty(*grad)) return UPFEAT_OK;
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  return guarded([&] {
    const double work = elements(*grad) * static_cast<double>(k[1] + 16);
    return kernels->grad_bilateral(runtime_for(threads, work),
                                   bilateral(keys, radius, temperature, sigma_spatial), *grad,
                                   *grad_keys, grad_scalars);
  });
}

int upfeat_stage_weights(const UpfeatTensor* guidance, const UpfeatStage* stage,
                         const UpfeatTensor* weights, int64_t radius, int isa, int threads) {
  if (!valid(guidance) || !stage || stage->key_width < 1) return UPFEAT_BAD_ARGUMENT;
  return guarded([&] {
    return make_weights(staged(guidance, stage, radius), *guidance, weights, isa, threads);
  });
}

int upfeat_stage_forward(const UpfeatTensor* features, const UpfeatTensor* guidance,
                         const UpfeatStage* stage, const UpfeatTensor* out, int64_t radius, int isa,
                         int threads) {
  if (!valid(guidance) || !stage || stage->key_width < 1) return UPFEAT_BAD_ARGUMENT;
  if (radius < 0 || radius >= 32768) return UPFEAT_BAD_ARGUMENT;
  UpfeatTensor weights = *guidance;  // only the sizes are read
  weights.size[1] = (2 * radius + 1) * (2 * radius + 1);
  return guarded([&] {
    return forward(features, staged(guidance, stage, radius), weights, out, kBicubic, isa, threads);
  });
}

}  // extern "C"
