// SHA-256 (FIPS 180-4), compiled without sanitizers: most of a fuzzer's time is spent here.
#include "native/shim.h"

#include <string.h>

static const u32 K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static u32 turn(u32 x, int n) { return x >> n | x << (32 - n); }

static u32 big_endian(const u8 *at) {
  u32 value;
  memcpy(&value, at, 4);
  return __builtin_bswap32(value);
}

static void block(u32 state[8], const u8 *at) {
  u32 w[64], v[8];
  for (int i = 0; i < 16; i++) w[i] = big_endian(at + 4 * i);
  for (int i = 16; i < 64; i++) {
    u32 a = w[i - 15], b = w[i - 2];
    w[i] = w[i - 16] + w[i - 7] + (turn(a, 7) ^ turn(a, 18) ^ a >> 3) + (turn(b, 17) ^ turn(b, 19) ^ b >> 10);
  }
  memcpy(v, state, 32);
  for (int i = 0; i < 64; i++) {
    u32 e = v[4], a = v[0];
    u32 one = v[7] + (turn(e, 6) ^ turn(e, 11) ^ turn(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + K[i] + w[i];
    u32 two = (turn(a, 2) ^ turn(a, 13) ^ turn(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
    memmove(v + 1, v, 28);
    v[4] += one;
    v[0] = one + two;
  }
  for (int i = 0; i < 8; i++) state[i] += v[i];
}

u64 sol_sha256(const Slice *parts, u64 count, u8 *digest) {
  u32 state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  u8 buffer[64];
  u64 used = 0, total = 0;
  for (u64 i = 0; i < count; i++) {
    const u8 *at = parts[i].at;
    u64 left = parts[i].length;
    total += left;
    while (left > 0) {
      u64 part = left < 64 - used ? left : 64 - used;
      memcpy(buffer + used, at, part);
      at += part;
      left -= part;
      used += part;
      if (used == 64) {
        block(state, buffer);
        used = 0;
      }
    }
  }
  buffer[used++] = 0x80;
  if (used > 56) {
    memset(buffer + used, 0, 64 - used);
    block(state, buffer);
    used = 0;
  }
  memset(buffer + used, 0, 56 - used);
  u64 bits = __builtin_bswap64(total * 8);
  memcpy(buffer + 56, &bits, 8);
  block(state, buffer);
  for (int i = 0; i < 8; i++) {
    u32 word = __builtin_bswap32(state[i]);
    memcpy(digest + 4 * i, &word, 4);
  }
  return 0;
}
