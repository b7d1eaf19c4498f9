#include "arguments.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace dau_fast {
namespace {

constexpr std::size_t kMost = std::numeric_limits<std::ptrdiff_t>::max();

std::string named(const Label& label) {
  return label.place < 0 ? label.name : label.name + ("[" + std::to_string(label.place) + "]");
}

}  // namespace

Arguments::Arguments(const char* function, std::size_t arrays) : function_(function) {
  regions_.reserve(arrays);
}

void Arguments::refuse(const std::string& reason) const {
  throw std::invalid_argument(std::string(function_) + ": " + reason);
}

void* Arguments::checked(const Label& label, const Given& given, std::size_t n, std::size_t bytes,
                         std::size_t alignment, bool written) {
  if (given.n < 0 || static_cast<std::size_t>(given.n) != n) {
    refuse(named(label) + " has " + std::to_string(given.n) + " elements: expected " + std::to_string(n));
  }
  if (n == 0) return nullptr;
  if (given.address == 0)
    refuse(named(label) + " has no memory: expected " + std::to_string(n) + " elements");
  if (given.address % alignment != 0) {
    refuse(named(label) + " does not lie at a multiple of " + std::to_string(alignment) + " bytes");
  }
  if (n > kMost / bytes || given.address + n * bytes < given.address) {
    refuse(named(label) + " is longer than memory: " + std::to_string(n) + " elements");
  }
  regions_.push_back({given.address, given.address + n * bytes, written, label});
  return reinterpret_cast<void*>(given.address);
}

std::size_t Arguments::lengths(std::initializer_list<std::pair<const char*, const GivenList*>> lists) const {
  const auto& [first, expected] = *lists.begin();
  for (const auto& [name, list] : lists) {
    if (list->addresses.size() != expected->addresses.size() ||
        list->sizes.size() != list->addresses.size()) {
      refuse(std::string(name) + " has " + std::to_string(list->addresses.size()) + " addresses and " +
             std::to_string(list->sizes.size()) + " sizes: expected one of each for the " +
             std::to_string(expected->addresses.size()) + " of " + first);
    }
  }
  return expected->addresses.size();
}

std::size_t Arguments::size(const char* name, std::int64_t value, std::int64_t least) const {
  if (value < least) {
    refuse(std::string(name) + " is " + std::to_string(value) + ": expected " + std::to_string(least) +
           " or more");
  }
  return static_cast<std::size_t>(value);
}

std::size_t Arguments::product(std::initializer_list<std::size_t> sizes) const {
  std::size_t total = 1;
  // Where one is 0 there are no elements, however many the others would ask for.
  if (std::find(sizes.begin(), sizes.end(), std::size_t{0}) != sizes.end()) return 0;
  for (const std::size_t size : sizes) {
    if (size > kMost / total) refuse("its sizes ask for more elements than memory has");
    total *= size;
  }
  return total;
}

std::pair<const Arguments::Region*, const Arguments::Region*> Arguments::first_overlap(bool one_written,
                                                                                       bool both_written) {
  std::sort(regions_.begin(), regions_.end(),
            [](const Region& a, const Region& b) { return a.begin < b.begin; });
  // Of those that began before: what reaches furthest.
  const Region *read = nullptr, *written = nullptr;
  for (const Region& region : regions_) {
    const bool with_read = region.written && one_written;
    const bool with_written = region.written ? both_written : one_written;
    if (with_read && read && region.begin < read->end) return {read, &region};
    if (with_written && written && region.begin < written->end) return {written, &region};
    const Region*& furthest = region.written ? written : read;
    if (!furthest || region.end > furthest->end) furthest = &region;
  }
  return {nullptr, nullptr};
}

bool Arguments::writes_twice() { return first_overlap(false, true).first != nullptr; }

void Arguments::refuse_overlaps(bool shared) {
  const auto [one, other] = first_overlap(true, !shared);
  if (one)
    refuse(named(one->label) + " and " + named(other->label) + " overlap: expected memory of their own");
}

}  // namespace dau_fast
