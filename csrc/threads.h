#pragma once

#include "plan.h"

namespace upfeat {

// Threads are started and joined within a call, so no state is left that a fork could break, and no
// second OpenMP run-time enters the process. The calling thread works, too.
void parallel_for(int workers, int64_t tasks, TaskBody body, void* context);

}  // namespace upfeat
