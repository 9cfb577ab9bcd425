// The coordinator's errors: Psyche's, in its order, from 6000.
#pragma once
#include "common/errors.h"

#define COORDINATOR_ERRORS(X)                                                                                 \
  X(UpdateConfigFinished, "Cannot update config of finished run")                                             \
  X(UpdateConfigNotHalted, "Cannot update config when not halted")                                            \
  X(CoordinatorAccountIncorrectSize, "Coordinator account incorrect size")                                    \
  X(ClientsFull, "Clients list full")                                                                         \
  X(ConfigSanityCheckFailed, "Config sanity check failed")                                                    \
  X(ModelSanityCheckFailed, "Model sanity check failed")                                                      \
  X(ProgressSanityCheckFailed, "Progress sanity check failed")                                                \
  X(SignerNotAClient, "Signer not a client")                                                                  \
  X(SignerMismatch, "Signer mismatch")                                                                        \
  X(CloseCoordinatorNotHalted, "Cannot close coordinator account when not halted")                            \
  X(CoordinatorErrorNoActiveRound, "Coordinator error: No active round")                                      \
  X(CoordinatorErrorInvalidWitness, "Coordinator error: Invalid witness")                                     \
  X(CoordinatorErrorInvalidRunState, "Coordinator error: Invalid run state")                                  \
  X(CoordinatorErrorDuplicateWitness, "Coordinator error: Duplicate witness")                                 \
  X(CoordinatorErrorInvalidHealthCheck, "Coordinator error: Invalid health check")                            \
  X(CoordinatorErrorHalted, "Coordinator error: Halted")                                                      \
  X(CoordinatorErrorInvalidCheckpoint, "Coordinator error: Invalid checkpoint")                               \
  X(CoordinatorErrorWitnessesFull, "Coordinator error: Witnesses full")                                       \
  X(CoordinatorErrorCannotResume, "Coordinator error: Cannot resume")                                         \
  X(CoordinatorErrorInvalidWithdraw, "Coordinator error: Invalid withdraw")                                   \
  X(CoordinatorErrorInvalidCommitteeSelection, "Coordinator error: Invalid committee selection")              \
  X(CoordinatorErrorInvalidCommitteeProof, "Coordinator error: Invalid committee proof")                      \
  X(MoreClientsThanBatches, "There are more clients than total number of batches to assign")                  \
  X(RunIdInvalidLength, "run_id must be 32 bytes or less")

enum {
  BeforeCoordinatorErrors = 5999,
#define X(name, message) name,
  COORDINATOR_ERRORS(X)
#undef X
};
_Static_assert(UpdateConfigFinished == 6000 && CoordinatorErrorNoActiveRound == 6010 && RunIdInvalidLength == 6023, "numbers");
