#include "authorizer/authorizer.h"

const ErrorText PROGRAM_ERRORS[] = {
#define X(name, message) {name, #name, message},
    AUTHORIZER_ERRORS(X)
#undef X
};
const u64 PROGRAM_ERRORS_LENGTH = COUNT(PROGRAM_ERRORS);

static u64 run(Input *input) {
  u64 instruction;
  if (!take_discriminator(input, &instruction)) return InstructionFallbackNotFound;
  switch (instruction) {
    case AUTHORIZATION_CREATE: return authorization_create(input);
    case AUTHORIZATION_GRANTOR_UPDATE: return authorization_grantor_update(input);
    case AUTHORIZATION_GRANTEE_UPDATE: return authorization_grantee_update(input);
    case AUTHORIZATION_CLOSE: return authorization_close(input);
    default: return InstructionFallbackNotFound;
  }
}

u64 entrypoint(u8 *buffer) {
  Input input;
  read_input(buffer, &input);
  return report(run(&input));
}
