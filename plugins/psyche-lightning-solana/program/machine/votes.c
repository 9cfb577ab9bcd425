// The list of votes in the manifest account: which parameters clients say they hold, in warm-up and in a round.
#include "machine/run.h"

#include "common/syscalls.h"

_Static_assert(MAX_CLIENTS <= 256, "indices of clients in a byte");

// Digests in the list are not aligned.
static bool same_vote(const Vote *vote, u32 step, const void *digest) {
  return vote->step == step && same_bytes(&vote->digest, digest, sizeof vote->digest);
}

NOINLINE bool find_vote(const Run *run, u64 client, u64 *index) {
  const Manifest *manifest = run->manifest;
  for (*index = 0; *index < within(manifest->votes_length, MAX_CLIENTS); ++*index)
    if (manifest->votes[*index].client == client) return true;
  return false;
}

NOINLINE bool set_vote(Run *run, u64 client, u32 step, const Key *digest) {
  Manifest *manifest = run->manifest;
  u64 place;
  if (find_vote(run, client, &place)) {
    if (same_vote(&manifest->votes[place], step, digest)) return false;
  } else {
    if (place >= MAX_CLIENTS) return false;  // one vote a client
    manifest->votes_length = (u32)place + 1;
  }
  Vote *vote = &manifest->votes[place];
  vote->client = (u8)client;
  vote->step = step;
  vote->digest = *digest;
  run->changed = true;
  return true;
}

void clear_votes(Run *run) {
  fill_zero(run->manifest->votes, sizeof run->manifest->votes);
  run->manifest->votes_length = 0;
}

NOINLINE void move_votes(Run *run, const u16 *places) {
  Manifest *manifest = run->manifest;
  u64 length = within(manifest->votes_length, MAX_CLIENTS), kept = 0;
  for (u64 i = 0; i < length; i++) {
    u16 place = places[manifest->votes[i].client];
    if (place == NO_PLACE) continue;
    if (kept != i) copy(&manifest->votes[kept], &manifest->votes[i], sizeof(Vote));
    manifest->votes[kept++].client = (u8)place;
  }
  fill_zero(&manifest->votes[kept], (length - kept) * sizeof(Vote));
  manifest->votes_length = (u32)kept;
}

// What more than half of all equal is left over when unequal ones cancel each other out; then it is counted.
NOINLINE const Vote *agreed_vote(const Run *run, u64 needed) {
  const Manifest *manifest = run->manifest;
  const Vote *found = 0;
  u64 length = within(manifest->votes_length, MAX_CLIENTS), lead = 0, count = 0;
  for (u64 i = 0; i < length; i++) {
    const Vote *vote = &manifest->votes[i];
    if (lead == 0) found = vote;
    if (same_vote(vote, found->step, &found->digest)) lead++;
    else lead--;
  }
  for (u64 i = 0; i < length; i++) count += same_vote(&manifest->votes[i], found->step, &found->digest);
  return length > 0 && count >= needed ? found : 0;
}
