// What the runtime gives a program. The native build implements the same functions (native/shim.c).
#pragma once
#include "common/types.h"

// Layouts of the C interface of the virtual machine.
typedef struct {
  Key *key;
  u64 *lamports;
  u64 data_length;
  u8 *data;
  Key *owner;
  u64 rent_epoch;
  bool is_signer;
  bool is_writable;
  bool is_executable;
} Account;

typedef struct {
  const Key *key;
  bool is_writable;
  bool is_signer;
} AccountMeta;

typedef struct {
  const Key *program;
  const AccountMeta *accounts;
  u64 accounts_length;
  const u8 *data;
  u64 data_length;
} Instruction;

// The seeds of one signer.
typedef struct {
  const Slice *seeds;
  u64 length;
} Signer;

typedef struct {
  u64 slot;
  i64 epoch_start_timestamp;
  u64 epoch;
  u64 leader_schedule_epoch;
  i64 unix_timestamp;
} Clock;

// The sysvar has a float between the two; its bytes are not touched here.
typedef struct {
  u64 lamports_per_byte_year;
  u8 exemption_threshold[8];
  u8 burn_percent;
} Rent;

extern u64 sol_log_(const char *text, u64 length);
extern u64 sol_memcpy_(void *to, const void *from, u64 length);
extern u64 sol_memset_(void *to, u64 value, u64 length);
extern u64 sol_memcmp_(const void *a, const void *b, u64 length, int *result);
extern u64 sol_sha256(const Slice *parts, u64 count, u8 *digest);
extern u64 sol_get_clock_sysvar(Clock *clock);
extern u64 sol_get_rent_sysvar(Rent *rent);
extern u64 sol_create_program_address(const Slice *seeds, u64 count, const Key *program, Key *address);
extern u64 sol_try_find_program_address(const Slice *seeds, u64 count, const Key *program, Key *address, u8 *bump);
extern u64 sol_invoke_signed_c(
    const Instruction *instruction, const Account *accounts, u64 accounts_length, const Signer *signers,
    u64 signers_length);
extern u64 sol_log_data(const Slice *fields, u64 count);

INLINE void copy(void *to, const void *from, u64 length) { sol_memcpy_(to, from, length); }
INLINE void fill_zero(void *to, u64 length) { sol_memset_(to, 0, length); }

INLINE bool same_bytes(const void *a, const void *b, u64 length) {
  int result = 0;
  sol_memcmp_(a, b, length, &result);
  return result == 0;
}
