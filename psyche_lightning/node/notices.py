"""A node's notices to people, as facts. Programs use a notice's class and fields, people read its text.

The text is made where the notice is shown: ``str(notice)``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar

from psyche_lightning.chronicle.entry import Kind
from psyche_lightning.errors import counted
from psyche_lightning.logs import duration
from psyche_lightning.protocol.state import ClientStatus
from psyche_lightning.wire.identity import short

logger = logging.getLogger(__name__)

MOST_NAMES = 8
"""Names of nodes in one line."""
_LEFT = {
    ClientStatus.DROPPED: "was dropped from the epoch: it delivered nothing, or has no connection",
    ClientStatus.WITHDRAWN: "has left the run",
    ClientStatus.EJECTED: "was ejected from the run",
}


class Notice(ABC):
    """Something for people.

    Attributes:
        level: how much it matters, as in :mod:`logging`.
        kind: of its entry in the event files.
    """

    level: ClassVar[int] = logging.WARNING
    kind: ClassVar[Kind] = Kind.FAULT

    @abstractmethod
    def __str__(self) -> str:
        """The notice in words."""

    def tell(self) -> None:
        """Put it into the log; the record's only argument is the notice itself."""
        logger.log(self.level, "%s", self)


# --- parameters -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TakesStart(Notice):
    """The node takes the epoch's initial parameters because its own differ."""

    level = logging.INFO
    kind = Kind.SNAPSHOT
    digest: bytes

    def __str__(self) -> str:
        return f"taking the run's parameters {_name(self.digest)} instead of its own"


@dataclass(frozen=True)
class OtherStart(Notice):
    """A run that resumes from a checkpoint would begin with other parameters, which this node does not take."""

    first: bytes
    digest: bytes

    def __str__(self) -> str:
        return (
            f"{short(self.first)}, the first member, names the parameters {_name(self.digest)}, and not those of the "
            "checkpoint from which the run resumes; waiting for another first member"
        )


@dataclass(frozen=True)
class TakesSnapshot(Notice):
    """The node takes parameters to replay the epoch from; they contain its first ``applied`` rounds."""

    level = logging.INFO
    kind = Kind.SNAPSHOT
    digest: bytes
    applied: int

    def __str__(self) -> str:
        return f"taking the parameters {_name(self.digest)} and replaying from round {self.applied} on"


@dataclass(frozen=True)
class TakesLast(Notice):
    """The node takes the parameters of the run's end."""

    level = logging.INFO
    kind = Kind.SNAPSHOT
    digest: bytes

    def __str__(self) -> str:
        return f"taking the run's last parameters {_name(self.digest)}"


@dataclass(frozen=True)
class ParametersNotObtained(Notice):
    """No peer sent these parameters, or they were wrong; the node tries again."""

    digest: bytes
    reason: str

    def __str__(self) -> str:
        return f"could not obtain the parameters {_name(self.digest)}: {self.reason}; trying again"


@dataclass(frozen=True)
class PieceNotDelivered(Notice):
    """A peer did not deliver a piece of a tensor that it seemed to have."""

    peer: bytes
    tensor: str
    reason: str

    def __str__(self) -> str:
        who = short(self.peer)
        return f"{who} {self.reason} (a piece of tensor {self.tensor!r}); taking it from another peer"


@dataclass(frozen=True)
class BuffersNotObtained(Notice):
    """No peer sent the model's buffers."""

    reason: str

    def __str__(self) -> str:
        return f"could not obtain the model's buffers: {self.reason}"


@dataclass(frozen=True)
class KeepsOwnBuffers(Notice):
    """The node trains with its own buffers because ``source`` does not send the shared ones."""

    source: bytes

    def __str__(self) -> str:
        return f"{short(self.source)} does not send the model's buffers; training with this node's own"


# --- parameters that differ -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParametersDiffer(Notice):
    """A quorum holds other parameters after a round; this node replays.

    Attributes:
        round: height of the round.
        equal: rounds applied at the newest digest that was the quorum's.
    """

    round: int
    equal: int

    def __str__(self) -> str:
        text = f"the parameters after round {self.round} differ from those of a quorum of witnesses"
        return f"{text} (equal after {counted(self.equal, 'round')}); replaying to find and repair it"


@dataclass(frozen=True)
class ReplayDoesNotHelp(Notice):
    """The parameters after a round still differ from the quorum's after a replay."""

    round: int

    def __str__(self) -> str:
        return f"the parameters after round {self.round} still differ; taking a peer's"


@dataclass(frozen=True)
class TensorDiffered(Notice):
    """A replay showed which tensor changed by itself first, and in which round."""

    tensor: str
    round: int

    def __str__(self) -> str:
        return f"the first tensor that differed was {self.tensor!r}, in round {self.round}"


