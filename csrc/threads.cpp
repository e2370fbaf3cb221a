#include "threads.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace upfeat {

void parallel_for(int workers, int64_t tasks, TaskBody body, void* context) {
  if (workers > tasks) workers = static_cast<int>(tasks);
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) {
      body(context, task, worker);
    }
  };
  std::vector<std::thread> others;
  try {
    for (int worker = 1; worker < workers; ++worker) others.emplace_back(work, worker);
  } catch (const std::exception&) {
    // At its limit of threads, a process still gets its result, from the threads that were started.
  }
  work(0);
  for (std::thread& thread : others) thread.join();
}

}  // namespace upfeat
