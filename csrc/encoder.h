// Which part of every scale of the encoder a window of queries depends on.
#pragma once

#include "plan.h"

namespace upfeat {

// Of `count` queries from `start` on along an axis of `length` pixels; `lengths` are those of all
// scales.
void plan_encoder_axis(EncoderAxis* axes, const int64_t* lengths, int64_t levels, int64_t start,
                       int64_t count);

}  // namespace upfeat
