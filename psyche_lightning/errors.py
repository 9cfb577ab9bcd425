"""The errors that a user may meet; the command line prints their text without a traceback."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence


class PsycheError(Exception):
    """Base of every error of this package: what happened, what was expected, what to do."""


class ConfigError(PsycheError):
    """A recipe, a run configuration or an option is wrong."""


class PluginError(PsycheError):
    """A plugin is malformed, or a name is registered by nobody or by several plugins."""


class WireError(PsycheError):
    """Bytes from outside are not one of the canonical encodings that the decoder accepts."""


class PayloadError(WireError):
    """A DisTrO payload is malformed, non-canonical or does not fit the model's layout."""


class TransportError(PsycheError):
    """A transport could not start, reach a peer or fetch a blob."""


class AbsentError(TransportError):
    """None of the peers that were asked for a blob has it."""


class StoreError(PsycheError):
    """A node's folder of blobs and promises is full, unwritable, in use or damaged."""


class CheckpointError(PsycheError):
    """A checkpoint is missing, damaged or of something else, or its address cannot be read or written."""


class DataError(PsycheError):
    """Samples cannot be obtained.

    A node whose training samples raise this gives nothing to the round, and their ids are assigned again later; where
    the error is lasting, the node leaves the run with it.

    Attributes:
        ids: the samples, as they were asked for; empty where it is not about some of them.
        lasting: whether asking again is of no use, as when the data is not what it was at the start.
    """

    def __init__(self, message: str, *, ids: Sequence[int] = (), lasting: bool = False) -> None:
        super().__init__(message)
        self.ids = tuple(ids)
        self.lasting = lasting


class CoordinatorError(PsycheError):
    """A coordinator refused a request or cannot be reached.

    Attributes:
        code: the machine's error name (as Psyche's, such as ``"InvalidWitness"``), ``"Unreachable"`` or a host's own.
        retryable: whether the same request may succeed later.
    """

    def __init__(self, message: str, *, code: str = "Coordinator", retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


class ManifestMismatchError(CoordinatorError):
    """This node's run configuration differs from the run's.

    Attributes:
        differences: ``(field, the run's value, this node's value)`` for each field that differs.
    """

    def __init__(self, message: str, differences: list[tuple[str, object, object]]) -> None:
        super().__init__(message, code="ManifestMismatch")
        self.differences = differences


def cause(error: OSError) -> str:
    """What the operating system says, such as ``Connection refused``; asyncio puts other words in its place."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__


def nearest(name: str, choices: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` when a choice is close to ``name``, else nothing."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
