// The input of a program: its accounts, the instruction's bytes and its own address.
#pragma once
#include "common/syscalls.h"

#define MAX_ACCOUNTS 16
// Room that the loader leaves after the data of each account, in which it may grow.
#define GROWTH 10240

typedef struct {
  Account accounts[MAX_ACCOUNTS];
  u64 accounts_length;
  const u8 *data;
  u64 data_length;
  const Key *program;
  Key program_key;  // what `program` points to: behind the instruction's bytes it is not aligned
} Input;

// Read the buffer that the loader hands to a program (its aligned form). Accounts beyond MAX_ACCOUNTS are dropped.
// An account that is given twice is the same memory twice.
void read_input(u8 *buffer, Input *input);

// The first eight bytes of the instruction, Anchor's discriminator; false when there are fewer.
bool take_discriminator(Input *input, u64 *discriminator);

// Each program's, called with that buffer.
u64 entrypoint(u8 *buffer);
