// An authorization: a grantor lets a grantee, the grantee's delegates, or anybody do what its scope names.
//
// The account is borsh: discriminator, bump, grantor, grantee, scope (length, bytes), active, delegates (length, keys),
// time of the grantor's last update. The authorizer makes and changes it, the coordinator reads it.
#pragma once
#include "common/accounts.h"
#include "common/borsh.h"

#define AUTHORIZATION_DISCRIMINATOR 0x4b20a8c3f3a84403ull  // S("account:Authorization")[:8]

typedef struct {
  u8 bump;
  Key grantor;
  Key grantee;  // zero: anybody
  Slice scope;
  bool active;
  const u8 *delegates;  // keys, unaligned
  u32 delegates_length;
  i64 grantor_update;  // seconds
} Authorization;

// Length of the account's data.
u64 authorization_length(u64 scope_length, u64 delegates_length);

// The account of `program` (the authorizer), read; the texts stay in place.
u64 read_authorization(const Account *account, const Key *program, Authorization *authorization, const char *name);

// Write everything but the scope and the delegates, which lie where they are.
void write_authorization(Account *account, const Authorization *authorization);

// Whether it lets `user` do what `scope` names, in the name of `grantor`.
bool authorizes(const Authorization *authorization, const Key *grantor, const Key *user, const Slice *scope);
