"""The requests of a node to its run's coordinator: one definition each, from the node core to every host.

The core emits requests, a :class:`Coordinator` carries them, and
:meth:`~psyche_lightning.coordinator.host.RunHost.handle` answers them. Their fields define what travels between a node
and a server: see :func:`encode` and :func:`decode`.
"""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from psyche_lightning.errors import CoordinatorError, WireError
from psyche_lightning.protocol.codec import from_json, round_from_json, round_to_json, to_json
from psyche_lightning.protocol.evals import Evaluation, Measure, measures_from_wire, measures_to_wire
from psyche_lightning.protocol.manifest import manifest_digest, manifest_text
from psyche_lightning.protocol.state import INCARNATION_SIZE, CoordinatorConfig, Round, RunState, WitnessProof
from psyche_lightning.wire.canonical import sha256

Answer = TypeVar("Answer", covariant=True)
MAX_FIGURES = 32
"""Named figures of one report."""
MAX_TOKENS = 16
"""Tokens of a text in one report, as in Psyche's ``WitnessMetadata``."""
FIGURE_NAME = re.compile(r"[a-z][A-Za-z0-9_.-]{0,47}(/[A-Za-z0-9_.-]{1,48})?")
"""Names of figures: a word, and perhaps a part of it behind a slash, such as the number of a parameter group."""


@dataclass(frozen=True)
class Figure:
    """A named figure of one step.

    Attributes:
        name: as in a node's ``metrics.jsonl``; see :data:`FIGURE_NAME`.
        step: optimizer step to which it belongs.
        value: the figure, finite.
    """

    name: str
    step: int
    value: float


@dataclass(frozen=True)
class Report:
    """Figures that a witness sends for people; only the speed decides something, where shares follow it.

    Attributes:
        step: optimizer step to which the figures belong.
        loss: mean training loss of the sender's batch, in the model's unit; NaN if it had no batch.
        tokens_per_second: the sender's own rate in its share of that step, without its waits for others.
        bytes_up: bytes that the sender wrote to its sockets since it started.
        bytes_down: bytes that it read.
        figures: the newest value of each further figure of the sender, at most :data:`MAX_FIGURES`; each stays in its
            reports until it has a newer one. A chain carries none.
        seconds: for which the sender trained since it started; a chain alone carries it, as a part of the time.
        prompt: the beginning that the sender continues, by its place in the recipe's ``evals.prompts``.
        tokens: those that it added to that text since its last report, at most :data:`MAX_TOKENS`; a chain alone
            carries them.
    """

    step: int = 0
    loss: float = float("nan")
    tokens_per_second: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    figures: tuple[Figure, ...] = ()
    seconds: float = 0.0
    prompt: int = 0
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Terms:
    """What a run has fixed, for a node that considers joining.

    Attributes:
        config: durations and sizes.
        unset: what the first node to join fixes: ``global_batch_size``, ``total_steps`` or both.
        manifest: the agreed sections; None if there are none yet.
        incarnation: the run's, see :class:`~psyche_lightning.protocol.state.RunState`.
    """

    config: CoordinatorConfig
    unset: tuple[str, ...] = ()
    manifest: dict[str, Any] | None = None
    incarnation: bytes = b""


class Request(Generic[Answer]):
    """A request of a node; the parameter is the type of the answer.

    Attributes:
        name: the request's name between node and server.
        reads: whether it only reads, so that nothing needs to be stored.
        later: fields at its end that the first release did not have. They are left out where they are empty, so that
            both releases understand each other.
    """

    name: ClassVar[str]
    reads: ClassVar[bool] = False
    later: ClassVar[int] = 0

    @classmethod
    def answer_to_json(cls, answer: Any) -> Any:
        """The answer as JSON."""
        return answer

    @classmethod
    def answer_from_json(cls, value: Any) -> Any:
        """The inverse of :meth:`answer_to_json`.

        Raises:
            WireError: the value is something else.
        """
        return value


