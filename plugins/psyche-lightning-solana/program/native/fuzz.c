// libFuzzer target of the coordinator: the input chooses a beginning, then a sequence of instructions on one run.
//
// Most instructions are nearly right (the arguments that a client would send, with a part changed), since random bytes
// rarely get past the first check; raw bytes are one of the kinds.
#include <stdlib.h>
#include <string.h>

#include "native/fuzz_drafts.h"

#define MOST_INSTRUCTIONS 24

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
  start(draft, next(bytes) % INSTRUCTIONS, OWNER + next(bytes) % 3);
  run_accounts(draft);
  for (u64 length = next(bytes); length > 0 && bytes->left > 0; length--) put8(draft, next(bytes));
}

// Every node reports: most instructions alone would leave a run in its first round.
static void everybody(Draft *draft, u8 value) {
  u8 held = (u8)manifest()->checkpoint_digest.w[0];  // all bytes of a digest are the same here
  for (u8 node = NODE; node < NODE + NODES; node++) {
    switch (coordinator()->run_state) {
      case WAITING_FOR_MEMBERS: draft_join(draft, node, value); break;
      case WARMUP: draft_warmup(draft, node, held ? held : 7); break;
      case ROUND_TRAIN:
      case ROUND_WITNESS: draft_witness(draft, node, value, 0x2b); break;
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
  start(draft, TICK, STRANGER);
  run_accounts(draft);
  must(send(draft) == 0, "a run that goes on can tick");
  if (!goes_on()) return;
  save(&now);
  must(send(draft) == 0, "and again");
  save(&after);
  must(memcmp(&now, &after, sizeof now) == 0, "a tick at rest changes nothing");
}

// A run with that configuration after so many times in which everybody said what is due.
typedef struct {
  u8 config;
  u8 steps;
  u8 phase;
} Beginning;

static const Beginning BEGINNINGS[] = {
    {0x05, 0, WAITING_FOR_MEMBERS}, {0x05, 1, WARMUP},      {0x05, 2, ROUND_TRAIN}, {0x02, 4, ROUND_TRAIN},
    {0x49, 4, ROUND_TRAIN},         {0xc1, 32, WAITING_FOR_MEMBERS}, {0xc1, 33, WARMUP}, {0xc1, 35, ROUND_TRAIN},
};
static Snapshot nothing, beginnings[COUNT(BEGINNINGS)];

static void begin(u8 config) {
  Draft draft;
  draft_init(&draft);
  must(send(&draft) == 0, "a run is made");
  start(&draft, UPDATE, OWNER);
  run_accounts(&draft);
  put8(&draft, 0);
  put8(&draft, 1);
  put_config(&draft, config);
  put8(&draft, 1);
  put_model(&draft, 2);
  put8(&draft, 0);
  must(send(&draft) == 0, "a run is configured");
  start(&draft, PAUSE, OWNER);
  run_accounts(&draft);
  put8(&draft, 0);
  must(send(&draft) == 0, "a run starts");
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  Draft draft;
  (void)argc;
  (void)argv;
  build_world();
  save(&nothing);
  for (u64 i = 0; i < COUNT(BEGINNINGS); i++) {
    restore(&nothing);
    begin(BEGINNINGS[i].config);
    for (u8 step = 0; step < BEGINNINGS[i].steps; step++) {
      everybody(&draft, 0xff);
      advance(2, 1);
      start(&draft, TICK, STRANGER);
      run_accounts(&draft);
      must(send(&draft) == 0, "a run goes on");
      check_world();
    }
    must(coordinator()->run_state == BEGINNINGS[i].phase, "a run begins as it should");
    save(&beginnings[i]);
  }
  return 0;
}

// What the low bits of a byte choose; what moves a run on comes more often.
enum { WAIT = INSTRUCTIONS, EVERYBODY, RAW };
static const u8 KINDS[32] = {
    INIT, FREE, UPDATE, VERSION, RATES, PAUSE, JOIN, TICK, WITNESS, WARMUP_WITNESS, HEALTH, CHECKPOINT, WITHDRAW,
    SET_MANIFEST, SET_ADDRESS, WAIT, WAIT, WAIT, WAIT, EVERYBODY, EVERYBODY, EVERYBODY, RAW, JOIN, TICK, TICK, WITNESS,
    WITNESS, WARMUP_WITNESS, HEALTH, RESTART, KICK,
};

int LLVMFuzzerTestOneInput(const u8 *data, size_t size) {
  Bytes bytes = {data, size};
  Draft draft;
  u64 beginning = next(&bytes) % (COUNT(BEGINNINGS) + 1);
  restore(beginning < COUNT(BEGINNINGS) ? &beginnings[beginning] : &nothing);
  for (int i = 0; i < MOST_INSTRUCTIONS && bytes.left > 0; i++) {
    u8 choice = next(&bytes), kind = KINDS[choice % COUNT(KINDS)];
    u64 nonce = coordinator()->nonce;
    if (kind < INSTRUCTIONS) {
      draft_one(&draft, kind, &bytes);
      if (choice & 128) spoil(&draft, &bytes);
      bool grew = send(&draft) != 0 || !initialized() || coordinator()->nonce - nonce <= 1 || kind <= FREE;
      must(grew, "the nonce grows by one at most");
    } else if (kind == WAIT) {
      advance(choice & 64 ? 1000 : choice / 32 + 1, choice & 1);
    } else if (kind == EVERYBODY) {
      everybody(&draft, next(&bytes));
    } else {
      send_raw(&draft, &bytes);
    }
  }
  check_world();
  check_rest(&draft);
  return 0;
}
