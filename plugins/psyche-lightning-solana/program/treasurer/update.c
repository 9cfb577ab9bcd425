// The run's main authority commands its coordinator, which obeys the run only: each command is forwarded, signed by it.
#include "coordinator/arguments.h"
#include "treasurer/treasurer.h"

// S("global:<name>")[:8] of the coordinator
#define UPDATE 0x7ffd3f9eb058c8dbull
#define SET_FUTURE_EPOCH_RATES 0x81b6c8c757a015efull
#define SET_PAUSED 0xdaa6e1b0c07d3c5bull
#define UPDATE_CLIENT_VERSION 0xfb0d02333c2e15c1ull
#define SET_MANIFEST 0x57d273dc5df0af75ull
#define CHECKPOINT 0xfcb88ff0cc13c8d5ull
#define RESTART_FROM 0xc71a09fe2374830aull

// More than the longest arguments: those of `update`.
#define MAX_ARGUMENTS 1024

enum { AUTHORITY_ACCOUNT, RUN, COORDINATOR_INSTANCE, COORDINATOR_ACCOUNT, COORDINATOR_PROGRAM, MANIFEST, UPDATE_ACCOUNTS };

// The run whose main authority signs, with the coordinator that it was created with.
static NOINLINE u64 open_run_account(const Input *input, Treasury *treasury) {
  TRY(need_accounts(input, UPDATE_ACCOUNTS));
  const Account *accounts = input->accounts;
  TRY(need_signer(&accounts[AUTHORITY_ACCOUNT], "authority"));
  TRY(load_treasury(input, &accounts[RUN], treasury));
  TRY(need_key(&accounts[AUTHORITY_ACCOUNT], &treasury->main_authority, "run"));
  TRY(need_key(&accounts[COORDINATOR_INSTANCE], &treasury->coordinator_instance, "run"));
  TRY(need_key(&accounts[COORDINATOR_ACCOUNT], &treasury->coordinator_account, "run"));
  return need_program(&accounts[COORDINATOR_PROGRAM], &treasury->coordinator_program, "coordinator_program");
}

static NOINLINE u64 forward(const Input *input, const Treasury *treasury, u64 discriminator, const Slice *arguments) {
  const Account *accounts = input->accounts;
  AccountMeta metas[4] = {
      {accounts[RUN].key, false, true},
      {accounts[COORDINATOR_INSTANCE].key, false, false},
      {accounts[COORDINATOR_ACCOUNT].key, true, false},
      {accounts[MANIFEST].key, true, false},
  };
  u8 data[8 + MAX_ARGUMENTS];
  REQUIRE(arguments->length <= MAX_ARGUMENTS, InstructionDidNotDeserialize);
  copy(data, &discriminator, 8);
  copy(data + 8, arguments->at, arguments->length);
  Instruction instruction = {accounts[COORDINATOR_PROGRAM].key, metas, COUNT(metas), data, 8 + arguments->length};
  RunSeeds seeds;
  seeds_of_run(&seeds, treasury);
  Signer signer = {seeds.seeds, COUNT(seeds.seeds)};
  return sol_invoke_signed_c(&instruction, accounts, input->accounts_length, &signer, 1);
}

// What is to be forwarded: the bytes of the arguments, and whether there is anything in them.
typedef struct {
  Slice update, rates, paused, client_version;
  bool has_update, has_rates, has_paused, has_client_version;
} Commands;

static Slice since(const u8 *start, const Reader *arguments) { return (Slice){start, (u64)(arguments->at - start)}; }

static NOINLINE void read_update_command(Reader *arguments, Commands *commands) {
  union {
    Metadata metadata;
    Config config;
    Model model;
    Progress progress;
  } ignored;
  const u8 *start = arguments->at;
  bool given[4];
  if ((given[0] = read_bool(arguments))) read_metadata(arguments, &ignored.metadata);
  if ((given[1] = read_bool(arguments))) read_config(arguments, &ignored.config);
  if ((given[2] = read_bool(arguments))) read_model(arguments, &ignored.model);
  if ((given[3] = read_bool(arguments))) read_progress(arguments, &ignored.progress);
  commands->update = since(start, arguments);
  commands->has_update = given[0] || given[1] || given[2] || given[3];
}

static NOINLINE void read_commands(Reader *arguments, Commands *commands) {
  read_update_command(arguments, commands);
  const u8 *start = arguments->at;
  bool earning, slashing;
  if ((earning = read_bool(arguments))) read_u64(arguments);
  if ((slashing = read_bool(arguments))) read_u64(arguments);
  commands->rates = since(start, arguments);
  commands->has_rates = earning || slashing;
  // These two have no option in the coordinator's own arguments.
  commands->has_paused = read_bool(arguments);
  start = arguments->at;
  if (commands->has_paused) read_bool(arguments);
  commands->paused = since(start, arguments);
  commands->has_client_version = read_bool(arguments);
  start = arguments->at;
  Slice text;
  if (commands->has_client_version) read_string(arguments, UINT32_MAX, &text);
  commands->client_version = since(start, arguments);
}

NOINLINE u64 run_update(Input *input) {
  Commands commands;
  Treasury treasury;
  Reader arguments = reader(input->data, input->data_length);
  read_commands(&arguments, &commands);
  TRY(ended(&arguments));
  TRY(open_run_account(input, &treasury));
  if (commands.has_update) TRY(forward(input, &treasury, UPDATE, &commands.update));
  if (commands.has_rates) TRY(forward(input, &treasury, SET_FUTURE_EPOCH_RATES, &commands.rates));
  if (commands.has_paused) TRY(forward(input, &treasury, SET_PAUSED, &commands.paused));
  if (commands.has_client_version) TRY(forward(input, &treasury, UPDATE_CLIENT_VERSION, &commands.client_version));
  return 0;
}

static NOINLINE u64 forward_all(Input *input, u64 discriminator) {
  Treasury treasury;
  TRY(open_run_account(input, &treasury));
  Slice arguments = {input->data, input->data_length};
  return forward(input, &treasury, discriminator, &arguments);
}

u64 run_set_manifest(Input *input) { return forward_all(input, SET_MANIFEST); }

u64 run_checkpoint(Input *input) { return forward_all(input, CHECKPOINT); }

u64 run_restart_from(Input *input) { return forward_all(input, RESTART_FROM); }
