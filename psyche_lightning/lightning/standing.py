"""The progress of a node's parameters, and which nodes write them to a shared address. All nodes compute the same."""

from __future__ import annotations

from dataclasses import dataclass

from psyche_lightning.protocol.assignment import assign
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.state import CoordinatorConfig, Round, RunState


@dataclass(frozen=True)
class Standing:
    """The progress of a node's parameters.

    Attributes:
        step: training steps that they contain.
        epoch: the run's epoch.
        data_index: first data id of the step that follows.
        writers: signers of the nodes that have these parameters; the first ones write to a shared address.
    """

    step: int
    epoch: int
    data_index: int
    writers: tuple[bytes, ...]

    def rank(self, signer: bytes) -> int | None:
        """A node's place among the writers, from 0; None for other nodes."""
        return self.writers.index(signer) if signer in self.writers else None


def after_round(state: RunState, epoch: int, height: int, *, overlap: bool) -> Standing | None:
    """The standing after a node has trained a round, before its next round begins.

    Without overlap it includes the round's results; with overlap, those up to two rounds before. Writers are the
    round's trainers, starting with one that its seed picks.

    Args:
        state: a state with the round.
        epoch: its epoch.
        height: its height.
        overlap: whether results travel while the next round computes.

    Returns:
        None if the state lacks the round.
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
    """The standing after the run. Writers are the nodes whose votes agreed on the parameters.

    Returns:
        None without agreement.
    """
    trained = [round_ for round_ in state.rounds if round_.step]
    last = max(trained, key=lambda round_: round_.height, default=None)
    agreed = (state.checkpoint.step, state.checkpoint.digest)
    writers = tuple(vote[0] for vote in state.checkpoint_votes if vote[1:] == agreed)
    if last is None or last.step != state.checkpoint.step or not writers:
        return None
    return Standing(last.step, state.epoch, last.data_index + last.batch_size, writers)


def _trainers(round_: Round, config: CoordinatorConfig) -> tuple[bytes, ...]:
    selection = round_selection(round_, config)
    shares = assign(round_.seed, round_.data_index, round_.batch_size, selection, round_.weights)
    indices = sorted({index for index, _, _ in shares})
    first = round_.seed % max(1, len(indices))
    return tuple(round_.clients[index] for index in indices[first:] + indices[:first])
