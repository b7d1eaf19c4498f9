// What the files of these tests share.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(what)                                                        \
  if (!(what)) {                                                           \
    std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #what); \
    std::exit(1);                                                          \
  }

// Tests that have a file of their own.
void test_image_batch();
