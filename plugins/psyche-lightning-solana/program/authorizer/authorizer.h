// The authorizer: who may do what in whose name (as Psyche's solana-authorizer). Other programs read its accounts.
#pragma once
#include "common/authorization.h"

// For so long after the grantor's last update an authorization with delegates cannot be closed.
#define CLOSING_DELAY (30 * 86400)

#define AUTHORIZER_ERRORS(X)                                                            \
  X(AuthorizationActiveIsTrue, "AuthorizationActive is true")                            \
  X(AuthorizationClosingConditionsNotReachedYet, "Authorization closing conditions not reached yet")

enum {
  BeforeAuthorizerErrors = 5999,
#define X(name, message) name,
  AUTHORIZER_ERRORS(X)
#undef X
};

// payer (signs, pays), grantor (signs), authorization (made), system program; grantee, scope (at most 32 bytes)
u64 authorization_create(Input *input);
// grantor (signs), authorization; active
u64 authorization_grantor_update(Input *input);
// payer (signs, pays), grantee (signs), authorization, system program; delegates_clear, delegates_added
u64 authorization_grantee_update(Input *input);
// grantor (signs), spill (gets the lamports), authorization, system program
u64 authorization_close(Input *input);

// The authorization account, writable and at the address that its content says.
u64 load_authorization(const Input *input, const Account *account, Authorization *authorization);
