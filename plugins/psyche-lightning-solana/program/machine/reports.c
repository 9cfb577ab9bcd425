// What clients report: which parameters they hold, and what they witnessed.
#include "machine/run.h"

#include "common/syscalls.h"

u64 need_running_round(const Run *run) {
  REQUIRE(!halted(run), CoordinatorErrorHalted);
  u8 phase = run->account->run_state;
  return phase == ROUND_TRAIN || phase == ROUND_WITNESS ? 0 : CoordinatorErrorInvalidRunState;
}

// While the run waits, whoever brought the checkpoint back becomes a holder.
static u64 become_holder(Run *run, const Key *signer, const Key *digest) {
  Manifest *manifest = run->manifest;
  REQUIRE(!zero_key(digest) && same_key(digest, &manifest->checkpoint_digest), CoordinatorErrorInvalidWitness);
  u64 member = find_member(run, signer);
  if (member == NOBODY || has_place(&manifest->holders, member)) return 0;
  add_place(&manifest->holders, member);
  run->changed = true;
  return 0;
}

NOINLINE u64 warmup_witness(Run *run, const Key *signer, u64 index, const Key *digest) {
  const Coordinator *account = run->account;
  Manifest *manifest = run->manifest;
  if (account->run_state == WAITING_FOR_MEMBERS) return become_holder(run, signer, digest);
  if (account->run_state != WARMUP) return 0;  // too late
  REQUIRE(index < account->clients.length && index < MAX_CLIENTS, CoordinatorErrorInvalidWitness);
  const Client *client = &account->clients.items[index];
  REQUIRE(same_key(&client->signer, signer) && client->state == HEALTHY, CoordinatorErrorInvalidWitness);
  u64 vote;
  REQUIRE(!find_vote(run, index, &vote), CoordinatorErrorDuplicateWitness);
  REQUIRE(!zero_key(digest), CoordinatorErrorInvalidWitness);
  // The first member of a fresh run says with which parameters it begins.
  bool fresh = zero_key(&manifest->checkpoint_digest), first = manifest->votes_length == 0;
  REQUIRE(!fresh || (first ? index == 0 : same_bytes(&manifest->votes[0].digest, digest, sizeof *digest)), CoordinatorErrorInvalidWitness);
  REQUIRE(!settled(run) || same_key(&manifest->checkpoint_digest, digest), CoordinatorErrorInvalidWitness);
  set_vote(run, index, 0, digest);
  add_place(&manifest->holders, client->place);
  return 0;
}

// The newest parameters that as many witnesses hold as are needed.
static void name_checkpoint(Run *run) {
  Manifest *manifest = run->manifest;
  const Vote *vote = agreed_vote(run, manifest->needed);
  if (vote == 0 || vote->step <= manifest->checkpoint_step) return;
  manifest->checkpoint_digest = vote->digest;
  manifest->checkpoint_step = vote->step;
}

NOINLINE u64 witness(Run *run, const Key *signer, const Witness *report, u32 step, const Key *digest) {
  const Coordinator *account = run->account;
  Round *round = current_round(run);
  u64 index = report->index, length = within(round->witnesses_length, MAX_WITNESSES), place = 0;
  REQUIRE(report->witness && report->position < witness_count(run, round), CoordinatorErrorInvalidWitness);
  REQUIRE(index < account->clients.length && index < MAX_CLIENTS, CoordinatorErrorInvalidWitness);
  REQUIRE(same_key(&account->clients.items[index].signer, signer), CoordinatorErrorInvalidWitness);
  REQUIRE(position_in(round, &TEXT("witness"), index) == report->position, CoordinatorErrorInvalidWitness);
  REQUIRE(account->clients.items[index].state == HEALTHY, CoordinatorErrorInvalidWitness);
  REQUIRE(zero_key(digest) || step < account->progress.step, CoordinatorErrorInvalidWitness);
  bool decided = decided_root(run, round) != 0;
  REQUIRE(draining(run) || !decided, CoordinatorErrorDuplicateWitness);
  while (place < length && round->witnesses[place].index != index) place++;
  REQUIRE(place < MAX_WITNESSES, CoordinatorErrorWitnessesFull);
  // What is decided stays decided, by the records that decided it.
  bool kept = place < length && (decided || same_bytes(&round->witnesses[place], report, sizeof *report));
  bool voted = !zero_key(digest) && set_vote(run, index, step, digest);
  REQUIRE(!kept || voted, CoordinatorErrorDuplicateWitness);
  if (!kept) round->witnesses[place] = *report;
  if (place == length) round->witnesses_length = length + 1;
  run->changed = true;
  if (voted) name_checkpoint(run);
  return 0;
}
