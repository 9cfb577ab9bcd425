// The treasurer's own accounts: their bytes and their addresses.
#include "treasurer/treasurer.h"

#define TREASURY_LENGTH (8 + 1 + 8 + 5 * sizeof(Key) + 2 * 8 + sizeof(Key))
#define PARTICIPANT_LENGTH (8 + 1 + 2 * 8)

static u8 *put(u8 *at, const void *value, u64 length) {
  copy(at, value, length);
  return at + length;
}

NOINLINE void seeds_of_run(RunSeeds *seeds, const Treasury *treasury) {
  copy(seeds->index, &treasury->index, 8);
  seeds->seeds[0] = TEXT("Run");
  seeds->seeds[1] = (Slice){seeds->index, 8};
  seeds->seeds[2] = (Slice){&treasury->bump, 1};
}

NOINLINE u64 make_treasury(Input *input, const Account *payer, Account *account, Treasury *treasury) {
  Derivation address = {{TEXT("Run"), {&treasury->index, 8}}, 2, 0};
  TRY(create_derived(input, payer, account, &address, TREASURY_LENGTH));
  treasury->bump = address.bump;
  store_treasury(account, treasury);
  return 0;
}

NOINLINE void store_treasury(Account *account, const Treasury *treasury) {
  u64 discriminator = RUN_DISCRIMINATOR;
  u8 *at = put(account->data, &discriminator, 8);
  *at++ = treasury->bump;
  at = put(at, &treasury->index, 8);
  at = put(at, &treasury->main_authority, 5 * sizeof(Key));
  at = put(at, &treasury->total_claimed_collateral_amount, 2 * 8);
  put(at, &treasury->coordinator_program, sizeof(Key));
}

NOINLINE u64 load_treasury(const Input *input, const Account *account, Treasury *treasury) {
  TRY(need_owned(account, input->program, RUN_DISCRIMINATOR, TREASURY_LENGTH, "run"));
  Reader data = reader(account->data + 8, account->data_length - 8);
  treasury->bump = read_u8(&data);
  treasury->index = read_u64(&data);
  read_bytes(&data, &treasury->main_authority, 5 * sizeof(Key));
  treasury->total_claimed_collateral_amount = read_u64(&data);
  treasury->total_claimed_earned_points = read_u64(&data);
  read_key(&data, &treasury->coordinator_program);
  RunSeeds seeds;
  seeds_of_run(&seeds, treasury);
  return need_seeds(account, seeds.seeds, COUNT(seeds.seeds), input->program, "run");
}

_Static_assert(
    offsetof(Treasury, collateral_mint) == offsetof(Treasury, main_authority) + 4 * sizeof(Key), "five keys in a row");

// The seeds are used in place, so the caller keeps what they point to.
static Derivation participant_address(const Key *run, const Key *user) {
  return (Derivation){{TEXT("Participant"), {run, sizeof(Key)}, {user, sizeof(Key)}}, 3, 0};
}

NOINLINE u64 make_participant(Input *input, const Account *payer, Account *account, const Key *run, const Key *user) {
  Derivation address = participant_address(run, user);
  TRY(create_derived(input, payer, account, &address, PARTICIPANT_LENGTH));
  Participant participant = {address.bump, 0, 0};
  store_participant(account, &participant);
  return 0;
}

NOINLINE void store_participant(Account *account, const Participant *participant) {
  u64 discriminator = PARTICIPANT_DISCRIMINATOR;
  u8 *at = put(account->data, &discriminator, 8);
  *at++ = participant->bump;
  put(at, &participant->claimed_collateral_amount, 2 * 8);
}

NOINLINE u64 load_participant(
    const Input *input, const Account *account, const Key *run, const Key *user, Participant *participant) {
  const char *name = "participant";
  TRY(need_writable(account, name));
  TRY(need_owned(account, input->program, PARTICIPANT_DISCRIMINATOR, PARTICIPANT_LENGTH, name));
  Reader data = reader(account->data + 8, account->data_length - 8);
  participant->bump = read_u8(&data);
  participant->claimed_collateral_amount = read_u64(&data);
  participant->claimed_earned_points = read_u64(&data);
  Derivation address = participant_address(run, user);
  address.seeds[address.count] = (Slice){&participant->bump, 1};
  return need_seeds(account, address.seeds, address.count + 1, input->program, name);
}
