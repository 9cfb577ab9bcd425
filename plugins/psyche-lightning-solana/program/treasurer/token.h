// Token accounts of the SPL token program, and its transfer.
#pragma once
#include "common/accounts.h"
#include "common/borsh.h"

extern const Key TOKEN_PROGRAM;
extern const Key ASSOCIATED_TOKEN_PROGRAM;

// A token account, of any mint and owner.
u64 need_token_account(const Account *account, const char *name);
// A token account of that mint and owner, from which nobody else may take.
u64 need_own_tokens(const Account *account, const Key *mint, const Key *owner, const char *name);
// The associated token account of that mint and owner.
u64 need_associated(const Account *account, const Key *mint, const Key *owner, const char *name);

// Make the associated token account, unless it exists: anybody may have made it before.
typedef struct {
  const Account *payer, *token_account, *owner, *mint;
} Association;
u64 make_associated(const Input *input, const Association *association);

typedef struct {
  const Account *from, *to, *owner;
  u64 amount;
} Payment;
// Pay, in the name of an owner that is an address of this program.
u64 pay(const Input *input, const Payment *payment, const Signer *signer);
