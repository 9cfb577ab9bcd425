"""What a node must know besides the run's state."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Equal on all nodes through the manifest, except the intervals.

    Attributes:
        overlap: whether results are witnessed one round later and applied two rounds later.
        digest_every: a parameter digest is due each time this many rounds have been applied.
        layout: digest of the meaning of payload positions.
        max_payload: largest payload in bytes.
        buffers: whether the model has buffers that are copied at the start of an epoch.
        keep_bytes: agreed payloads that are kept since the last snapshot, in bytes; beyond it a new one is taken.
        tensors: names of the parameters that are trained, in the order of the fingerprints of :class:`Applied`.
        retry: seconds until a fetch, a question or a call is repeated first; doubles up to ``retry_most``.
        retry_most: longest such interval in seconds.
    """

    overlap: bool
    digest_every: int
    layout: bytes
    max_payload: int
    buffers: bool = False
    keep_bytes: int = 1 << 30
    tensors: tuple[str, ...] = ()
    retry: float = 2.0
    retry_most: float = 15.0

    @property
    def delay(self) -> int:
        """Rounds from training to applying."""
        return 2 if self.overlap else 1

    def applied_before(self, height: int) -> int:
        """How many rounds are applied when round ``height`` is trained; those from there on are under way."""
        return max(0, height - self.delay + 1)

    @property
    def digest_span(self) -> int:
        """Rounds after a digest in which witness lists name it: until the next one is there."""
        return self.digest_every + self.delay