@dataclass(frozen=True)
class TensorDiffers(Notice):
    """A comparison with a peer's parameters showed which tensor differs after a round."""

    tensor: str
    round: int

    def __str__(self) -> str:
        return f"after round {self.round} the first tensor that differs is {self.tensor!r}"


@dataclass(frozen=True)
class DifferenceNotFound(Notice):
    """The tensor that differs after a round could not be found."""

    round: int
    reason: str

    def __str__(self) -> str:
        return f"could not find which tensor differs after round {self.round}: {self.reason}"


# --- rounds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoundNotApplicable(Notice):
    """A round cannot be applied though all peers were asked for missing data.

    Attributes:
        round: its height.
        missing: what is missing.
    """

    round: int
    missing: str

    def __str__(self) -> str:
        return f"round {self.round} cannot be applied ({self.missing}); asking peers for later parameters"


@dataclass(frozen=True)
class RatesDiffer(Notice):
    """The agreed learning rates are not this node's."""

    kind = Kind.NOTICE

    def __str__(self) -> str:
        return "this node's learning rate differs from the agreed one, which is used"


@dataclass(frozen=True)
class OtherRates(Notice):
    """A trainer has other learning rates than the agreed ones."""

    kind = Kind.NOTICE
    trainer: bytes

    def __str__(self) -> str:
        return f"{short(self.trainer)} trains with another learning rate than the agreed one, which is used"


# --- what others sent -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MessageRefused(Notice):
    """A peer sent, for the ``times``-th time, a disallowed message."""

    peer: bytes
    times: int
    reason: str

    def __str__(self) -> str:
        return f"refused a message of {short(self.peer)} ({self.times} so far): {self.reason}"


@dataclass(frozen=True)
class MessageUnreadable(Notice):
    """A peer sent, for the ``times``-th time, bytes that are no signed message of this run."""

    peer: bytes
    times: int
    reason: str

    def __str__(self) -> str:
        return f"refused a message from {short(self.peer)} ({self.times} so far): {self.reason}"


@dataclass(frozen=True)
class TwoResults(Notice):
    """A trainer signed two results for one batch."""

    trainer: bytes

    def __str__(self) -> str:
        return f"{short(self.trainer)} signed two results for one batch; both are excluded"


@dataclass(frozen=True)
class PayloadRefused(Notice):
    """A trainer's payload is malformed."""

    trainer: bytes
    round: int
    reason: str

    def __str__(self) -> str:
        return f"refused the payload of {short(self.trainer)} in round {self.round}: {self.reason}"


@dataclass(frozen=True)
class RequestRefused(Notice):
    """The coordinator refused a request for good; ``code`` as in :class:`~psyche_lightning.errors.CoordinatorError`."""

    kind = Kind.ERROR
    code: str
    reason: str

    def __str__(self) -> str:
        return f"the coordinator refused a request: {self.reason}"


@dataclass(frozen=True)
class CoordinatorWentBack(Notice):
    """The coordinator shows an older state than before for long, as if it was restored from a copy.

    Attributes:
        step: the run's step that this node had seen.
        now: the step that the coordinator shows.
    """

    step: int
    now: int

    def __str__(self) -> str:
        return (
            f"the coordinator went back from step {self.step} to step {self.now}: was it restored from a copy? This "
            "node begins again from there, with what it has stored"
        )


@dataclass(frozen=True)
class SignedBefore(Notice):
    """This node signed a result for this round before, for other data ids; a second one would have it ejected."""

    round: int

    def __str__(self) -> str:
        return f"does not train round {self.round}: before its restart, this node signed a result for other data ids"


# --- waiting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waits(Notice):
    """The training thread has waited ``seconds``; ``what`` is the reason."""

    level = logging.INFO
    kind = Kind.WAIT
    what: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.what} ({duration(self.seconds)})"


# --- coming and going -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined(Notice):
    """The node has joined the run.

    Attributes:
        node: its key.
        signer: its key at the coordinator.
        address: where peers reach it; empty if they find it by its key.
    """

    level = logging.INFO
    kind = Kind.JOIN
    node: bytes
    signer: bytes
    address: str

    def __str__(self) -> str:
        known = "" if self.signer == self.node else f" (signer {short(self.signer)})"
        where = f", peers reach it at {self.address}" if self.address else ""
        return f"joined the run as {short(self.node)}{known}{where}"