@dataclass(frozen=True)
class GetTerms(Request[Terms]):
    """Asks what the run has fixed, without joining it."""

    name = "terms"
    reads = True

    @classmethod
    def answer_to_json(cls, answer: Terms) -> Any:
        """``[config, unset, manifest, incarnation]``."""
        return [to_json(answer.config), list(answer.unset), answer.manifest, answer.incarnation.hex()]

    @classmethod
    def answer_from_json(cls, value: Any) -> Terms:
        """The terms."""
        try:
            config, unset, manifest, text = value
            incarnation = bytes.fromhex(text)
        except (TypeError, ValueError) as error:
            raise WireError("the terms are not [config, unset, manifest, incarnation]") from error
        if len(incarnation) not in (0, INCARNATION_SIZE):
            raise WireError(f"an incarnation of {len(incarnation)} bytes; expected {INCARNATION_SIZE}")
        return Terms(from_json(CoordinatorConfig, config), tuple(unset), manifest, incarnation)


@dataclass(frozen=True)
class Join(Request[None]):
    """Makes the sender a pending member; sent again to change its address.

    The node core leaves all fields to the runtime, which knows them.

    Attributes:
        address: the address of its transport.
        manifest: its sections of the run's manifest.
        region: where it says that it is, for people; empty if it does not say. A chain has no place for it.

    Raises:
        ManifestMismatchError: the run has another manifest.
    """

    name = "join"
    later = 1
    address: str = ""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    region: str = ""


@dataclass(frozen=True)
class Withdraw(Request[None]):
    """Leaves the run: a pending member is forgotten, and a client of the epoch becomes Withdrawn."""

    name = "withdraw"


@dataclass(frozen=True)
class WarmupWitness(Request[None]):
    """Says that the client at ``index`` of the list holds the parameters with this digest."""

    name = "warmup_witness"
    epoch: int
    index: int
    digest: bytes


@dataclass(frozen=True)
class Witness(Request[None]):
    """Reports as a witness of a round; may be repeated with other content until the round is decided.

    Attributes:
        epoch: epoch of the run.
        height: height of the round.
        proof: the sender's place in the committee.
        merkle: root over the commitments that it verified, in ascending order.
        participants: Bloom filter of the signers that it heard.
        broadcasts: Bloom filter of the commitments that it verified.
        step: training steps in the newest parameters whose digest the sender knows.
        digest: that digest, or empty.
        report: figures for people; the node core leaves them to the runtime.
    """

    name = "witness"
    epoch: int
    height: int
    proof: WitnessProof
    merkle: bytes
    participants: bytes
    broadcasts: bytes
    step: int = 0
    digest: bytes = b""
    report: Report = Report()


@dataclass(frozen=True)
class HealthCheck(Request[int]):
    """Names clients that delivered nothing in the rounds before ``height``; the answer is how many were dropped."""

    name = "health_check"
    epoch: int
    height: int
    signers: tuple[bytes, ...]


@dataclass(frozen=True)
class Accuse(Request[None]):
    """Shows two signed results of one trainer for one batch, for which it is ejected.

    A coordinator that cannot eject refuses with the code ``Unsupported``.
    """

    name = "accuse"
    first: bytes
    second: bytes


@dataclass(frozen=True)
class Evaluated(Request[Evaluation]):
    """Gives the figures of one share of a task; the answer is the task's evaluation with what all nodes have measured.

    A coordinator without a memory of others' figures answers with this node's alone.

    Attributes:
        task: one of the manifest's tasks.
        step: training steps in the parameters that were measured.
        documents: documents of the whole task, the same on all nodes.
        share: the share.
        figures: over the share's documents.
    """

    name = "evaluated"
    task: str
    step: int
    documents: int
    share: int
    figures: tuple[Measure, ...]

    @classmethod
    def answer_to_json(cls, answer: Evaluation) -> Any:
        """An object with the fields of the evaluation."""
        return to_json(answer)

    @classmethod
    def answer_from_json(cls, value: Any) -> Evaluation:
        """The evaluation."""
        return from_json(Evaluation, value)


