// The steps that move a run from phase to phase (machine.py's tick).
#include "machine/run.h"

#include "common/syscalls.h"

// Rounds without training at the end of an epoch, in which the last results are witnessed and applied.
#define DRAIN_ROUNDS 2
// More steps than one instruction can take: two rounds that drain without clients, a cool-down and a new epoch are ten.
#define MAX_STEPS 32
#define LAST_EPOCH UINT16_MAX

NOINLINE void open_run(Run *run, Coordinator *account, Manifest *manifest, u64 slot, i64 timestamp) {
  run->account = account;
  run->manifest = manifest;
  run->now = timestamp > 0 ? (u64)timestamp : 0;
  run->timestamp = timestamp;
  run->slot = slot;
  run->changed = false;
  // At rest while waiting, these two are the same; in a round, a quorum of complete reports never rests.
  run->gathered = account->run_state == WAITING_FOR_MEMBERS && count_pending(run) >= account->config.init_min_clients;
  run->heard = false;
}

NOINLINE void close_run(Run *run) {
  if (!run->changed) return;
  Coordinator *account = run->account;
  u8 phase = account->run_state;
  bool in_round = phase == ROUND_TRAIN || phase == ROUND_WITNESS;
  account->first_round = phase == WARMUP || (in_round && current_round(run)->height == 0);
  account->is_warmup_first_tick = phase == WAITING_FOR_MEMBERS;
  account->is_training_first_tick = phase == WAITING_FOR_MEMBERS || phase == WARMUP;
  account->nonce++;
}

// The run's seed of a round: LE64 of SHA-256(unix_timestamp, slot), as Psyche has it.
static u64 round_seed(const Run *run) {
  u64 digest[4];
  Slice parts[2] = {{&run->timestamp, 8}, {&run->slot, 8}};
  sol_sha256(parts, 2, (u8 *)digest);
  return digest[0];
}

// Height at which the epoch began to drain, in rounds since its start; none while it trains.
static u64 trained_rounds(const Coordinator *account) {
  return account->last_step == 0 ? UINT64_MAX : (u64)account->last_step - account->start_step;
}

bool trains(const Run *run, const Round *round) { return round->height < trained_rounds(run->account); }

static u64 round_batch(const Run *run, const Round *round) {
  const Coordinator *account = run->account;
  return trains(run, round) ? batch_size(&account->config, round->data_index, account->model.max_seq_len) : 0;
}

static NOINLINE void begin_round(Run *run, u32 height, u64 data_index) {
  Coordinator *account = run->account;
  account->rounds_head = height % STORED_ROUNDS;
  Round *round = current_round(run);
  fill_zero(round, sizeof *round);
  round->data_index = data_index;
  round->seed = round_seed(run);
  round->height = height;
  round->clients_length = (u16)account->clients.length;
  if (height == 0) account->next_active++;  // everybody joins again for the next epoch
  enter(run, ROUND_TRAIN);
}

static bool step_waiting(Run *run) {
  Coordinator *account = run->account;
  const Config *config = &account->config;
  u64 pending = count_pending(run);
  if (pending < config->init_min_clients) {
    if (!run->gathered) return false;
    enter(run, WAITING_FOR_MEMBERS);
    return true;
  }
  bool alone = config->init_min_clients == 1 && pending == 1;
  if (!alone && !run->gathered) {
    enter(run, WAITING_FOR_MEMBERS);
    run->gathered = true;
    return true;
  }
  if (!alone && !passed(run, account->phase_start, config->waiting_for_members_extra_time)) return false;
  form_epoch(run);
  return true;
}

