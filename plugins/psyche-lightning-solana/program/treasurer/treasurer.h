// The treasurer: owns a run's coordinator, and pays a token for each point that a client earned there (as Psyche's solana-treasurer).
#pragma once
#include "common/accounts.h"
#include "common/borsh.h"

#define RUN_DISCRIMINATOR 0xbdf673eb569b36c7ull          // S("account:Run")[:8]
#define PARTICIPANT_DISCRIMINATOR 0x0636b3f74f6c8e20ull  // S("account:Participant")[:8]

#define TREASURER_ERRORS(X)                      \
  X(InvalidParameter, "Invalid parameter") \
  X(RunIdInvalidLength, "run_id must be 32 bytes or less")

enum {
  BeforeTreasurerErrors = 5999,
#define X(name, message) name,
  TREASURER_ERRORS(X)
#undef X
};

// A run with a treasurer; the account at ["Run", index] is the main authority of its coordinator. Borsh, in this order.
typedef struct {
  u8 bump;
  u64 index;
  Key main_authority;  // who commands the run through the treasurer
  Key join_authority;
  Key coordinator_account;
  Key coordinator_instance;
  Key collateral_mint;
  u64 total_claimed_collateral_amount;
  u64 total_claimed_earned_points;
  Key coordinator_program;  // ours: Psyche's treasurer has its coordinator's address compiled in
} Treasury;

// What one user was paid; at ["Participant", run, user].
typedef struct {
  u8 bump;
  u64 claimed_collateral_amount;
  u64 claimed_earned_points;
} Participant;

// Handlers. All signatures, writable accounts and accounts that are made are marked.

// payer (signs, pays), run (made), run_collateral (made: the run's associated token account), collateral_mint,
// coordinator_instance (made), coordinator_account (writable), coordinator_program, associated_token_program,
// token_program, system_program; then what our coordinator adds: authorizer_program, coordinator_manifest (made).
// Arguments: index, run_id, client_version, main_authority, join_authority.
u64 run_create(Input *input);
// authority (signs), run, coordinator_instance, coordinator_account (writable), coordinator_program,
// coordinator_manifest (writable).
// Arguments, each optional: metadata, config, model, progress, earning, slashing, paused, client_version.
u64 run_update(Input *input);
// Accounts of run_update. Arguments as the coordinator's set_manifest and checkpoint: forwarded as they are.
u64 run_set_manifest(Input *input);
u64 run_checkpoint(Input *input);
u64 run_restart_from(Input *input);
// payer (signs, pays), user (signs), run, participant (made), system_program.
u64 participant_create(Input *input);
// user (signs), user_collateral (writable), run (writable), run_collateral (writable), coordinator_account,
// participant (writable), token_program. Argument: how many points.
u64 participant_claim(Input *input);

// treasury.c
typedef struct {
  Slice seeds[3];
  u8 index[8];
} RunSeeds;
// The seeds with which the run signs.
void seeds_of_run(RunSeeds *seeds, const Treasury *treasury);
u64 make_treasury(Input *input, const Account *payer, Account *account, Treasury *treasury);
u64 load_treasury(const Input *input, const Account *account, Treasury *treasury);
void store_treasury(Account *account, const Treasury *treasury);
u64 make_participant(Input *input, const Account *payer, Account *account, const Key *run, const Key *user);
u64 load_participant(
    const Input *input, const Account *account, const Key *run, const Key *user, Participant *participant);
void store_participant(Account *account, const Participant *participant);
