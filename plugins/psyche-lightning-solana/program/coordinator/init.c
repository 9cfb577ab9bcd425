// The beginning and the end of a run's accounts.
#include "coordinator/context.h"

typedef struct {
  Key main_authority;
  Key join_authority;
  Slice run_id;
  Slice client_version;
} InitArguments;

enum { PAYER, INSTANCE, COORDINATOR, SYSTEM, AUTHORIZER, MANIFEST, INIT_ACCOUNTS };

static u64 read_arguments(const Input *input, InitArguments *arguments) {
  Reader fields = reader(input->data, input->data_length);
  read_key(&fields, &arguments->main_authority);
  read_key(&fields, &arguments->join_authority);
  read_string(&fields, UINT32_MAX, &arguments->run_id);
  read_string(&fields, sizeof ((Coordinator *)0)->client_version, &arguments->client_version);
  TRY(ended(&fields));
  REQUIRE(arguments->run_id.length > 0 && arguments->run_id.length <= MAX_RUN_ID, RunIdInvalidLength);
  return 0;
}

static u64 check_coordinator(const Account *account, const Key *program) {
  const char *name = "coordinator_account";
  TRY(need_writable(account, name));
  if (!same_key(account->owner, program)) return fail_account(name, AccountOwnedByWrongProgram);
  if (account->data_length != sizeof(Coordinator)) return fail_account(name, CoordinatorAccountIncorrectSize);
  return discriminator_of(account) == 0 ? 0 : fail_account(name, AccountDiscriminatorAlreadySet);
}

static NOINLINE u64 make_instance(Input *input, const InitArguments *arguments) {
  Account *accounts = input->accounts;
  Derivation derivation = {{TEXT("coordinator"), arguments->run_id}, 2, 0};
  TRY(create_derived(input, &accounts[PAYER], &accounts[INSTANCE], &derivation, INSTANCE_SIZE));
  Instance *instance = (Instance *)accounts[INSTANCE].data;
  instance->discriminator = INSTANCE_DISCRIMINATOR;
  instance->bump = derivation.bump;
  instance->main_authority = arguments->main_authority;
  instance->join_authority = arguments->join_authority;
  instance->coordinator_account = *accounts[COORDINATOR].key;
  instance->run_id_length = (u32)arguments->run_id.length;
  copy(instance->run_id, arguments->run_id.at, arguments->run_id.length);
  return 0;
}

static NOINLINE u64 make_manifest(Input *input, const InitArguments *arguments) {
  Account *accounts = input->accounts;
  Derivation derivation = {{TEXT("manifest"), arguments->run_id}, 2, 0};
  TRY(create_derived(input, &accounts[PAYER], &accounts[MANIFEST], &derivation, sizeof(Manifest)));
  Manifest *manifest = (Manifest *)accounts[MANIFEST].data;
  manifest->discriminator = MANIFEST_DISCRIMINATOR;
  manifest->bump = derivation.bump;
  manifest->coordinator_account = *accounts[COORDINATOR].key;
  manifest->authorizer = *accounts[AUTHORIZER].key;
  manifest->needed = 1;
  return 0;
}

NOINLINE u64 init_coordinator(Input *input) {
  InitArguments arguments;
  Account *accounts = input->accounts;
  TRY(read_arguments(input, &arguments));
  TRY(need_accounts(input, INIT_ACCOUNTS));
  TRY(need_signer(&accounts[PAYER], "payer"));
  TRY(need_writable(&accounts[PAYER], "payer"));
  TRY(check_coordinator(&accounts[COORDINATOR], input->program));
  TRY(need_program(&accounts[SYSTEM], &SYSTEM_PROGRAM, "system_program"));
  if (!accounts[AUTHORIZER].is_executable) return fail_account("authorizer", InvalidProgramExecutable);
  TRY(make_instance(input, &arguments));
  TRY(make_manifest(input, &arguments));
  Coordinator *account = (Coordinator *)accounts[COORDINATOR].data;
  fill_zero(account, sizeof *account);
  account->discriminator = COORDINATOR_DISCRIMINATOR;
  account->version = COORDINATOR_VERSION;
  copy(account->run_id, arguments.run_id.at, arguments.run_id.length);
  copy(account->client_version, arguments.client_version.at, arguments.client_version.length);
  return 0;
}

NOINLINE u64 free_coordinator(Input *input) {
  Context context;
  Reader arguments = reader(input->data, input->data_length);
  TRY(ended(&arguments));
  TRY(open_context(&context, input, 2, AUTHORITY | CLOSING));
  Account *spill = &input->accounts[1];
  TRY(need_writable(spill, "spill"));
  const Account *accounts[4] = {spill, context.instance, context.coordinator, context.manifest};
  TRY(need_distinct(accounts, COUNT(accounts), "spill"));
  REQUIRE(halted(&context.run), CloseCoordinatorNotHalted);
  TRY(close_account(context.instance, spill));
  TRY(close_account(context.coordinator, spill));
  return close_account(context.manifest, spill);
}
