// A run with a treasurer begins: its own accounts, and its coordinator, which it owns.
#include "treasurer/token.h"
#include "treasurer/treasurer.h"

#define INIT_COORDINATOR 0x197a85e849943914ull  // S("global:init_coordinator")[:8]
#define MAX_RUN_ID 32
#define MAX_CLIENT_VERSION 96

enum {
  PAYER,
  RUN,
  RUN_COLLATERAL,
  COLLATERAL_MINT,
  COORDINATOR_INSTANCE,
  COORDINATOR_ACCOUNT,
  COORDINATOR_PROGRAM,
  ASSOCIATED_TOKEN,
  TOKEN,
  SYSTEM,
  AUTHORIZER_PROGRAM,
  COORDINATOR_MANIFEST,
  CREATE_ACCOUNTS,
};

static NOINLINE u64 init_coordinator(
    const Input *input, const Treasury *treasury, const Slice *run_id, const Slice *client_version) {
  const Account *accounts = input->accounts;
  AccountMeta metas[6] = {
      {accounts[PAYER].key, true, true},
      {accounts[COORDINATOR_INSTANCE].key, true, false},
      {accounts[COORDINATOR_ACCOUNT].key, true, false},
      {accounts[SYSTEM].key, false, false},
      {accounts[AUTHORIZER_PROGRAM].key, false, false},
      {accounts[COORDINATOR_MANIFEST].key, true, false},
  };
  u8 data[8 + 2 * sizeof(Key) + 4 + MAX_RUN_ID + 4 + MAX_CLIENT_VERSION];
  u64 discriminator = INIT_COORDINATOR;
  u32 lengths[2] = {(u32)run_id->length, (u32)client_version->length};
  copy(data, &discriminator, 8);
  copy(data + 8, accounts[RUN].key, sizeof(Key));  // the main authority
  copy(data + 40, &treasury->join_authority, sizeof(Key));
  copy(data + 72, &lengths[0], 4);
  copy(data + 76, run_id->at, run_id->length);
  copy(data + 76 + run_id->length, &lengths[1], 4);
  copy(data + 80 + run_id->length, client_version->at, client_version->length);
  u64 length = 80 + run_id->length + client_version->length;
  Instruction instruction = {accounts[COORDINATOR_PROGRAM].key, metas, COUNT(metas), data, length};
  return sol_invoke_signed_c(&instruction, accounts, input->accounts_length, 0, 0);
}

NOINLINE u64 run_create(Input *input) {
  Treasury treasury = {0};
  Slice run_id, client_version;
  Reader arguments = reader(input->data, input->data_length);
  treasury.index = read_u64(&arguments);
  read_string(&arguments, UINT32_MAX, &run_id);
  read_string(&arguments, MAX_CLIENT_VERSION, &client_version);
  read_key(&arguments, &treasury.main_authority);
  read_key(&arguments, &treasury.join_authority);
  TRY(ended(&arguments));
  REQUIRE(run_id.length > 0 && run_id.length <= MAX_RUN_ID, RunIdInvalidLength);

  TRY(need_accounts(input, CREATE_ACCOUNTS));
  Account *accounts = input->accounts;
  TRY(need_signer(&accounts[PAYER], "payer"));
  TRY(need_writable(&accounts[PAYER], "payer"));
  if (!accounts[COORDINATOR_PROGRAM].is_executable) return fail_account("coordinator_program", InvalidProgramExecutable);
  TRY(need_program(&accounts[ASSOCIATED_TOKEN], &ASSOCIATED_TOKEN_PROGRAM, "associated_token_program"));
  TRY(need_program(&accounts[TOKEN], &TOKEN_PROGRAM, "token_program"));
  TRY(need_program(&accounts[SYSTEM], &SYSTEM_PROGRAM, "system_program"));

  treasury.coordinator_instance = *accounts[COORDINATOR_INSTANCE].key;
  treasury.coordinator_account = *accounts[COORDINATOR_ACCOUNT].key;
  treasury.collateral_mint = *accounts[COLLATERAL_MINT].key;
  treasury.coordinator_program = *accounts[COORDINATOR_PROGRAM].key;
  TRY(make_treasury(input, &accounts[PAYER], &accounts[RUN], &treasury));
  Association vault = {&accounts[PAYER], &accounts[RUN_COLLATERAL], &accounts[RUN], &accounts[COLLATERAL_MINT]};
  TRY(make_associated(input, &vault));
  return init_coordinator(input, &treasury, &run_id, &client_version);
}
