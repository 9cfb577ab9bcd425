// Users are paid for the points that the coordinator gave them, each point once.
#include "machine/layout.h"
#include "treasurer/token.h"
#include "treasurer/treasurer.h"

enum { PAYER, NEW_USER, NEW_RUN, NEW_PARTICIPANT, SYSTEM, CREATE_ACCOUNTS };
enum { USER, USER_COLLATERAL, RUN, RUN_COLLATERAL, COORDINATOR_ACCOUNT, PARTICIPANT, TOKEN, CLAIM_ACCOUNTS };

NOINLINE u64 participant_create(Input *input) {
  Reader arguments = reader(input->data, input->data_length);
  TRY(ended(&arguments));
  TRY(need_accounts(input, CREATE_ACCOUNTS));
  Account *accounts = input->accounts;
  TRY(need_signer(&accounts[PAYER], "payer"));
  TRY(need_writable(&accounts[PAYER], "payer"));
  TRY(need_signer(&accounts[NEW_USER], "user"));
  Treasury treasury;
  TRY(load_treasury(input, &accounts[NEW_RUN], &treasury));
  TRY(need_program(&accounts[SYSTEM], &SYSTEM_PROGRAM, "system_program"));
  const Key *run = accounts[NEW_RUN].key, *user = accounts[NEW_USER].key;
  return make_participant(input, &accounts[PAYER], &accounts[NEW_PARTICIPANT], run, user);
}

// The points of a user in the run's coordinator account, which is checked; nothing for who never joined.
static NOINLINE u64 read_earned(const Account *account, const Treasury *treasury, const Key *user, u64 *earned) {
  const char *name = "coordinator_account";
  TRY(need_key(account, &treasury->coordinator_account, "run"));
  TRY(need_owned(account, &treasury->coordinator_program, COORDINATOR_DISCRIMINATOR, sizeof(Coordinator), name));
  const Coordinator *coordinator = (const Coordinator *)account->data;
  if (coordinator->version != COORDINATOR_VERSION || coordinator->members_length > MAX_CLIENTS)
    return fail_account(name, AccountDidNotDeserialize);
  *earned = 0;
  for (u64 i = 0; i < coordinator->members_length; i++)
    if (same_key(&coordinator->members[i].signer, user)) *earned = coordinator->members[i].earned;
  return 0;
}

// Count `points` as paid: no more than were earned, and no sum that overflows.
static u64 count(Treasury *treasury, Participant *participant, u64 earned, u64 points) {
  REQUIRE(participant->claimed_earned_points <= earned, InvalidParameter);
  REQUIRE(points <= earned - participant->claimed_earned_points, InvalidParameter);
  participant->claimed_earned_points += points;
  bool overflow = __builtin_add_overflow(
      participant->claimed_collateral_amount, points, &participant->claimed_collateral_amount);
  overflow |= __builtin_add_overflow(
      treasury->total_claimed_collateral_amount, points, &treasury->total_claimed_collateral_amount);
  overflow |=
      __builtin_add_overflow(treasury->total_claimed_earned_points, points, &treasury->total_claimed_earned_points);
  return overflow ? InvalidParameter : 0;
}

NOINLINE u64 participant_claim(Input *input) {
  Reader arguments = reader(input->data, input->data_length);
  u64 points = read_u64(&arguments);
  TRY(ended(&arguments));
  TRY(need_accounts(input, CLAIM_ACCOUNTS));
  Account *accounts = input->accounts;
  const Key *user = accounts[USER].key, *run = accounts[RUN].key;
  TRY(need_signer(&accounts[USER], "user"));
  TRY(need_writable(&accounts[RUN], "run"));
  Treasury treasury;
  TRY(load_treasury(input, &accounts[RUN], &treasury));
  TRY(need_own_tokens(&accounts[USER_COLLATERAL], &treasury.collateral_mint, user, "user_collateral"));
  TRY(need_associated(&accounts[RUN_COLLATERAL], &treasury.collateral_mint, run, "run_collateral"));
  u64 earned;
  TRY(read_earned(&accounts[COORDINATOR_ACCOUNT], &treasury, user, &earned));
  Participant participant;
  TRY(load_participant(input, &accounts[PARTICIPANT], run, user, &participant));
  TRY(need_program(&accounts[TOKEN], &TOKEN_PROGRAM, "token_program"));

  TRY(count(&treasury, &participant, earned, points));
  store_participant(&accounts[PARTICIPANT], &participant);
  store_treasury(&accounts[RUN], &treasury);
  RunSeeds seeds;
  seeds_of_run(&seeds, &treasury);
  Signer signer = {seeds.seeds, COUNT(seeds.seeds)};
  // One base unit of the token a point.
  Payment payment = {&accounts[RUN_COLLATERAL], &accounts[USER_COLLATERAL], &accounts[RUN], points};
  return pay(input, &payment, &signer);
}
