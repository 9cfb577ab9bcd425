// Entry point: the instruction's discriminator, S("global:<name>")[:8], chooses the handler.
#include "authorizer/authorizer.h"

#define INSTRUCTIONS(X)                                                                    \
  X(0x666ddfe7b3c49d14, authorization_create, "AuthorizationCreate")                       \
  X(0xf93abd61a141741d, authorization_grantor_update, "AuthorizationGrantorUpdate")        \
  X(0x43c19059c77f6fba, authorization_grantee_update, "AuthorizationGranteeUpdate")        \
  X(0x175785c820f8d081, authorization_close, "AuthorizationClose")

const ErrorText PROGRAM_ERRORS[] = {
#define X(name, message) {name, #name, message},
    AUTHORIZER_ERRORS(X)
#undef X
};
const u64 PROGRAM_ERRORS_LENGTH = COUNT(PROGRAM_ERRORS);

static u64 dispatch(Input *input) {
  u64 discriminator;
  if (!take_discriminator(input, &discriminator)) return InstructionFallbackNotFound;
  switch (discriminator) {
#define X(number, handler, name)                                      \
  case number##ull:                                                   \
    sol_log_("Instruction: " name, sizeof("Instruction: " name) - 1); \
    return handler(input);
    INSTRUCTIONS(X)
#undef X
    default: return InstructionFallbackNotFound;
  }
}

u64 entrypoint(u8 *buffer) {
  Input input;
  read_input(buffer, &input);
  return report(dispatch(&input));
}
