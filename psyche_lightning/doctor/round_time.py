"""How long a round takes: a pure function of measurements, which anybody can check.

n nodes share S samples, each of which takes c seconds. With local steps, a node makes H steps of its own optimizer, of
o seconds each, but no more than it has samples. Payloads have P bytes. Upload and download are U and D bytes a second.
A round trip takes R seconds to peers and Q seconds to the coordinator. A small write is safely on disk after f seconds.
Then::

    compute  = c * ceil(S / n)                         of the slowest node, if others are known to be slower; where
                                                       shares follow known speeds, of the node done last
    steps    = o * min(H, ceil(S / n))                 0 without local steps
    distro   = encode + apply                          of this node's update, and of all n
    upload   = w * ((n - 1) * P + messages) / U        each other node fetches this node's payload once
    download = w * ((n - 1) * P + messages) / D        and this node fetches theirs, at the same time
    disk     = 7 * f                                   promises and the coordinator's state are stored first
    latency  = 3 R / 2 + Q                             announcement, request for payloads, report, next round;
                                                       small payloads, which go out unasked, take R less

    working  = compute + steps + distro
    exchange = latency + max(upload, download)

    overlap off:  round = working + exchange + disk
    overlap on:   round = max(working, upload, download, (working + exchange) / 2) + disk

w is the number of bytes on the wire for each byte, headers included. With overlap, the exchange of a round, including
the coordinator's part, runs while the next round computes. It must end before the round after that. So two rounds fit
into the time from a round's start to its last message. The speed is ``S * seq_len / round`` tokens a second.
Utilization is the fraction of a round in which this node computes, ``(compute + steps) / round``.

The formula assumes that every node has a link like this one, that no node fails, and that nodes do not share cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WIRE = 1.04
"""Bytes on the wire for each byte of a payload, as with the TCP transport."""
MESSAGE, LISTED = 450, 32
"""Bytes of a node's messages to each peer in a round: result and witness list, and each commitment in the list."""
WRITES = 7
"""Writes of a round for which others wait: the payload and its folder at the trainer and at the node that fetches it,
the announcement, the witness list, and the coordinator's own write."""
SLOWER = 1.05
"""Other nodes count as slower from this factor on."""


@dataclass(frozen=True)
class Conditions:
    """What a round depends on; times in seconds, sizes in bytes, rates in bytes a second.

    Attributes:
        nodes: nodes that train, with this one.
        samples: samples of a round on all nodes together.
        seq_len: tokens of a sample.
        sample_seconds: forward and backward of one sample on this node.
        encode_seconds: encoding this node's update.
        apply_seconds: applying all nodes' updates.
        payload: bytes that a node publishes in a round.
        overlap: whether results travel while the next round computes.
        upload: rate at which this node sends; infinite to ignore the link.
        download: rate at which this node receives.
        round_trip: round trip to peers.
        coordinator_trip: round trip to the coordinator.
        write_seconds: until a small write is safely on disk.
        slowest_seconds: computing and encoding of the slowest peer in a round; 0 if nothing is known of peers.
        local_steps: steps of a node's own optimizer in a round; 0 without local steps.
        step_seconds: one of these steps, without its forward and backward.
        own_samples: samples of this node in a round, where shares follow known speeds; None for equal shares.
    """

    nodes: int
    samples: int
    seq_len: int
    sample_seconds: float
    encode_seconds: float
    apply_seconds: float
    payload: int
    overlap: bool
    upload: float = math.inf
    download: float = math.inf
    round_trip: float = 0.0
    coordinator_trip: float = 0.0
    write_seconds: float = 0.0
    slowest_seconds: float = 0.0
    local_steps: int = 0
    step_seconds: float = 0.0
    own_samples: int | None = None

    @property
    def share(self) -> int:
        """Samples of this node in a round."""
        return math.ceil(self.samples / self.nodes) if self.own_samples is None else self.own_samples

    @property
    def own_parts(self) -> dict[str, float]:
        """Seconds in which this node computes in a round: forward and backward, and any steps of its optimizer."""
        steps = {"steps": self.step_seconds * min(self.local_steps, self.share)} if self.local_steps else {}
        return {"compute": self.sample_seconds * self.share, **steps}

    @property
    def traffic(self) -> int:
        """Bytes that a node sends in a round, and as many that it receives, without network headers."""
        return (self.nodes - 1) * (self.payload + MESSAGE + LISTED * self.nodes)


@dataclass(frozen=True)
class Prediction:
    """The predicted speed; times in seconds.

    Attributes:
        round_seconds: a whole round.
        tokens_per_second: of all nodes together.
        utilization: fraction of the time in which this node computes, 0 to 1.
        parts: compute, distro, upload, download, disk and latency of a round, each by itself; ``steps`` if there are
            local ones; ``slowest`` is how much longer a slower peer computes.
        limit: the part that limits the run most.
    """

    round_seconds: float
    tokens_per_second: float
    utilization: float
    parts: dict[str, float]
    limit: str


def predict(given: Conditions) -> Prediction:
    """Predict the speed of a run with the formula of this module."""
    own = sum(given.own_parts.values())
    slower = given.slowest_seconds - given.encode_seconds
    compute = slower if slower > SLOWER * own else own
    several = given.nodes > 1
    wire = WIRE * given.traffic
    parts = {
        **given.own_parts,
        "slowest": compute - own,
        "distro": given.encode_seconds + given.apply_seconds,
        "upload": wire / given.upload,
        "download": wire / given.download,
        "disk": WRITES * given.write_seconds if several else 0.0,
        "latency": 1.5 * given.round_trip + given.coordinator_trip if several else 0.0,
    }
    working, transfer = compute + parts["distro"], max(parts["upload"], parts["download"])
    exchange = parts["latency"] + transfer
    hidden: tuple[str, ...] = ()  # parts that run behind longer ones, and so limit nothing
    total = working + exchange
    if given.overlap:
        hidden = ("upload", "download", "latency") if working >= exchange else ("compute", "steps", "slowest", "distro")
        total = max(working, transfer, total / 2)
    total += parts["disk"]
    limit = max((name for name in parts if name not in hidden), key=lambda name: parts[name])
    return Prediction(
        round_seconds=total,
        tokens_per_second=given.samples * given.seq_len / total,
        utilization=own / total,
        parts=parts,
        limit=limit,
    )


def needed_rate(given: Conditions) -> float:
    """Bytes a second, each way, at which the transfer takes as long as computing.

    With overlap this rate makes the transfer free; without overlap it halves the speed. A node too slow for a share
    counts as if it had a sample.
    """
    return WIRE * given.traffic / (sum(given.own_parts.values()) or given.sample_seconds)