@dataclass(frozen=True)
class GetRounds(Request[tuple[Round, ...]]):
    """Asks for the epoch's rounds from height ``first`` on, with witness records; none if ``first`` is not kept.

    Only for members. The answer may end before the newest round; then ask again from its last one on.
    """

    name = "rounds"
    reads = True
    epoch: int
    first: int

    @classmethod
    def answer_to_json(cls, answer: tuple[Round, ...]) -> Any:
        """A list of rounds."""
        return [round_to_json(value) for value in answer]

    @classmethod
    def answer_from_json(cls, value: Any) -> tuple[Round, ...]:
        """The rounds."""
        return tuple(round_from_json(item) for item in value)


REQUESTS: dict[str, type[Request[Any]]] = {
    kind.name: kind
    for kind in (GetTerms, Join, Withdraw, WarmupWitness, Witness, HealthCheck, Accuse, Evaluated, GetRounds)
}
"""Each request by its name between node and server."""


def _fields(kind: Any) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(kind)
    return [(item.name, hints[item.name]) for item in fields(kind)]


_FIELDS: dict[type[Request[Any]], list[tuple[str, Any]]] = {kind: _fields(kind) for kind in REQUESTS.values()}


class Coordinator(Protocol):
    """A client of one run's coordinator, on any kind of host (the plugin kind ``coordinator``).

    Implementations repeat retryable requests. They give up after some attempts if they never reached the run. Later
    they try as long as it takes: how long a node waits is its own patience. The signer of every request is the client
    itself.
    """

    @property
    def signer(self) -> bytes:
        """The 32-byte key by which the coordinator knows this client: the node's own key, or a wallet's."""
        ...

    @property
    def away(self) -> str | None:
        """The coordinator's name and why it cannot be reached at the moment; None if it can."""
        ...

    async def request(self, request: Request[Answer]) -> Answer:
        """Send a request, and return the answer.

        Raises:
            CoordinatorError: the request is refused, or the coordinator cannot be reached.
        """
        ...

    def watch(self) -> AsyncIterator[RunState]:
        """Yields the state now and after each change; may skip all but the newest, and reconnects by itself."""
        ...

    async def close(self) -> None:
        """Close connections; further calls fail."""


# --- between node and server ----------------------------------------------------------------------------------------


def encode(request: Request[Any], *, held: bool = False) -> list[Any]:
    """The fields of a request as values for canonical msgpack, in order.

    A proof becomes its three values, a report a list of its values with one of ``[name, step, value]`` for each figure,
    keys and measures a list, and a manifest its digest and its canonical text.

    Args:
        request: the request.
        held: whether the server already has the manifest, whose text is then empty.
    """
    values: list[Any] = []
    for item, hint in _FIELDS[type(request)]:
        value = getattr(request, item)
        if hint is WitnessProof:
            values += [value.position, value.index, value.witness]
        elif hint is Report:
            numbers = [value.step, value.loss, value.tokens_per_second, value.bytes_up, value.bytes_down]
            values.append([*numbers, [[figure.name, figure.step, figure.value] for figure in value.figures]])
        elif hint == tuple[bytes, ...]:
            values.append(list(value))
        elif hint == tuple[Measure, ...]:
            values.append(measures_to_wire(value))
        elif hint == Mapping[str, Any]:
            values += [manifest_digest(value), "" if held else manifest_text(value)]
        else:
            values.append(value)
    least = len(values) - type(request).later
    while len(values) > least and not values[-1]:
        values.pop()
    return values


