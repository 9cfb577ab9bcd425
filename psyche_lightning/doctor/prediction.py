"""How long a round takes, from what was measured: a pure function, so that anyone can check it.

A round of n nodes that share S samples, each of which takes c seconds, with payloads of P bytes, an upload and a
download of U and D bytes a second, a round trip of R seconds to peers and of Q to the coordinator, and f seconds until
a small write is safely on disk::

    compute  = c * ceil(S / n)                         the slowest node's, where others are known to be slower
    distro   = encode + apply                          of the own update; of all n
    upload   = w * ((n - 1) * P + messages) / U        each of the others fetches the own payload once
    download = w * ((n - 1) * P + messages) / D        and this node theirs, at the same time
    disk     = 7 * f                                   what a node promises and a coordinator tells is stored before
    latency  = 3 R / 2 + Q                             announcement, request of payloads, report and next round

    working  = compute + distro
    exchange = latency + max(upload, download)

    overlap off:  round = working + exchange + disk
    overlap on:   round = max(working, upload, download, (working + exchange) / 2) + disk

w is what a byte costs on the wire with its headers. With overlap all of a round's exchange, the coordinator's part
included, goes on while the next one computes, and must be over before the one after that: two rounds in the time that
one takes from its start to its last message. Tokens a second are ``S * seq_len / round``, and utilization is the share
of the round in which this node computes, ``c * ceil(S / n) / round``.

It assumes that every node has a link like this one, that nobody fails, and that nodes do not share cores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WIRE = 1.04
"""Bytes on the wire for each byte of a payload, as of the TCP transport."""
MESSAGE, LISTED = 600, 32
"""Bytes of a node's messages to each peer in a round: results and witness lists, and in these each commitment."""
WRITES = 7
"""Writes of a round that others wait for: the payload with its folder, at its trainer and at who fetched it, the
announcement, the witness list, and the coordinator's own."""
SLOWER = 1.05
"""Others count as slower from this factor on."""


@dataclass(frozen=True)
class Conditions:
    """What a round depends on; times in seconds, sizes in bytes, rates in bytes a second.

    Attributes:
        nodes: how many train, this one included.
        samples: of a round of all nodes together.
        seq_len: tokens of a sample.
        sample_seconds: forward and backward of one sample on this node.
        encode_seconds: of DisTrO's own update.
        apply_seconds: of applying all nodes' updates.
        payload: bytes that a node publishes in a round.
        overlap: whether results travel while the next round computes.
        upload: rate at which this node can send; infinite for a link that is not looked at.
        download: rate at which it can receive.
        round_trip: to peers.
        coordinator_trip: to the coordinator and back.
        write_seconds: until a small write is safely on disk.
        slowest_seconds: the slowest peer's computing in a round, with its encoding; 0 when nothing is known of peers.
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

    @property
    def traffic(self) -> int:
        """Bytes that a node sends in a round, and as many that it receives, without headers of the network."""
        return (self.nodes - 1) * (self.payload + MESSAGE + LISTED * self.nodes)


@dataclass(frozen=True)
class Prediction:
    """What follows; times in seconds.

    Attributes:
        round_seconds: of a whole round.
        tokens_per_second: of all nodes together.
        utilization: share of the time in which this node computes, 0 to 1.
        parts: compute, distro, upload, download, disk and latency of a round, each for itself; ``slowest`` is what a
            slower peer's computing takes beyond the own.
        limit: the part that limits the run most.
    """

    round_seconds: float
    tokens_per_second: float
    utilization: float
    parts: dict[str, float]
    limit: str


def predict(given: Conditions) -> Prediction:
    """What a run will reach under these conditions (the module says how)."""
    own = given.sample_seconds * math.ceil(given.samples / given.nodes)
    slower = given.slowest_seconds - given.encode_seconds
    compute = slower if slower > SLOWER * own else own
    several = given.nodes > 1
    wire = WIRE * given.traffic
    parts = {
        "compute": own,
        "slowest": compute - own,
        "distro": given.encode_seconds + given.apply_seconds,
        "upload": wire / given.upload,
        "download": wire / given.download,
        "disk": WRITES * given.write_seconds if several else 0.0,
        "latency": 1.5 * given.round_trip + given.coordinator_trip if several else 0.0,
    }
    working, transfer = compute + parts["distro"], max(parts["upload"], parts["download"])
    exchange = parts["latency"] + transfer
    hidden: tuple[str, ...] = ()  # behind something longer, so that it limits nothing
    total = working + exchange
    if given.overlap:
        hidden = ("upload", "download", "latency") if working >= exchange else ("compute", "slowest", "distro")
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
    """Bytes a second, each way, with which transfer takes as long as computing.

    With overlap that is enough for it to cost nothing; without, it halves the speed.
    """
    return WIRE * given.traffic / (given.sample_seconds * math.ceil(given.samples / given.nodes))
