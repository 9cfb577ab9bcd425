#include "treasurer/token.h"

// TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA
const Key TOKEN_PROGRAM = {{0x93a165d7e1f6dd06, 0xac79ebce46e1cbd9, 0x91375b5fed85b41c, 0xa900ff7e85f58c3a}};
// ATokenGPvbdGVxr1b2hvZbsiqW5xWH25efTNsLJA8knL
const Key ASSOCIATED_TOKEN_PROGRAM = {{0xf189244e8f25978c, 0x830d8e1429103dbb, 0x8410ffda99135a0b, 0x59f8e9dbd87b8e04}};

// The layout of spl_token::state::Account.
typedef struct __attribute__((packed)) {
  Key mint;
  Key owner;
  u64 amount;
  u32 has_delegate;
  Key delegate;
  u8 state;  // 0: not initialized
  u32 is_native;
  u64 native_rent;
  u64 delegated_amount;
  u32 has_close_authority;
  Key close_authority;
} TokenAccount;
_Static_assert(sizeof(TokenAccount) == 165, "the size that the token program checks");

// Instructions of the two programs.
enum { TRANSFER = 3 };
enum { CREATE_IDEMPOTENT = 1 };

NOINLINE u64 need_token_account(const Account *account, const char *name) {
  TRY(need_writable(account, name));
  if (!same_key(account->owner, &TOKEN_PROGRAM)) return fail_account(name, AccountOwnedByWrongProgram);
  if (account->data_length != sizeof(TokenAccount)) return fail_account(name, AccountDidNotDeserialize);
  return ((const TokenAccount *)account->data)->state == 0 ? fail_account(name, AccountNotInitialized) : 0;
}

NOINLINE u64 need_own_tokens(const Account *account, const Key *mint, const Key *owner, const char *name) {
  TRY(need_token_account(account, name));
  const TokenAccount *token = (const TokenAccount *)account->data;
  bool own = same_bytes(&token->mint, mint, sizeof(Key)) && same_bytes(&token->owner, owner, sizeof(Key));
  return own && token->has_delegate == 0 ? 0 : fail_account(name, ConstraintRaw);
}

NOINLINE u64 need_associated(const Account *account, const Key *mint, const Key *owner, const char *name) {
  TRY(need_token_account(account, name));
  const TokenAccount *token = (const TokenAccount *)account->data;
  if (!same_bytes(&token->owner, owner, sizeof(Key))) return fail_account(name, ConstraintTokenOwner);
  Slice seeds[3] = {{owner, sizeof(Key)}, {&TOKEN_PROGRAM, sizeof(Key)}, {mint, sizeof(Key)}};
  Key address;
  u8 bump;
  if (sol_try_find_program_address(seeds, COUNT(seeds), &ASSOCIATED_TOKEN_PROGRAM, &address, &bump) ||
      !same_key(&address, account->key))
    return fail_account(name, ConstraintAssociated);
  return 0;
}

NOINLINE u64 make_associated(const Input *input, const Association *association) {
  AccountMeta metas[6] = {
      {association->payer->key, true, true},   {association->token_account->key, true, false},
      {association->owner->key, false, false}, {association->mint->key, false, false},
      {&SYSTEM_PROGRAM, false, false},         {&TOKEN_PROGRAM, false, false},
  };
  u8 data = CREATE_IDEMPOTENT;
  Instruction instruction = {&ASSOCIATED_TOKEN_PROGRAM, metas, COUNT(metas), &data, 1};
  return sol_invoke_signed_c(&instruction, input->accounts, input->accounts_length, 0, 0);
}

NOINLINE u64 pay(const Input *input, const Payment *payment, const Signer *signer) {
  AccountMeta metas[3] = {
      {payment->from->key, true, false}, {payment->to->key, true, false}, {payment->owner->key, false, true}};
  u8 data[9] = {TRANSFER};
  copy(data + 1, &payment->amount, 8);
  Instruction instruction = {&TOKEN_PROGRAM, metas, COUNT(metas), data, sizeof data};
  return sol_invoke_signed_c(&instruction, input->accounts, input->accounts_length, signer, 1);
}
