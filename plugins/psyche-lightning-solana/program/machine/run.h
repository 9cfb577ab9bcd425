// A run: its two accounts, and the time of the instruction.
//
// The rules are those of psyche_lightning/coordinator/machine.py. Inputs (reports.c, members.c) only record; `settle`
// moves the run from phase to phase as far as it goes. Times are whole Unix seconds.
#pragma once
#include "machine/errors.h"
#include "machine/manifest.h"

typedef struct {
  Coordinator *account;
  Manifest *manifest;
  u64 now;
  i64 timestamp;  // as the clock has it, for the seed of rounds
  u64 slot;
  bool changed;   // whether this instruction changed anything
  bool gathered;  // while waiting: whether there are enough members since phase_start
} Run;

// Take up a run before an instruction does anything to it.
void open_run(Run *run, Coordinator *account, Manifest *manifest, u64 slot, i64 timestamp);
// What remains to be done after an instruction: derived flags and the nonce.
void close_run(Run *run);

INLINE bool halted(const Run *run) {
  u8 phase = run->account->run_state;
  return phase == UNINITIALIZED || phase == FINISHED || phase == PAUSED;
}

INLINE Round *current_round(const Run *run) { return &run->account->rounds[run->account->rounds_head % STORED_ROUNDS]; }

// Whether the run only drains its pipeline, at the end of an epoch.
INLINE bool draining(const Run *run) { return run->account->last_step != 0; }

// Whether the checkpoint contains every round, so that its digest is the run's.
INLINE bool settled(const Run *run) {
  const Manifest *manifest = run->manifest;
  return !zero_key(&manifest->checkpoint_digest) && manifest->checkpoint_step == run->account->progress.step - 1;
}

// Lengths as loops may use them: within the arrays whatever the account says.
INLINE u64 within(u64 length, u64 most) { return length < most ? length : most; }

// tick.c
// Take every step that is due; nothing when halted.
void settle(Run *run);
// Whether all steps are trained, and the parameters after them named.
bool is_finished(const Run *run);
// Refuses with CoordinatorErrorHalted, else settles.
u64 tick(Run *run);
// Whether the round trains a step, or only drains the pipeline.
bool trains(const Run *run, const Round *round);

// phase.c
void enter(Run *run, u8 phase);

// epoch.c
// Whether the member waits for the next epoch.
INLINE bool is_pending(const Coordinator *account, u64 index) {
  return account->members[index].active == account->next_active;
}
u64 count_pending(const Run *run);
// Whether enough members wait for an epoch, and one of them may hold the run's parameters.
bool has_gathered(const Run *run);
void form_epoch(Run *run);
// How many clients formed the epoch, also those that have left it since.
u64 epoch_members(const Run *run);
// How many clients the epoch cannot do without: a quorum of its members, and `min_clients`.
u64 least_clients(const Run *run);
// Clients that are not healthy leave the list; whether there were any.
bool remove_departed(Run *run, u32 height);
void withdraw_everyone(Run *run);
// The end of an epoch: points if it got somewhere, and who holds the parameters.
void reward_and_hold(Run *run);
// Another member comes first, since a fresh run did not begin with the parameters that the first names, if any.
void change_first(Run *run);

// votes.c
// Add a vote, or replace the client's earlier one; whether that changed anything.
bool set_vote(Run *run, u64 client, u32 step, const Key *digest);
bool find_vote(const Run *run, u64 client, u64 *index);
void clear_votes(Run *run);
// Warm-up: votes name clients by index, so those who remain get their new ones. `places` has the new index or NO_PLACE.
#define NO_PLACE 0xffff
void move_votes(Run *run, const u16 *places);
// The vote that at least `needed` others equal, more than half of all; null without one.
const Vote *agreed_vote(const Run *run, u64 needed);

// committee.c
u64 quorum(u64 expected);
u64 witness_count(const Run *run, const Round *round);
// How many equal reports decide a round of an epoch with so many members: a quorum of the witnesses it begins with.
u64 needed_reports(const Run *run);
// The root that as many reports of the round name as are needed; null without one.
const Key *decided_root(const Run *run, const Round *round);
// The position that the shuffle of `round` for `salt` gives to the client at `index`; NOBODY if there is none.
u64 position_in(const Round *round, const Slice *salt, u64 index);
// Whether each witness of the current round has reported or has left.
bool everyone_reported(const Run *run);

// arithmetic.c
u64 batch_size(const Config *config, u64 data_index, u32 max_seq_len);
// Whether `length` seconds have passed since `start`.
INLINE bool passed(const Run *run, u64 start, u64 length) { return run->now >= start && run->now - start >= length; }

// members.c
#define NOBODY MAX_CLIENTS
// Index of a member, or NOBODY.
u64 find_member(const Run *run, const Key *signer);
// Index in the epoch's list of clients, or NOBODY.
u64 find_client(const Run *run, const Key *signer);
bool is_healthy(const Run *run, const Key *signer);
u64 count_healthy(const Run *run);
u64 join(Run *run, const Key *signer, const Key *p2p);
u64 leave(Run *run, const Key *signer, u8 state);

// control.c
u64 pause(Run *run);
u64 resume(Run *run);
// Go on from other parameters than the newest; later steps are undone.
u64 restart_from(Run *run, u32 step, const Key *digest);

// reports.c
u64 need_running_round(const Run *run);
u64 warmup_witness(Run *run, const Key *signer, u64 index, const Key *digest);
// `report` has its proof, filters and root; the epoch and height that it names were compared by the caller. `digest` and
// `step` are of the newest parameters that the witness holds, if the digest is not zero.
u64 witness(Run *run, const Key *signer, const Witness *report, u32 step, const Key *digest);

// health.c
typedef struct {
  Key signer;  // who is said to be gone
  u8 committee;
  u64 position;
  u64 index;
} HealthClaim;
u64 health_check(Run *run, const Key *signer, const HealthClaim *claim);

// model.c
bool config_is_sane(const Config *config);
bool model_is_sane(const Model *model);
bool cold_start_fits(const Config *config, const Model *model);
bool progress_is_sane(const Progress *progress);
// What the checkpoint becomes when peers hold it.
void checkpoint_to_peers(CheckpointSource *checkpoint);
// Another source for it (the table of docs/solana-account.md); whether it was taken.
bool replace_checkpoint(CheckpointSource *checkpoint, const CheckpointSource *offered);
