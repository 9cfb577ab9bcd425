// What the run's owner asks for: pause and resume.
#include "machine/run.h"

u64 pause(Run *run) {
  Coordinator *account = run->account;
  REQUIRE(!halted(run), Halted);
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
  REQUIRE(unstarted || account->run_state == PAUSED, CannotResume);
  enter(run, is_finished(run) ? FINISHED : WAITING_FOR_MEMBERS);
  account->next_active++;
  settle(run);
  return 0;
}
