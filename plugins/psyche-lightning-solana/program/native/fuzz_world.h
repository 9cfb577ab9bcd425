// A small chain for the fuzzer.
#pragma once
#include "coordinator/context.h"
#include "native/shim.h"

#define NODES 6

enum {
  OWNER,
  NODE,  // the first of NODES
  STRANGER = NODE + NODES,
  SPILL,
  NODE_KEY,  // two for each node and the stranger
  AUTHORIZER = NODE_KEY + 2 * (NODES + 1),
  SYSTEM,
  ANYBODY,   // an authorization to join
  KEEPER,    // an authorization of the first node to set checkpoints
  INACTIVE,  // one to join that was withdrawn
  // From here on, accounts that a program may change have data.
  INSTANCE,
  COORDINATOR,
  MANIFEST,
  ADDRESS,  // of the first node
  IDS,
};

typedef struct {
  u8 id;
  bool signer;
  bool writable;
} Meta;

// A copy of everything that an instruction may change: of the lists, their first elements, since the others stay zero
// (check_world sees to that).
#define MOST_COPIED 20000
typedef struct {
  u64 lamports[IDS];
  Key owner[IDS];
  u64 length[IDS];
  u8 data[MOST_COPIED];
  i64 timestamp;
  u64 slot;
} Snapshot;

void build_world(void);
void save(Snapshot *snapshot);
void restore(const Snapshot *snapshot);
void advance(u64 seconds, u64 slots);
const Key *key_of(u64 id);
bool initialized(void);
Coordinator *coordinator(void);
Manifest *manifest(void);
// Run an instruction (discriminator and arguments); undone when it is refused. Returns the error.
u64 call(const Meta *metas, u64 metas_length, const u8 *data, u64 length);
// What is true of every account after every instruction (fuzz_check.c).
void check_world(void);
void must(bool condition, const char *what);
