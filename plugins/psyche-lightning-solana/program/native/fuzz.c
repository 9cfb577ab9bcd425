// libFuzzer target of the coordinator: the input is a choice of a beginning, then a sequence of instructions on one run.
//
// Most instructions are nearly right (the arguments that a client would send, with a part changed), since random bytes
// rarely get past the first check; raw bytes are one of the kinds.
#include <stdlib.h>
#include <string.h>

#include "native/fuzz_world.h"

#define MOST_INSTRUCTIONS 24

typedef struct {
  const u8 *at;
  u64 left;
} Bytes;

static u8 next(Bytes *bytes) {
  if (bytes->left == 0) return 0;
  bytes->left--;
  return *bytes->at++;
}

// An instruction under construction.
typedef struct {
  u8 data[1400];
  u64 length;
  Meta metas[8];
  u64 metas_length;
} Draft;

static void put(Draft *draft, const void *from, u64 length) {
  memcpy(draft->data + draft->length, from, length);
  draft->length += length;
}
static void put8(Draft *draft, u8 value) { put(draft, &value, 1); }
static void put16(Draft *draft, u16 value) { put(draft, &value, 2); }
static void put32(Draft *draft, u32 value) { put(draft, &value, 4); }
static void put64(Draft *draft, u64 value) { put(draft, &value, 8); }
static void put_zeros(Draft *draft, u64 length) {
  memset(draft->data + draft->length, 0, length);
  draft->length += length;
}
static void put_text(Draft *draft, const char *text) {
  put32(draft, (u32)strlen(text));
  put(draft, text, strlen(text));
}
static void put_filled(Draft *draft, u8 value, u64 length) {
  memset(draft->data + draft->length, value, length);
  draft->length += length;
}
static void meta(Draft *draft, u8 id, bool signer, bool writable) {
  draft->metas[draft->metas_length++] = (Meta){id, signer, writable};
}

static void start(Draft *draft, u64 discriminator, u8 user) {
  draft->length = draft->metas_length = 0;
  put64(draft, discriminator);
  meta(draft, user, true, true);
}
static void run_accounts(Draft *draft) {
  meta(draft, INSTANCE, false, false);
  meta(draft, COORDINATOR, false, true);
  meta(draft, MANIFEST, false, true);
}
static u64 send(const Draft *draft) { return call(draft->metas, draft->metas_length, draft->data, draft->length); }

enum {
  INIT, FREE, UPDATE, VERSION, RATES, PAUSE, JOIN, TICK, WITNESS, WARMUP_WITNESS, HEALTH, CHECKPOINT, WITHDRAW, VOTE,
  SET_MANIFEST, SET_ADDRESS, INSTRUCTIONS,
};
static const u64 DISCRIMINATORS[INSTRUCTIONS] = {
    0x197a85e849943914, 0x204af2dfe5d7d859, 0x7ffd3f9eb058c8db, 0xfb0d02333c2e15c1, 0x81b6c8c757a015ef, 0xdaa6e1b0c07d3c5b,
    0x4bf6866a667da048, 0x0f3f5065082c4f5c, 0x2715df8e1995f4d5, 0x5e37163fe87ae8d3, 0x839d128aa8635a73, 0xfcb88ff0cc13c8d5,
    0x22a16d949c4612b7, 0xc9222e333b3578bf, 0x57d273dc5df0af75, 0x2cbca8e5ed1f4b5f,
};

static void draft_init(Draft *draft) {
  start(draft, DISCRIMINATORS[INIT], OWNER);
  put(draft, key_of(OWNER), 32);
  put(draft, key_of(OWNER), 32);
  put_text(draft, "fuzz");
  put_text(draft, "v1");
  meta(draft, INSTANCE, false, true);
  meta(draft, COORDINATOR, false, true);
  meta(draft, SYSTEM, false, false);
  meta(draft, AUTHORIZER, false, false);
  meta(draft, MANIFEST, false, true);
}

