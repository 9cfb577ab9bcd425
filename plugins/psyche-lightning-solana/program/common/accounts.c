#include "common/accounts.h"

const Key SYSTEM_PROGRAM = {{0, 0, 0, 0}};

// Instructions of the system program.
enum { CREATE_ACCOUNT = 0, ASSIGN = 1, TRANSFER = 2, ALLOCATE = 8 };
// Bytes that the runtime counts for an account beside its data.
#define ACCOUNT_OVERHEAD 128

NOINLINE u64 need_accounts(const Input *input, u64 count) {
  return input->accounts_length < count ? AccountNotEnoughKeys : 0;
}

NOINLINE u64 need_signer(const Account *account, const char *name) {
  return account->is_signer ? 0 : fail_account(name, AccountNotSigner);
}

NOINLINE u64 need_writable(const Account *account, const char *name) {
  return account->is_writable ? 0 : fail_account(name, AccountNotMutable);
}

NOINLINE u64 need_program(const Account *account, const Key *program, const char *name) {
  return same_key(account->key, program) ? 0 : fail_account(name, InvalidProgramId);
}

NOINLINE u64 need_key(const Account *account, const Key *key, const char *name) {
  return same_key(account->key, key) ? 0 : fail_account(name, ConstraintRaw);
}

NOINLINE u64 need_owned(const Account *account, const Key *program, u64 discriminator, u64 length, const char *name) {
  if (!same_key(account->owner, program)) return fail_account(name, AccountOwnedByWrongProgram);
  if (account->data_length < 8) return fail_account(name, AccountDiscriminatorNotFound);
  if (discriminator_of(account) != discriminator) return fail_account(name, AccountDiscriminatorMismatch);
  return account->data_length >= length ? 0 : fail_account(name, AccountDidNotDeserialize);
}

NOINLINE u64 need_seeds(const Account *account, const Slice *seeds, u64 count, const Key *program, const char *name) {
  Key address;
  if (sol_create_program_address(seeds, count, program, &address) || !same_key(&address, account->key))
    return fail_account(name, ConstraintSeeds);
  return 0;
}

NOINLINE u64 need_distinct(const Account *const *accounts, u64 count, const char *name) {
  for (u64 i = 1; i < count; i++)
    for (u64 j = 0; j < i; j++)
      if (same_key(accounts[i]->key, accounts[j]->key)) return fail_account(name, ConstraintDuplicateMutableAccount);
  return 0;
}

NOINLINE u64 rent_exempt(u64 length) {
  Rent rent;
  sol_get_rent_sysvar(&rent);
  // The exemption threshold is 2 years on every cluster; programs have no floats.
  return (ACCOUNT_OVERHEAD + length) * rent.lamports_per_byte_year * 2;
}

typedef struct __attribute__((packed)) {
  u32 kind;
  u64 lamports;
  u64 space;
  Key owner;
} CreateArguments;

typedef struct __attribute__((packed)) {
  u32 kind;
  u64 amount;
} AmountArguments;

typedef struct __attribute__((packed)) {
  u32 kind;
  Key owner;
} AssignArguments;

static NOINLINE u64 call_system(const Input *input, const Instruction *instruction, const Signer *signer) {
  return sol_invoke_signed_c(instruction, input->accounts, input->accounts_length, signer, 1);
}

static NOINLINE u64 create_new(
    const Input *input, const Account *payer, const Account *account, const Signer *signer, u64 length) {
  AccountMeta metas[2] = {{payer->key, true, true}, {account->key, true, true}};
  CreateArguments create = {CREATE_ACCOUNT, rent_exempt(length), length, *input->program};
  Instruction instruction = {&SYSTEM_PROGRAM, metas, 2, (const u8 *)&create, sizeof create};
  return call_system(input, &instruction, signer);
}

// An address that holds lamports already cannot be "created": anyone could block a run by sending one there.
static NOINLINE u64 take_over(
    const Input *input, const Account *payer, const Account *account, const Signer *signer, u64 length) {
  u64 needed = rent_exempt(length);
  if (*account->lamports < needed) {
    AccountMeta metas[2] = {{payer->key, true, true}, {account->key, true, false}};
    AmountArguments transfer = {TRANSFER, needed - *account->lamports};
    Instruction instruction = {&SYSTEM_PROGRAM, metas, 2, (const u8 *)&transfer, sizeof transfer};
    TRY(call_system(input, &instruction, signer));
  }
  AccountMeta own[1] = {{account->key, true, true}};
  AmountArguments allocate = {ALLOCATE, length};
  Instruction instruction = {&SYSTEM_PROGRAM, own, 1, (const u8 *)&allocate, sizeof allocate};
  TRY(call_system(input, &instruction, signer));
  AssignArguments assign = {ASSIGN, *input->program};
  instruction.data = (const u8 *)&assign;
  instruction.data_length = sizeof assign;
  return call_system(input, &instruction, signer);
}

NOINLINE u64 create_derived(
    const Input *input, const Account *payer, Account *account, Derivation *derivation, u64 length) {
  Key address;
  Slice *seeds = derivation->seeds;
  if (sol_try_find_program_address(seeds, derivation->count, input->program, &address, &derivation->bump))
    return ConstraintSeeds;
  if (!same_key(&address, account->key)) return ConstraintSeeds;
  if (!account->is_writable) return AccountNotMutable;
  if (!same_key(account->owner, &SYSTEM_PROGRAM) || account->data_length != 0) return AccountDiscriminatorAlreadySet;
  seeds[derivation->count] = (Slice){&derivation->bump, 1};
  Signer signer = {seeds, derivation->count + 1};
  TRY((*account->lamports == 0 ? create_new : take_over)(input, payer, account, &signer, length));
  account->data_length = length;
  return 0;
}

// The loader reads the new length from before the data.
static void set_length(Account *account, u64 length) {
  *(u64 *)(account->data - 8) = length;
  account->data_length = length;
}

NOINLINE u64 resize_account(const Input *input, Account *payer, Account *account, u64 length) {
  u64 before = rent_exempt(account->data_length), after = rent_exempt(length);
  if (after > before) {
    if (length - account->data_length > GROWTH) return AccountReallocExceedsLimit;
    AccountMeta metas[2] = {{payer->key, true, true}, {account->key, true, false}};
    AmountArguments transfer = {TRANSFER, after - before};
    Instruction instruction = {&SYSTEM_PROGRAM, metas, 2, (const u8 *)&transfer, sizeof transfer};
    TRY(sol_invoke_signed_c(&instruction, input->accounts, input->accounts_length, 0, 0));
  } else {
    REQUIRE(*account->lamports >= before - after, ConstraintRaw);
    *account->lamports -= before - after;
    *payer->lamports += before - after;
  }
  set_length(account, length);
  return 0;
}

NOINLINE u64 close_account(Account *account, Account *to) {
  u64 sum;
  if (__builtin_add_overflow(*to->lamports, *account->lamports, &sum)) return ConstraintRaw;
  *to->lamports = sum;
  *account->lamports = 0;
  fill_zero(account->data, account->data_length);
  // A system account without data or lamports ceases to exist.
  set_length(account, 0);
  *account->owner = SYSTEM_PROGRAM;
  return 0;
}
