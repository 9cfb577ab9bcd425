"""What a node's parameters contain, and which nodes write them to a shared address: the same answer on every node."""

from __future__ import annotations

from dataclasses import dataclass

from psyche_lightning.protocol.assignment import assign
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.state import CoordinatorConfig, Round, RunState


@dataclass(frozen=True)
class Standing:
    """Where the parameters stand.

    Attributes:
        step: training steps that they contain.
        epoch: the run's epoch.
        data_index: first data id of the step that follows.
        writers: signers of those who have them, in the order in which they care for a shared address.
    """

    step: int
    epoch: int
    data_index: int
    writers: tuple[bytes, ...]

    def rank(self, signer: bytes) -> int | None:
        """A node's place among the writers, from 0; None when it is none."""
        return self.writers.index(signer) if signer in self.writers else None


def after_round(state: RunState, epoch: int, height: int, *, overlap: bool) -> Standing | None:
    """After a node has trained in a round of the epoch, before its next one begins.

    Without overlap the round's results are applied then; with it those of two rounds before are. Writers are the
    round's trainers, beginning with one that its seed picks.

    Args:
        state: one that has the round.
        epoch: of the round.
        height: of the round.
        overlap: whether results travel while the next round computes.

    Returns:
        None when the state has no such round.
    """
    rounds = {round_.height: round_ for round_ in state.rounds} if state.epoch == epoch else {}
    current = rounds.get(height)
    before = rounds.get(max(0, height - 1)) if overlap else current
    if current is None or before is None:
        return None
    writers = _trainers(current, state.config)
    if overlap:
        return Standing(before.step - 1, epoch, before.data_index, writers)
    return Standing(current.step, epoch, current.data_index + current.batch_size, writers)


def at_the_end(state: RunState) -> Standing | None:
    """When the run is finished. Writers are those whose votes made the parameters the agreed ones.

    Returns:
        None when none are agreed.
    """
    trained = [round_ for round_ in state.rounds if round_.step]
    last = max(trained, key=lambda round_: round_.height, default=None)
    agreed = (state.checkpoint.step, state.checkpoint.digest)
    writers = tuple(vote[0] for vote in state.checkpoint_votes if vote[1:] == agreed)
    if last is None or last.step != state.checkpoint.step or not writers:
        return None
    return Standing(last.step, state.epoch, last.data_index + last.batch_size, writers)


def _trainers(round_: Round, config: CoordinatorConfig) -> tuple[bytes, ...]:
    shares = assign(round_.seed, round_.data_index, round_.batch_size, round_selection(round_, config))
    indices = sorted({index for index, _, _ in shares})
    first = round_.seed % max(1, len(indices))
    return tuple(round_.clients[index] for index in indices[first:] + indices[:first])