static void put_config(Draft *draft, u8 variant) {
  static const u8 INIT_MIN[] = {1, 2, 3, 3}, MIN[] = {1, 1, 2, 3}, SEATS[] = {0, 1, 2, 0};
  static const u64 RAMP[] = {0, 1000, UINT64_MAX, 64};
  Config config = {
      .warmup_time = 10, .cooldown_time = 5, .max_round_train_time = 8, .round_witness_time = 3,
      .global_batch_size_warmup_tokens = RAMP[variant >> 2 & 3], .epoch_time = variant & 64 ? 60 : UINT64_MAX,
      .total_steps = variant & 128 ? UINT32_MAX - 1 : 4, .init_min_clients = INIT_MIN[variant & 3],
      .min_clients = MIN[variant & 3], .witness_nodes = SEATS[variant & 3], .global_batch_size_start = 7,
      .global_batch_size_end = variant & 16 ? 65535 : 300, .waiting_for_members_extra_time = 2};
  put(draft, &config, sizeof config);
}

static void put_source(Draft *draft, u8 tag, u8 prefix) {
  put8(draft, tag);
  if (tag == 0) return;
  put(draft, "name", 4);
  put_zeros(draft, 60);
  put8(draft, prefix & 1);
  if (!(prefix & 1)) return;
  put(draft, "main", 4);
  put_zeros(draft, 60);
}

static void put_model(Draft *draft, u8 variant) {
  put8(draft, 0);
  put32(draft, 1 + variant);
  put32(draft, variant & 1);
  put8(draft, variant & 3);
  put_source(draft, 1 + (variant >> 1) % 5, variant >> 4);
  put8(draft, variant >> 3 & 1);
  u8 data = variant % 6;
  put8(draft, data);
  if (data == 1) put_filled(draft, 's', 64);
  if (data == 2 || data >= 4) put_filled(draft, 'u', 192);
  if (data == 3) {
    u8 location = variant / 6 % 3;
    put8(draft, location);
    if (location == 1) {
      put_filled(draft, 't', 64);
      put32(draft, 1);
      put8(draft, 2);
      put32(draft, 3);
    } else {
      put_filled(draft, 'g', location == 0 ? 192 : 256);
    }
    put8(draft, 1);
    put8(draft, 1);
    put_filled(draft, 9, 32);
  }
  static const u8 SIZES[] = {20, 32, 32, 48};
  put8(draft, variant >> 5 & 3);
  put_filled(draft, 1, SIZES[variant >> 5 & 3]);
  put8(draft, 1 + (variant & 1));
  if (variant & 1) {
    put8(draft, 1);
    put_filled(draft, 2, 4);
    put8(draft, 0);
    put_filled(draft, 2, 8);
    put8(draft, 1);
  } else {
    put_filled(draft, 2, 16);
    put8(draft, 0);
  }
}

static void draft_update(Draft *draft, Bytes *bytes) {
  u8 parts = next(bytes);
  start(draft, DISCRIMINATORS[UPDATE], OWNER);
  run_accounts(draft);
  put8(draft, parts & 1);
  if (parts & 1) put_filled(draft, next(bytes), 360);
  put8(draft, parts >> 1 & 1);
  if (parts & 2) put_config(draft, next(bytes));
  put8(draft, parts >> 2 & 1);
  if (parts & 4) put_model(draft, next(bytes));
  put8(draft, parts >> 3 & 1);
  if (parts & 8) {
    u8 extreme = next(bytes);
    put16(draft, extreme & 1 ? 65535 : next(bytes));
    put32(draft, extreme & 2 ? UINT32_MAX : next(bytes));
    put64(draft, extreme & 4 ? (1ull << 63) - 1 : extreme & 8 ? UINT64_MAX : next(bytes));
  }
}

static void draft_join(Draft *draft, u8 node, u8 p2p) {
  start(draft, DISCRIMINATORS[JOIN], node);
  put(draft, key_of(node), 32);
  put_filled(draft, p2p, 32);
  meta(draft, ANYBODY, false, false);
  run_accounts(draft);
}

static u64 index_of(u8 node) {
  const ClientList *clients = &coordinator()->clients;
  for (u64 i = 0; i < clients->length && i < MAX_CLIENTS; i++)
    if (same_key(&clients->items[i].signer, key_of(node))) return i;
  return 0;
}

static void put_record(Draft *draft, u64 position, u64 index, u8 heard, u8 merkle) {
  put64(draft, position);
  put64(draft, index);
  put8(draft, 1);
  put_filled(draft, heard, 384);
  put_filled(draft, merkle, 32);
}

static void draft_warmup(Draft *draft, u8 node, u8 digest) {
  start(draft, DISCRIMINATORS[WARMUP_WITNESS], node);
  run_accounts(draft);
  u64 index = index_of(node);
  put_record(draft, index, index, 0, digest);
  put16(draft, coordinator()->progress.epoch);
}

