// Entry point: the instruction's discriminator, S("global:<name>")[:8], chooses the handler.
#include "coordinator/context.h"

#define INSTRUCTIONS(X)                                                                            \
  X(0x197a85e849943914, init_coordinator, "InitCoordinator")                                       \
  X(0x204af2dfe5d7d859, free_coordinator, "FreeCoordinator")                                       \
  X(0x7ffd3f9eb058c8db, update, "Update")                                                          \
  X(0xfb0d02333c2e15c1, update_client_version, "UpdateClientVersion")                              \
  X(0x81b6c8c757a015ef, set_future_epoch_rates, "SetFutureEpochRates")                             \
  X(0xdaa6e1b0c07d3c5b, set_paused, "SetPaused")                                                   \
  X(0xc71a09fe2374830a, go_back_to, "RestartFrom")                                                 \
  X(0x4bf6866a667da048, join_run, "JoinRun")                                                       \
  X(0x0f3f5065082c4f5c, tick_run, "Tick")                                                          \
  X(0x2715df8e1995f4d5, send_witness, "Witness")                                                   \
  X(0x5e37163fe87ae8d3, send_warmup_witness, "WarmupWitness")                                      \
  X(0x839d128aa8635a73, send_health_check, "HealthCheck")                                          \
  X(0xfcb88ff0cc13c8d5, set_checkpoint, "Checkpoint")                                              \
  X(0x22a16d949c4612b7, withdraw_from_run, "Withdraw")                                             \
  X(0xd213963eb9955cb8, kick, "Kick")                                                              \
  X(0x57d273dc5df0af75, set_manifest, "SetManifest")                                               \
  X(0x2cbca8e5ed1f4b5f, set_address, "SetAddress")

const ErrorText PROGRAM_ERRORS[] = {
#define X(name, message) {name, #name, message},
    COORDINATOR_ERRORS(X)
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

u64 process_instruction(Input *input) { return report(dispatch(input)); }

u64 entrypoint(u8 *buffer) {
  Input input;
  read_input(buffer, &input);
  return process_instruction(&input);
}
