// What changes with every phase that a run enters.
#include "machine/run.h"

void enter(Run *run, u8 phase) {
  Coordinator *account = run->account;
  if (phase != ROUND_WITNESS) clear_votes(run);
  account->run_state = phase;
  account->phase_start = run->now;
  run->gathered = false;
  run->changed = true;
}