static void draft_witness(Draft *draft, u8 node, u8 heard, bool bound) {
  start(draft, DISCRIMINATORS[WITNESS], node);
  run_accounts(draft);
  const Coordinator *account = coordinator();
  const Round *round = &account->rounds[account->rounds_head];
  u64 index = index_of(node);
  put_record(draft, position_in(round, &TEXT("witness"), index), index, heard, 5);
  put_zeros(draft, 389);
  if (!bound) return;
  put16(draft, account->progress.epoch);
  put32(draft, round->height);
}

static void draft_health(Draft *draft, u8 node, u8 gone, u8 index) {
  const Coordinator *account = coordinator();
  start(draft, DISCRIMINATORS[HEALTH], node);
  run_accounts(draft);
  put(draft, key_of(gone), 32);
  put_zeros(draft, 32);
  put8(draft, TRAINER);
  const Round *round = &account->rounds[(account->rounds_head + 3) % STORED_ROUNDS];
  put64(draft, position_in(round, &TEXT("committee"), index));
  put64(draft, index);
}

static void draft_vote(Draft *draft, u8 node, u8 digest) {
  start(draft, DISCRIMINATORS[VOTE], node);
  run_accounts(draft);
  put16(draft, coordinator()->progress.epoch);
  put32(draft, coordinator()->progress.step - 1);
  put_filled(draft, digest, 32);
}

static void draft_address(Draft *draft, u8 length) {
  start(draft, DISCRIMINATORS[SET_ADDRESS], NODE);
  put32(draft, length);
  put_filled(draft, 'a', length);
  meta(draft, ADDRESS, false, true);
  meta(draft, INSTANCE, false, false);
  meta(draft, SYSTEM, false, false);
}

static void draft_free(Draft *draft) {
  start(draft, DISCRIMINATORS[FREE], OWNER);
  meta(draft, SPILL, false, true);
  meta(draft, INSTANCE, false, true);
  meta(draft, COORDINATOR, false, true);
  meta(draft, MANIFEST, false, true);
}

static void draft_one(Draft *draft, u8 kind, Bytes *bytes) {
  u8 node = NODE + next(bytes) % (NODES + 1);  // the last is a stranger
  switch (kind) {
    case INIT: draft_init(draft); return;
    case FREE: draft_free(draft); return;
    case UPDATE: draft_update(draft, bytes); return;
    case JOIN: draft_join(draft, node, next(bytes)); return;
    case WITNESS: draft_witness(draft, node, next(bytes), next(bytes) & 1); return;
    case WARMUP_WITNESS: draft_warmup(draft, node, next(bytes)); return;
    case HEALTH: draft_health(draft, node, NODE + next(bytes) % NODES, next(bytes) % NODES); return;
    case VOTE: draft_vote(draft, node, next(bytes)); return;
    case SET_ADDRESS: draft_address(draft, next(bytes)); return;
    default: break;
  }
  bool owners = kind == VERSION || kind == RATES || kind == PAUSE || kind == SET_MANIFEST;
  start(draft, DISCRIMINATORS[kind], owners ? OWNER : node);
  run_accounts(draft);
  if (kind == VERSION) put_text(draft, next(bytes) & 1 ? "v2" : "test");
  if (kind == PAUSE) put8(draft, next(bytes) % 3);
  if (kind == RATES) {
    put8(draft, 1);
    put64(draft, next(bytes) & 1 ? UINT64_MAX : 1000);
    put8(draft, 0);
  }
  if (kind == SET_MANIFEST) {
    put_filled(draft, next(bytes), 32);
    put_text(draft, "https://example.org/manifest");
  }
  if (kind == CHECKPOINT) {
    put_source(draft, next(bytes) % 6, next(bytes));
    meta(draft, KEEPER, false, false);
  }
}

// Change the draft: a byte of the arguments, their length, or an account.
static void spoil(Draft *draft, Bytes *bytes) {
  u8 how = next(bytes), where = next(bytes), value = next(bytes);
  Meta *changed = &draft->metas[where % draft->metas_length];
  switch (how % 6) {
    case 0: draft->data[(where | (value & 3) << 8) % draft->length] ^= (u8)(1 << (value >> 3 & 7)); return;
    case 1: draft->length -= where % draft->length; return;
    case 2: put8(draft, value); return;
    case 3: changed->id = value % IDS; return;
    case 4: changed->signer = changed->writable = false; return;
    default: draft->metas_length -= where % draft->metas_length; return;
  }
}

