// What clients report: that they hold the parameters, what they witnessed, and which parameters an epoch ended with.
#include "machine/run.h"

u64 need_running_round(const Run *run) {
  REQUIRE(!halted(run), Halted);
  u8 phase = run->account->run_state;
  return phase == ROUND_TRAIN || phase == ROUND_WITNESS ? 0 : InvalidRunState;
}

NOINLINE u64 warmup_witness(Run *run, const Key *signer, u64 index, const Key *digest) {
  const Coordinator *account = run->account;
  Manifest *manifest = run->manifest;
  if (account->run_state != WARMUP) return 0;  // too late
  REQUIRE(index < account->clients.length && index < MAX_CLIENTS, InvalidWitness);
  const Client *client = &account->clients.items[index];
  REQUIRE(same_key(&client->signer, signer) && client->state == HEALTHY, InvalidWitness);
  u64 vote;
  REQUIRE(!find_vote(run, index, &vote), DuplicateWitness);
  REQUIRE(!zero_key(digest), InvalidWitness);
  const Key *agreed = &manifest->checkpoint_digest;
  REQUIRE(zero_key(agreed) || same_key(agreed, digest), InvalidWitness);
  add_vote(run, index, 0, digest);
  manifest->holders[client->place / 32] |= 1u << client->place % 32;
  return 0;
}

NOINLINE u64 witness(Run *run, const Key *signer, const Witness *report) {
  const Coordinator *account = run->account;
  Round *round = current_round(run);
  u64 index = report->index, length = within(round->witnesses_length, MAX_WITNESSES);
  REQUIRE(report->witness && report->position < witness_count(run, round), InvalidWitness);
  REQUIRE(index < account->clients.length && index < MAX_CLIENTS, InvalidWitness);
  REQUIRE(same_key(&account->clients.items[index].signer, signer), InvalidWitness);
  REQUIRE(position_in(round, &TEXT("witness"), index) == report->position, InvalidWitness);
  REQUIRE(account->clients.items[index].state == HEALTHY, InvalidWitness);
  for (u64 i = 0; i < length; i++) REQUIRE(round->witnesses[i].index != index, DuplicateWitness);
  REQUIRE(length < MAX_WITNESSES, WitnessesFull);
  round->witnesses[length] = *report;
  round->witnesses_length = length + 1;
  run->changed = true;
  return 0;
}

NOINLINE u64 vote_checkpoint(Run *run, const Key *signer, u16 epoch, const Vote *vote) {
  const Coordinator *account = run->account;
  Key digest = vote->digest;
  REQUIRE(!halted(run), Halted);
  REQUIRE(account->run_state == COOLDOWN, InvalidRunState);
  REQUIRE(epoch == account->progress.epoch, InvalidCheckpoint);
  u64 client = find_client(run, signer), place;
  REQUIRE(client != NOBODY && account->clients.items[client].state == HEALTHY, InvalidCheckpoint);
  REQUIRE(!zero_key(&digest) && vote->step < account->progress.step, InvalidCheckpoint);
  if (find_vote(run, client, &place)) {
    const Vote *earlier = &run->manifest->votes[place];
    Key other = earlier->digest;
    return earlier->step == vote->step && same_key(&other, &digest) ? 0 : InvalidCheckpoint;
  }
  add_vote(run, client, vote->step, &digest);
  return 0;
}
