#include "machine/run.h"

// More than 2/3 rounded down, and never half or fewer (committee.py's quorum).
u64 quorum(u64 expected) {
  u64 two_thirds = expected * 2 / 3;
  u64 majority = expected / 2 + 1;
  return two_thirds > majority ? two_thirds : majority;
}

// floor(a * b / c + 1/2) for a < 2^16 and b < c, bit by bit: the product has up to 80 bits.
static u64 scale_half_up(u64 a, u64 b, u64 c) {
  u64 quotient = 0, rest = 0;  // quotient * c + rest == (the bits of a so far) * b
  for (int bit = 15; bit >= 0; bit--) {
    quotient *= 2;
    if (rest >= c - rest) {
      rest -= c - rest;
      quotient++;
    } else {
      rest *= 2;
    }
    if (a >> bit & 1) {
      if (rest >= c - b) {
        rest -= c - b;
        quotient++;
      } else {
        rest += b;
      }
    }
  }
  return quotient + (rest >= c - rest);
}

// Psyche's get_batch_size: the end size once `data_index * max_seq_len` tokens are at least the ramp's.
NOINLINE u64 batch_size(const Config *config, u64 data_index, u32 max_seq_len) {
  u64 start = config->global_batch_size_start, end = config->global_batch_size_end;
  u64 ramp = config->global_batch_size_warmup_tokens;
  if (ramp == 0) return end;
  if (max_seq_len == 0) return start;
  // Compared by division: the product may have 96 bits.
  if (data_index >= ramp / max_seq_len + (ramp % max_seq_len != 0)) return end;
  return start + scale_half_up(end - start, data_index * max_seq_len, ramp);
}
