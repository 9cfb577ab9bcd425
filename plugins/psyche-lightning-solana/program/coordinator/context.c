#include "coordinator/context.h"

_Static_assert(sizeof(Instance) <= INSTANCE_SIZE, "an instance fits into its account");

NOINLINE u64 open_instance(Context *context, Input *input, u64 at, u64 flags) {
  context->input = input;
  context->user = &input->accounts[0];
  context->instance = &input->accounts[at];
  TRY(need_signer(context->user, "user"));
  const char *name = "coordinator_instance";
  if (flags & CLOSING) TRY(need_writable(context->instance, name));
  TRY(need_owned(context->instance, input->program, INSTANCE_DISCRIMINATOR, INSTANCE_SIZE, name));
  const Instance *instance = (const Instance *)context->instance->data;
  if (instance->run_id_length > MAX_RUN_ID) return fail_account(name, AccountDidNotDeserialize);
  context->run_id = (Slice){instance->run_id, instance->run_id_length};
  Slice seeds[3] = {TEXT("coordinator"), context->run_id, {&instance->bump, 1}};
  TRY(need_seeds(context->instance, seeds, 3, input->program, name));
  context->main_authority = instance->main_authority;
  context->join_authority = instance->join_authority;
  if (flags & AUTHORITY) TRY(need_key(context->user, &context->main_authority, name));
  if (flags & JOIN_AUTHORITY) TRY(need_key(context->user, &context->join_authority, name));
  return 0;
}

static NOINLINE u64 open_coordinator(Context *context, u64 flags) {
  const char *name = "coordinator_account";
  Account *account = context->coordinator;
  if (!(flags & READ_ONLY_RUN)) TRY(need_writable(account, name));
  TRY(need_owned(account, context->input->program, COORDINATOR_DISCRIMINATOR, 16, name));
  if (account->data_length != sizeof(Coordinator)) return fail_account(name, CoordinatorAccountIncorrectSize);
  if (((const Coordinator *)account->data)->version != COORDINATOR_VERSION)
    return fail_account(name, AccountDidNotDeserialize);
  Key key = ((const Instance *)context->instance->data)->coordinator_account;
  return need_key(account, &key, name);
}

static NOINLINE u64 open_manifest(Context *context) {
  const char *name = "manifest";
  Account *account = context->manifest;
  TRY(need_writable(account, name));
  TRY(need_owned(account, context->input->program, MANIFEST_DISCRIMINATOR, sizeof(Manifest), name));
  const Manifest *manifest = (const Manifest *)account->data;
  Slice seeds[3] = {TEXT("manifest"), context->run_id, {&manifest->bump, 1}};
  TRY(need_seeds(account, seeds, 3, context->input->program, name));
  return need_key(context->coordinator, &manifest->coordinator_account, name);
}

NOINLINE u64 open_context(Context *context, Input *input, u64 at, u64 flags) {
  TRY(need_accounts(input, at + 3));
  TRY(open_instance(context, input, at, flags));
  context->coordinator = &input->accounts[at + 1];
  context->manifest = &input->accounts[at + 2];
  TRY(open_coordinator(context, flags));
  TRY(open_manifest(context));
  Clock clock;
  sol_get_clock_sysvar(&clock);
  Coordinator *account = (Coordinator *)context->coordinator->data;
  open_run(&context->run, account, (Manifest *)context->manifest->data, clock.slot, clock.unix_timestamp);
  return 0;
}

u64 close_context(Context *context) {
  close_run(&context->run);
  return 0;
}

NOINLINE u64 need_authorization(
    const Context *context, const Account *account, const Key *grantor, const Slice *scope) {
  Authorization authorization;
  TRY(read_authorization(account, &context->run.manifest->authorizer, &authorization, "authorization"));
  if (authorizes(&authorization, grantor, context->user->key, scope)) return 0;
  return fail_account("authorization", ConstraintRaw);
}
