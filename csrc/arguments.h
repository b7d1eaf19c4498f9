// Arrays as callers tell of them, an address and a number of elements each, checked before they are read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace dau_fast {

// 0 and 0: an array that is not there.
struct Given {
  std::uintptr_t address = 0;
  std::int64_t n = 0;
};

// Several of them: two lists of one length.
struct GivenList {
  std::vector<std::uintptr_t> addresses;
  std::vector<std::int64_t> sizes;

  Given operator[](std::size_t i) const { return {addresses[i], sizes[i]}; }
};

// What an argument is called, with its place where it is one of a list.
struct Label {
  const char* name;
  std::ptrdiff_t place = -1;
};

// The arguments of one call. Every function throws std::invalid_argument, with one line that says what is
// wrong and what was expected, for an argument that does not fit.
class Arguments {
 public:
  // arrays: about how many there will be.
  explicit Arguments(const char* function, std::size_t arrays = 16);

  // `given` as exactly `n` elements; null where there are none.
  template <typename T>
  const T* read(const Label& label, const Given& given, std::size_t n) {
    return reinterpret_cast<const T*>(checked(label, given, n, sizeof(T), alignof(T), false));
  }
  template <typename T>
  T* write(const Label& label, const Given& given, std::size_t n) {
    return reinterpret_cast<T*>(checked(label, given, n, sizeof(T), alignof(T), true));
  }
  // The same of an array that may be missing: null then.
  template <typename T>
  const T* read_if_given(const Label& label, const Given& given, std::size_t n) {
    return given.address == 0 && given.n == 0 ? nullptr : read<T>(label, given, n);
  }
  template <typename T>
  T* write_if_given(const Label& label, const Given& given, std::size_t n) {
    return given.address == 0 && given.n == 0 ? nullptr : write<T>(label, given, n);
  }

  // How many arrays each of `lists` has, which must be one number.
  std::size_t lengths(std::initializer_list<std::pair<const char*, const GivenList*>> lists) const;

  // `value` where it is at least `least`.
  std::size_t size(const char* name, std::int64_t value, std::int64_t least = 0) const;

  // The product of sizes, where memory could hold as many elements.
  std::size_t product(std::initializer_list<std::size_t> sizes) const;

  // What is written shares no byte with what is read, nor, unless `shared`, with what else is written.
  void refuse_overlaps(bool shared = false);
  // Whether two arrays that are written share a byte.
  bool writes_twice();

  [[noreturn]] void refuse(const std::string& reason) const;

 private:
  struct Region {
    std::uintptr_t begin, end;
    bool written;
    Label label;
  };

  void* checked(const Label& label, const Given& given, std::size_t n, std::size_t bytes,
                std::size_t alignment, bool written);
  // Two regions that share a byte, of which one or both are written; null where there are none.
  std::pair<const Region*, const Region*> first_overlap(bool one_written, bool both_written);

  const char* function_;
  std::vector<Region> regions_;
};

}  // namespace dau_fast
