// The kernels for one instruction set. CMake compiles this file once per instruction set, with the
// set's name in UPFEAT_ISA and the machine flags that the set needs.
//
// Everything is in an anonymous namespace, and nothing of the C++ library is used: the linker could
// merge an inline function that portable code uses, too, into one copy with instructions that the
// running machine lacks.
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "plan.h"

namespace upfeat {
namespace {

#include "emulated_tiles.inl"
#include "simd.inl"
// The order matters: each file uses the files before it.
#include "convert.inl"
#include "fold.inl"
#include "block.inl"
#include "weights.inl"
#include "upsample.inl"
#include "cells.inl"
#include "gradients.inl"
#include "bilateral_gradients.inl"
#include "neighbourhood.inl"
#include "products.inl"
#include "dense.inl"
#include "digits.inl"
#include "attention.inl"
#include "encoder.inl"
#include "pointwise_digits.inl"
#include "winograd.inl"
#include "winograd_digits.inl"
#include "layers.inl"
#include "patterns.inl"
#include "pyramid.inl"

const Kernels kTable = {upsample,    make_weights,   grad_features, grad_weights,
                        grad_bilateral, attend, attend_shrinking, grad_attend, attend_windows,
                        grad_windows,   packed_bytes, pack_layer,   run_layer,   pool_layer,
                        prepare_layer,  run_patterns,   encode_pyramid};

}  // namespace

#define UPFEAT_JOIN2(a, b) a##b
#define UPFEAT_JOIN(a, b) UPFEAT_JOIN2(a, b)

const Kernels* UPFEAT_JOIN(kernels_, UPFEAT_ISA)() { return &kTable; }

}  // namespace upfeat
