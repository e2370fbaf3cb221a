#pragma once

#include <stdint.h>

#include "plan.h"

namespace upfeat {

// The kernels for instruction set `isa`, or for the best set if `isa` is negative; null if this
// machine cannot run them.
const Kernels* kernels_for(int isa);
// `work` is the number of multiply-adds; small work stays on the calling thread.
Runtime runtime_for(int threads, double work);
// Backs a large new output with large pages, if the platform has them.
void prepare_output(const UpfeatTensor& out, int threads);

}  // namespace upfeat
