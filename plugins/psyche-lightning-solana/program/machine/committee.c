// Who witnesses: Ethereum's swap-or-not shuffle with 90 rounds (Psyche's swap_or_not.rs), forwards and backwards.
//
// Positions are below 256, so each round of the shuffle has one block of bits; pivots and blocks are hashed once.
#include "machine/run.h"

#include "common/syscalls.h"

#ifndef SHUFFLE_ROUNDS  // the fuzzer takes fewer, since it would do little else than hash
#define SHUFFLE_ROUNDS 90
#endif

typedef struct {
  u32 size;
  u8 pivots[SHUFFLE_ROUNDS];
  u8 blocks[SHUFFLE_ROUNDS][32];
} Shuffle;

_Static_assert(MAX_CLIENTS <= 256, "one block of bits a round, pivots in a byte");

static NOINLINE void prepare(Shuffle *shuffle, const Round *round, const Slice *salt) {
  u8 seed[32], key[32];
  Slice number = {&round->seed, 8};
  sol_sha256(&number, 1, seed);
  Slice salted[2] = {{seed, 32}, *salt};
  sol_sha256(salted, 2, key);
  shuffle->size = round->clients_length;
  u8 turn;
  const u32 block = 0;
  Slice parts[3] = {{key, 32}, {&turn, 1}, {&block, 4}};
  for (turn = 0; turn < SHUFFLE_ROUNDS; turn++) {
    u64 digest[4];
    sol_sha256(parts, 2, (u8 *)digest);
    shuffle->pivots[turn] = (u8)(digest[0] % shuffle->size);
    sol_sha256(parts, 3, shuffle->blocks[turn]);
  }
}

// One round is its own inverse.
INLINE u32 swap_or_not(const Shuffle *shuffle, u32 turn, u32 current) {
  u32 flip = shuffle->pivots[turn] + shuffle->size - current;
  if (flip >= shuffle->size) flip -= shuffle->size;
  u32 position = current > flip ? current : flip;
  return shuffle->blocks[turn][position >> 3 & 31] >> (position & 7) & 1 ? flip : current;
}

static NOINLINE u32 position_of(const Shuffle *shuffle, u32 index) {
  for (u32 turn = 0; turn < SHUFFLE_ROUNDS; turn++) index = swap_or_not(shuffle, turn, index);
  return index;
}

static NOINLINE u32 index_at(const Shuffle *shuffle, u32 position) {
  for (u32 turn = SHUFFLE_ROUNDS; turn-- > 0;) position = swap_or_not(shuffle, turn, position);
  return position;
}

static u64 seats(const Run *run, u64 clients) {
  u64 wanted = run->account->config.witness_nodes;
  if (wanted == 0 || wanted > MAX_WITNESSES) wanted = MAX_WITNESSES;
  return within(clients, wanted);
}

// A round may have fewer clients than `witness_nodes`: then all of them witness.
u64 witness_count(const Run *run, const Round *round) { return seats(run, round->clients_length); }

// Clients that leave later do not lower it. So whoever stays never decides alone.
u64 needed_reports(const Run *run) { return quorum(seats(run, epoch_members(run))); }

// What is needed is more than half of the seats. So of all roots, one is left over when unequal ones cancel each other
// out; then it is counted.
NOINLINE const Key *decided_root(const Run *run, const Round *round) {
  const Key *found = 0;
  u64 length = within(round->witnesses_length, MAX_WITNESSES), lead = 0, count = 0;
  if (length < run->manifest->needed) return 0;
  for (u64 i = 0; i < length; i++) {
    const Key *root = &round->witnesses[i].merkle;
    if (lead == 0) found = root;
    if (same_key(root, found)) lead++;
    else lead--;
  }
  for (u64 i = 0; i < length; i++) count += same_key(&round->witnesses[i].merkle, found);
  return length > 0 && count >= run->manifest->needed ? found : 0;
}

NOINLINE u64 position_in(const Round *round, const Slice *salt, u64 index) {
  if (index >= round->clients_length) return NOBODY;
  Shuffle shuffle;
  prepare(&shuffle, round, salt);
  return position_of(&shuffle, (u32)index);
}

// Fills in who of the current round's clients is healthy and has not reported; returns how many.
static NOINLINE u64 find_open(const Run *run, bool *open) {
  const ClientList *clients = &run->account->clients;
  const Round *round = current_round(run);
  u64 count = 0;
  for (u64 i = 0; i < MAX_CLIENTS; i++) {
    open[i] = i < clients->length && clients->items[i].state == HEALTHY;
    count += open[i];
  }
  for (u64 i = 0; i < within(round->witnesses_length, MAX_WITNESSES); i++) {
    u64 index = round->witnesses[i].index;
    if (index >= MAX_CLIENTS || !open[index]) continue;
    open[index] = false;
    count--;
  }
  return count;
}

NOINLINE bool everyone_reported(const Run *run) {
  const Round *round = current_round(run);
  bool open[MAX_CLIENTS];
  u64 count = find_open(run, open), wanted = witness_count(run, round);
  if (count == 0) return true;
  // More than there are clients without a seat: one of them has one.
  if (count > round->clients_length - wanted) return false;
  Shuffle shuffle;
  prepare(&shuffle, round, &TEXT("witness"));
  for (u32 position = 0; position < wanted; position++)
    if (open[index_at(&shuffle, position) % MAX_CLIENTS]) return false;
  return true;
}
