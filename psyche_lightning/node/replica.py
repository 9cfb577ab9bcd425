"""The interface of the parameters that a node trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from psyche_lightning.node.snapshot import Get, Index, Put
from psyche_lightning.protocol.open_ids import OpenIds


class Replica(Protocol):
    """Published parameters and their update rule; local state never touches them (invariant I2).

    Only :meth:`payload_size`, :meth:`check` and :meth:`check_index` may be called outside the training thread.

    Attributes:
        layout: 32-byte digest of what payload positions mean.
        groups: number of parameter groups, each of which has a learning rate.
        has_buffers: whether the model has buffers to copy at the start of an epoch.
        size: bytes of a snapshot.
        tensors: names of the parameters that are trained, in the order of :meth:`prints`.
    """

    layout: bytes
    groups: int
    has_buffers: bool
    size: int
    tensors: tuple[str, ...]

    def payload_size(self, step: int) -> int:
        """The largest payload of a step of the run, in bytes."""
        ...

    def check(self, payload: bytes, step: int) -> None:
        """Refuse a malformed payload; called from other threads.

        Raises:
            PayloadError: it is not canonical or does not fit the layout and the step.
        """

    def apply(self, payloads: Sequence[bytes], lrs: tuple[int, ...], step: int) -> None:
        """Apply an agreed set of payloads of a step.

        The result is a pure function of the arguments and the parameters (I1).
        """

    def digest(self, put: Put, open_ids: OpenIds = ()) -> bytes:
        """Digest of the parameters and the open ids that go with them; stores the index blob but no tensors."""
        ...

    def snapshot(self, put: Put, open_ids: OpenIds = ()) -> bytes:
        """Store all parameters as blobs and return their digest."""
        ...

    def prints(self) -> bytes:
        """A fingerprint of 8 bytes of each trained parameter: cheap, and differs if anything in it does."""
        ...

    def check_index(self, index: Index, *, buffers: bool) -> None:
        """Refuse an index of other parameters, or buffers, than this model's; called from other threads.

        Raises:
            WireError: names, shapes or dtypes are not this model's.
        """

    def load(self, digest: bytes, get: Get) -> None:
        """Replace the parameters by those of that digest.

        Raises:
            WireError: names, shapes or dtypes are not this model's, or a value is not finite.
        """

    def snapshot_buffers(self, put: Put) -> bytes:
        """Store the buffers as blobs and return the hash of their index."""
        ...

    def load_buffers(self, index: bytes, get: Get) -> None:
        """Replace the buffers by those of that index.

        Raises:
            WireError: names, shapes or dtypes are not this model's.
        """
