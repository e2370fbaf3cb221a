#pragma once

#include <stdint.h>

#include "plan.h"

namespace upfeat {

// The kernels for instruction set `isa`, or for the best when it is negative; null if there are
// none.
const Kernels* kernels_for(int isa);
// `work` in multiply-adds: small work stays on the calling thread.
Runtime runtime_for(int threads, double work);
// Gives large fresh outputs large pages where the platform has them.
void prepare_output(const UpfeatTensor& out, int threads);

}  // namespace upfeat
