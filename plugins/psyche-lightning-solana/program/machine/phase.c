// What changes with every phase that a run enters.
#include "machine/run.h"

#include "common/syscalls.h"

void enter(Run *run, u8 phase) {
  Coordinator *account = run->account;
  // Reports of warm-up stay for as long as its epoch trains, votes until they are counted.
  if (phase != ROUND_TRAIN && phase != ROUND_WITNESS) {
    if (account->run_state == WARMUP) fill_zero(&account->rounds[0], sizeof account->rounds[0]);
    clear_votes(run);
  }
  account->run_state = phase;
  account->phase_start = run->now;
  run->gathered = false;
  run->heard = false;
  run->changed = true;
}