static void send_raw(Draft *draft, Bytes *bytes) {
  start(draft, DISCRIMINATORS[next(bytes) % INSTRUCTIONS], OWNER + next(bytes) % 3);
  run_accounts(draft);
  for (u64 length = next(bytes); length > 0 && bytes->left > 0; length--) put8(draft, next(bytes));
}

// Every node reports: most instructions alone would leave a run in its first round.
static void everybody(Draft *draft, u8 value) {
  for (u8 node = NODE; node < NODE + NODES; node++) {
    switch (coordinator()->run_state) {
      case WAITING_FOR_MEMBERS: draft_join(draft, node, value); break;
      case WARMUP: draft_warmup(draft, node, 7); break;
      case COOLDOWN: draft_vote(draft, node, 1 + (value & 1)); break;
      case ROUND_TRAIN:
      case ROUND_WITNESS: draft_witness(draft, node, value, true); break;
      default: return;
    }
    send(draft);
  }
}

static bool goes_on(void) {
  u8 phase = coordinator()->run_state;
  return initialized() && phase != UNINITIALIZED && phase != FINISHED && phase != PAUSED;
}

// A run at rest stays as it is: another tick at the same time changes nothing.
static void check_rest(Draft *draft) {
  static Snapshot now, after;
  if (!goes_on()) return;
  start(draft, DISCRIMINATORS[TICK], STRANGER);
  run_accounts(draft);
  must(send(draft) == 0, "a run that goes on can tick");
  if (!goes_on()) return;
  save(&now);
  must(send(draft) == 0, "and again");
  save(&after);
  must(memcmp(&now, &after, sizeof now) == 0, "a tick at rest changes nothing");
}

#define BEGINNINGS 8
static Snapshot beginnings[BEGINNINGS];

static void begin(u8 config) {
  Draft draft;
  draft_init(&draft);
  must(send(&draft) == 0, "a run is made");
  start(&draft, DISCRIMINATORS[UPDATE], OWNER);
  run_accounts(&draft);
  put8(&draft, 0);
  put8(&draft, 1);
  put_config(&draft, config);
  put8(&draft, 1);
  put_model(&draft, 2);
  put8(&draft, 0);
  must(send(&draft) == 0, "a run is configured");
  start(&draft, DISCRIMINATORS[PAUSE], OWNER);
  run_accounts(&draft);
  put8(&draft, 0);
  must(send(&draft) == 0, "a run starts");
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  Draft draft;
  (void)argc;
  (void)argv;
  build_world();
  save(&beginnings[0]);
  for (int i = 1; i < BEGINNINGS; i++) {
    restore(&beginnings[0]);
    begin((u8)(i < 4 ? 1 : i == 4 ? 2 : 0x41));
    for (int steps = 1; steps < i; steps++) {
      everybody(&draft, 0xff);
      advance(2, 1);
      start(&draft, DISCRIMINATORS[TICK], STRANGER);
      run_accounts(&draft);
      must(send(&draft) == 0, "a run goes on");
      check_world();
    }
    save(&beginnings[i]);
  }
  return 0;
}

int LLVMFuzzerTestOneInput(const u8 *data, size_t size) {
  Bytes bytes = {data, size};
  Draft draft;
  restore(&beginnings[next(&bytes) % BEGINNINGS]);
  for (int i = 0; i < MOST_INSTRUCTIONS && bytes.left > 0; i++) {
    u8 kind = next(&bytes);
    u64 nonce = coordinator()->nonce;
    if (kind % 32 < INSTRUCTIONS) {
      draft_one(&draft, kind % 32, &bytes);
      if (kind & 128) spoil(&draft, &bytes);
      bool grew = send(&draft) != 0 || !initialized() || coordinator()->nonce - nonce <= 1 || kind % 32 <= FREE;
      must(grew, "the nonce grows by one at most");
    } else if (kind % 32 < 22) {
      advance(kind & 64 ? 1000 : kind % 32 - 15, kind & 1);
    } else if (kind % 32 < 30) {
      everybody(&draft, next(&bytes));
    } else {
      send_raw(&draft, &bytes);
    }
  }
  check_world();
  check_rest(&draft);
  return 0;
}
