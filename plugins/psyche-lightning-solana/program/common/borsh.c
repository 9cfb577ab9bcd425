#include "common/borsh.h"

NOINLINE const u8 *read_raw(Reader *reader, u64 length) {
  if (reader->bad || length > reader->left) {
    reader->bad = true;
    return 0;
  }
  const u8 *at = reader->at;
  reader->at += length;
  reader->left -= length;
  return at;
}

u8 read_u8(Reader *reader) {
  const u8 *at = read_raw(reader, 1);
  return at ? *at : 0;
}

u16 read_u16(Reader *reader) {
  u16 value = 0;
  const u8 *at = read_raw(reader, sizeof value);
  if (at) __builtin_memcpy(&value, at, sizeof value);
  return value;
}

NOINLINE u32 read_u32(Reader *reader) {
  u32 value = 0;
  const u8 *at = read_raw(reader, sizeof value);
  if (at) __builtin_memcpy(&value, at, sizeof value);
  return value;
}

NOINLINE u64 read_u64(Reader *reader) {
  u64 value = 0;
  const u8 *at = read_raw(reader, sizeof value);
  if (at) __builtin_memcpy(&value, at, sizeof value);
  return value;
}

u8 read_tag(Reader *reader, u8 variants) {
  u8 tag = read_u8(reader);
  if (tag < variants) return tag;
  reader->bad = true;
  return 0;
}

bool read_bool(Reader *reader) { return read_tag(reader, 2) == 1; }

u32 read_f32(Reader *reader) {
  u32 bits = read_u32(reader);
  if ((bits & 0x7fffffffu) > 0x7f800000u) reader->bad = true;
  return bits;
}

u64 read_f64(Reader *reader) {
  u64 bits = read_u64(reader);
  if ((bits & 0x7fffffffffffffffull) > 0x7ff0000000000000ull) reader->bad = true;
  return bits;
}

void read_bytes(Reader *reader, void *to, u64 length) {
  const u8 *at = read_raw(reader, length);
  if (at) copy(to, at, length);
  else fill_zero(to, length);
}

void read_key(Reader *reader, Key *key) { read_bytes(reader, key, sizeof *key); }

NOINLINE void read_fixed(Reader *reader, u8 *text, u64 length) {
  read_bytes(reader, text, length);
  bool over = false;
  for (u64 i = 0; i < length; i++) {
    if (over && text[i] != 0) reader->bad = true;
    over |= text[i] == 0;
  }
}

void read_string(Reader *reader, u64 most, Slice *text) {
  u64 length = read_u32(reader);
  if (length > most) reader->bad = true;
  const u8 *at = read_raw(reader, length);
  *text = (Slice){at, at ? length : 0};
  if (at && !is_utf8(at, length)) reader->bad = true;
}

u64 ended(const Reader *reader) { return reader->bad || reader->left != 0 ? InstructionDidNotDeserialize : 0; }

NOINLINE bool is_utf8(const u8 *text, u64 length) {
  u64 at = 0;
  while (at < length) {
    u8 first = text[at++];
    if (first < 0x80) continue;
    // Continuation bytes, and the range of the first of them, which excludes overlong forms, surrogates and > U+10FFFF.
    u64 more = first >= 0xf0 ? 3 : first >= 0xe0 ? 2 : 1;
    u8 low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    u8 high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    if (first < 0xc2 || first > 0xf4 || more > length - at) return false;
    for (u64 i = 0; i < more; i++) {
      u8 next = text[at++];
      if (next < low || next > high) return false;
      low = 0x80;
      high = 0xbf;
    }
  }
  return true;
}
