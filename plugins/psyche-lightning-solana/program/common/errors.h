// Refusals. A function that may refuse returns 0 or an error; TRY passes it on.
//
// An error is the number that the transaction reports as Custom(n): Anchor's numbers for what its framework checks
// (100 to 4999), the program's own from 6000 (Anchor's convention), each with its line in the log in the form that
// Anchor's clients read. A refusal undoes everything that the instruction did.
#pragma once
#include "common/types.h"

// name, number, message
#define FRAMEWORK_ERRORS(X)                                                                            \
  X(InstructionFallbackNotFound, 101, "Fallback functions are not supported")                          \
  X(InstructionDidNotDeserialize, 102, "The program could not deserialize the given instruction")      \
  X(ConstraintRaw, 2003, "A raw constraint was violated")                                              \
  X(ConstraintSeeds, 2006, "A seeds constraint was violated")                                          \
  X(ConstraintAssociated, 2009, "An associated constraint was violated")                               \
  X(ConstraintTokenOwner, 2015, "A token owner constraint was violated")                               \
  X(ConstraintDuplicateMutableAccount, 2040, "A duplicate mutable account was passed")                 \
  X(AccountDiscriminatorAlreadySet, 3000, "The account discriminator was already set on this account") \
  X(AccountDiscriminatorNotFound, 3001, "No discriminator was found on the account")                   \
  X(AccountDiscriminatorMismatch, 3002, "Account discriminator did not match what was expected")       \
  X(AccountDidNotDeserialize, 3003, "Failed to deserialize the account")                               \
  X(AccountNotEnoughKeys, 3005, "Not enough account keys given to the instruction")                    \
  X(AccountNotMutable, 3006, "The given account is not mutable")                                       \
  X(AccountOwnedByWrongProgram, 3007, "The given account is owned by a different program than expected") \
  X(InvalidProgramId, 3008, "Program ID was not as expected")                                          \
  X(InvalidProgramExecutable, 3009, "Program account is not executable")                               \
  X(AccountNotSigner, 3010, "The given account did not sign")                                          \
  X(AccountNotInitialized, 3012, "The program expected this account to be already initialized")        \
  X(AccountSysvarMismatch, 3015, "The given public key does not match the required sysvar")            \
  X(AccountReallocExceedsLimit, 3016, "The account reallocation exceeds the MAX_PERMITTED_DATA_INCREASE limit")

enum {
#define X(name, number, message) name = number,
  FRAMEWORK_ERRORS(X)
#undef X
};

typedef struct {
  u32 number;
  const char *name;
  const char *message;
} ErrorText;

// The program's own errors (6000 and up); each program defines its table.
extern const ErrorText PROGRAM_ERRORS[];
extern const u64 PROGRAM_ERRORS_LENGTH;

#define TRY(call)                  \
  do {                             \
    u64 error_ = (call);           \
    if (error_ != 0) return error_; \
  } while (0)

// Refuse with `error` unless `condition` holds.
#define REQUIRE(condition, error)      \
  do {                                 \
    if (!(condition)) return (error);  \
  } while (0)

// An error that names the account at fault (a literal) in its log line; written at once.
#define FAIL_ACCOUNT(account, error) fail_account((account), (error))
u64 fail_account(const char *account, u64 error);

// Write the log line of what a handler returned, and give the number to return to the runtime.
u64 report(u64 error);
