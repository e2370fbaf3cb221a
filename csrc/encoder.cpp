// Layers of convolutional encoders: checks, division into tasks, and sums added in a fixed order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "checks.h"
#include "plan.h"
#include "runtime.h"
#include "upfeat.h"

namespace upfeat {
namespace {

constexpr int64_t kMostTasks = 64;  // per image; constant, so that tasks depend on the shape alone
constexpr int64_t kColumns = 64;    // of a Winograd task, as in winograd.inl

Layer describe(const UpfeatTensor* x, const UpfeatLayer& given, const UpfeatTensor* out) {
  Layer layer{};
  layer.x = x;
  layer.out = out;
  layer.weight = given.weight;
  layer.packed = static_cast<const char*>(given.packed);
  layer.bias = given.bias;
  layer.scale = given.scale;
  layer.shift = given.shift;
  layer.rotate_rows = given.rotate_rows;
  layer.rotate_columns = given.rotate_columns;
  layer.inputs = given.inputs;
  layer.outputs = given.outputs;
  layer.pitch = given.pitch;
  layer.in_pitch = given.in_pitch;
  layer.kernel = given.kernel;
  layer.pair = given.pair;
  layer.groups = given.groups;
  layer.epsilon = given.epsilon;
  layer.winograd = given.winograd != 0;
  layer.activation = static_cast<Activation>(given.activation);
  layer.unit = given.unit != 0;
  layer.reflect = given.reflect != 0;
  return layer;
}

// Computes the scale and shift of a group norm from its sums, to `room`.
void use_sums(Layer& layer, const UpfeatLayer& given, int64_t batch, std::vector<float>& room) {
  if (!given.sums) return;
  const int64_t pitch = (given.inputs + 15) / 16 * 16, size = given.inputs / given.sum_groups;
  const double count = static_cast<double>(given.sum_count);
  room.assign(static_cast<size_t>(2 * batch * pitch), 0.0f);
  float *scales = room.data(), *shifts = scales + batch * pitch;
  for (int64_t i = 0; i < batch * given.inputs; ++i) {
    const int64_t image = i / given.inputs, c = i % given.inputs;
    const double* sums = given.sums + 2 * (image * given.sum_groups + c / size);
    const double mean = sums[0] / count;
    const double variance = std::max(sums[1] / count - mean * mean, 0.0);
    double scale = 1 / std::sqrt(variance + given.sum_epsilon);
    if (given.gain) scale *= static_cast<double>(given.gain[c]);
    const double offset = given.offset ? static_cast<double>(given.offset[c]) : 0;
    scales[image * pitch + c] = static_cast<float>(scale);
    shifts[image * pitch + c] = static_cast<float>(offset - mean * scale);
  }
  layer.scale = scales;
  layer.shift = shifts;
  layer.in_pitch = pitch;
}

// True if the steps before the convolution are valid for `channels` inputs.
bool preparation_fits(const UpfeatLayer& layer, int64_t channels) {
  const int64_t vectors = (channels + 15) / 16 * 16;
  if (layer.inputs != channels || channels < 1) return false;
  if ((layer.scale == nullptr) != (layer.shift == nullptr)) return false;
  if (layer.scale && layer.in_pitch < vectors) return false;
  if (layer.sums && (layer.scale || layer.sum_groups < 1 || layer.sum_count < 1)) return false;
  if (layer.sums && channels % layer.sum_groups) return false;
  if ((layer.rotate_rows == nullptr) != (layer.rotate_columns == nullptr)) return false;
  return !layer.rotate_rows || (layer.pair >= 1 && channels % (2 * layer.pair) == 0);
}

bool weights_fit(const UpfeatLayer& layer) {
  const int64_t vectors = (layer.outputs + 15) / 16 * 16;
  if (layer.inputs < 1 || layer.outputs < 1 || layer.pitch < vectors) return false;
  return layer.kernel == 3 || (layer.kernel == 1 && !layer.winograd);
}

// Matrices of tiles are stored and loaded by whole cache lines.
bool on_line(const void* memory) { return reinterpret_cast<uintptr_t>(memory) % 64 == 0; }

bool convolution_fits(const UpfeatTensor& x, const UpfeatLayer& layer, const UpfeatTensor* residual,
                      const UpfeatTensor& out, const double* sums) {
  if (!weights_fit(layer) || !layer.packed || !on_line(layer.packed)) return false;
  const bool windows = layer.kernel == 3 && !layer.winograd;
  if (windows) {  // inputs are the channels of all taps in a row, without steps before
    if (layer.inputs != 9 * x.size[1] || layer.scale || layer.sums) return false;
    if (layer.rotate_rows || layer.unit) return false;
  } else if (!preparation_fits(layer, x.size[1])) {
    return false;
  }
  if (sums && (layer.groups < 1 || layer.outputs % layer.groups)) return false;
  const int64_t* o = out.size;
  if (!sized(out, x.size[0], layer.outputs, x.size[2], x.size[3])) return false;
  return !residual || (valid(residual) && sized(*residual, o[0], o[1], o[2], o[3]));
}

}  // namespace
}  // namespace upfeat

using namespace upfeat;

