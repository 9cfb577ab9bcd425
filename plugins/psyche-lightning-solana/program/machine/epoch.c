// How an epoch forms, how clients leave it, and what follows when it succeeded.
#include "machine/run.h"

#include "common/syscalls.h"

NOINLINE u64 count_pending(const Run *run) {
  u64 count = 0;
  for (u64 i = 0; i < within(run->account->members_length, MAX_CLIENTS); i++) count += is_pending(run->account, i);
  return count;
}

bool has_gathered(const Run *run) {
  const Manifest *manifest = run->manifest;
  bool held = zero_key(&manifest->checkpoint_digest);  // a fresh run needs nobody who holds anything
  u64 count = 0;
  for (u64 i = 0; i < within(run->account->members_length, MAX_CLIENTS); i++) {
    if (!is_pending(run->account, i)) continue;
    count++;
    held |= has_place(&manifest->holders, i);
  }
  return held && count >= run->account->config.init_min_clients;
}

u64 epoch_members(const Run *run) { return run->account->clients.length + run->account->exited.length; }

u64 least_clients(const Run *run) {
  u64 least = quorum(epoch_members(run)), configured = run->account->config.min_clients;
  return least > configured ? least : configured;
}

// The pending members become the list of clients.
static NOINLINE void take_members(Run *run) {
  Coordinator *account = run->account;
  ClientList *clients = &account->clients;
  fill_zero(clients, sizeof *clients);
  u64 length = 0;
  for (u64 i = 0; i < within(account->members_length, MAX_CLIENTS); i++) {
    if (!is_pending(account, i)) continue;
    clients->items[length].signer = account->members[i].signer;
    clients->items[length].p2p = account->members[i].p2p;
    clients->items[length].place = (u8)i;
    length++;
  }
  clients->length = length;
}

// The stored rounds stay those of the last epoch until this one trains.
NOINLINE void form_epoch(Run *run) {
  Coordinator *account = run->account;
  fill_zero(&account->exited, sizeof account->exited);
  take_members(run);
  account->epoch_start = run->now;
  account->current_rates = account->future_rates;
  enter(run, WARMUP);
}

// Index of each client after those who are not healthy have left, for the reports of warm-up.
static NOINLINE void move_reports(Run *run) {
  const ClientList *clients = &run->account->clients;
  u16 places[MAX_CLIENTS];
  u16 kept = 0;
  for (u64 i = 0; i < MAX_CLIENTS; i++)
    places[i] = i < clients->length && clients->items[i].state == HEALTHY ? kept++ : NO_PLACE;
  move_votes(run, places);
}

NOINLINE bool remove_departed(Run *run, u32 height) {
  Coordinator *account = run->account;
  ClientList *clients = &account->clients, *exited = &account->exited;
  u64 length = within(clients->length, MAX_CLIENTS), kept = 0;
  if (count_healthy(run) == length) return false;
  if (account->run_state == WARMUP) move_reports(run);
  for (u64 i = 0; i < length; i++) {
    Client *client = &clients->items[i];
    if (client->state == HEALTHY) {
      if (kept != i) clients->items[kept] = *client;
      kept++;
    } else if (exited->length < MAX_CLIENTS) {
      client->exited_height = height;
      exited->items[exited->length++] = *client;
    }
  }
  fill_zero(&clients->items[kept], (length - kept) * sizeof(Client));
  clients->length = kept;
  run->changed = true;
  return true;
}

NOINLINE void withdraw_everyone(Run *run) {
  ClientList *clients = &run->account->clients;
  for (u64 i = 0; i < within(clients->length, MAX_CLIENTS); i++) {
    if (clients->items[i].state != HEALTHY) continue;
    clients->items[i].state = WITHDRAWN;
    run->changed = true;
  }
}

static void add_points(u64 *points, u64 more) {
  if (__builtin_add_overflow(*points, more, points)) *points = UINT64_MAX;
}

static NOINLINE void settle_list(Run *run, const ClientList *list, u64 earning) {
  Coordinator *account = run->account;
  for (u64 i = 0; i < within(list->length, MAX_CLIENTS); i++) {
    const Client *client = &list->items[i];
    Member *member = &account->members[client->place];
    add_place(&run->manifest->holders, client->place);
    if (client->state == HEALTHY) add_points(&member->earned, earning);
    if (client->state == EJECTED) add_points(&member->slashed, account->current_rates.slashing_per_client);
  }
}

NOINLINE void reward_and_hold(Run *run) {
  Coordinator *account = run->account;
  bool advanced = run->manifest->checkpoint_step >= account->start_step;
  u64 healthy = advanced ? count_healthy(run) : 0;
  fill_zero(&run->manifest->holders, sizeof run->manifest->holders);
  settle_list(run, &account->clients, healthy ? account->current_rates.earning_total_shared / healthy : 0);
  settle_list(run, &account->exited, 0);
}

// It gets the last client's place, and that one its place. In a fresh run nothing refers to places yet.
NOINLINE void change_first(Run *run) {
  Coordinator *account = run->account;
  ClientList *clients = &account->clients;
  u64 length = within(clients->length, MAX_CLIENTS);
  if (length > 1) {
    Member *first = &account->members[clients->items[0].place], *last = &account->members[clients->items[length - 1].place];
    Member moved = *first;
    *first = *last;
    *last = moved;
  }
  fill_zero(clients, sizeof *clients);
  fill_zero(&account->exited, sizeof account->exited);
  fill_zero(&run->manifest->holders, sizeof run->manifest->holders);
}
