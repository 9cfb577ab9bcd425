#include "machine/run.h"

NOINLINE u64 find_member(const Run *run, const Key *signer, u64 from) {
  const Coordinator *account = run->account;
  u64 length = within(account->members_length, MAX_CLIENTS), at = from;
  for (u64 i = 0; i < length; i++, at++) {
    if (at >= length) at = 0;
    if (same_key(&account->members[at].signer, signer)) return at;
  }
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

// Whether another member's node has that key.
static bool is_taken(const Run *run, const Key *p2p, u64 index) {
  const Coordinator *account = run->account;
  for (u64 i = 0; i < within(account->members_length, MAX_CLIENTS); i++)
    if (i != index && same_key(&account->members[i].p2p, p2p)) return true;
  return false;
}

// A wallet becomes pending for the next epoch; one that came before may bring a new node key.
NOINLINE u64 join(Run *run, const Key *signer, const Key *p2p) {
  Coordinator *account = run->account;
  u64 index = find_member(run, signer, 0);
  REQUIRE(!is_taken(run, p2p, index), SignerMismatch);
  if (index == NOBODY) {
    index = account->members_length;
    REQUIRE(index < account->config.global_batch_size_end, MoreClientsThanBatches);
    REQUIRE(index < MAX_CLIENTS, ClientsFull);
    account->members_length = index + 1;
    account->members[index].signer = *signer;
  } else if (same_key(&account->members[index].p2p, p2p) && account->members[index].active == account->next_active) {
    return 0;
  }
  account->members[index].p2p = *p2p;
  account->members[index].active = account->next_active;
  run->changed = true;
  return 0;
}

// A pending member is forgotten, a healthy client of the epoch becomes Withdrawn.
NOINLINE u64 withdraw(Run *run, const Key *signer) {
  Coordinator *account = run->account;
  u64 member = find_member(run, signer, 0), client = find_client(run, signer);
  bool pending = member != NOBODY && account->members[member].active == account->next_active;
  bool healthy = client != NOBODY && account->clients.items[client].state == HEALTHY;
  REQUIRE(pending || healthy, InvalidWithdraw);
  if (pending && account->members[member].active != 0) {
    account->members[member].active = 0;
    run->changed = true;
  }
  if (healthy) {
    account->clients.items[client].state = WITHDRAWN;
    run->changed = true;
  }
  return 0;
}