extern "C" {

int upfeat_layer_pack(const UpfeatLayer* given, void* packed, int64_t* bytes, int isa,
                      int threads) {
  if (!given || !bytes || !weights_fit(*given)) return UPFEAT_BAD_ARGUMENT;
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  const Layer layer = describe(nullptr, *given, nullptr);
  const int64_t needed = kernels->packed_bytes(layer);
  if (!packed) {
    *bytes = needed;
    return UPFEAT_OK;
  }
  if (!layer.weight || *bytes < needed || !on_line(packed)) return UPFEAT_BAD_ARGUMENT;
  return kernels->pack_layer(runtime_for(threads, 0), layer, static_cast<char*>(packed));
}

int upfeat_layer_forward(const UpfeatTensor* x, const UpfeatLayer* given,
                         const UpfeatTensor* residual, const UpfeatTensor* out, double* sums,
                         int isa, int threads) {
  if (!all_valid({x, out}) || !given) return UPFEAT_BAD_ARGUMENT;
  if (!convolution_fits(*x, *given, residual, *out, sums)) return UPFEAT_BAD_ARGUMENT;
  if (is_empty(*out)) return UPFEAT_OK;
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  if (given->packed_bytes < kernels->packed_bytes(describe(x, *given, out))) {
    return UPFEAT_BAD_ARGUMENT;
  }
  return guarded([&] {
    Layer layer = describe(x, *given, out);
    std::vector<float> norm;
    use_sums(layer, *given, x->size[0], norm);
    layer.residual = residual;
    const int64_t height = out->size[2];
    // Small maps, too, are divided into several tasks.
    const int64_t winograd_rows = height > 64 ? 16 : 4;
    layer.rows_per_task =
        layer.winograd ? winograd_rows : (height + kMostTasks - 1) / kMostTasks;
    layer.row_tasks = (height + layer.rows_per_task - 1) / layer.rows_per_task;
    layer.column_tasks = layer.winograd ? (out->size[3] + kColumns - 1) / kColumns : 1;
    const int64_t per_image = layer.row_tasks * layer.column_tasks, width = 2 * layer.groups;
    std::vector<double> partial;
    if (sums) {
      partial.resize(static_cast<size_t>(out->size[0] * per_image * width));
      layer.partial = partial.data();
    }
    prepare_output(*out, threads);
    const double work = elements(*out) * static_cast<double>(layer.inputs);
    const int status = kernels->run_layer(runtime_for(threads, work), layer);
    for (int64_t i = 0; sums && i < out->size[0] * width; ++i) {
      sums[i] = 0;
      for (int64_t task = 0; task < per_image; ++task) {
        sums[i] += partial[static_cast<size_t>((i / width * per_image + task) * width + i % width)];
      }
    }
    return status;
  });
}

int upfeat_layer_pool(const UpfeatTensor* x, const UpfeatLayer* given, const UpfeatTensor* out,
                      int isa, int threads) {
  if (!all_valid({x, out}) || !given) return UPFEAT_BAD_ARGUMENT;
  if (!preparation_fits(*given, x->size[1])) return UPFEAT_BAD_ARGUMENT;
  if (!sized(*out, x->size[0], x->size[1], out->size[2], out->size[3])) return UPFEAT_BAD_ARGUMENT;
  if (is_empty(*out)) return UPFEAT_OK;
  if (is_empty(*x)) return UPFEAT_BAD_ARGUMENT;  // there are no pixels to average
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  return guarded([&] {
    Layer layer = describe(x, *given, out);
    std::vector<float> norm;
    use_sums(layer, *given, x->size[0], norm);
    return kernels->pool_layer(runtime_for(threads, 16 * elements(*x)), layer);
  });
}

int upfeat_layer_prepare(const UpfeatTensor* x, const UpfeatLayer* given, const UpfeatTensor* out,
                         int isa, int threads) {
  if (!all_valid({x, out}) || !given) return UPFEAT_BAD_ARGUMENT;
  if (!preparation_fits(*given, x->size[1])) return UPFEAT_BAD_ARGUMENT;
  if (!sized(*out, x->size[0], x->size[1], x->size[2], x->size[3])) return UPFEAT_BAD_ARGUMENT;
  if (is_empty(*out)) return UPFEAT_OK;
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  return guarded([&] {
    Layer layer = describe(x, *given, out);
    std::vector<float> norm;
    use_sums(layer, *given, x->size[0], norm);
    return kernels->prepare_layer(runtime_for(threads, 16 * elements(*x)), layer);
  });
}

int upfeat_patterns(const UpfeatTensor* features, const float* patterns, int64_t side,
                    int64_t pitch, const UpfeatTensor* out, int isa, int threads) {
  if (!all_valid({features, out}) || !patterns || side < 1) return UPFEAT_BAD_ARGUMENT;
  const int64_t* f = features->size;
  if (!sized(*out, f[0], out->size[1], f[2], f[3]) || side % 2 == 0) return UPFEAT_BAD_ARGUMENT;
  if (pitch < (out->size[1] + 15) / 16 * 16) return UPFEAT_BAD_ARGUMENT;
  if (is_empty(*out) || is_empty(*features)) return UPFEAT_OK;
  const Kernels* kernels = kernels_for(isa);
  if (!kernels) return UPFEAT_NO_ISA;
  return guarded([&] {
    const double work = elements(*out) * static_cast<double>(f[1] * (side * side + 16));
    return kernels->run_patterns(runtime_for(threads, work), *features, patterns, side, pitch,
                                 *out);
  });
}

}  // extern "C"
