// The coordinator's errors: Psyche's, in its order, from 6000.
#pragma once
#include "common/errors.h"

#define COORDINATOR_ERRORS(X)                                                                       \
  X(UpdateConfigFinished, "Cannot update config of finished run")                                   \
  X(UpdateConfigNotHalted, "Cannot update config when not halted")                                  \
  X(CoordinatorAccountIncorrectSize, "Coordinator account incorrect size")                          \
  X(ClientsFull, "All client slots are taken")                                                      \
  X(ConfigSanityCheckFailed, "Config sanity check failed")                                          \
  X(ModelSanityCheckFailed, "Model sanity check failed")                                            \
  X(ProgressSanityCheckFailed, "Progress sanity check failed")                                      \
  X(SignerNotAClient, "Signer not a client")                                                        \
  X(SignerMismatch, "Signer mismatch")                                                              \
  X(CloseCoordinatorNotHalted, "Cannot close coordinator account when not halted")                  \
  X(NoActiveRound, "Coordinator error: No active round")                                            \
  X(InvalidWitness, "Coordinator error: Invalid witness")                                           \
  X(InvalidRunState, "Coordinator error: Invalid run state")                                        \
  X(DuplicateWitness, "Coordinator error: Duplicate witness")                                       \
  X(InvalidHealthCheck, "Coordinator error: Invalid health check")                                  \
  X(Halted, "Coordinator error: Halted")                                                            \
  X(InvalidCheckpoint, "Coordinator error: Invalid checkpoint")                                     \
  X(WitnessesFull, "Coordinator error: Witnesses full")                                             \
  X(CannotResume, "Coordinator error: Cannot resume")                                               \
  X(InvalidWithdraw, "Coordinator error: Invalid withdraw")                                         \
  X(InvalidCommitteeSelection, "Coordinator error: Invalid committee selection")                    \
  X(InvalidCommitteeProof, "Coordinator error: Invalid committee proof")                            \
  X(MoreClientsThanBatches, "There are more clients than batches in a round")                       \
  X(RunIdInvalidLength, "The run id has 1 to 32 bytes")

enum {
  BeforeCoordinatorErrors = 5999,
#define X(name, message) name,
  COORDINATOR_ERRORS(X)
#undef X
};
_Static_assert(UpdateConfigFinished == 6000 && NoActiveRound == 6010 && RunIdInvalidLength == 6023, "numbers");
