// Clients that delivered nothing in the last rounds are dropped.
#include "machine/run.h"

#include "common/syscalls.h"

// Rounds in a row after which a client without a witnessed result may be dropped.
#define MISSED_ROUNDS 3
_Static_assert(MISSED_ROUNDS < STORED_ROUNDS, "they are stored");

// Bloom filter over FNV-1a whose initial states are the filter's keys (Psyche's bloom.rs).
static NOINLINE bool bloom_contains(const Bloom *bloom, const u8 *item) {
  for (u64 k = 0; k < BLOOM_KEYS; k++) {
    u64 hash = bloom->keys[k];
    for (u64 i = 0; i < 32; i++) hash = (hash ^ item[i]) * 0x100000001b3ull;
    if (!(bloom->bits[hash / 64 % BLOOM_WORDS] >> (hash % 64) & 1)) return false;
  }
  return true;
}

// Whether as many reports as are needed do not name it as a participant of a round that trained.
static NOINLINE bool missed(const Run *run, const Round *round, const u8 *item) {
  u64 silent = 0;
  for (u64 i = 0; i < within(round->witnesses_length, MAX_WITNESSES); i++)
    silent += !bloom_contains(&round->witnesses[i].participants, item);
  return trains(run, round) && silent >= run->manifest->needed;
}

static NOINLINE bool missed_all(const Run *run, u32 height, const Client *client) {
  u8 item[32];
  Slice part = {&client->signer, 32};
  if (height < MISSED_ROUNDS) return false;
  sol_sha256(&part, 1, item);
  for (u32 back = 1; back <= MISSED_ROUNDS; back++) {
    u64 slot = (height - back) % STORED_ROUNDS;
    if (!has_place(&run->manifest->trainers[slot], client->place)) return false;
    if (!missed(run, &run->account->rounds[slot], item)) return false;
  }
  return true;
}

// Index that the member at `place` had in the round in `slot`, whose clients have the order of their places.
static u64 index_in(const Run *run, u64 slot, u64 place) {
  const Places *trainers = &run->manifest->trainers[slot];
  u64 index = 0;
  if (!has_place(trainers, place)) return NOBODY;
  for (u64 i = 0; i < place; i++) index += has_place(trainers, i);
  return index;
}

static u64 drop(Run *run, Client *client) {
  Coordinator *account = run->account;
  client->state = DROPPED;
  if (is_pending(account, client->place)) account->members[client->place].active = 0;
  run->changed = true;
  return 0;
}

NOINLINE u64 health_check(Run *run, const Key *signer, const HealthClaim *claim) {
  Coordinator *account = run->account;
  TRY(need_running_round(run));
  u32 height = current_round(run)->height;
  REQUIRE(height > 0 && is_healthy(run, signer), CoordinatorErrorInvalidHealthCheck);
  u64 slot = (height - 1) % STORED_ROUNDS, member = find_member(run, &claim->signer);
  // There are no verifiers and tie-breakers (config_is_sane): everybody trains.
  REQUIRE(claim->committee == TRAINER && member != NOBODY, CoordinatorErrorInvalidCommitteeProof);
  REQUIRE(index_in(run, slot, member) == claim->index, CoordinatorErrorInvalidCommitteeProof);
  REQUIRE(position_in(&account->rounds[slot], &TEXT("committee"), claim->index) == claim->position, CoordinatorErrorInvalidCommitteeProof);
  u64 index = find_client(run, &claim->signer);
  if (index == NOBODY || account->clients.items[index].state != HEALTHY) return 0;  // gone already
  REQUIRE(missed_all(run, height, &account->clients.items[index]), CoordinatorErrorInvalidHealthCheck);
  return drop(run, &account->clients.items[index]);
}