def decode(name: str, values: Any, manifests: Mapping[bytes, Mapping[str, Any]]) -> Request[Any]:
    """Read what :func:`encode` wrote.

    Args:
        name: name of the request.
        values: its fields, from the wire.
        manifests: the manifests that the server holds, by digest.

    Raises:
        WireError: the request is unknown, or has other fields.
        CoordinatorError: the content of a field is wrong (``InvalidRequest``, ``InvalidManifest``), or the manifest's
            text is empty and the server does not hold it (``ManifestNeeded``).
    """
    kind = REQUESTS.get(name)
    if kind is None:
        raise WireError(f"unknown request {name[:40]!r}; known are {', '.join(REQUESTS)}")
    types = wire_types(kind)
    least = len(types) - kind.later
    told = types[: max(least, len(values))] if isinstance(values, list) else types
    if not isinstance(values, list) or [type(value) for value in values] != list(told):
        raise WireError(f"{name} takes ({', '.join(each.__name__ for each in types)})")
    rest = iter((*values, *(each() for each in types[len(told) :])))
    found: dict[str, Any] = {}
    for item, hint in _FIELDS[kind]:
        if hint is WitnessProof:
            found[item] = WitnessProof(next(rest), next(rest), next(rest))
        elif hint is Report:
            found[item] = _report(next(rest))
        elif hint == tuple[bytes, ...]:
            keys = next(rest)
            if any(type(key) is not bytes for key in keys):
                raise CoordinatorError(f"{item} of {name} is a list of keys", code="InvalidRequest")
            found[item] = tuple(keys)
        elif hint == tuple[Measure, ...]:
            found[item] = measures_from_wire(next(rest))
        elif hint == Mapping[str, Any]:
            found[item] = _manifest(next(rest), next(rest), manifests)
        else:
            found[item] = next(rest)
    return kind(**found)


def wire_types(kind: type[Request[Any]]) -> tuple[type, ...]:
    """The types of the values that :func:`encode` returns for a request of this kind."""
    types: list[type] = []
    for _, hint in _FIELDS[kind]:
        if hint is WitnessProof:
            types += [int, int, bool]
        elif hint is Report or hint in (tuple[bytes, ...], tuple[Measure, ...]):
            types.append(list)
        elif hint == Mapping[str, Any]:
            types += [bytes, str]
        else:
            types.append(hint)
    return tuple(types)


def _report(values: list[Any]) -> Report:
    """Check the figures of a witness. They decide nothing, but they are stored and shown."""
    kinds = (int, float, float, int, int, list)
    if [type(value) for value in values] != list(kinds):
        raise CoordinatorError(
            "a report is [step, loss, tokens per second, bytes up, bytes down, figures]", code="InvalidRequest"
        )
    step, loss, rate, up, down, figures = values
    if any(not 0 <= value < 1 << 64 for value in (step, up, down)):
        raise CoordinatorError("step and bytes of a report are unsigned 64-bit integers", code="InvalidRequest")
    if len(figures) > MAX_FIGURES or not all(map(_is_figure, figures)):
        raise CoordinatorError(
            f"a report has at most {MAX_FIGURES} figures, each of them [name, step, value]: a name such as norm/0, an "
            "unsigned 64-bit integer, and a finite number",
            code="InvalidRequest",
        )
    return Report(step, loss, rate, up, down, tuple(Figure(*figure) for figure in figures))


def _is_figure(values: Any) -> bool:
    if not isinstance(values, list) or [type(value) for value in values] != [str, int, float]:
        return False
    name, step, value = values
    return bool(FIGURE_NAME.fullmatch(name)) and 0 <= step < 1 << 64 and math.isfinite(value)


def _manifest(digest: bytes, text: str, held: Mapping[bytes, Mapping[str, Any]]) -> Mapping[str, Any]:
    if not text:
        if digest not in held:
            raise CoordinatorError("the coordinator does not hold this manifest yet", code="ManifestNeeded")
        return held[digest]
    try:
        manifest = json.loads(text)
        if not isinstance(manifest, dict) or manifest_text(manifest) != text or sha256(text.encode()) != digest:
            raise ValueError("not its canonical form, or it does not match its digest")
    except (ValueError, RecursionError) as error:
        raise CoordinatorError(f"the manifest cannot be read: {error}", code="InvalidManifest") from error
    return manifest
