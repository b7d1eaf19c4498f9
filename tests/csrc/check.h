// What the files of these tests share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

#define CHECK(what)                                                         \
  if (!(what)) {                                                            \
    std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
    std::exit(1);                                                           \
  }

// Whether `call` throws an Error that says just that.
template <typename Error, typename Call>
bool says(const Call& call, const std::string& expected) {
  try {
    call();
  } catch (const Error& error) {
    return error.what() == expected;
  }
  return false;
}

// Tests that have a file of their own.
void test_image_batch();
void test_arguments();
