// Invariants of the accounts.
#include "native/fuzz_world.h"

#include <string.h>

static bool zeros(const void *at, u64 length) {
  const u8 *bytes = at;
  return length == 0 || (bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0);
}

#define ZERO(object) must(zeros(&(object), sizeof(object)), #object " is zero")

static void check_clients(const ClientList *list, bool left) {
  const Coordinator *account = coordinator();
  must(list->length <= MAX_CLIENTS, "a list of clients is in bounds");
  must(zeros(&list->items[list->length], (MAX_CLIENTS - list->length) * sizeof(Client)), "the rest of it is zero");
  for (u64 i = 0; i < list->length; i++) {
    const Client *client = &list->items[i];
    ZERO(client->padding);
    must(client->place < account->members_length, "a client is a member");
    must(same_key(&account->members[client->place].signer, &client->signer), "and keeps its place");
    must(client->state <= EJECTED, "a client's state is known");
    must(!left || client->state != HEALTHY, "who left is not healthy");
    must(left || client->exited_height == 0, "who is there has not left");
  }
}

static void check_membership(const Coordinator *account) {
  u64 next = 0;
  must(account->members_length <= MAX_CLIENTS, "members are in bounds");
  must(zeros(&account->members[account->members_length], (MAX_CLIENTS - account->members_length) * sizeof(Member)),
       "unused members are zero");
  for (u64 i = 0; i < account->members_length; i++) {
    const Member *member = &account->members[i];
    must(member->unused == 0 && member->active <= account->next_active, "a member is active in an epoch to come");
    for (u64 j = 0; j < i; j++) must(!same_key(&account->members[j].signer, &member->signer), "a wallet is one member");
    u64 seen = 0;
    if (next < account->clients.length && same_key(&account->clients.items[next].signer, &member->signer)) {
      next++;
      seen++;
    }
    for (u64 j = 0; j < account->exited.length; j++)
      seen += same_key(&account->exited.items[j].signer, &member->signer);
    must(seen <= 1, "a member is in the epoch once");
  }
  must(next == account->clients.length, "the epoch's clients are members, in the order of registration");
}

static void check_round(u64 slot) {
  const Round *round = &coordinator()->rounds[slot];
  u64 trainers = 0;
  for (u64 i = 0; i < MAX_CLIENTS; i++) trainers += has_place(&manifest()->trainers[slot], i);
  must(trainers == round->clients_length, "a round's clients are in their places");
  for (u64 i = coordinator()->members_length; i < MAX_CLIENTS; i++)
    must(!has_place(&manifest()->trainers[slot], i), "and are members");
  must(round->witnesses_length <= MAX_WITNESSES, "witnesses are in bounds");
  must(zeros(&round->witnesses[round->witnesses_length],
             (MAX_WITNESSES - round->witnesses_length) * sizeof(Witness)), "unused witnesses are zero");
  must(round->clients_length <= MAX_CLIENTS && round->tie_breaker_tasks == 0, "a round's clients are in bounds");
  for (u64 i = 0; i < round->witnesses_length; i++) {
    const Witness *record = &round->witnesses[i];
    ZERO(record->padding);
    must(record->witness == 1, "a record claims its seat");
    must(record->index < round->clients_length, "a record names a client");
    for (u64 j = 0; j < i; j++) must(round->witnesses[j].index != record->index, "a witness reports once");
  }
}

static void check_model(const Model *model) {
  ZERO(model->padding);
  ZERO(model->checkpoint.padding);
  must(model->tag == 0 && model->checkpoint.tag <= CHECKPOINT_P2P_GCS && model->checkpoint.has_prefix <= 1, "known");
  must(model->checkpoint.has_prefix || zeros(model->checkpoint.prefix, 64), "no prefix is zero");
  must(model->data_location.tag <= DATA_PREPROCESSED && model->schedule.tag <= SCHEDULE_WARMUP_STABLE_DECAY, "known");
  must(model->optimizer.tag <= OPTIMIZER_DISTRO && model->architecture <= 3 && model->data_type <= 1, "known");
}

static void check_votes(void) {
  const Coordinator *account = coordinator();
  const Manifest *kept = manifest();
  must(kept->votes_length <= MAX_CLIENTS, "votes are in bounds");
  must(zeros(&kept->votes[kept->votes_length], (MAX_CLIENTS - kept->votes_length) * sizeof(Vote)), "unused votes");
  for (u64 i = 0; i < kept->votes_length; i++) {
    const Vote *vote = &kept->votes[i];
    Key digest = vote->digest;
    must(vote->client < account->clients.length, "a vote names a client");
    must(!zero_key(&digest), "and parameters");
    for (u64 j = 0; j < i; j++) must(kept->votes[j].client != vote->client, "a client votes once");
  }
  must(!zero_key(&kept->checkpoint_digest) || kept->checkpoint_step == 0, "no checkpoint has no step");
  for (u64 i = account->members_length; i < MAX_CLIENTS; i++)
    must(!has_place(&kept->holders, i), "who holds the checkpoint is a member");
  must(kept->needed > 0 && kept->needed <= MAX_WITNESSES, "some reports are needed, and no more than there are");
  ZERO(kept->padding);
  ZERO(kept->padding2);
}

static void check_phase(const Coordinator *account) {
  u8 phase = account->run_state;
  bool in_round = phase == ROUND_TRAIN || phase == ROUND_WITNESS;
  const Round *round = &account->rounds[account->rounds_head % STORED_ROUNDS];
  must(phase <= PAUSED && phase != COOLDOWN && account->rounds_head < STORED_ROUNDS, "the phase is known");
  must(account->first_round <= 1 && account->cold_start_epoch <= 1 && account->pending_pause <= 1, "flags are 0 or 1");
  must(!account->pending_pause || in_round, "a pause is pending only in an epoch");
  must(!in_round || round->height % STORED_ROUNDS == account->rounds_head, "a round lies where its height says");
  must(!in_round || round->clients_length == account->clients.length, "clients leave at the end of a round");
  must(!in_round || !zero_key(&manifest()->epoch_digest), "an epoch's first parameters are known");
  must(account->last_step == 0 || account->last_step > account->start_step, "an epoch that drains has trained");
  must(account->first_round == (phase == WARMUP || (in_round && round->height == 0)), "the first round");
  must(account->is_warmup_first_tick == (phase == WAITING_FOR_MEMBERS), "the first tick of warm-up");
  must(account->is_training_first_tick == (phase == WAITING_FOR_MEMBERS || phase == WARMUP), "the first training tick");
  if (phase == UNINITIALIZED) return;
  must(account->progress.step > 0 && config_is_sane(&account->config), "a run that goes on is configured");
}

void check_world(void) {
  const Coordinator *account = coordinator();
  if (!initialized()) {
    must(zeros(account, sizeof *account), "an account without a run is zero");
    return;
  }
  must(account->version == COORDINATOR_VERSION, "the version stays");
  ZERO(account->padding0);
  ZERO(account->padding1);
  ZERO(account->padding2);
  ZERO(account->padding3);
  ZERO(account->padding4);
  ZERO(account->progress.padding);
  check_phase(account);
  check_membership(account);
  check_clients(&account->clients, false);
  check_clients(&account->exited, true);
  for (u64 i = 0; i < STORED_ROUNDS; i++) check_round(i);
  check_model(&account->model);
  check_votes();
}
