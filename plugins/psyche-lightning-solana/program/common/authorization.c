#include "common/authorization.h"

// Discriminator, bump, grantor, grantee; the scope's length follows.
#define SCOPE_AT (8 + 1 + 2 * sizeof(Key))

u64 authorization_length(u64 scope_length, u64 delegates_length) {
  return SCOPE_AT + 4 + scope_length + 1 + 4 + delegates_length * sizeof(Key) + 8;
}

NOINLINE u64 read_authorization(
    const Account *account, const Key *program, Authorization *authorization, const char *name) {
  TRY(need_owned(account, program, AUTHORIZATION_DISCRIMINATOR, authorization_length(0, 0), name));
  Reader data = reader(account->data + 8, account->data_length - 8);
  authorization->bump = read_u8(&data);
  read_key(&data, &authorization->grantor);
  read_key(&data, &authorization->grantee);
  u64 scope_length = read_u32(&data);
  const u8 *scope = read_raw(&data, scope_length);
  authorization->scope = (Slice){scope, scope_length};
  authorization->active = read_bool(&data);
  authorization->delegates_length = read_u32(&data);
  authorization->delegates = read_raw(&data, authorization->delegates_length * sizeof(Key));
  authorization->grantor_update = (i64)read_u64(&data);
  return data.bad ? fail_account(name, AccountDidNotDeserialize) : 0;
}

NOINLINE void write_authorization(Account *account, const Authorization *authorization) {
  u64 discriminator = AUTHORIZATION_DISCRIMINATOR;
  u32 scope_length = (u32)authorization->scope.length;
  u8 active = authorization->active;
  u8 *at = account->data;
  copy(at, &discriminator, 8);
  at[8] = authorization->bump;
  copy(at + 9, &authorization->grantor, sizeof(Key));
  copy(at + 9 + sizeof(Key), &authorization->grantee, sizeof(Key));
  copy(at + SCOPE_AT, &scope_length, 4);
  at += SCOPE_AT + 4 + scope_length;
  *at = active;
  copy(at + 1, &authorization->delegates_length, 4);
  copy(at + 5 + authorization->delegates_length * sizeof(Key), &authorization->grantor_update, 8);
}

NOINLINE bool authorizes(
    const Authorization *authorization, const Key *grantor, const Key *user, const Slice *scope) {
  if (!authorization->active || !same_key(&authorization->grantor, grantor)) return false;
  if (authorization->scope.length != scope->length) return false;
  if (!same_bytes(authorization->scope.at, scope->at, scope->length)) return false;
  if (zero_key(&authorization->grantee) || same_key(&authorization->grantee, user)) return true;
  for (u64 i = 0; i < authorization->delegates_length; i++)
    if (same_bytes(authorization->delegates + i * sizeof(Key), user, sizeof(Key))) return true;
  return false;
}