@dataclass(frozen=True)
class EpochFormed(Notice):
    """An epoch has its nodes.

    Attributes:
        epoch: its number.
        nodes: their keys.
        member: whether this node is one of them.
    """

    level = logging.INFO
    kind = Kind.EPOCH
    epoch: int
    nodes: tuple[bytes, ...]
    member: bool

    def __str__(self) -> str:
        names = ", ".join(map(short, self.nodes[:MOST_NAMES])) + (", ..." if len(self.nodes) > MOST_NAMES else "")
        many = f"{len(self.nodes)} node{'s' * (len(self.nodes) != 1)}"
        late = "" if self.member else "; this node is late and joins the next one"
        return f"epoch {self.epoch} has {many}: {names}{late}"


@dataclass(frozen=True)
class TooFewMembers(Notice):
    """The run fell below the members that it needs to go on.

    Attributes:
        run_id: its name.
        left: members that stay from the last epoch.
        needed: members with which an epoch begins.
        least: members below which an epoch ends.
    """

    kind = Kind.NOTICE
    run_id: str
    left: int
    needed: int
    least: int

    def __str__(self) -> str:
        settings = f"init_min_clients={self.left}" + (f" min_clients={self.left}" if self.left < self.least else "")
        return (
            f"the run has {self.left} of the {counted(self.needed, 'member')} that it needs: it waits for "
            f"{counted(self.needed - self.left, 'more member')}. Start more nodes; or its owner lets it go on with "
            f"fewer: psyche run pause {self.run_id}, psyche run update {self.run_id} {settings}, "
            f"psyche run resume {self.run_id}"
        )


@dataclass(frozen=True)
class PeerLeft(Notice):
    """A node no longer takes part in the epoch."""

    level = logging.INFO
    kind = Kind.DROP
    node: bytes
    status: ClientStatus

    def __str__(self) -> str:
        return f"{short(self.node)} {_LEFT[self.status]}"


@dataclass(frozen=True)
class Dropped(Notice):
    """The run dropped this node: others did not hear from it."""

    kind = Kind.DROP
    status: ClientStatus

    def __str__(self) -> str:
        return f"this node {_LEFT[self.status]}; it asks to join the next epoch"


@dataclass(frozen=True)
class Paused(Notice):
    """The run is paused, or resumed."""

    level = logging.INFO
    kind = Kind.NOTICE
    paused: bool

    def __str__(self) -> str:
        return "the run is paused" if self.paused else "the run resumes"


@dataclass(frozen=True)
class CannotGoOn(Notice):
    """The node ends with an error for ``reason``, in words, as soon as its training thread looks."""

    kind = Kind.ERROR
    reason: str

    def __str__(self) -> str:
        return f"this node cannot go on: {self.reason}"


@dataclass(frozen=True)
class TrainingAway(Notice):
    """The training loop took a round ``seconds`` ago and did not come back; the node leaves the run until it does."""

    seconds: float

    def __str__(self) -> str:
        return (
            f"the training loop took a round and has not come back for {duration(self.seconds)} (did it end, or is it "
            "busy with something else?): this node leaves the run until it does, and nobody waits for it"
        )


@dataclass(frozen=True)
class Left(Notice):
    """The node has left the run for ``reason``, in words."""

    level = logging.INFO
    kind = Kind.LEAVE
    reason: str

    def __str__(self) -> str:
        return f"leaves the run: {self.reason}"


# --- the end --------------------------------------------------------------------------------------------------------


class Outcome(Enum):
    """What a node holds when it leaves a finished run."""

    LAST_PARAMETERS = auto()
    NOTHING_AGREED = auto()
    OTHER_PARAMETERS = auto()


@dataclass(frozen=True)
class Finished(Notice):
    """The run is over, and the node leaves it.

    Attributes:
        outcome: ``LAST_PARAMETERS``: the node holds the run's last; ``NOTHING_AGREED``: the run has none;
            ``OTHER_PARAMETERS``: no peer sent the run's last.
        parameters: digest of the run's last parameters; empty when none were agreed.
    """

    level = logging.INFO
    kind = Kind.LEAVE
    outcome: Outcome
    parameters: bytes = b""

    @property
    def whole(self) -> bool:
        """Whether the node holds the run's last parameters; if not, its training failed."""
        return self.outcome is Outcome.LAST_PARAMETERS

    @property
    def advice(self) -> str:
        """What to do where the node does not hold the run's last parameters."""
        if self.outcome is Outcome.NOTHING_AGREED:
            return "No node has a result: train again in a new run (`psyche run create`)"
        return "Take them from a node that finished the run, or from its checkpoints"

    def __str__(self) -> str:
        if self.outcome is Outcome.NOTHING_AGREED:
            return "the run is finished; no parameters were agreed"
        if self.outcome is Outcome.OTHER_PARAMETERS:
            return f"the run is finished, but no peer sent its last parameters {_name(self.parameters)}"
        return "the run is finished"


def _name(digest: bytes) -> str:
    return digest.hex()[:12]
