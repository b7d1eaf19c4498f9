// What a call's arguments are refused for, before anybody reads them.
#include "arguments.h"

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"

namespace {

using dau_fast::Arguments;
using dau_fast::Given;

Given given(const std::vector<float>& values) {
  return {reinterpret_cast<std::uintptr_t>(values.data()), static_cast<std::int64_t>(values.size())};
}

template <typename Call>
bool refuses(const Call& call, const std::string& expected) {
  return says<std::invalid_argument>(call, "step: " + expected);
}

void test_an_array_is_as_long_as_expected_and_there() {
  const std::vector<float> values(4);
  const Given four = given(values), nowhere{0, 4}, odd{four.address + 1, 4}, none{};
  Arguments call("step");
  CHECK(call.read<float>({"z"}, four, 4) == values.data());
  CHECK(refuses([&] { call.read<float>({"z"}, four, 5); }, "z has 4 elements: expected 5"));
  CHECK(refuses([&] { call.write<float>({"z", 2}, four, 3); }, "z[2] has 4 elements: expected 3"));
  CHECK(refuses([&] { call.read<float>({"z"}, {four.address, -1}, 4); }, "z has -1 elements: expected 4"));
  CHECK(refuses([&] { call.read<float>({"z"}, nowhere, 4); }, "z has no memory: expected 4 elements"));
  CHECK(refuses([&] { call.read<float>({"z"}, odd, 4); }, "z does not lie at a multiple of 4 bytes"));
  CHECK(call.read<std::uint8_t>({"z"}, odd, 4) != nullptr);
  CHECK(call.read<float>({"z"}, none, 0) == nullptr);
  CHECK(call.read_if_given<float>({"z"}, none, 4) == nullptr);
  CHECK(refuses([&] { call.read<float>({"z"}, none, 4); }, "z has 0 elements: expected 4"));
  CHECK(
      refuses([&] { call.read_if_given<float>({"z"}, nowhere, 4); }, "z has no memory: expected 4 elements"));
  const std::int64_t many = INT64_MAX / 2;
  CHECK(refuses([&] { call.read<float>({"z"}, {four.address, many}, static_cast<std::size_t>(many)); },
                "z is longer than memory: " + std::to_string(many) + " elements"));
}

void test_sizes_and_their_products() {
  const Arguments call("step");
  CHECK(call.size("batch", 0) == 0 && call.size("batch", 3, 1) == 3);
  CHECK(refuses([&] { call.size("batch", -1); }, "batch is -1: expected 0 or more"));
  CHECK(refuses([&] { call.size("threads", 0, 1); }, "threads is 0: expected 1 or more"));
  CHECK(call.product({3, 4, 5}) == 60 && call.product({SIZE_MAX, 0, SIZE_MAX}) == 0);
  CHECK(refuses([&] { call.product({std::size_t{1} << 32, std::size_t{1} << 32}); },
                "its sizes ask for more elements than memory has"));
}

void test_lists_have_one_length() {
  const Arguments call("step");
  const dau_fast::GivenList two{{0, 0}, {0, 0}}, one{{0}, {0}}, uneven{{0, 0}, {0}};
  CHECK(call.lengths({{"weights", &two}, {"grads", &two}}) == 2);
  const std::string expected = " sizes: expected one of each for the 2 of weights";
  CHECK(refuses([&] { call.lengths({{"weights", &two}, {"grads", &one}}); },
                "grads has 1 addresses and 1" + expected));
  CHECK(refuses([&] { call.lengths({{"weights", &two}, {"grads", &uneven}}); },
                "grads has 2 addresses and 1" + expected));
  CHECK(refuses([&] { call.lengths({{"weights", &uneven}}); }, "weights has 2 addresses and 1" + expected));
}

// Arrays a and b of 8 and 4 floats, b from element `from` of a on.
struct Pair {
  Arguments call{"step"};

  Pair(const std::vector<float>& memory, std::size_t from, bool write_a, bool write_b) {
    const auto add = [&](const char* name, std::size_t begin, std::size_t n, bool write) {
      const Given part{reinterpret_cast<std::uintptr_t>(memory.data() + begin), static_cast<std::int64_t>(n)};
      if (write) {
        call.write<float>({name}, part, n);
      } else {
        call.read<float>({name}, part, n);
      }
    };
    add("b", 4 + from, 4, write_b);
    add("a", 4, 8, write_a);
  }
};

void test_what_is_written_has_memory_of_its_own() {
  const std::vector<float> memory(20);
  const std::string both = "a and b overlap: expected memory of their own";
  for (const std::size_t from : {1u, 4u, 7u}) {
    for (const bool write_a : {false, true}) {
      Pair(memory, from, false, false).call.refuse_overlaps();
      CHECK(refuses([&] { Pair(memory, from, write_a, true).call.refuse_overlaps(); }, both));
      CHECK(refuses([&] { Pair(memory, from, true, write_a).call.refuse_overlaps(); }, both));
    }
    CHECK(refuses([&] { Pair(memory, from, true, false).call.refuse_overlaps(true); }, both));
    Pair shared(memory, from, true, true);
    shared.call.refuse_overlaps(true);
    CHECK(shared.call.writes_twice());
    CHECK(!Pair(memory, from, true, false).call.writes_twice());
  }
  Pair apart(memory, 8, true, true);
  apart.call.refuse_overlaps();
  CHECK(!apart.call.writes_twice());
  // A long array that is read, a short one in it, and what is written behind the short one.
  Arguments call("step");
  const auto begin = reinterpret_cast<std::uintptr_t>(memory.data());
  call.read<float>({"long"}, {begin, 20}, 20);
  call.read<float>({"short"}, {begin + 4, 1}, 1);
  call.write<float>({"out"}, {begin + 40, 1}, 1);
  CHECK(refuses([&] { call.refuse_overlaps(); }, "long and out overlap: expected memory of their own"));
}

}  // namespace

void test_arguments() {
  test_an_array_is_as_long_as_expected_and_there();
  test_sizes_and_their_products();
  test_lists_have_one_length();
  test_what_is_written_has_memory_of_its_own();
}
