#include "native/fuzz_world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define RICH 1000000000000ull

// The data of each account is a block of its own, behind its length: ASan sees a step beyond it.
static Key keys[IDS];
static u8 *blocks[IDS];
static u64 capacities[IDS];
static u64 lamports[IDS];
static Key owners[IDS];
static i64 timestamp;
static u64 slot;
static Snapshot before;
static bool traced;  // FUZZ_TRACE=1: write each instruction's log
static const Key PROGRAM = {{1, 2, 3, 4}};

void must(bool condition, const char *what) {
  if (condition) return;
  fprintf(stderr, "not true: %s\n", what);
  __builtin_trap();
}

const Key *key_of(u64 id) { return &keys[id]; }

static u64 *length_of(u64 id) { return (u64 *)blocks[id]; }
static u8 *data_of(u64 id) { return blocks[id] + 8; }

bool initialized(void) {
  return *length_of(MANIFEST) == sizeof(Manifest) && coordinator()->discriminator == COORDINATOR_DISCRIMINATOR;
}
Coordinator *coordinator(void) { return (Coordinator *)data_of(COORDINATOR); }
Manifest *manifest(void) { return (Manifest *)data_of(MANIFEST); }

void advance(u64 seconds, u64 slots) {
  timestamp += (i64)seconds;
  slot += slots;
}

static void make(u64 id, u64 capacity, u64 length, Key owner) {
  free(blocks[id]);
  blocks[id] = calloc(1, 8 + capacity);
  capacities[id] = capacity;
  *length_of(id) = length;
  lamports[id] = RICH;
  owners[id] = owner;
}

static void derive(u64 id, const Slice *seeds, u64 count) {
  Slice all[4];
  u8 bump = 255;
  memcpy(all, seeds, count * sizeof *seeds);
  all[count] = (Slice){&bump, 1};
  sol_create_program_address(all, count + 1, &PROGRAM, &keys[id]);
  lamports[id] = 0;
}

static void authorize(u64 id, const char *scope, u64 grantee, bool active) {
  u8 *at = data_of(id);
  u32 length = (u32)strlen(scope);
  u64 discriminator = AUTHORIZATION_DISCRIMINATOR;
  memcpy(at, &discriminator, 8);
  memcpy(at + 9, &keys[OWNER], 32);
  if (grantee != IDS) memcpy(at + 41, &keys[grantee], 32);
  memcpy(at + 73, &length, 4);
  memcpy(at + 77, scope, length);
  at[77 + length] = active;
}

void build_world(void) {
  traced = getenv("FUZZ_TRACE") != 0;
  const Key system = {{0, 0, 0, 0}};
  timestamp = 1700000000;
  slot = 1;
  for (u64 id = 0; id < IDS; id++) {
    keys[id] = (Key){{id + 1, 0xabcdef, id * 77, 5}};
    make(id, 0, 0, system);
  }
  keys[SYSTEM] = system;
  for (u64 id = ANYBODY; id <= INACTIVE; id++) make(id, 96 + 32, 96 + 32, keys[AUTHORIZER]);
  authorize(ANYBODY, "CoordinatorJoinRun", IDS, true);
  authorize(KEEPER, "CoordinatorCheckpoint", NODE, true);
  authorize(INACTIVE, "CoordinatorJoinRun", IDS, false);
  make(INSTANCE, INSTANCE_SIZE, 0, system);
  make(COORDINATOR, sizeof(Coordinator), sizeof(Coordinator), PROGRAM);
  make(MANIFEST, sizeof(Manifest), 0, system);
  make(ADDRESS, 176, 0, system);
  const Slice run_id = TEXT("fuzz");
  derive(INSTANCE, (Slice[]){TEXT("coordinator"), run_id}, 2);
  derive(MANIFEST, (Slice[]){TEXT("manifest"), run_id}, 2);
  derive(ADDRESS, (Slice[]){TEXT("address"), run_id, {&keys[NODE], 32}}, 3);
  // Somebody sent lamports ahead: too few to be exempt from rent, and more than enough.
  lamports[ADDRESS] = 5;
  lamports[MANIFEST] = RICH;
}

#define USED (MAX_CLIENTS < 8 ? MAX_CLIENTS : 8)
#define REPORTS (MAX_WITNESSES < 8 ? MAX_WITNESSES : 8)
_Static_assert(NODES + 1 <= 8, "the wallets fit into what is copied");

typedef struct {
  u8 id;
  u32 offset;
  u32 length;
} Range;

#define LIST(id, type, list, count) {id, offsetof(type, list), (count) * sizeof(((type *)0)->list[0])}
#define FROM(id, type, first, last) {id, offsetof(type, first), offsetof(type, last) - offsetof(type, first)}
#define REST(id, type, first) {id, offsetof(type, first), sizeof(type) - offsetof(type, first)}
#define ROUND(i)                                                         \
  LIST(COORDINATOR, Coordinator, rounds[i].witnesses, REPORTS), {        \
    COORDINATOR, offsetof(Coordinator, rounds[i].witnesses_length), 32   \
  }

