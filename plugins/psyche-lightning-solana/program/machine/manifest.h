// The manifest account: what Psyche's layout has no field for.
#pragma once
#include "machine/layout.h"

#define MANIFEST_DISCRIMINATOR 0x2db4649a093605dbull  // S("account:RunManifest")[:8]
#define MAX_ADDRESS 192

// The parameters that a client says it holds: in warm-up with step 0, in a round with its report.
typedef struct __attribute__((packed)) {
  u8 client;  // index in the epoch's list of clients
  u32 step;
  Key digest;
} Vote;

// A set of members, by their places.
typedef struct {
  u32 words[(MAX_CLIENTS + 31) / 32];
} Places;

INLINE bool has_place(const Places *places, u64 place) { return places->words[place / 32] >> (place % 32) & 1; }
INLINE void add_place(Places *places, u64 place) { places->words[place / 32] |= 1u << (place % 32); }

typedef struct {
  u64 discriminator;
  u8 bump;
  u8 padding[7];
  Key coordinator_account;
  Key authorizer;       // the program that grants authorizations
  Key manifest_digest;  // zero: none is set
  u8 manifest_address[MAX_ADDRESS];
  Key checkpoint_digest;  // the newest parameters on record; zero: none yet
  u32 checkpoint_step;
  u32 votes_length;
  Key epoch_digest;  // the parameters with which the epoch of the stored rounds began
  Places holders;    // who may hold the run's parameters
  Places trainers[STORED_ROUNDS];  // the clients of each stored round
  u32 needed;  // how many equal reports decide one of these rounds
  u32 padding2;
  Vote votes[MAX_CLIENTS];
} Manifest;

SIZE(Vote, 37);
// One call may give an account at most 10,240 bytes.
SIZE(Manifest, 10016);
AT(Manifest, coordinator_account, 16);
AT(Manifest, authorizer, 48);
AT(Manifest, manifest_digest, 80);
AT(Manifest, manifest_address, 112);
AT(Manifest, checkpoint_digest, 304);
AT(Manifest, checkpoint_step, 336);
AT(Manifest, votes_length, 340);
AT(Manifest, epoch_digest, 344);
AT(Manifest, holders, 376);
AT(Manifest, trainers, 408);
AT(Manifest, needed, 536);
AT(Manifest, votes, 544);
