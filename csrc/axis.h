#pragma once

#include "plan.h"

namespace upfeat {

// Both return false when memory runs out; free_axis is safe on a partly built axis.
// Bicubic (a = -0.75, align_corners=False, cells clamped) from `in` to `out`, then reflect by
// radius.
bool bicubic_axis(Axis& axis, int64_t in, int64_t out, int64_t radius);
// No resize and no reflection: output coordinate y reads cells y .. y+2r of out+2r.
bool padded_axis(Axis& axis, int64_t out, int64_t radius);
// `count` cells from `first` on, of `all`.
struct CellRange {
  int64_t count, all, first;
};
// Coordinate start + y of `length` over all cells reads the 2r+1 cells around the one it lies in,
// clamped to the grid; also fills `away`. Of cells that are not in the range it reads the nearest
// one that is.
bool cells_axis(Axis& axis, const CellRange& cells, int64_t length, int64_t start, int64_t out,
                int64_t radius);
void free_axis(Axis& axis);

}  // namespace upfeat
