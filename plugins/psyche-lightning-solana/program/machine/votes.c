// The list of votes in the manifest account: checkpoint votes in cool-down, reports in warm-up.
#include "machine/run.h"

#include "common/syscalls.h"

_Static_assert(MAX_CLIENTS <= 256, "indices of clients in a byte");

static bool same_vote(const Vote *vote, u32 step, const Key *digest) {
  Key other = vote->digest;
  return vote->step == step && same_key(&other, digest);
}

// In warm-up, the report also lies where Psyche's readers look for it, as far as there is room.
static void mirror_report(Run *run, u64 place) {
  Round *round = &run->account->rounds[0];
  if (place >= MAX_WITNESSES) return;
  Vote *vote = &run->manifest->votes[place];
  Witness *record = &round->witnesses[place];
  record->position = record->index = vote->client;
  record->witness = 1;
  record->merkle = vote->digest;
  round->witnesses_length = place + 1;
}

NOINLINE void add_vote(Run *run, u64 client, u32 step, const Key *digest) {
  Manifest *manifest = run->manifest;
  u64 place = manifest->votes_length, first = 0;
  if (place >= MAX_CLIENTS) return;  // one vote a client
  bool warmup = run->account->run_state == WARMUP;
  if (!warmup)
    while (first < place && !same_vote(&manifest->votes[first], step, digest)) first++;
  Vote *vote = &manifest->votes[place];
  vote->client = (u8)client;
  vote->first = (u8)first;
  vote->step = step;
  vote->digest = *digest;
  manifest->votes_length = (u32)place + 1;
  if (warmup) mirror_report(run, place);
  run->changed = true;
}

NOINLINE bool find_vote(const Run *run, u64 client, u64 *index) {
  const Manifest *manifest = run->manifest;
  for (*index = 0; *index < within(manifest->votes_length, MAX_CLIENTS); ++*index)
    if (manifest->votes[*index].client == client) return true;
  return false;
}

void clear_votes(Run *run) {
  fill_zero(run->manifest->votes, sizeof run->manifest->votes);
  run->manifest->votes_length = 0;
}

NOINLINE void move_votes(Run *run, const u16 *places) {
  Manifest *manifest = run->manifest;
  Round *round = &run->account->rounds[0];
  u64 length = within(manifest->votes_length, MAX_CLIENTS), kept = 0;
  fill_zero(round->witnesses, sizeof round->witnesses);
  round->witnesses_length = 0;
  for (u64 i = 0; i < length; i++) {
    u16 place = places[manifest->votes[i].client];
    if (place == NO_PLACE) continue;
    if (kept != i) copy(&manifest->votes[kept], &manifest->votes[i], sizeof(Vote));
    manifest->votes[kept].client = (u8)place;
    mirror_report(run, kept);
    kept++;
  }
  fill_zero(&manifest->votes[kept], (length - kept) * sizeof(Vote));
  manifest->votes_length = (u32)kept;
}

// The place of the first vote with the most equals, and their number; only votes of the healthy count.
static NOINLINE u64 most_frequent(const Run *run, u64 *winner) {
  const Manifest *manifest = run->manifest;
  const ClientList *clients = &run->account->clients;
  u16 counts[MAX_CLIENTS];
  u64 length = within(manifest->votes_length, MAX_CLIENTS), most = 0;
  fill_zero(counts, sizeof counts);
  for (u64 i = 0; i < length; i++) {
    const Vote *vote = &manifest->votes[i];
    if (clients->items[vote->client].state == HEALTHY) counts[vote->first]++;
  }
  *winner = 0;
  for (u64 i = 0; i < length; i++) {
    if (counts[i] <= most) continue;
    most = counts[i];
    *winner = i;
  }
  return most;
}

static u64 count_present_votes(const Run *run) {
  const Manifest *manifest = run->manifest;
  u64 count = 0;
  for (u64 i = 0; i < within(manifest->votes_length, MAX_CLIENTS); i++)
    count += run->account->clients.items[manifest->votes[i].client].state == HEALTHY;
  return count;
}

NOINLINE bool decide_checkpoint(Run *run, bool expired, bool *agreed) {
  Manifest *manifest = run->manifest;
  u64 present = count_healthy(run), winner;
  *agreed = most_frequent(run, &winner) >= quorum(present);
  if (!*agreed && count_present_votes(run) < present && !expired) return false;
  if (*agreed) {
    manifest->checkpoint_step = manifest->votes[winner].step;
    manifest->checkpoint_digest = manifest->votes[winner].digest;
  }
  return true;
}
