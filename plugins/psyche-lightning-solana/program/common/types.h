// Integer types, keys and small helpers that every file uses. Freestanding; little-endian hosts only.
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t i64;

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "accounts are read in place");

// A public key or digest. Aligned, so that comparing two takes four loads each.
typedef struct {
  u64 w[4];
} Key;

INLINE bool same_key(const Key *a, const Key *b) {
  return a->w[0] == b->w[0] && a->w[1] == b->w[1] && a->w[2] == b->w[2] && a->w[3] == b->w[3];
}

INLINE bool zero_key(const Key *a) {
  return (a->w[0] | a->w[1] | a->w[2] | a->w[3]) == 0;
}

// A run of bytes as the syscalls take it.
typedef struct {
  const void *at;
  u64 length;
} Slice;

// A string literal as a slice, without its terminator.
#define TEXT(literal) ((Slice){(literal), sizeof(literal) - 1})
