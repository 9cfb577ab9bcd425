"""Which nodes delivered in a round, as the coordinator's record shows it, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum

from psyche_lightning.protocol.assignment import assign
from psyche_lightning.protocol.bloom import Bloom
from psyche_lightning.protocol.committee import decided_root, round_selection
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.state import CoordinatorConfig, Round
from psyche_lightning.wire.canonical import sha256

MAX_DELIVERIES = 512
"""Newest rounds of which it is known who delivered."""
CHANGING_DELIVERIES = 4
"""The newest of them, which may still change: who trained too late tells it later."""


class Mark(str, Enum):
    """What became of a node's part of a round; the letters are what is stored and sent."""

    DELIVERED = "d"
    LATE = "l"
    """It trained its part, but too few witnesses had the result in time."""
    ABSENT = "a"
    EXCLUDED = "x"
    """Its result was there, but nothing of the round counts."""
    RESTED = "r"
    """No samples of the round were its."""


@dataclass(frozen=True)
class Delivery:
    """One training round.

    Attributes:
        epoch: the round's epoch.
        height: its height.
        step: its optimizer step.
        time: when it was over, as in :class:`~psyche_lightning.coordinator.history.Event`.
        decided: whether its results were agreed.
        nodes: numbers of its clients.
        marks: a letter for each of them, see :class:`Mark`.
    """

    epoch: int
    height: int
    step: int
    time: float
    decided: bool
    nodes: tuple[int, ...]
    marks: str


def shares_of(round_: Round, config: CoordinatorConfig) -> dict[bytes, int]:
    """How many samples each client of a round trains."""
    parts = assign(round_.seed, round_.data_index, round_.batch_size, round_selection(round_, config), round_.weights)
    return dict.fromkeys(round_.clients, 0) | {round_.clients[index]: stop - start for index, start, stop in parts}


def marks_of(
    round_: Round, attesting: Round, needed: int, shares: dict[bytes, int], trained: Collection[bytes]
) -> tuple[bool, list[Mark]]:
    """What became of each client's part of a round.

    Args:
        round_: the round that was trained.
        attesting: the round whose witnesses say what they have of it; the same unless results overlap training.
        needed: number of equal reports that decide.
        shares: samples of each client.
        trained: clients that say that they trained the round's step.

    Returns:
        Whether results were agreed, and a mark for each of the round's clients.
    """
    root = decided_root(attesting, needed)
    agreed = root not in (None, EMPTY_ROOT)
    reports = Counter((record.merkle == root, record.participants) for record in attesting.witnesses)
    heard = [(decides, Bloom.from_bytes(sent), count) for (decides, sent), count in reports.items()]
    marks = []
    for signer in round_.clients:
        item = sha256(signer)
        by = [(decides, count) for decides, participants, count in heard if item in participants]
        if not shares[signer]:
            marks.append(Mark.RESTED)
        elif agreed and sum(count for decides, count in by if decides) >= needed:
            marks.append(Mark.DELIVERED)
        elif not agreed and by:
            marks.append(Mark.EXCLUDED)
        else:
            marks.append(Mark.LATE if by or signer in trained else Mark.ABSENT)
    return agreed, marks
