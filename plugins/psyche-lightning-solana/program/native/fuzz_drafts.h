// Instructions as clients would send them, with arguments chosen by the fuzzer's bytes.
#pragma once
#include "native/fuzz_world.h"

// The fuzzer's bytes; zeros when they are used up.
typedef struct {
  const u8 *at;
  u64 left;
} Bytes;

u8 next(Bytes *bytes);

// An instruction under construction.
typedef struct {
  u8 data[1400];
  u64 length;
  Meta metas[8];
  u64 metas_length;
} Draft;

enum {
  INIT, FREE, UPDATE, VERSION, RATES, PAUSE, JOIN, TICK, WITNESS, WARMUP_WITNESS, HEALTH, CHECKPOINT, WITHDRAW,
  SET_MANIFEST, SET_ADDRESS, KICK, RESTART, INSTRUCTIONS,
};

void put8(Draft *draft, u8 value);
void put_config(Draft *draft, u8 variant);
void put_model(Draft *draft, u8 variant);
// Discriminator and user; then the run's accounts.
void start(Draft *draft, u8 kind, u8 user);
void run_accounts(Draft *draft);

void draft_init(Draft *draft);
void draft_join(Draft *draft, u8 node, u8 p2p);
void draft_warmup(Draft *draft, u8 node, u8 digest);
void draft_witness(Draft *draft, u8 node, u8 heard, u8 said);
// Any of them.
void draft_one(Draft *draft, u8 kind, Bytes *bytes);

u64 send(const Draft *draft);
