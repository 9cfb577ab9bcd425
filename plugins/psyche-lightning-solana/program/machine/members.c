#include "machine/run.h"

#include "common/syscalls.h"

NOINLINE u64 find_member(const Run *run, const Key *signer) {
  const Coordinator *account = run->account;
  for (u64 i = 0; i < within(account->members_length, MAX_CLIENTS); i++)
    if (same_key(&account->members[i].signer, signer)) return i;
  return NOBODY;
}

NOINLINE u64 find_client(const Run *run, const Key *signer) {
  const ClientList *clients = &run->account->clients;
  for (u64 i = 0; i < within(clients->length, MAX_CLIENTS); i++)
    if (same_key(&clients->items[i].signer, signer)) return i;
  return NOBODY;
}

bool is_healthy(const Run *run, const Key *signer) {
  u64 index = find_client(run, signer);
  return index != NOBODY && run->account->clients.items[index].state == HEALTHY;
}

NOINLINE u64 count_healthy(const Run *run) {
  const ClientList *clients = &run->account->clients;
  u64 count = 0;
  for (u64 i = 0; i < within(clients->length, MAX_CLIENTS); i++) count += clients->items[i].state == HEALTHY;
  return count;
}

// Whether the node of another pending member has that key.
static bool is_taken(const Run *run, const Key *p2p, u64 index) {
  const Coordinator *account = run->account;
  for (u64 i = 0; i < within(account->members_length, MAX_CLIENTS); i++)
    if (i != index && is_pending(account, i) && same_key(&account->members[i].p2p, p2p)) return true;
  return false;
}

static void mark_listed(const ClientList *list, bool *listed) {
  for (u64 i = 0; i < within(list->length, MAX_CLIENTS); i++) listed[list->items[i].place] = true;
}

// A place for another member: a new one, or that of a wallet that is gone, has no points and does not hold the
// checkpoint. Those of the epoch and of the stored rounds stay.
static NOINLINE u64 find_place(Run *run) {
  Coordinator *account = run->account;
  bool listed[MAX_CLIENTS];
  if (account->members_length < MAX_CLIENTS) return account->members_length++;
  fill_zero(listed, sizeof listed);
  mark_listed(&account->clients, listed);
  mark_listed(&account->exited, listed);
  for (u64 slot = 0; slot < STORED_ROUNDS; slot++)
    for (u64 i = 0; i < MAX_CLIENTS; i++) listed[i] |= has_place(&run->manifest->trainers[slot], i);
  for (u64 i = 0; i < MAX_CLIENTS; i++) {
    const Member *member = &account->members[i];
    if (listed[i] || is_pending(account, i) || member->earned || member->slashed || has_place(&run->manifest->holders, i)) continue;
    return i;
  }
  return NOBODY;
}

// A wallet becomes pending for the next epoch; one that came before may bring a new node key.
NOINLINE u64 join(Run *run, const Key *signer, const Key *p2p) {
  Coordinator *account = run->account;
  u64 index = find_member(run, signer);
  bool pending = index != NOBODY && is_pending(account, index);
  REQUIRE(!is_taken(run, p2p, index), SignerMismatch);
  if (pending && same_key(&account->members[index].p2p, p2p)) return 0;
  REQUIRE(pending || count_pending(run) < account->config.global_batch_size_end, MoreClientsThanBatches);
  if (index == NOBODY) {
    index = find_place(run);
    REQUIRE(index != NOBODY, ClientsFull);
    account->members[index].signer = *signer;
  }
  account->members[index].p2p = *p2p;
  account->members[index].active = account->next_active;
  run->changed = true;
  return 0;
}

// A pending member is forgotten, a healthy client of the epoch gets that state.
NOINLINE u64 leave(Run *run, const Key *signer, u8 state) {
  Coordinator *account = run->account;
  u64 member = find_member(run, signer), client = find_client(run, signer);
  bool pending = member != NOBODY && account->members[member].active == account->next_active;
  bool healthy = client != NOBODY && account->clients.items[client].state == HEALTHY;
  REQUIRE(pending || healthy, CoordinatorErrorInvalidWithdraw);
  if (pending && account->members[member].active != 0) {
    account->members[member].active = 0;
    run->changed = true;
  }
  if (healthy) {
    account->clients.items[client].state = state;
    run->changed = true;
  }
  return 0;
}
