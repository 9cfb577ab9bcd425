// Checks of accounts, with Anchor's errors; making accounts at program-derived addresses, and closing them.
#pragma once
#include "common/entry.h"
#include "common/errors.h"

extern const Key SYSTEM_PROGRAM;

// The first eight bytes of an account's data, Anchor's discriminator.
INLINE u64 discriminator_of(const Account *account) { return *(const u64 *)account->data; }

u64 need_accounts(const Input *input, u64 count);
u64 need_signer(const Account *account, const char *name);
u64 need_writable(const Account *account, const char *name);
u64 need_program(const Account *account, const Key *program, const char *name);
// Owned by `program`, with that discriminator, and at least `length` bytes long.
u64 need_owned(const Account *account, const Key *program, u64 discriminator, u64 length, const char *name);
// Its key is `key`.
u64 need_key(const Account *account, const Key *key, const char *name);
// Its address is the one that the seeds (the bump last) give for `program`.
u64 need_seeds(const Account *account, const Slice *seeds, u64 count, const Key *program, const char *name);
// No two of these are the same account.
u64 need_distinct(const Account *const *accounts, u64 count, const char *name);

// A program-derived address: the caller gives the seeds; the bump, and its place behind them, is filled in.
#define MAX_SEEDS 6
typedef struct {
  Slice seeds[MAX_SEEDS + 1];
  u64 count;
  u8 bump;
} Derivation;

// Make the account at that address, `length` bytes long, paid by `payer`; also when somebody has sent lamports there
// before. The input has the system program among its accounts.
// Refuses another address (ConstraintSeeds) and an account that exists (AccountDiscriminatorAlreadySet).
u64 create_derived(const Input *input, const Account *payer, Account *account, Derivation *derivation, u64 length);

// Lamports with which an account of that length is exempt from rent.
u64 rent_exempt(u64 length);

// Give an account of this program another length; `payer` pays the rent of what is added, and gets that of what is cut.
// What is added is zero. At most 10,240 bytes are added in one instruction.
u64 resize_account(const Input *input, Account *payer, Account *account, u64 length);

// Give the account's lamports to `to`, clear its data and give it back to the system.
u64 close_account(Account *account, Account *to);
