"""What a node tells people, as facts. Programs decide by a notice's class and fields, people read its text.

The text is made where the notice is shown: ``str(notice)``.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from typing import ClassVar

from psyche_lightning.transports.base import Link
from psyche_lightning.wire.identity import short


class Notice(ABC):
    """Something for people.

    Attributes:
        level: how much it matters, as in :mod:`logging`.
    """

    level: ClassVar[int] = logging.WARNING

    @abstractmethod
    def __str__(self) -> str:
        """The notice in words."""


# --- parameters -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TakesStart(Notice):
    """The node takes the parameters with which the epoch begins, as its own are others."""

    level = logging.INFO
    digest: bytes

    def __str__(self) -> str:
        return f"taking the run's parameters {_name(self.digest)} in place of the own ones"


@dataclass(frozen=True)
class TakesSnapshot(Notice):
    """The node takes parameters from which it replays the epoch; they contain its first ``applied`` rounds."""

    level = logging.INFO
    digest: bytes
    applied: int

    def __str__(self) -> str:
        return f"taking the parameters {_name(self.digest)} and replaying from round {self.applied} on"


@dataclass(frozen=True)
class TakesLast(Notice):
    """The node takes the parameters with which the run ended."""

    level = logging.INFO
    digest: bytes

    def __str__(self) -> str:
        return f"taking the run's last parameters {_name(self.digest)}"


@dataclass(frozen=True)
class ParametersNotObtained(Notice):
    """Nobody gave the node these parameters, or they were not what was wanted; it will try again."""

    digest: bytes
    reason: str

    def __str__(self) -> str:
        return f"could not obtain the parameters {_name(self.digest)}: {self.reason}; trying again"


@dataclass(frozen=True)
class TransferUnderWay(Notice):
    """Parameters are on their way: ``here`` of ``total`` bytes, from so many peers, at ``rate`` bytes a second."""

    level = logging.INFO
    digest: bytes
    here: int
    total: int
    peers: int
    rate: float

    def __str__(self) -> str:
        share = f"{self.here / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
        return f"parameters {_name(self.digest)}: {share} from {self.peers} peers, {self.rate / 1e6:,.1f} MB/s"


@dataclass(frozen=True)
class PieceNotDelivered(Notice):
    """A peer that seemed to have a piece of a tensor did not deliver it."""

    peer: bytes
    tensor: str
    reason: str

    def __str__(self) -> str:
        who = short(self.peer)
        return f"{who} {self.reason} (a piece of tensor {self.tensor!r}); taking it from another peer"


@dataclass(frozen=True)
class BuffersNotObtained(Notice):
    """Nobody gave the node the model's buffers."""

    reason: str

    def __str__(self) -> str:
        return f"could not obtain the model's buffers: {self.reason}"


@dataclass(frozen=True)
class KeepsOwnBuffers(Notice):
    """The node trains with its own buffers, as ``source``, whose should be taken, does not give them."""

    source: bytes

    def __str__(self) -> str:
        return f"{short(self.source)} does not give the model's buffers; training with this node's own"


# --- parameters that differ -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParametersDiffer(Notice):
    """A quorum holds other parameters after a round than this node, which replays.

    Attributes:
        round: height of the round.
        equal: rounds applied at the newest digest that was the quorum's.
    """

    round: int
    equal: int

    def __str__(self) -> str:
        text = f"the parameters differ after round {self.round} from those of a quorum of witnesses"
        return f"{text} (equal after {self.equal} rounds); replaying to find and repair it"


@dataclass(frozen=True)
class ReplayDoesNotHelp(Notice):
    """The parameters after a round are not the quorum's, and a replay does not change that."""

    round: int

    def __str__(self) -> str:
        return f"the parameters after round {self.round} differ still; taking those of a peer"


@dataclass(frozen=True)
class TensorDiffered(Notice):
    """A replay showed which tensor had changed by itself, and in which round first."""

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
    """Which tensor differs after a round could not be found out."""

    round: int
    reason: str

    def __str__(self) -> str:
        return f"which tensor differs after round {self.round} could not be found out: {self.reason}"


# --- rounds ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecidedWithoutLists(Notice):
    """A round is decided without the lists of witnesses that left: nobody has them. Others may decide otherwise."""

    round: int
    witnesses: tuple[bytes, ...]

    def __str__(self) -> str:
        names = ", ".join(map(short, self.witnesses))
        return f"nobody has the list of {names}, who left; deciding round {self.round} without it"


@dataclass(frozen=True)
class RoundNotApplicable(Notice):
    """A round cannot be applied, though everybody was asked for what is missing.

    Attributes:
        round: its height.
        missing: what for, in words.
    """

    round: int
    missing: str

    def __str__(self) -> str:
        return f"round {self.round} cannot be applied ({self.missing}); asking peers for later parameters"


@dataclass(frozen=True)
class RatesDiffer(Notice):
    """The learning rates that were agreed are not those of this node."""

    def __str__(self) -> str:
        return "this node's learning rate differs from the agreed one, which is used"


# --- what others sent -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MessageRefused(Notice):
    """A peer's message is not what it may send."""

    peer: bytes
    reason: str

    def __str__(self) -> str:
        return f"refused a message: {self.reason}"


@dataclass(frozen=True)
class MessageUnreadable(Notice):
    """A peer delivered bytes that are no signed message of this run, for the ``times``-th time."""

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

    code: str
    reason: str

    def __str__(self) -> str:
        return f"the coordinator refused a request: {self.reason}"


# --- waiting --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waits(Notice):
    """The training thread has waited for ``seconds``; ``what`` says for whom."""

    level = logging.INFO
    what: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.what} ({self.seconds:.0f} s)"


@dataclass(frozen=True)
class LinkIsDown(Notice):
    """A peer that this node waits for, perhaps, cannot be reached."""

    level = logging.INFO
    link: Link

    def __str__(self) -> str:
        return str(self.link)


# --- the end --------------------------------------------------------------------------------------------------------


class Outcome(Enum):
    """What a node holds as it leaves the finished run."""

    LAST_PARAMETERS = auto()
    NOTHING_AGREED = auto()
    OTHER_PARAMETERS = auto()


@dataclass(frozen=True)
class Finished(Notice):
    """The run is over, and the node leaves it.

    Attributes:
        outcome: ``LAST_PARAMETERS``: the node holds the run's last; ``NOTHING_AGREED``: the run has none;
            ``OTHER_PARAMETERS``: nobody gave this node the run's last.
        parameters: digest of the run's last parameters; empty when none were agreed.
    """

    level = logging.INFO
    outcome: Outcome
    parameters: bytes = b""

    def __str__(self) -> str:
        if self.outcome is Outcome.NOTHING_AGREED:
            return "the run is finished; no parameters were agreed"
        if self.outcome is Outcome.OTHER_PARAMETERS:
            return f"the run is finished, but nobody gave this node its last parameters {_name(self.parameters)}"
        return "the run is finished"


def _name(digest: bytes) -> str:
    return digest.hex()[:12]
