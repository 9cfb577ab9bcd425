// The steps that move a run from phase to phase (machine.py's tick).
#include "machine/run.h"

#include "common/syscalls.h"

// Most rounds without training at an epoch's end: the last results are witnessed, and the parameters after them named.
#define DRAIN_ROUNDS 2
// More steps than one instruction can take: the end of an epoch and a new one.
#define MAX_STEPS 32
#define LAST_EPOCH UINT16_MAX

NOINLINE void open_run(Run *run, Coordinator *account, Manifest *manifest, u64 slot, i64 timestamp) {
  run->account = account;
  run->manifest = manifest;
  run->now = timestamp > 0 ? (u64)timestamp : 0;
  run->timestamp = timestamp;
  run->slot = slot;
  run->changed = false;
  // At rest while waiting, these two are the same.
  run->gathered = account->run_state == WAITING_FOR_MEMBERS && has_gathered(run);
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

static void set_trainers(Run *run) {
  const ClientList *clients = &run->account->clients;
  Places *trainers = &run->manifest->trainers[run->account->rounds_head];
  fill_zero(trainers, sizeof *trainers);
  for (u64 i = 0; i < within(clients->length, MAX_CLIENTS); i++) add_place(trainers, clients->items[i].place);
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
  set_trainers(run);
  if (height == 0) account->next_active++;  // everybody joins again for the next epoch
  enter(run, ROUND_TRAIN);
}

static bool step_waiting(Run *run) {
  Coordinator *account = run->account;
  const Config *config = &account->config;
  if (!has_gathered(run)) {
    if (!run->gathered) return false;
    enter(run, WAITING_FOR_MEMBERS);
    return true;
  }
  bool alone = config->init_min_clients == 1 && count_pending(run) == 1;
  if (!alone && !run->gathered) {
    enter(run, WAITING_FOR_MEMBERS);
    run->gathered = true;
    return true;
  }
  if (!alone && !passed(run, account->phase_start, config->waiting_for_members_extra_time)) return false;
  form_epoch(run);
  return true;
}

static bool give_up_warmup(Run *run) {
  if (zero_key(&run->manifest->checkpoint_digest)) change_first(run);
  enter(run, WAITING_FOR_MEMBERS);
  return true;
}

bool is_finished(const Run *run) {
  bool nothing = zero_key(&run->manifest->checkpoint_digest);  // no epoch ever began
  return run->account->progress.step > run->account->config.total_steps && (settled(run) || nothing);
}

// The epoch begins with the parameters that a quorum of its members reports.
static NOINLINE void begin_epoch(Run *run, const Key *digest) {
  Coordinator *account = run->account;
  Manifest *manifest = run->manifest;
  manifest->epoch_digest = *digest;
  manifest->checkpoint_digest = *digest;
  manifest->checkpoint_step = account->progress.step - 1;
  manifest->needed = (u32)needed_reports(run);
  account->start_step = account->progress.step;
  account->last_step = 0;
  account->rounds_head = 0;
  fill_zero(account->rounds, sizeof account->rounds);
  fill_zero(manifest->trainers, sizeof manifest->trainers);
  if (is_finished(run)) enter(run, FINISHED);  // the last epoch ended before its parameters were named
  else begin_round(run, 0, account->progress.epoch_start_data_index);
}

static bool step_warmup(Run *run) {
  Coordinator *account = run->account;
  if (remove_departed(run, 0)) return true;
  if (account->clients.length < least_clients(run)) return give_up_warmup(run);
  bool expired = passed(run, account->phase_start, account->config.warmup_time);
  if (run->manifest->votes_length < account->clients.length && !expired) return false;
  const Vote *vote = agreed_vote(run, quorum(epoch_members(run)));
  if (vote == 0) return expired && give_up_warmup(run);
  Key digest = vote->digest;
  begin_epoch(run, &digest);
  return true;
}

// Whether the last drain round is under way.
static bool drains_last(const Run *run) {
  return draining(run) && current_round(run)->height + 1 - trained_rounds(run->account) >= DRAIN_ROUNDS;
}

// Whether nothing more is to come of the current round: it is decided, or too few clients are left to decide it. The last
// drain round is over when the parameters after all results are named.
static bool is_over(const Run *run) {
  if (count_healthy(run) < least_clients(run)) return true;
  if (draining(run) && settled(run)) return true;
  return !drains_last(run) && decided_root(run, current_round(run)) != 0;
}

// Whether none of the stored rounds, all of which train, has a result.
static NOINLINE bool nothing_applied(const Run *run) {
  for (u64 slot = 0; slot < STORED_ROUNDS; slot++) {
    const Round *round = &run->account->rounds[slot];
    const Key *root = decided_root(run, round);
    if (round->clients_length == 0 || !trains(run, round) || (root != 0 && !zero_key(root))) return false;
  }
  return true;
}

// Whether no round can be decided any more; the step of the current one is counted, and its departed are removed.
static bool ends_at_once(const Run *run) {
  return run->account->clients.length < least_clients(run) ||
         current_round(run)->witnesses_length < run->manifest->needed;
}

static bool is_ending(const Run *run) {
  const Coordinator *account = run->account;
  return passed(run, account->epoch_start, account->config.epoch_time) ||
         account->progress.step > account->config.total_steps || account->pending_pause;
}

static NOINLINE void end_epoch(Run *run, u64 data_index) {
  Coordinator *account = run->account;
  Progress *progress = &account->progress;
  progress->epoch_start_data_index = data_index;
  reward_and_hold(run);
  checkpoint_to_peers(&account->model.checkpoint);
  bool over = is_finished(run) || progress->epoch == LAST_EPOCH;
  if (progress->epoch != LAST_EPOCH) progress->epoch++;
  account->cold_start_epoch = account->pending_pause;
  if (account->pending_pause) {
    withdraw_everyone(run);
    account->pending_pause = 0;
    enter(run, PAUSED);
  } else {
    enter(run, over ? FINISHED : WAITING_FOR_MEMBERS);
  }
}

static NOINLINE void end_round(Run *run) {
  Coordinator *account = run->account;
  const Round *round = current_round(run);
  u32 height = round->height;
  u64 data_index = round->data_index + round_batch(run, round);
  if (trains(run, round)) account->progress.step++;
  remove_departed(run, height);
  if (ends_at_once(run) || (draining(run) && (settled(run) || drains_last(run)))) {
    end_epoch(run, data_index);
    return;
  }
  if (!draining(run)) {
    bool idle = nothing_applied(run);
    if (idle || is_ending(run)) account->last_step = account->progress.step;
    if (idle) account->pending_pause = 1;
  }
  begin_round(run, height + 1, data_index);
}

static bool step_round(Run *run) {
  const Coordinator *account = run->account;
  const Config *config = &account->config;
  bool training = account->run_state == ROUND_TRAIN;
  u64 length = config->round_witness_time;
  if (training) length = draining(run) ? config->cooldown_time : config->max_round_train_time;
  bool over = is_over(run), expired = passed(run, account->phase_start, length);
  if (over || (expired && !training)) {
    end_round(run);
    return true;
  }
  if (!training || !(expired || everyone_reported(run))) return false;
  enter(run, ROUND_WITNESS);
  return true;
}

static bool step(Run *run) {
  switch (run->account->run_state) {
    case WAITING_FOR_MEMBERS: return step_waiting(run);
    case WARMUP: return step_warmup(run);
    case ROUND_TRAIN:
    case ROUND_WITNESS: return step_round(run);
    default: return false;
  }
}

NOINLINE void settle(Run *run) {
  for (int i = 0; i < MAX_STEPS && step(run); i++) continue;
}

u64 tick(Run *run) {
  REQUIRE(!halted(run), CoordinatorErrorHalted);
  settle(run);
  return 0;
}
