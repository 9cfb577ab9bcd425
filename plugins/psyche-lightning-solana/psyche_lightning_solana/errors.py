"""The programs' error numbers as readable errors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """One error of a program.

    Attributes:
        number: of the transaction's ``Custom`` error.
        name: its name in the log line: Psyche's.
        message: the log line's text.
        retryable: whether the same instruction may succeed later without intervention.
    """

    number: int
    name: str
    message: str
    retryable: bool = False

    @property
    def code(self) -> str:
        """The ``CoordinatorError.code``, as the state machine names it."""
        return code_of(self.name)


def code_of(name: str) -> str:
    """The ``CoordinatorError.code`` of an error of the programs: Psyche marks those of the state machine."""
    return name.removeprefix("CoordinatorError")


def _table(first: int, *rows: tuple[str, str]) -> dict[int, Refusal]:
    return {first + i: Refusal(first + i, *row, retryable=code_of(row[0]) in _PASSING) for i, row in enumerate(rows)}


# These depend on the run's state, which may change between an update and the transaction.
_PASSING = {"NoActiveRound", "InvalidRunState", "Halted", "ClientsFull", "UpdateConfigNotHalted"}

_ANCHOR = {
    number: Refusal(number, name, message)
    for number, name, message in (
        (101, "InstructionFallbackNotFound", "Fallback functions are not supported"),
        (102, "InstructionDidNotDeserialize", "The program could not deserialize the given instruction"),
        (2003, "ConstraintRaw", "A raw constraint was violated"),
        (2006, "ConstraintSeeds", "A seeds constraint was violated"),
        (2009, "ConstraintAssociated", "An associated constraint was violated"),
        (2015, "ConstraintTokenOwner", "A token owner constraint was violated"),
        (2040, "ConstraintDuplicateMutableAccount", "A duplicate mutable account was passed"),
        (3000, "AccountDiscriminatorAlreadySet", "The account discriminator was already set on this account"),
        (3001, "AccountDiscriminatorNotFound", "No discriminator was found on the account"),
        (3002, "AccountDiscriminatorMismatch", "Account discriminator did not match what was expected"),
        (3003, "AccountDidNotDeserialize", "Failed to deserialize the account"),
        (3005, "AccountNotEnoughKeys", "Not enough account keys given to the instruction"),
        (3006, "AccountNotMutable", "The given account is not mutable"),
        (3007, "AccountOwnedByWrongProgram", "The given account is owned by a different program than expected"),
        (3008, "InvalidProgramId", "Program ID was not as expected"),
        (3009, "InvalidProgramExecutable", "Program account is not executable"),
        (3010, "AccountNotSigner", "The given account did not sign"),
        (3012, "AccountNotInitialized", "The program expected this account to be already initialized"),
        (3015, "AccountSysvarMismatch", "The given public key does not match the required sysvar"),
        (3016, "AccountReallocExceedsLimit", "The account reallocation exceeds the MAX_PERMITTED_DATA_INCREASE limit"),
    )
}

_COORDINATOR = _table(
    6000,
    ("UpdateConfigFinished", "Cannot update config of finished run"),
    ("UpdateConfigNotHalted", "Cannot update config when not halted"),
    ("CoordinatorAccountIncorrectSize", "Coordinator account incorrect size"),
    ("ClientsFull", "Clients list full"),
    ("ConfigSanityCheckFailed", "Config sanity check failed"),
    ("ModelSanityCheckFailed", "Model sanity check failed"),
    ("ProgressSanityCheckFailed", "Progress sanity check failed"),
    ("SignerNotAClient", "Signer not a client"),
    ("SignerMismatch", "Signer mismatch"),
    ("CloseCoordinatorNotHalted", "Cannot close coordinator account when not halted"),
    ("CoordinatorErrorNoActiveRound", "Coordinator error: No active round"),
    ("CoordinatorErrorInvalidWitness", "Coordinator error: Invalid witness"),
    ("CoordinatorErrorInvalidRunState", "Coordinator error: Invalid run state"),
    ("CoordinatorErrorDuplicateWitness", "Coordinator error: Duplicate witness"),
    ("CoordinatorErrorInvalidHealthCheck", "Coordinator error: Invalid health check"),
    ("CoordinatorErrorHalted", "Coordinator error: Halted"),
    ("CoordinatorErrorInvalidCheckpoint", "Coordinator error: Invalid checkpoint"),
    ("CoordinatorErrorWitnessesFull", "Coordinator error: Witnesses full"),
    ("CoordinatorErrorCannotResume", "Coordinator error: Cannot resume"),
    ("CoordinatorErrorInvalidWithdraw", "Coordinator error: Invalid withdraw"),
    ("CoordinatorErrorInvalidCommitteeSelection", "Coordinator error: Invalid committee selection"),
    ("CoordinatorErrorInvalidCommitteeProof", "Coordinator error: Invalid committee proof"),
    ("MoreClientsThanBatches", "There are more clients than total number of batches to assign"),
    ("RunIdInvalidLength", "run_id must be 32 bytes or less"),
)

_AUTHORIZER = _table(
    6000,
    ("AuthorizationActiveIsTrue", "AuthorizationActive is true"),
    ("AuthorizationClosingConditionsNotReachedYet", "Authorization closing conditions not reached yet"),
)

_TREASURER = _table(
    6000,
    ("InvalidParameter", "Invalid parameter"),
    ("RunIdInvalidLength", "run_id must be 32 bytes or less"),
)

REFUSALS: dict[str, dict[int, Refusal]] = {
    "coordinator": _ANCHOR | _COORDINATOR,
    "authorizer": _ANCHOR | _AUTHORIZER,
    "treasurer": _ANCHOR | _TREASURER,
}
"""Each program's errors by number."""

NUMBERS: dict[str, int] = {refusal.code: number for number, refusal in REFUSALS["coordinator"].items()}
"""The coordinator's numbers by code."""


def refusal(number: int, program: str = "coordinator") -> Refusal:
    """The number's meaning; numbers that our programs do not use are named ``Custom<number>``."""
    known = REFUSALS[program].get(number)
    return known or Refusal(number, f"Custom{number}", f"the {program} program refused with the number {number}")


class Refused(Exception):
    """The program refuses.

    Attributes:
        code: of the error, as in :attr:`Refusal.code`.
        number: the transaction's ``Custom`` number.
    """

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code
        self.number = NUMBERS[code]


def require(holds: object, code: str) -> None:
    """Refuse with that error unless ``holds``."""
    if not holds:
        raise Refused(code)
