// What the main authority sets.
#include "coordinator/context.h"

typedef struct {
  bool has_metadata, has_config, has_model, has_progress;
  Metadata metadata;
  Config config;
  Progress progress;
  Model model;
} Update;

// Set part of an account, and note whether that changed it.
static NOINLINE void set(Run *run, void *to, const void *from, u64 length) {
  if (same_bytes(to, from, length)) return;
  copy(to, from, length);
  run->changed = true;
}

static NOINLINE u64 read_update(const Input *input, Update *update) {
  Reader fields = reader(input->data, input->data_length);
  if ((update->has_metadata = read_bool(&fields))) read_metadata(&fields, &update->metadata);
  if ((update->has_config = read_bool(&fields))) read_config(&fields, &update->config);
  if ((update->has_model = read_bool(&fields))) read_model(&fields, &update->model);
  if ((update->has_progress = read_bool(&fields))) read_progress(&fields, &update->progress);
  return ended(&fields);
}

static NOINLINE u64 apply_update(Run *run, const Update *update) {
  Coordinator *account = run->account;
  bool halting = update->has_config || update->has_model || update->has_progress;
  REQUIRE(account->run_state != FINISHED, UpdateConfigFinished);
  REQUIRE(!halting || halted(run), UpdateConfigNotHalted);
  if (update->has_metadata) set(run, &account->metadata, &update->metadata, sizeof(Metadata));
  if (update->has_config) {
    REQUIRE(config_is_sane(&update->config), ConfigSanityCheckFailed);
    set(run, &account->config, &update->config, sizeof(Config));
  }
  if (update->has_model) {
    REQUIRE(model_is_sane(&update->model), ModelSanityCheckFailed);
    set(run, &account->model, &update->model, sizeof(Model));
  }
  bool fits = !(update->has_config || update->has_model) || cold_start_fits(&account->config, &account->model);
  REQUIRE(fits, ModelSanityCheckFailed);
  if (update->has_progress) {
    REQUIRE(progress_is_sane(&update->progress), ProgressSanityCheckFailed);
    set(run, &account->progress, &update->progress, sizeof(Progress));
  }
  return 0;
}

NOINLINE u64 update(Input *input) {
  Update update;
  Context context;
  TRY(read_update(input, &update));
  TRY(open_context(&context, input, 1, AUTHORITY));
  TRY(apply_update(&context.run, &update));
  return close_context(&context);
}

NOINLINE u64 update_client_version(Input *input) {
  u8 version[sizeof ((Coordinator *)0)->client_version];
  Slice text;
  Context context;
  Reader fields = reader(input->data, input->data_length);
  read_string(&fields, sizeof version, &text);
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, AUTHORITY));
  REQUIRE(halted(&context.run), UpdateConfigNotHalted);
  fill_zero(version, sizeof version);
  copy(version, text.at, text.length);
  set(&context.run, context.run.account->client_version, version, sizeof version);
  return close_context(&context);
}

NOINLINE u64 set_future_epoch_rates(Input *input) {
  Context context;
  Rates rates = {0, 0};
  Reader fields = reader(input->data, input->data_length);
  bool has_earning = read_bool(&fields);
  if (has_earning) rates.earning_total_shared = read_u64(&fields);
  bool has_slashing = read_bool(&fields);
  if (has_slashing) rates.slashing_per_client = read_u64(&fields);
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, AUTHORITY));
  Rates *future = &context.run.account->future_rates;
  if (!has_earning) rates.earning_total_shared = future->earning_total_shared;
  if (!has_slashing) rates.slashing_per_client = future->slashing_per_client;
  set(&context.run, future, &rates, sizeof rates);
  return close_context(&context);
}

NOINLINE u64 set_paused(Input *input) {
  Context context;
  Reader fields = reader(input->data, input->data_length);
  bool paused = read_bool(&fields);
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, AUTHORITY));
  TRY((paused ? pause : resume)(&context.run));
  return close_context(&context);
}

NOINLINE u64 go_back_to(Input *input) {
  Context context;
  Key digest;
  Reader fields = reader(input->data, input->data_length);
  u32 step = read_u32(&fields);
  read_key(&fields, &digest);
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, AUTHORITY));
  TRY(restart_from(&context.run, step, &digest));
  return close_context(&context);
}

// Where the run's manifest lies, and its digest: fixed while the run goes on, once there is one.
NOINLINE u64 set_manifest(Input *input) {
  Context context;
  Key digest;
  Slice address;
  Reader fields = reader(input->data, input->data_length);
  read_key(&fields, &digest);
  read_string(&fields, MAX_ADDRESS, &address);
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, AUTHORITY | READ_ONLY_RUN));
  Manifest *manifest = context.run.manifest;
  REQUIRE(halted(&context.run) || zero_key(&manifest->manifest_digest), UpdateConfigNotHalted);
  manifest->manifest_digest = digest;
  fill_zero(manifest->manifest_address, MAX_ADDRESS);
  copy(manifest->manifest_address, address.at, address.length);
  return 0;
}

// Another source of the checkpoint: by the main authority, or whom it has authorized.
NOINLINE u64 set_checkpoint(Input *input) {
  Context context;
  CheckpointSource checkpoint;
  Reader fields = reader(input->data, input->data_length);
  read_checkpoint(&fields, &checkpoint);
  TRY(ended(&fields));
  TRY(open_context(&context, input, 1, 0));
  Run *run = &context.run;
  if (!same_key(context.user->key, &context.main_authority)) {
    REQUIRE(input->accounts_length > 4, CoordinatorErrorInvalidCheckpoint);
    const Slice scope = TEXT("CoordinatorCheckpoint");
    TRY(need_authorization(&context, &input->accounts[4], &context.main_authority, &scope));
  }
  CheckpointSource source = run->account->model.checkpoint;
  if (replace_checkpoint(&source, &checkpoint)) set(run, &run->account->model.checkpoint, &source, sizeof source);
  if (!halted(run)) settle(run);
  return close_context(&context);
}
