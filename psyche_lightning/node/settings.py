"""A node's settings besides the run's state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from psyche_lightning.node.rates import ONE_GROUP, Rates


@dataclass(frozen=True)
class Settings:
    """Equal on all nodes through the manifest, except the intervals.

    Attributes:
        overlap: whether results are witnessed one round later and applied two rounds later.
        digest_every: a parameter digest is due after every so many applied rounds.
        layout: digest of the meaning of payload positions.
        payload_size: returns the largest payload of a step of the run, in bytes.
        buffers: whether the model has buffers that are copied at the start of an epoch.
        keep_bytes: bytes of agreed payloads to keep since the last snapshot before taking a new one.
        rates: the learning rates that a result may have.
        pinned: whether the manifest says with which parameters the run begins, so that this node takes no others.
        tensors: names of the parameters that are trained, in the order of the fingerprints of :class:`Applied`.
        retry: seconds to the first repetition of a fetch, question or call; doubles up to ``retry_most``.
        retry_most: longest such interval in seconds.
    """

    overlap: bool
    digest_every: int
    layout: bytes
    payload_size: Callable[[int], int]
    buffers: bool = False
    keep_bytes: int = 1 << 30
    rates: Rates = ONE_GROUP
    pinned: bool = False
    tensors: tuple[str, ...] = ()
    retry: float = 2.0
    retry_most: float = 15.0

    @property
    def delay(self) -> int:
        """Rounds from training to applying."""
        return 2 if self.overlap else 1

    def applied_before(self, height: int) -> int:
        """Number of rounds applied when round ``height`` is trained; later rounds are under way."""
        return max(0, height - self.delay + 1)
