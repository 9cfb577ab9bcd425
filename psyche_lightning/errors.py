"""The errors that a user may meet; the command line prints their text without a traceback."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator, Sequence

KILLED = 128 + 9
"""Exit code of a process that another one's death by SIGKILL ended, as shells give it."""


class PsycheError(Exception):
    """Base of all errors of this package. The text says what happened, what was expected and what to do.

    Attributes:
        exit_code: of a command that ends with it.
    """

    exit_code = 1


class ConfigError(PsycheError):
    """A recipe, a run configuration or an option is wrong."""


class PluginError(PsycheError):
    """A plugin is malformed, or no plugin or several plugins register a name."""


class WireError(PsycheError):
    """Bytes from outside are not in the one encoding that the decoder accepts."""


class PayloadError(WireError):
    """A DisTrO payload is malformed, not canonical, or does not fit the model's layout."""


class TransportError(PsycheError):
    """A transport cannot start, reach a peer or fetch a blob."""


class AbsentError(TransportError):
    """Every peer that was asked for a blob answered that it does not have it."""


class StoreError(PsycheError):
    """A node's folder of blobs and promises is full, not writable, in use or damaged."""


class CheckpointError(PsycheError):
    """A checkpoint is missing, damaged or of another model, or its address cannot be read or written."""


class DataError(PsycheError):
    """Samples are not available.

    If a node's training samples raise it, the node contributes nothing to the round, and the ids are assigned again
    later. If the error is lasting, the node leaves the run with it.

    Attributes:
        ids: the requested samples; empty if the error does not concern particular samples.
        lasting: whether another attempt is useless, for example because the data has changed since the start.
    """

    def __init__(self, message: str, *, ids: Sequence[int] = (), lasting: bool = False) -> None:
        super().__init__(message)
        self.ids = tuple(ids)
        self.lasting = lasting


class CoordinatorError(PsycheError):
    """A coordinator refused a request or cannot be reached.

    Attributes:
        code: the machine's name of the error (as in Psyche, such as ``"InvalidWitness"``), ``"Unreachable"`` or a
            host's own name.
        retryable: whether the same request may succeed later.
    """

    def __init__(self, message: str, *, code: str = "Coordinator", retryable: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.retryable = retryable


class UnfinishedError(PsycheError):
    """A node's part in a run is over, but it does not hold the run's last parameters: nothing counts as done."""


class ManifestMismatchError(CoordinatorError):
    """This node's run configuration differs from the run's.

    Attributes:
        differences: ``(field, the run's value, this node's value)`` for each field that differs.
    """

    def __init__(self, message: str, differences: list[tuple[str, object, object]]) -> None:
        super().__init__(message, code="ManifestMismatch")
        self.differences = differences


def cause(error: OSError) -> str:
    """The operating system's text, such as ``Connection refused``, which asyncio replaces by its own."""
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return error.strerror or str(error) or type(error).__name__


def nearest(name: str, choices: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` if a choice is close to ``name``, else an empty text."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def counted(number: int, thing: str, things: str = "") -> str:
    """Such as ``1 node`` or ``3 nodes``; ``things`` is a plural that has more than an s."""
    return f"{number} {thing if number == 1 else things or thing + 's'}"


@contextlib.contextmanager
def needing(package: str, extra: str, what: str) -> Iterator[None]:
    """Import a package inside the context that is installed only with an extra of this one.

    Args:
        package: its name, as pip knows it.
        extra: the extra.
        what: what needs it, such as ``"model.adapter"``.

    Raises:
        ConfigError: it cannot be imported; the text says how it is installed.
    """
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"{what} needs the package {package}: pip install 'psyche-lightning[{extra}]'. {error}"
        ) from error
