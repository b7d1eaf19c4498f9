// What the vector loops and the threads of this folder share.
#pragma once

#include <atomic>
#include <cstddef>
#include <future>
#include <vector>

// A function that is marked so is compiled for several instruction sets on x86-64 Linux, and the
// loader takes the best one that the machine has. AddressSanitizer is not up yet when it chooses.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__)
#define DAU_FAST_WIDE __attribute__((target_clones("default", "avx2,fma", "arch=x86-64-v4")))
#else
#define DAU_FAST_WIDE
#endif
// A helper is compiled for the instruction set of the function that it becomes part of.
#if defined(__GNUC__)
#define DAU_FAST_INSIDE inline __attribute__((always_inline))
#define DAU_FAST_PREFETCH(address, write) __builtin_prefetch(address, write)
#else
#define DAU_FAST_INSIDE inline
#define DAU_FAST_PREFETCH(address, write) static_cast<void>(address)
#endif

namespace dau_fast {

// Calls work(part) for each part below `count`, each on a thread of its own, 0 on this one.
template <typename Work>
void on_threads(std::size_t count, const Work& work) {
  std::vector<std::future<void>> others;  // each waits for its thread when it goes
  for (std::size_t part = 1; part < count; ++part) {
    others.push_back(std::async(std::launch::async, [&work, part] { work(part); }));
  }
  work(0);
}

}  // namespace dau_fast
