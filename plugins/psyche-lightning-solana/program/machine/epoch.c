// How an epoch forms, how clients leave it, and what follows when it succeeded.
#include "machine/run.h"

#include "common/syscalls.h"

NOINLINE u64 count_pending(const Run *run) {
  u64 count = 0;
  for (u64 i = 0; i < within(run->account->members_length, MAX_CLIENTS); i++) count += is_pending(run->account, i);
  return count;
}

// The pending members become the list of clients; whether one of them may hold the checkpoint.
static NOINLINE bool take_members(Run *run) {
  Coordinator *account = run->account;
  ClientList *clients = &account->clients;
  fill_zero(clients, sizeof *clients);
  bool held = false;
  u64 length = 0;
  for (u64 i = 0; i < within(account->members_length, MAX_CLIENTS); i++) {
    if (!is_pending(account, i)) continue;
    clients->items[length].signer = account->members[i].signer;
    clients->items[length].p2p = account->members[i].p2p;
    clients->items[length].place = (u8)i;
    length++;
    held |= holds(run->manifest, i);
  }
  clients->length = length;
  return held;
}

NOINLINE void form_epoch(Run *run) {
  Coordinator *account = run->account;
  Manifest *manifest = run->manifest;
  fill_zero(account->rounds, sizeof account->rounds);
  fill_zero(&account->exited, sizeof account->exited);
  manifest->epoch_digest = (Key){{0, 0, 0, 0}};
  account->rounds_head = 0;
  account->start_step = account->progress.step;
  account->last_step = 0;
  account->epoch_start = run->now;
  account->current_rates = account->future_rates;
  if (!take_members(run)) {
    // Nobody is left who could serve the parameters: the first warm-up witness decides again.
    manifest->checkpoint_digest = (Key){{0, 0, 0, 0}};
    manifest->checkpoint_step = 0;
    checkpoint_to_hub(&account->model.checkpoint);
  }
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

NOINLINE void forget_silent_holders(Run *run) {
  const ClientList *clients = &run->account->clients;
  for (u64 i = 0; i < within(clients->length, MAX_CLIENTS); i++) {
    u64 member = clients->items[i].place;
    run->manifest->holders[member / 32] &= ~(1u << member % 32);
  }
}

static void add_points(u64 *points, u64 more) {
  if (__builtin_add_overflow(*points, more, points)) *points = UINT64_MAX;
}

static NOINLINE void settle_list(Run *run, const ClientList *list, u64 earning) {
  Coordinator *account = run->account;
  for (u64 i = 0; i < within(list->length, MAX_CLIENTS); i++) {
    u64 member = list->items[i].place;
    run->manifest->holders[member / 32] |= 1u << member % 32;
    if (list->items[i].state == HEALTHY) add_points(&account->members[member].earned, earning);
    if (list->items[i].state == EJECTED)
      add_points(&account->members[member].slashed, account->current_rates.slashing_per_client);
  }
}

NOINLINE void reward_and_hold(Run *run, bool succeeded) {
  Coordinator *account = run->account;
  u64 healthy = succeeded ? count_healthy(run) : 0;
  fill_zero(run->manifest->holders, sizeof run->manifest->holders);
  settle_list(run, &account->clients, healthy ? account->current_rates.earning_total_shared / healthy : 0);
  settle_list(run, &account->exited, 0);
}
