#pragma once

#include "plan.h"

namespace upfeat {

// The functions that build an axis return false if memory runs out; free_axis is safe on a partly
// built axis.

// Bicubic resize (a = -0.75, align_corners=False, cells clamped) from `in` to `out`, then reflect
// padding by radius.
bool bicubic_axis(Axis& axis, int64_t in, int64_t out, int64_t radius);
// No resize and no padding: output coordinate y reads cells y .. y+2r of out+2r.
bool padded_axis(Axis& axis, int64_t out, int64_t radius);
// `count` cells from `first` on, of `all`.
struct CellRange {
  int64_t count, all, first;
};
// Output coordinate y, which is start + y of `length` on the whole axis, reads the 2r+1 cells
// around the cell that contains it, clamped to the grid. A cell outside the range is replaced by
// the nearest cell in it. Also fills `own` and `away`.
bool cells_axis(Axis& axis, const CellRange& cells, int64_t length, int64_t start, int64_t out,
                int64_t radius);
void free_axis(Axis& axis);

}  // namespace upfeat
