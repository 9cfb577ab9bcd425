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
  bool heard;     // in a round: whether a quorum of complete reports has ended its training
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

// Lengths as loops may use them: within the arrays whatever the account says.
INLINE u64 within(u64 length, u64 most) { return length < most ? length : most; }

// tick.c
// Take every step that is due; nothing when halted.
void settle(Run *run);
// Refuses with Halted, else settles.
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
// Whether the member may hold the checkpoint.
INLINE bool holds(const Manifest *manifest, u64 index) { return manifest->holders[index / 32] >> (index % 32) & 1; }
u64 count_pending(const Run *run);
void form_epoch(Run *run);
// Clients that are not healthy leave the list; whether there were any.
bool remove_departed(Run *run, u32 height);
void withdraw_everyone(Run *run);
// Those who said nothing in a whole warm-up do not hold the checkpoint.
void forget_silent_holders(Run *run);
// The end of an epoch: points if it succeeded, and who holds the parameters.
void reward_and_hold(Run *run, bool succeeded);

// votes.c
void add_vote(Run *run, u64 client, u32 step, const Key *digest);
bool find_vote(const Run *run, u64 client, u64 *index);
void clear_votes(Run *run);
// Warm-up: votes name clients by index, so those who remain get their new ones. `places` has the new index or NO_PLACE.
#define NO_PLACE 0xffff
void move_votes(Run *run, const u16 *places);
// Cool-down: whether it is over, because a quorum agrees (then on the new checkpoint) or because nothing can change.
bool decide_checkpoint(Run *run, bool expired, bool *agreed);

// committee.c
u64 quorum(u64 expected);
u64 witness_count(const Run *run, const Round *round);
// The position that the shuffle of `round` for `salt` gives to the client at `index`; NOBODY if there is none.
u64 position_in(const Round *round, const Slice *salt, u64 index);
// Whether each witness of the current round has reported or is gone.
bool nobody_left_to_report(const Run *run);

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
u64 withdraw(Run *run, const Key *signer);

// control.c
u64 pause(Run *run);
u64 resume(Run *run);

// reports.c
u64 need_running_round(const Run *run);
u64 warmup_witness(Run *run, const Key *signer, u64 index, const Key *digest);
// `report` has its proof, filters and root; the epoch and height that it names were compared by the caller.
u64 witness(Run *run, const Key *signer, const Witness *report);
// Of `vote`, step and digest are given.
u64 vote_checkpoint(Run *run, const Key *signer, u16 epoch, const Vote *vote);

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
// What the checkpoint becomes when peers hold it, and when nobody is left who does.
void checkpoint_to_peers(CheckpointSource *checkpoint);
void checkpoint_to_hub(CheckpointSource *checkpoint);
// Another source for it (the table of docs/solana-account.md); whether it was taken.
bool replace_checkpoint(CheckpointSource *checkpoint, const CheckpointSource *offered);