static const Range RANGES[] = {
    FROM(COORDINATOR, Coordinator, discriminator, rounds),
    ROUND(0), ROUND(1), ROUND(2), ROUND(3),
    LIST(COORDINATOR, Coordinator, clients.items, USED),
    {COORDINATOR, offsetof(Coordinator, clients.length), 8},
    LIST(COORDINATOR, Coordinator, exited.items, USED),
    FROM(COORDINATOR, Coordinator, exited.length, members),
    LIST(COORDINATOR, Coordinator, members, USED),
    REST(COORDINATOR, Coordinator, members_length),
    FROM(MANIFEST, Manifest, discriminator, votes),
    LIST(MANIFEST, Manifest, votes, USED),
    {INSTANCE, 0, INSTANCE_SIZE},
    {ADDRESS, 0, 176},
};

void save(Snapshot *snapshot) {
  u64 place = 0;
  memcpy(snapshot->lamports, lamports, sizeof lamports);
  memcpy(snapshot->owner, owners, sizeof owners);
  for (u64 id = 0; id < IDS; id++) snapshot->length[id] = *length_of(id);
  for (u64 i = 0; i < COUNT(RANGES); i++) {
    must(place + RANGES[i].length <= MOST_COPIED, "a snapshot has room");
    memcpy(snapshot->data + place, data_of(RANGES[i].id) + RANGES[i].offset, RANGES[i].length);
    place += RANGES[i].length;
  }
  snapshot->timestamp = timestamp;
  snapshot->slot = slot;
}

void restore(const Snapshot *snapshot) {
  u64 place = 0;
  memcpy(lamports, snapshot->lamports, sizeof lamports);
  memcpy(owners, snapshot->owner, sizeof owners);
  for (u64 id = 0; id < IDS; id++) *length_of(id) = snapshot->length[id];
  for (u64 i = 0; i < COUNT(RANGES); i++) {
    memcpy(data_of(RANGES[i].id) + RANGES[i].offset, snapshot->data + place, RANGES[i].length);
    place += RANGES[i].length;
  }
  timestamp = snapshot->timestamp;
  slot = snapshot->slot;
}

static void fill_input(Input *input, const Meta *metas, u64 metas_length) {
  memset(input, 0, sizeof *input);
  input->program = &PROGRAM;
  input->accounts_length = metas_length;
  for (u64 i = 0; i < metas_length; i++) {
    u64 id = metas[i].id;
    Account *account = &input->accounts[i];
    account->key = &keys[id];
    account->owner = &owners[id];
    account->lamports = &lamports[id];
    account->data = data_of(id);
    account->data_length = *length_of(id);
    account->is_executable = id == AUTHORIZER || id == SYSTEM;
    // An account has the rights of all its places in the transaction.
    for (u64 j = 0; j < metas_length; j++) {
      if (metas[j].id != id) continue;
      account->is_signer |= metas[j].signer;
      account->is_writable |= metas[j].writable;
    }
  }
}

// Does the runtime's part after a success: what it would not allow must not happen.
static void settle_accounts(const Input *input) {
  u64 sum = 0, sum_before = 0;
  for (u64 id = 0; id < IDS; id++) {
    bool writable = false;
    for (u64 i = 0; i < input->accounts_length; i++)
      if (input->accounts[i].key == &keys[id]) writable |= input->accounts[i].is_writable;
    must(writable || lamports[id] == before.lamports[id], "lamports of a read-only account stay");
    must(writable || same_key(&owners[id], &before.owner[id]), "the owner of a read-only account stays");
    must(*length_of(id) <= capacities[id], "an account does not grow beyond its room");
    sum += lamports[id];
    sum_before += before.lamports[id];
  }
  must(sum == sum_before, "lamports are neither made nor lost");
}

u64 call(const Meta *metas, u64 metas_length, const u8 *data, u64 length) {
  Input input;
  save(&before);
  fill_input(&input, metas, metas_length);
  u8 *copied = malloc(length);  // a block of its own, so that ASan sees a step beyond it
  memcpy(copied, data, length);
  input.data = copied;
  input.data_length = length;
  set_machine(&input, slot, timestamp);
  u64 error = process_instruction(&input);
  free(copied);
  if (traced) {
    const Coordinator *account = coordinator();
    fprintf(stderr, "%.*serror %lu, phase %u, step %u, clients %lu, votes %u, time %ld\n", (int)MACHINE.log_length,
            MACHINE.log, error, account->run_state, account->progress.step, account->clients.length,
            manifest()->votes_length, timestamp);
  }
  if (error != 0) restore(&before);
  else settle_accounts(&input);
  return error;
}
