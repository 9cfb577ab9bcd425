// The manifest account: what Psyche's layout has no field for.
#pragma once
#include "machine/layout.h"

#define MANIFEST_DISCRIMINATOR 0x2db4649a093605dbull  // S("account:RunManifest")[:8]
#define MAX_ADDRESS 192

// What a client reported of its parameters: in cool-down its vote, in warm-up what it holds (step and first are 0).
typedef struct __attribute__((packed)) {
  u8 client;  // index in the epoch's list of clients
  u8 first;   // index of the first vote with the same step and digest
  u32 step;
  Key digest;
} Vote;

typedef struct {
  u64 discriminator;
  u8 bump;
  u8 padding[7];
  Key coordinator_account;
  Key authorizer;       // the program that grants authorizations
  Key manifest_digest;  // zero: none is set
  u8 manifest_address[MAX_ADDRESS];
  Key checkpoint_digest;  // zero: nothing is agreed
  u32 checkpoint_step;
  u32 votes_length;
  Key epoch_digest;  // the parameters with which round 0 began; zero before
  u32 holders[(MAX_CLIENTS + 31) / 32];  // bit i: member i may hold the checkpoint
  Vote votes[MAX_CLIENTS];
} Manifest;

SIZE(Vote, 38);
// One call may give an account at most 10,240 bytes.
SIZE(Manifest, 10136);
AT(Manifest, coordinator_account, 16);
AT(Manifest, authorizer, 48);
AT(Manifest, manifest_digest, 80);
AT(Manifest, manifest_address, 112);
AT(Manifest, checkpoint_digest, 304);
AT(Manifest, checkpoint_step, 336);
AT(Manifest, votes_length, 340);
AT(Manifest, epoch_digest, 344);
AT(Manifest, holders, 376);
AT(Manifest, votes, 408);