static bool step_warmup(Run *run) {
  Coordinator *account = run->account;
  Manifest *manifest = run->manifest;
  if (remove_departed(run, 0)) return true;
  if (account->clients.length < account->config.min_clients) {
    enter(run, WAITING_FOR_MEMBERS);
    return true;
  }
  bool expired = passed(run, account->phase_start, account->config.warmup_time);
  if (manifest->votes_length < account->clients.length && !expired) return false;
  if (manifest->votes_length == 0) {
    forget_silent_holders(run);
    enter(run, WAITING_FOR_MEMBERS);
    return true;
  }
  // When parameters are agreed, every report is of those; else the first decides, and they are what is agreed.
  manifest->epoch_digest = manifest->votes[0].digest;
  if (zero_key(&manifest->checkpoint_digest)) {
    manifest->checkpoint_digest = manifest->epoch_digest;
    manifest->checkpoint_step = account->progress.step - 1;
  }
  begin_round(run, 0, account->progress.epoch_start_data_index);
  return true;
}

// Whether the epoch ends after the training round `round`, whose step is counted and whose departed are removed.
static bool is_ending(const Run *run, const Round *round) {
  const Coordinator *account = run->account;
  return passed(run, account->epoch_start, account->config.epoch_time) ||
         account->clients.length < account->config.min_clients ||
         round->witnesses_length < quorum(witness_count(run, round)) ||
         account->progress.step > account->config.total_steps || account->pending_pause;
}

static NOINLINE void end_round(Run *run) {
  Coordinator *account = run->account;
  const Round *round = current_round(run);
  u32 height = round->height;
  u64 data_index = round->data_index + round_batch(run, round);
  if (trains(run, round)) account->progress.step++;
  remove_departed(run, height);
  if (account->last_step == 0) {
    if (round->witnesses_length == 0) {
      withdraw_everyone(run);
      enter(run, COOLDOWN);
      return;
    }
    if (is_ending(run, round)) account->last_step = account->progress.step;
  } else if (height + 1 - trained_rounds(account) == DRAIN_ROUNDS) {
    enter(run, COOLDOWN);
    return;
  }
  begin_round(run, height + 1, data_index);
}

static bool step_round(Run *run) {
  const Coordinator *account = run->account;
  const Round *round = current_round(run);
  bool training = account->run_state == ROUND_TRAIN;
  // Each report that came in training says "I have everything"; those that come later do not.
  bool heard = run->heard || (training && round->witnesses_length >= quorum(witness_count(run, round)));
  u64 length = training ? account->config.max_round_train_time : account->config.round_witness_time;
  if (!heard && !passed(run, account->phase_start, length) && !nobody_left_to_report(run)) return false;
  if (training) {
    enter(run, ROUND_WITNESS);
    run->heard = heard;
  } else {
    end_round(run);
  }
  return true;
}

static bool step_cooldown(Run *run) {
  Coordinator *account = run->account;
  Progress *progress = &account->progress;
  const Round *round = current_round(run);
  bool agreed;
  if (!decide_checkpoint(run, passed(run, account->phase_start, account->config.cooldown_time), &agreed)) return false;
  if (agreed)
    progress->epoch_start_data_index = round->data_index + round_batch(run, round);
  else  // back to where the epoch began: its steps are trained again
    progress->step = account->start_step;
  reward_and_hold(run, agreed);
  checkpoint_to_peers(&account->model.checkpoint);
  bool over = progress->step > account->config.total_steps || progress->epoch == LAST_EPOCH;
  if (progress->epoch != LAST_EPOCH) progress->epoch++;
  account->cold_start_epoch = account->pending_pause;
  if (account->pending_pause) {
    withdraw_everyone(run);
    account->pending_pause = 0;
    enter(run, PAUSED);
  } else {
    enter(run, over ? FINISHED : WAITING_FOR_MEMBERS);
  }
  return true;
}

static bool step(Run *run) {
  switch (run->account->run_state) {
    case WAITING_FOR_MEMBERS: return step_waiting(run);
    case WARMUP: return step_warmup(run);
    case ROUND_TRAIN:
    case ROUND_WITNESS: return step_round(run);
    case COOLDOWN: return step_cooldown(run);
    default: return false;
  }
}

NOINLINE void settle(Run *run) {
  for (int i = 0; i < MAX_STEPS && step(run); i++) continue;
}

u64 tick(Run *run) {
  REQUIRE(!halted(run), Halted);
  settle(run);
  return 0;
}
