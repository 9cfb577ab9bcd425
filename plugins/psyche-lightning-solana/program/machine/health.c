// Clients from which the witnesses of the round before heard nothing are dropped.
#include "machine/run.h"

#include "common/syscalls.h"

// Bloom filter over FNV-1a whose initial states are the filter's keys (Psyche's bloom.rs).
static NOINLINE bool bloom_contains(const Bloom *bloom, const u8 *item) {
  for (u64 k = 0; k < BLOOM_KEYS; k++) {
    u64 hash = bloom->keys[k];
    for (u64 i = 0; i < 32; i++) hash = (hash ^ item[i]) * 0x100000001b3ull;
    if (!(bloom->bits[hash / 64 % BLOOM_WORDS] >> (hash % 64) & 1)) return false;
  }
  return true;
}

static u64 count_heard(const Round *round, const Key *signer) {
  u8 item[32];
  Slice part = {signer, 32};
  sol_sha256(&part, 1, item);
  u64 heard = 0;
  for (u64 i = 0; i < within(round->witnesses_length, MAX_WITNESSES); i++)
    heard += bloom_contains(&round->witnesses[i].participants, item);
  return heard;
}

// Whether `signer` was at that index in the round before: its list was today's, and those who left at its end, in the
// order of registration.
static NOINLINE bool was_at(const Run *run, const Round *before, const Key *signer, u64 index) {
  const Coordinator *account = run->account;
  const ClientList *clients = &account->clients, *exited = &account->exited;
  u64 here = 0, place = 0;
  u64 left = before->clients_length - within(clients->length, before->clients_length);
  u64 gone = exited->length - within(left, exited->length);
  for (u64 i = 0; i < within(account->members_length, MAX_CLIENTS); i++) {
    const Key *member = &account->members[i].signer;
    if (here < within(clients->length, MAX_CLIENTS) && same_key(&clients->items[here].signer, member)) here++;
    else if (gone < within(exited->length, MAX_CLIENTS) && same_key(&exited->items[gone].signer, member)) gone++;
    else continue;
    if (place == index) return same_key(member, signer);
    place++;
  }
  return false;
}

static u64 drop(Run *run, u64 client) {
  Coordinator *account = run->account;
  account->clients.items[client].state = DROPPED;
  u64 member = account->clients.items[client].place;
  if (is_pending(account, member)) account->members[member].active = 0;
  run->changed = true;
  return 0;
}

NOINLINE u64 health_check(Run *run, const Key *signer, const HealthClaim *claim) {
  const Coordinator *account = run->account;
  TRY(need_running_round(run));
  u32 height = current_round(run)->height;
  REQUIRE(height > 0 && is_healthy(run, signer), InvalidHealthCheck);
  const Round *before = &account->rounds[(height - 1) % STORED_ROUNDS];
  // There are no verifiers and tie-breakers (config_is_sane): everybody trains.
  REQUIRE(claim->committee == TRAINER && was_at(run, before, &claim->signer, claim->index), InvalidCommitteeProof);
  REQUIRE(position_in(before, &TEXT("committee"), claim->index) == claim->position, InvalidCommitteeProof);
  u64 client = find_client(run, &claim->signer);
  if (client == NOBODY || account->clients.items[client].state != HEALTHY) return 0;  // gone already
  u64 reports = before->witnesses_length;
  // A round on which nobody reported, or which only drained, cannot tell.
  REQUIRE(reports > 0 && trains(run, before), InvalidHealthCheck);
  REQUIRE(count_heard(before, &claim->signer) < quorum(reports), InvalidHealthCheck);
  return drop(run, client);
}
