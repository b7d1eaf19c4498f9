#include "parallel.h"

#include <atomic>
#include <exception>
#include <future>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace dau_fast {
namespace {

// Parts that threads take one after the other.
struct Parts {
  std::size_t count;
  void (*work)(const void*, std::size_t);
  const void* data;
  std::atomic<std::size_t> next{0};
  std::mutex noting{};
  std::exception_ptr thrown{};
};

// Nothing may be thrown through the frames of an OpenMP runtime.
void take_parts(void* taken) noexcept {
  auto& parts = *static_cast<Parts*>(taken);
  for (std::size_t part; (part = parts.next++) < parts.count;) {
    try {
      parts.work(parts.data, part);
    } catch (...) {
      const std::lock_guard lock(parts.noting);
      parts.thrown = std::current_exception();
    }
  }
}

// Runs a function on so many threads: GCC's own entry point for a parallel region (libgomp.h).
using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);

// The runtime whose threads PyTorch works with already; threads of our own would be started at every call.
// Null where there is none of GNU's interface, and in a forked process, where its threads are gone and it
// does not know.
std::atomic<Region> region = nullptr;

[[maybe_unused]] const bool region_is_known = [] {
#if defined(__linux__)
  region = reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (pthread_atfork(nullptr, nullptr, [] { region = nullptr; }) != 0) region = nullptr;
#endif
  return true;
}();

void start_threads(Parts& parts) {
  std::vector<std::future<void>> others;  // each waits for its thread when it goes
  for (std::size_t thread = 1; thread < parts.count; ++thread) {
    others.push_back(std::async(std::launch::async, [&parts] { take_parts(&parts); }));
  }
  take_parts(&parts);
}

}  // namespace

void run_parts(std::size_t count, void (*work)(const void* data, std::size_t part), const void* data) {
  if (count == 1) return work(data, 0);
  Parts parts{count, work, data};
  if (const Region run = region) {
    run(take_parts, &parts, static_cast<unsigned>(count), 0);
  } else {
    start_threads(parts);
  }
  if (parts.thrown) std::rethrow_exception(parts.thrown);
}

}  // namespace dau_fast
