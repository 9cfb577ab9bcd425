#include "common/entry.h"

#define NOT_A_DUPLICATE 0xff

NOINLINE void read_input(u8 *buffer, Input *input) {
  u64 count = *(u64 *)buffer;
  u8 *at = buffer + 8;
  for (u64 i = 0; i < count; i++) {
    Account ignored;
    Account *account = i < MAX_ACCOUNTS ? &input->accounts[i] : &ignored;
    if (at[0] != NOT_A_DUPLICATE) {  // the index of an earlier one
      if (i < MAX_ACCOUNTS && at[0] < i) *account = input->accounts[at[0]];
      at += 8;
      continue;
    }
    // marker, signer, writable, executable, 4 bytes of padding, key, owner, lamports, data length, data
    account->is_signer = at[1] != 0;
    account->is_writable = at[2] != 0;
    account->is_executable = at[3] != 0;
    account->key = (Key *)(at + 8);
    account->owner = (Key *)(at + 40);
    account->lamports = (u64 *)(at + 72);
    account->data_length = *(u64 *)(at + 80);
    account->data = at + 88;
    at += 88 + account->data_length + GROWTH;
    at += (8 - ((u64)at & 7)) & 7;
    account->rent_epoch = *(u64 *)at;
    at += 8;
  }
  input->accounts_length = count < MAX_ACCOUNTS ? count : MAX_ACCOUNTS;
  input->data_length = *(u64 *)at;
  input->data = at + 8;
  copy(&input->program_key, input->data + input->data_length, sizeof(Key));
  input->program = &input->program_key;
}

bool take_discriminator(Input *input, u64 *discriminator) {
  if (input->data_length < 8) return false;
  __builtin_memcpy(discriminator, input->data, 8);
  input->data += 8;
  input->data_length -= 8;
  return true;
}
