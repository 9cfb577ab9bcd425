// A reader of borsh arguments. Errors stick: read everything, then ask `ended`.
//
// It takes one encoding of each value: booleans and tags in range, strings of valid UTF-8, no NaN, nothing left.
#pragma once
#include "common/errors.h"
#include "common/syscalls.h"

typedef struct {
  const u8 *at;
  u64 left;
  bool bad;
} Reader;

INLINE Reader reader(const u8 *data, u64 length) { return (Reader){data, length, false}; }

// The next `length` bytes, or null (and bad) when there are fewer.
const u8 *read_raw(Reader *reader, u64 length);

u8 read_u8(Reader *reader);
u16 read_u16(Reader *reader);
u32 read_u32(Reader *reader);
u64 read_u64(Reader *reader);
bool read_bool(Reader *reader);
// The tag of an enum with `variants` variants, or of an Option (2).
u8 read_tag(Reader *reader, u8 variants);
// The bits of a float. NaN is refused.
u32 read_f32(Reader *reader);
u64 read_f64(Reader *reader);
void read_key(Reader *reader, Key *key);
void read_bytes(Reader *reader, void *to, u64 length);
// A text filled up with zeros: exactly `length` bytes, none but zeros after the first zero.
void read_fixed(Reader *reader, u8 *text, u64 length);
// A length u32, and as many bytes of UTF-8, at most `most`; they stay in place.
void read_string(Reader *reader, u64 most, Slice *text);

// 0, or InstructionDidNotDeserialize when something was wrong or bytes are left.
u64 ended(const Reader *reader);

// Whether the bytes are UTF-8 (no overlong forms, no surrogates).
bool is_utf8(const u8 *text, u64 length);
