// What the vector loops and the threads of this folder share.
#pragma once

#include <cstddef>

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

// Calls work(data, part) for each part below `count` on threads that take the next one as they come, this one
// among them. Throws what a call has thrown, after all.
void run_parts(std::size_t count, void (*work)(const void* data, std::size_t part), const void* data);

// Calls work(part) for each part below `count`, on as many threads.
template <typename Work>
void on_threads(std::size_t count, const Work& work) {
  run_parts(
      count, [](const void* data, std::size_t part) { (*static_cast<const Work*>(data))(part); }, &work);
}

}  // namespace dau_fast
