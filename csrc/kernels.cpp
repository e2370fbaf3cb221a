// The kernels for one instruction set. CMake compiles this file once per set, with UPFEAT_ISA
// naming it and the machine flags that it needs.
//
// Everything lies in an anonymous namespace and nothing comes from the C++ library: an inline
// function shared with portable code could be merged by the linker into one copy that holds
// instructions the running machine lacks.
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "plan.h"

namespace upfeat {
namespace {

#include "simd.inl"
// Order matters: each file uses the ones before it.
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
#include "attention.inl"
#include "encoder.inl"
#include "winograd.inl"
#include "layers.inl"
#include "patterns.inl"
#include "pyramid.inl"

const Kernels kTable = {upsample,    make_weights,   grad_features, grad_weights,
                        grad_bilateral, attend, attend_shrinking, grad_attend, attend_windows,
                        grad_windows,   run_layer,   pool_layer,    prepare_layer,
                        run_patterns,   encode_pyramid};

}  // namespace

#define UPFEAT_JOIN2(a, b) a##b
#define UPFEAT_JOIN(a, b) UPFEAT_JOIN2(a, b)

const Kernels* UPFEAT_JOIN(kernels_, UPFEAT_ISA)() { return &kTable; }

}  // namespace upfeat
