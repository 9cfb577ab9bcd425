// The runtime's syscalls, for programs compiled natively.
//
// Addresses are derived as on the chain, with one difference: a derived address must not be a point of the curve. Here
// the search for a bump does not test that, but takes the first address that is among the instruction's accounts.
#include "native/shim.h"

#include <string.h>

Machine MACHINE;

enum { MISSING_ACCOUNT = 1, BAD_INSTRUCTION = 2, NO_FUNDS = 3 };

u64 sol_log_(const char *text, u64 length) {
  if (length + 1 > MAX_LOG - MACHINE.log_length) return 0;
  memcpy(MACHINE.log + MACHINE.log_length, text, length);
  MACHINE.log_length += length;
  MACHINE.log[MACHINE.log_length++] = '\n';
  return 0;
}

u64 sol_log_data(const Slice *fields, u64 count) {
  (void)fields;
  (void)count;
  return 0;
}

u64 sol_memcpy_(void *to, const void *from, u64 length) {
  if (length) memcpy(to, from, length);
  return 0;
}

u64 sol_memset_(void *to, u64 value, u64 length) {
  if (length) memset(to, (int)value, length);
  return 0;
}

u64 sol_memcmp_(const void *a, const void *b, u64 length, int *result) {
  *result = length ? memcmp(a, b, length) : 0;
  return 0;
}

u64 sol_get_clock_sysvar(Clock *clock) {
  *clock = (Clock){MACHINE.slot, 0, 0, 0, MACHINE.timestamp};
  return 0;
}

u64 sol_get_rent_sysvar(Rent *rent) {
  memset(rent, 0, sizeof *rent);
  rent->lamports_per_byte_year = 3480;
  return 0;
}

u64 sol_create_program_address(const Slice *seeds, u64 count, const Key *program, Key *address) {
  Slice parts[18];
  if (count > 16) return BAD_INSTRUCTION;
  for (u64 i = 0; i < count; i++) {
    if (seeds[i].length > 32) return BAD_INSTRUCTION;
    parts[i] = seeds[i];
  }
  parts[count] = (Slice){program, 32};
  parts[count + 1] = TEXT("ProgramDerivedAddress");
  return sol_sha256(parts, count + 2, (u8 *)address);
}

static Account *find(const Key *key) {
  const Input *input = MACHINE.input;
  for (u64 i = 0; i < input->accounts_length; i++)
    if (same_key(input->accounts[i].key, key)) return (Account *)&input->accounts[i];
  return 0;
}

u64 sol_try_find_program_address(const Slice *seeds, u64 count, const Key *program, Key *address, u8 *bump) {
  Slice all[17];
  if (count > 15) return BAD_INSTRUCTION;
  memcpy(all, seeds, count * sizeof *seeds);
  all[count] = (Slice){bump, 1};
  for (int tried = 255; tried >= 0; tried--) {
    *bump = (u8)tried;
    if (sol_create_program_address(all, count + 1, program, address)) return BAD_INSTRUCTION;
    if (find(address)) return 0;
  }
  return 0;  // the address of bump 0, which is no account's
}

static u64 move_lamports(Account *from, Account *to, u64 lamports) {
  if (*from->lamports < lamports) return NO_FUNDS;
  *from->lamports -= lamports;
  *to->lamports += lamports;
  return 0;
}

// Signed by the transaction, or by the seeds of a program.
static bool signs(const AccountMeta *meta, const Account *account, const Signer *signer, const Key *program) {
  Key address;
  if (!meta->is_signer || account->is_signer) return true;
  return sol_create_program_address(signer->seeds, signer->length, program, &address) == 0 &&
         same_key(&address, account->key);
}

static void allocate(Account *account, u64 space) {
  memset(account->data, 0, space);
  *(u64 *)(account->data - 8) = space;
  account->data_length = space;
}

// The system program's create, assign, transfer and allocate.
u64 sol_invoke_signed_c(
    const Instruction *instruction, const Account *accounts, u64 accounts_length, const Signer *signers,
    u64 signers_length) {
  u32 kind;
  u64 amount = 0, space = 0;
  Account *touched[2] = {0, 0};
  (void)accounts;
  (void)accounts_length;
  if (signers_length != 1 || instruction->data_length < 4 || instruction->accounts_length > 2) return BAD_INSTRUCTION;
  for (u64 i = 0; i < instruction->accounts_length; i++) {
    const AccountMeta *meta = &instruction->accounts[i];
    touched[i] = find(meta->key);
    if (!touched[i] || !find(instruction->program)) return MISSING_ACCOUNT;
    if (!signs(meta, touched[i], signers, MACHINE.input->program)) return MISSING_ACCOUNT;
    if (meta->is_writable && !touched[i]->is_writable) return MISSING_ACCOUNT;
  }
  memcpy(&kind, instruction->data, 4);
  if (kind != 1) memcpy(&amount, instruction->data + 4, 8);
  switch (kind) {
    case 0:
      memcpy(&space, instruction->data + 12, 8);
      if (move_lamports(touched[0], touched[1], amount)) return NO_FUNDS;
      allocate(touched[1], space);
      memcpy(touched[1]->owner, instruction->data + 20, 32);
      return 0;
    case 1: memcpy(touched[0]->owner, instruction->data + 4, 32); return 0;
    case 2: return move_lamports(touched[0], touched[1], amount);
    case 8: allocate(touched[0], amount); return 0;
    default: return BAD_INSTRUCTION;
  }
}

void set_machine(const Input *input, u64 slot, i64 timestamp) {
  MACHINE.slot = slot;
  MACHINE.timestamp = timestamp;
  MACHINE.input = input;
  MACHINE.log_length = 0;
}
