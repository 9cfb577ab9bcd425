"""Predicts a run from measurements, and describes the prediction in rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psyche_lightning.coordinator.shares import weigh
from psyche_lightning.doctor.connectivity import members
from psyche_lightning.doctor.finding import Finding, Verdict, duration, size, speed
from psyche_lightning.doctor.link import MeasuredLink
from psyche_lightning.doctor.round_time import Conditions, Prediction, needed_rate, predict
from psyche_lightning.doctor.speed import TrainingSpeed
from psyche_lightning.errors import counted
from psyche_lightning.protocol.assignment import divide
from psyche_lightning.protocol.manifest import BY_SPEED
from psyche_lightning.protocol.owner import ClockReading
from psyche_lightning.recipe import Recipe
from psyche_lightning.transports.environment import with_environment

AREA = "prediction"
HANDSHAKE_TRIPS = 3.0
"""Round trips until a peer has proved its key: TCP, TLS, and the proofs."""
BUSY = 0.7
"""Utilization below which the doctor gives advice."""
_LIMITS = {
    "compute": ("computing", ""),
    "steps": ("the optimizer of the local steps", "with a larger global batch, each of its steps has more samples"),
    "slowest": ("the slowest node", "all others wait for it: leave it out, or let all nodes have similar devices"),
    "distro": ("DisTrO's own work", "with a larger global batch, nodes compute longer between two updates"),
    "upload": ("upload", "overlap=true hides it behind computing; a smaller k or a larger global batch sends less"),
    "download": ("download", "overlap=true hides it behind computing; a smaller k or fewer nodes send less"),
    "disk": ("the disk", "use a faster disk for node.directory, or a larger global batch"),
    "latency": ("latency", "overlap=true hides it behind computing; a larger global batch computes longer in between"),
}


@dataclass(frozen=True)
class RunShape:
    """The size of a round.

    Attributes:
        nodes: nodes that train.
        samples: samples of a round.
        rates: tokens a second of the other nodes, as they report it, by short key.
    """

    nodes: int
    samples: int
    rates: Mapping[str, float]

    @property
    def share(self) -> int:
        """Samples of one node, where shares are equal."""
        return math.ceil(self.samples / self.nodes)

    def shares(self, own: float, *, by_speed: bool) -> dict[str, int]:
        """Samples of this node, whose key is empty here, and of those whose speed is known.

        Args:
            own: tokens a second of this node.
            by_speed: whether shares follow speeds; they are predicted where those of all nodes are known.
        """
        speeds = {b"": own, **{key.encode(): rate for key, rate in self.rates.items()}}
        weights = weigh(list(speeds), speeds, None) if by_speed and len(speeds) == self.nodes else ()
        sizes = divide(self.samples, weights) if weights else [self.share] * len(speeds)
        return dict(zip(["", *self.rates], sizes, strict=True))


@dataclass(frozen=True)
class Network:
    """The link for a prediction; rates in bytes a second, times in seconds; None means not known.

    Attributes:
        upload: this node's upload.
        download: this node's download.
        round_trip: round trip to peers.
        coordinator_trip: round trip to the coordinator.
    """

    upload: float | None
    download: float | None
    round_trip: float | None
    coordinator_trip: float | None


def run_shape(recipe: Recipe, status: Mapping[str, Any] | None, nodes: int | None) -> RunShape:
    """A round of the run, or of the recipe if there is no run.

    Args:
        recipe: gives the batch, and the number of nodes with which it begins.
        status: the run's status, whose values win.
        nodes: number of nodes to predict for; None for those of the run and this one, or of the recipe.
    """
    batch, rates, there = recipe.run.global_batch_size_end, {}, recipe.run.init_min_clients
    if status is not None:
        found = members(status)
        batch = status["config"]["global_batch_size_end"] or batch
        there = max(status["config"]["init_min_clients"], len(found))
        rates = {row["key"]: row["tokens_per_second"] for row in found.values() if row["tokens_per_second"]}
    return RunShape(nodes or there, batch, rates)


def network(
    options: Mapping[str, Any],
    *,
    links: Sequence[MeasuredLink],
    reading: ClockReading | None,
    url: str | None,
    answered: Sequence[float],
    upload: float | None,
    download: float | None,
    round_trip: float | None,
) -> Network:
    """The known properties of the link: given values, else the slowest measured ones; never above the node's limits.

    Args:
        options: options of the transport, which may set limits.
        links: measured links to peers.
        reading: the coordinator's clock, and how long its answers took.
        url: the coordinator's URL.
        answered: seconds in which peers refused this node.
        upload: given upload in bytes a second, or None.
        download: given download in bytes a second, or None.
        round_trip: given round trip in seconds, or None.
    """
    limits = with_environment(options)
    rates = []
    for name, given in (("upload", upload), ("download", download)):
        measured = [getattr(link, name) for link in links]
        known = [*(measured if given is None else [given]), limits.get(name)]
        rates.append(min((rate for rate in known if rate is not None), default=None))
    trip = round_trip
    if trip is None and links:
        trip = max(link.round_trip for link in links)
    if trip is None and answered:
        trip = max(answered) / HANDSHAKE_TRIPS
    # Connecting takes one round trip, the encryption another, and the answer one.
    own = None if reading is None else reading.answer_seconds / (3 if url and url.startswith("https") else 2)
    return Network(rates[0], rates[1], trip, own if own is not None else trip)


def conditions(
    recipe: Recipe,
    shape: RunShape,
    network: Network,
    speed: TrainingSpeed,
    payload: int,
    write_seconds: float | None = None,
) -> Conditions:
    """The arguments of the formula; an unknown value counts as no delay."""
    shares = shape.shares(recipe.data.seq_len / speed.sample_seconds, by_speed=recipe.run.shares == BY_SPEED)
    slowest = (samples * recipe.data.seq_len / shape.rates[key] for key, samples in shares.items() if key)
    return Conditions(
        nodes=shape.nodes,
        samples=shape.samples,
        seq_len=recipe.data.seq_len,
        sample_seconds=speed.sample_seconds,
        encode_seconds=speed.encode_seconds,
        apply_seconds=speed.apply_seconds,
        payload=payload,
        overlap=recipe.run.overlap,
        upload=network.upload or math.inf,
        download=network.download or math.inf,
        round_trip=network.round_trip or 0.0,
        coordinator_trip=network.coordinator_trip or 0.0,
        write_seconds=write_seconds or 0.0,
        slowest_seconds=max(slowest, default=0.0),
        local_steps=recipe.distro.densest.local_steps,
        step_seconds=speed.step_seconds,
        own_samples=shares[""],
    )


def findings(
    given: Conditions, network: Network, speed_: TrainingSpeed, shape: RunShape
) -> tuple[Prediction, list[Finding]]:
    """Returns the prediction and its rows."""
    found = predict(given)
    tokens = given.seq_len / speed_.sample_seconds
    rows = [
        Finding("recipe", "speed", f"{_tokens(tokens)} on this device alone: {speed_.how}"),
        _link(given, network),
        Finding(AREA, "round", f"{duration(found.round_seconds)}: {parts_of(given, found)}"),
        Finding(AREA, "speed", f"{_tokens(found.tokens_per_second)} of {_nodes(shape.nodes)}, {_batch(given)}"),
    ]
    if given.share < given.local_steps:
        value = (
            f"{given.share} of {given.local_steps} in a round, as a node's share has {counted(given.share, 'sample')}"
        )
        advice = f"with run.global_batch_size_end={given.nodes * given.local_steps} or more it makes all of them"
        rows.append(Finding(AREA, "local steps", value, Verdict.WARNING, advice))
    what, advice = _LIMITS[found.limit]
    if found.limit == "slowest":
        name = min(shape.rates, key=lambda key: shape.rates[key])
        what = f"{what}, {name}"
    low = found.utilization < BUSY
    value = f"{found.utilization:.0%} of the time this device computes; the limit is {what}"
    verdict = Verdict.WARNING if low and advice else Verdict.OK
    if given.overlap:
        advice = advice.replace("overlap=true hides it behind computing; ", "")
    rows.append(Finding(AREA, "utilization", value, verdict, advice if low else ""))
    return found, rows


def limit_of(found: Prediction) -> tuple[str, float]:
    """What limits a run most, for people, and how long that takes as a share of a round."""
    return _LIMITS[found.limit][0], found.parts[found.limit] / found.round_seconds


def _link(given: Conditions, network: Network) -> Finding:
    if given.nodes == 1:
        return Finding(AREA, "link", "one node alone needs no link")
    needed = f"{size(given.traffic)} each way a round; {speed(needed_rate(given))} moves them while it computes"
    known = []
    for name in ("upload", "download"):
        rate = getattr(network, name)
        known += [] if rate is None else [f"{name} {speed(rate)}"]
    if network.round_trip is not None:
        known.append(f"round trip {duration(network.round_trip)}")
    if network.upload is None or network.download is None:
        advice = (
            "the prediction assumes that it takes no time: measure it (psyche doctor --listen on a peer's machine, "
            "--peer here), or give --upload, --download and --latency"
        )
        return Finding(AREA, "link", "; ".join([needed, *known]), Verdict.UNKNOWN, advice)
    slow = min(network.upload, network.download) < needed_rate(given)
    advice = "slower than that: rounds wait for the link" * slow
    return Finding(AREA, "link", f"{needed}; here {', '.join(known)}", Verdict.WARNING if slow else Verdict.OK, advice)


def parts_of(given: Conditions, found: Prediction) -> str:
    """The parts of a round, for people."""
    names = {"steps": "its optimizer", "distro": "DisTrO", "slowest": "waiting for the slowest"}
    texts = [f"{names.get(name, name)} {duration(part)}" for name, part in found.parts.items() if part > 0]
    return f"{', '.join(texts)}; results overlap computing" if given.overlap else ", ".join(texts)


def _tokens(rate: float) -> str:
    return f"{rate:,.0f} tokens/s" if rate >= 100 else f"{rate:.3g} tokens/s"


def _nodes(nodes: int) -> str:
    return "one node" if nodes == 1 else f"{nodes} nodes like this one"


def _batch(given: Conditions) -> str:
    return f"{counted(given.samples, 'sample')} of {counted(given.seq_len, 'token')} a round"
