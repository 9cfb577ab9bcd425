// The accounts of an instruction on a run, checked.
#pragma once
#include "common/authorization.h"
#include "coordinator/arguments.h"
#include "machine/run.h"

#define INSTANCE_DISCRIMINATOR 0xfc1f18af1099099cull  // S("account:CoordinatorInstance")[:8]
#define INSTANCE_SIZE 173

// The instance account: which coordinator account the run has, and who decides (Psyche's instance_state, borsh).
typedef struct __attribute__((packed)) {
  u64 discriminator;
  u8 bump;
  Key main_authority;
  Key join_authority;
  Key coordinator_account;
  u32 run_id_length;
  u8 run_id[MAX_RUN_ID];
} Instance;

typedef struct {
  Input *input;
  const Account *user;  // the first account: who signs
  Account *instance;
  Account *coordinator;
  Account *manifest;
  Key main_authority;
  Key join_authority;
  Slice run_id;
  Run run;
} Context;

enum {
  AUTHORITY = 1,       // the user has to be the run's main authority
  READ_ONLY_RUN = 2,   // the coordinator account need not be writable
  CLOSING = 4,         // the instance has to be writable
  JOIN_AUTHORITY = 8,  // the user has to be the run's join authority
};

// The instance alone, for what does not touch the run.
u64 open_instance(Context *context, Input *input, u64 at, u64 flags);
// The user first, then from `at` on: instance, coordinator account, manifest.
u64 open_context(Context *context, Input *input, u64 at, u64 flags);
// The last of what an instruction does.
u64 close_context(Context *context);

// The authorization in `account` lets the user do what `scope` names in the name of `grantor`.
u64 need_authorization(const Context *context, const Account *account, const Key *grantor, const Slice *scope);

// What the entry point does once the input is read.
u64 process_instruction(Input *input);

// Handlers. Each decodes its arguments, checks its accounts, and does its work.
u64 init_coordinator(Input *input);
u64 free_coordinator(Input *input);
u64 update(Input *input);
u64 update_client_version(Input *input);
u64 set_future_epoch_rates(Input *input);
u64 set_paused(Input *input);
u64 go_back_to(Input *input);
u64 join_run(Input *input);
u64 withdraw_from_run(Input *input);
u64 kick(Input *input);
u64 tick_run(Input *input);
u64 send_witness(Input *input);
u64 send_warmup_witness(Input *input);
u64 send_health_check(Input *input);
u64 set_checkpoint(Input *input);
u64 set_manifest(Input *input);
u64 set_address(Input *input);
