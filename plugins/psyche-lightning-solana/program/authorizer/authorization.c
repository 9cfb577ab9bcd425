#include "authorizer/authorizer.h"

#define MAX_SEED 32

// The address is derived from what the account says; its bump goes last.
static void name_address(Slice *seeds, const Authorization *authorization) {
  seeds[0] = TEXT("Authorization");
  seeds[1] = (Slice){&authorization->grantor, sizeof(Key)};
  seeds[2] = (Slice){&authorization->grantee, sizeof(Key)};
  seeds[3] = authorization->scope;
}

NOINLINE u64 load_authorization(const Input *input, const Account *account, Authorization *authorization) {
  TRY(need_writable(account, "authorization"));
  TRY(read_authorization(account, input->program, authorization, "authorization"));
  Slice seeds[5];
  name_address(seeds, authorization);
  seeds[4] = (Slice){&authorization->bump, 1};
  return need_seeds(account, seeds, COUNT(seeds), input->program, "authorization");
}

u64 authorization_create(Input *input) {
  Authorization made = {0};
  Reader arguments = reader(input->data, input->data_length);
  read_key(&arguments, &made.grantee);
  made.scope.length = read_u32(&arguments);
  made.scope.at = read_raw(&arguments, made.scope.length);
  TRY(ended(&arguments));

  TRY(need_accounts(input, 4));
  Account *accounts = input->accounts;
  Account *payer = &accounts[0], *grantor = &accounts[1], *account = &accounts[2];
  TRY(need_signer(payer, "payer"));
  TRY(need_writable(payer, "payer"));
  TRY(need_signer(grantor, "grantor"));
  TRY(need_program(&accounts[3], &SYSTEM_PROGRAM, "system_program"));
  REQUIRE(made.scope.length <= MAX_SEED, fail_account("authorization", ConstraintSeeds));

  made.grantor = *grantor->key;
  Derivation address = {.count = 4};
  name_address(address.seeds, &made);
  TRY(create_derived(input, payer, account, &address, authorization_length(made.scope.length, 0)));

  // Inactive: what the grantor grants, it grants with an update, so that every grant has a time.
  made.bump = address.bump;
  u8 *scope = account->data + 8 + 1 + 2 * sizeof(Key) + 4;
  copy(scope, made.scope.at, made.scope.length);
  write_authorization(account, &made);
  return 0;
}

u64 authorization_grantor_update(Input *input) {
  Reader arguments = reader(input->data, input->data_length);
  bool active = read_bool(&arguments);
  TRY(ended(&arguments));

  TRY(need_accounts(input, 2));
  Account *grantor = &input->accounts[0], *account = &input->accounts[1];
  TRY(need_signer(grantor, "grantor"));
  Authorization authorization;
  TRY(load_authorization(input, account, &authorization));
  REQUIRE(same_key(&authorization.grantor, grantor->key), fail_account("authorization", ConstraintRaw));

  Clock clock;
  sol_get_clock_sysvar(&clock);
  authorization.active = active;
  authorization.grantor_update = clock.unix_timestamp;
  write_authorization(account, &authorization);
  return 0;
}

u64 authorization_grantee_update(Input *input) {
  Reader arguments = reader(input->data, input->data_length);
  bool clear = read_bool(&arguments);
  u32 added_length = read_u32(&arguments);
  const u8 *added = read_raw(&arguments, added_length * sizeof(Key));
  TRY(ended(&arguments));

  TRY(need_accounts(input, 4));
  Account *payer = &input->accounts[0], *grantee = &input->accounts[1], *account = &input->accounts[2];
  TRY(need_signer(payer, "payer"));
  TRY(need_writable(payer, "payer"));
  TRY(need_signer(grantee, "grantee"));
  Authorization authorization;
  TRY(load_authorization(input, account, &authorization));
  REQUIRE(same_key(&authorization.grantee, grantee->key), fail_account("authorization", ConstraintRaw));
  TRY(need_program(&input->accounts[3], &SYSTEM_PROGRAM, "system_program"));

  u64 kept = clear ? 0 : authorization.delegates_length;
  u8 *delegates = (u8 *)authorization.delegates;
  TRY(resize_account(input, payer, account, authorization_length(authorization.scope.length, kept + added_length)));
  copy(delegates + kept * sizeof(Key), added, added_length * sizeof(Key));
  authorization.delegates_length = (u32)(kept + added_length);
  write_authorization(account, &authorization);
  return 0;
}

u64 authorization_close(Input *input) {
  Reader arguments = reader(input->data, input->data_length);
  TRY(ended(&arguments));

  TRY(need_accounts(input, 4));
  Account *grantor = &input->accounts[0], *spill = &input->accounts[1], *account = &input->accounts[2];
  TRY(need_signer(grantor, "grantor"));
  TRY(need_writable(spill, "spill"));
  Authorization authorization;
  TRY(load_authorization(input, account, &authorization));
  REQUIRE(same_key(&authorization.grantor, grantor->key), fail_account("authorization", ConstraintRaw));
  const Account *both[2] = {spill, account};
  TRY(need_distinct(both, COUNT(both), "spill"));
  TRY(need_program(&input->accounts[3], &SYSTEM_PROGRAM, "system_program"));

  REQUIRE(!authorization.active, AuthorizationActiveIsTrue);
  Clock clock;
  sol_get_clock_sysvar(&clock);
  // The grantee paid for the list of delegates: the grantor cannot take that rent at once.
  if (authorization.delegates_length > 0 && clock.unix_timestamp - authorization.grantor_update < CLOSING_DELAY)
    return AuthorizationClosingConditionsNotReachedYet;
  return close_account(account, spill);
}
