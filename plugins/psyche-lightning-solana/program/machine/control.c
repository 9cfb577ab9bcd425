// What the run's owner asks for: pause, resume, and other parameters than the newest.
#include "machine/run.h"

#include "common/syscalls.h"

u64 pause(Run *run) {
  Coordinator *account = run->account;
  REQUIRE(!halted(run), CoordinatorErrorHalted);
  u8 phase = account->run_state;
  if (phase == ROUND_TRAIN || phase == ROUND_WITNESS) {
    if (!account->pending_pause) run->changed = true;
    account->pending_pause = 1;
    return 0;
  }
  withdraw_everyone(run);
  account->cold_start_epoch = 1;
  enter(run, PAUSED);
  return 0;
}

// Open a paused run to members, or one that never ran; both only with a sane configuration.
u64 resume(Run *run) {
  Coordinator *account = run->account;
  REQUIRE(config_is_sane(&account->config), ConfigSanityCheckFailed);
  REQUIRE(model_is_sane(&account->model), ModelSanityCheckFailed);
  REQUIRE(cold_start_fits(&account->config, &account->model), ModelSanityCheckFailed);
  bool unstarted = account->run_state == UNINITIALIZED;
  if (unstarted && account->progress.step == 0) account->progress.step = 1;
  REQUIRE(account->progress.step > 0, ProgressSanityCheckFailed);
  REQUIRE(unstarted || account->run_state == PAUSED, CoordinatorErrorCannotResume);
  enter(run, is_finished(run) ? FINISHED : WAITING_FOR_MEMBERS);
  account->next_active++;
  settle(run);
  return 0;
}

// The samples from the stored round that trains the step after `step` on are trained again.
static void go_back(Run *run, u32 step) {
  Coordinator *account = run->account;
  for (u64 slot = 0; slot < STORED_ROUNDS; slot++) {
    const Round *round = &account->rounds[slot];
    bool found = round->clients_length > 0 && trains(run, round) && account->start_step + round->height == step + 1;
    if (found) account->progress.epoch_start_data_index = round->data_index;
  }
}

// Whether the run is already there, in this phase since now.
static NOINLINE bool is_back(const Run *run, u32 step, const Key *digest) {
  const Coordinator *account = run->account;
  const Manifest *manifest = run->manifest;
  bool there = manifest->checkpoint_step == step && same_key(&manifest->checkpoint_digest, digest);
  for (u64 i = 0; i < within(account->members_length, MAX_CLIENTS); i++) there &= !has_place(&manifest->holders, i);
  return there && settled(run) && account->rounds[0].clients_length == 0 &&
         (account->run_state == PAUSED || (account->run_state == WAITING_FOR_MEMBERS && account->phase_start == run->now));
}

u64 restart_from(Run *run, u32 step, const Key *digest) {
  Coordinator *account = run->account;
  Manifest *manifest = run->manifest;
  u8 phase = account->run_state;
  REQUIRE(phase == WAITING_FOR_MEMBERS || phase == WARMUP || phase == PAUSED, CoordinatorErrorInvalidRunState);
  REQUIRE(!zero_key(digest) && step < account->progress.step, CoordinatorErrorInvalidCheckpoint);
  if (is_back(run, step, digest)) return 0;
  go_back(run, step);
  manifest->checkpoint_digest = *digest;
  manifest->checkpoint_step = step;
  account->progress.step = step + 1;
  fill_zero(account->rounds, sizeof account->rounds);
  fill_zero(manifest->trainers, sizeof manifest->trainers);
  fill_zero(&manifest->holders, sizeof manifest->holders);
  account->rounds_head = 0;
  run->changed = true;
  if (phase != PAUSED) enter(run, WAITING_FOR_MEMBERS);
  settle(run);
  return 0;
}
