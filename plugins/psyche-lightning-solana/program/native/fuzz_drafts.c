#include "native/fuzz_drafts.h"

#include <string.h>

static const u64 DISCRIMINATORS[INSTRUCTIONS] = {
    0x197a85e849943914, 0x204af2dfe5d7d859, 0x7ffd3f9eb058c8db, 0xfb0d02333c2e15c1,
    0x81b6c8c757a015ef, 0xdaa6e1b0c07d3c5b, 0x4bf6866a667da048, 0x0f3f5065082c4f5c,
    0x2715df8e1995f4d5, 0x5e37163fe87ae8d3, 0x839d128aa8635a73, 0xfcb88ff0cc13c8d5,
    0x22a16d949c4612b7, 0x57d273dc5df0af75, 0x2cbca8e5ed1f4b5f, 0xd213963eb9955cb8,
    0xc71a09fe2374830a,
};

u8 next(Bytes *bytes) {
  if (bytes->left == 0) return 0;
  bytes->left--;
  return *bytes->at++;
}

static void put(Draft *draft, const void *from, u64 length) {
  memcpy(draft->data + draft->length, from, length);
  draft->length += length;
}
void put8(Draft *draft, u8 value) { put(draft, &value, 1); }
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

void start(Draft *draft, u8 kind, u8 user) {
  draft->length = draft->metas_length = 0;
  put64(draft, DISCRIMINATORS[kind]);
  meta(draft, user, true, true);
}
void run_accounts(Draft *draft) {
  meta(draft, INSTANCE, false, false);
  meta(draft, COORDINATOR, false, true);
  meta(draft, MANIFEST, false, true);
}
u64 send(const Draft *draft) { return call(draft->metas, draft->metas_length, draft->data, draft->length); }

void draft_init(Draft *draft) {
  start(draft, INIT, OWNER);
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

void put_config(Draft *draft, u8 variant) {
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

void put_model(Draft *draft, u8 variant) {
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
  start(draft, UPDATE, OWNER);
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

void draft_join(Draft *draft, u8 node, u8 p2p) {
  start(draft, JOIN, node);
  put(draft, key_of(node), 32);
  u8 key = NODE_KEY + (p2p == 0 ? 0 : 2 * (node - NODE) + (p2p & 1));  // with 0, the first node's key
  put(draft, key_of(key), 32);
  meta(draft, ANYBODY, false, false);
  run_accounts(draft);
  meta(draft, key, true, false);
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

void draft_warmup(Draft *draft, u8 node, u8 digest) {
  start(draft, WARMUP_WITNESS, node);
  run_accounts(draft);
  u64 index = index_of(node);
  put_record(draft, index, index, 0, digest);
  put16(draft, coordinator()->progress.epoch);
}

void draft_witness(Draft *draft, u8 node, u8 heard, u8 said) {
  start(draft, WITNESS, node);
  run_accounts(draft);
  const Coordinator *account = coordinator();
  const Round *round = &account->rounds[account->rounds_head];
  u64 index = index_of(node);
  put_record(draft, position_in(round, &TEXT("witness"), index), index, heard, said >> 1 & 3);
  put_zeros(draft, 389);
  if (!(said & 1)) return;  // it says nothing of its place and its parameters
  put16(draft, account->progress.epoch);
  put32(draft, round->height);
  put32(draft, account->progress.step - (said >> 3 & 3));
  put_filled(draft, said >> 5, 32);
}

static void draft_health(Draft *draft, u8 node, u8 gone, u8 index) {
  const Coordinator *account = coordinator();
  start(draft, HEALTH, node);
  run_accounts(draft);
  put(draft, key_of(gone), 32);
  put_zeros(draft, 32);
  put8(draft, TRAINER);
  const Round *round = &account->rounds[(account->rounds_head + 3) % STORED_ROUNDS];
  put64(draft, position_in(round, &TEXT("committee"), index));
  put64(draft, index);
}

static void draft_address(Draft *draft, u8 length) {
  start(draft, SET_ADDRESS, NODE);
  put32(draft, length);
  put_filled(draft, 'a', length);
  meta(draft, ADDRESS, false, true);
  meta(draft, INSTANCE, false, false);
  meta(draft, SYSTEM, false, false);
}

static void draft_free(Draft *draft) {
  start(draft, FREE, OWNER);
  meta(draft, SPILL, false, true);
  meta(draft, INSTANCE, false, true);
  meta(draft, COORDINATOR, false, true);
  meta(draft, MANIFEST, false, true);
}

void draft_one(Draft *draft, u8 kind, Bytes *bytes) {
  u8 node = NODE + next(bytes) % (NODES + 1);  // the last is a stranger
  switch (kind) {
    case INIT: draft_init(draft); return;
    case FREE: draft_free(draft); return;
    case UPDATE: draft_update(draft, bytes); return;
    case JOIN: draft_join(draft, node, next(bytes)); return;
    case WITNESS: draft_witness(draft, node, next(bytes), next(bytes)); return;
    case WARMUP_WITNESS: draft_warmup(draft, node, next(bytes)); return;
    case HEALTH: draft_health(draft, node, NODE + next(bytes) % NODES, next(bytes) % NODES); return;
    case SET_ADDRESS: draft_address(draft, next(bytes)); return;
    default: break;
  }
  bool owners = kind == VERSION || kind == RATES || kind == PAUSE || kind == SET_MANIFEST || kind >= KICK;
  start(draft, kind, owners ? OWNER : node);
  run_accounts(draft);
  if (kind == VERSION) put_text(draft, next(bytes) & 1 ? "v2" : "test");
  if (kind == RESTART) {
    put32(draft, coordinator()->progress.step - (next(bytes) & 3));
    put_filled(draft, next(bytes) & 3, 32);
  }
  if (kind == KICK) put(draft, key_of(node), 32);
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
