"""What a node asks of a coordinator, whichever host runs it (the ``coordinator`` plugin kind)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from psyche_lightning.protocol.state import CoordinatorConfig, Round, RunState, WitnessProof


@dataclass(frozen=True)
class Report:
    """What a witness sends along for people to look at (spec S1.4 ``WitnessMetadata``); it decides nothing.

    Attributes:
        step: optimizer step that the figures belong to.
        loss: mean training loss of the sender's batch, in the model's unit; NaN when it had none.
        tokens_per_second: the sender's own rate.
        bytes_up: bytes the sender wrote to its sockets since it started.
        bytes_down: bytes it read.
    """

    step: int = 0
    loss: float = float("nan")
    tokens_per_second: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Terms:
    """What a run has fixed, as a node that thinks of joining sees it.

    Attributes:
        config: durations and sizes.
        unset: what the first node to join fixes: ``global_batch_size`` and ``total_steps``, or one of them.
        manifest: the agreed sections; None as long as there are none.
    """

    config: CoordinatorConfig
    unset: tuple[str, ...] = ()
    manifest: dict[str, Any] | None = None


class Coordinator(Protocol):
    """A client of one run's coordinator. All methods raise :class:`~psyche_lightning.errors.CoordinatorError`.

    Implementations retry what is retryable with bounds of their own; what still fails is raised with
    ``retryable=True`` when trying again later makes sense. The signer of every call is the client itself.
    """

    @property
    def signer(self) -> bytes:
        """The 32-byte key that the coordinator knows this client by: the node's own, or a wallet's."""
        ...

    async def terms(self) -> Terms:
        """What the run has fixed; does not join it."""
        ...

    async def join(self, address: str, manifest: dict[str, Any]) -> None:
        """Become a pending member with this transport address and run manifest (idempotent).

        Raises:
            ManifestMismatchError: the run has another manifest.
        """

    async def withdraw(self) -> None:
        """Leave: a pending member is forgotten, a client of the epoch becomes Withdrawn."""

    async def warmup_witness(self, epoch: int, index: int, digest: bytes) -> None:
        """Say that this client, at ``index`` of the list, holds the parameters with that digest."""

    async def witness(
        self,
        epoch: int,
        height: int,
        proof: WitnessProof,
        merkle: bytes,
        participants: bytes,
        broadcasts: bytes,
        report: Report,
    ) -> None:
        """Report as a witness of round ``height``."""

    async def health_check(self, epoch: int, height: int, signers: list[bytes]) -> int:
        """Name clients without a sign of life in the round before ``height``; returns how many were dropped."""

    async def checkpoint(self, epoch: int, step: int, digest: bytes) -> None:
        """Vote in cool-down for the parameters that this client holds after ``step`` training steps."""

    async def accuse(self, first: bytes, second: bytes) -> None:
        """Show two signed results of one trainer for one batch, for which it is ejected.

        A coordinator that cannot eject raises ``CoordinatorError`` with the code ``Unsupported``.
        """

    async def rounds(self, epoch: int, first: int) -> list[Round]:
        """The rounds of the epoch from height ``first`` on, complete with witness records; empty if not kept."""

    def watch(self) -> AsyncIterator[RunState]:
        """The state now and after every change, newest only (changes may be skipped); reconnects by itself."""

    async def close(self) -> None:
        """Release connections."""
