// Entry point: the instruction's discriminator, S("global:<name>")[:8], chooses the handler.
#include "treasurer/treasurer.h"

#define INSTRUCTIONS(X)                                          \
  X(0xfda73a0ef7a338c6, run_create, "RunCreate")                 \
  X(0x9d14420d742e5633, run_update, "RunUpdate")                 \
  X(0xcede91b92a7695ac, run_set_manifest, "RunSetManifest")      \
  X(0x9184470af70d1e93, run_checkpoint, "RunCheckpoint")         \
  X(0x17cb47d03b1f05f1, run_restart_from, "RunRestartFrom")      \
  X(0xb546b075288eb132, participant_create, "ParticipantCreate") \
  X(0x26ad6b3b56e896a0, participant_claim, "ParticipantClaim")

const ErrorText PROGRAM_ERRORS[] = {
#define X(name, message) {name, #name, message},
    TREASURER_ERRORS(X)
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
