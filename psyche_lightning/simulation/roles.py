"""What nodes of the simulator do that break the rules on purpose.

A role changes what leaves a node: the effects of its core, which itself follows the rules.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from psyche_lightning.node import events as ev
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.messages import Ask, Attest, Envelope, Message, Offer, Result
from psyche_lightning.protocol.requests import Accuse, HealthCheck, WarmupWitness, Witness
from psyche_lightning.wire.canonical import sha256

ROLES = (
    "malformed",  # payloads that nobody can decode
    "equivocate",  # two results for one batch, each for half of the peers
    "withhold",  # tells one peer alone, and answers nobody
    "silent",  # sends peers nothing, and reports none of their results
    "lone",  # reports at once that it heard nobody, and names all others as silent
    "false roots",  # reports lists that do not exist, and sends other lists
    "false digests",  # names parameters that nobody has
    "false offers",  # offers parameters that do not exist
    "rates",  # other learning rates
    "accuse",  # accuses without proof
    "ask",  # asks for everything, all the time
)


class Role:
    """One node's way of breaking the rules.

    Args:
        kind: one of :data:`ROLES`; empty for a node that keeps them.
        seal: signs a message in the node's name.
        rng: the history's randomness.
    """

    def __init__(self, kind: str, seal: Callable[[Message], Envelope], rng: random.Random) -> None:
        self.kind = kind
        self._seal = seal
        self._rng = rng
        self._peers: tuple[bytes, ...] = ()

    def play(self, effect: ev.Effect) -> Iterator[ev.Effect]:
        """The effects that the node has in place of one of its core's."""
        match effect:
            case ev.SetPeers(peers):
                self._peers = tuple(key for key, _ in peers)
                yield effect
            case ev.Broadcast(envelope):
                yield from self._tell(effect, envelope)
            case ev.SendTo(peer, envelope):
                if self.kind == "false roots" and isinstance(envelope.message, Attest):
                    listed = replace(envelope.message, commitments=self._noise())
                    yield ev.SendTo(peer, self._seal(listed))
                elif self.kind not in ("withhold", "silent"):
                    yield effect
            case Witness():
                yield from self._report(effect)
            case WarmupWitness() if self.kind == "false digests":
                yield replace(effect, digest=self._noise())
            case _:
                yield effect

    def _noise(self) -> bytes:
        return sha256(b"noise", self._rng.randbytes(8))

    def _tell(self, effect: ev.Broadcast, envelope: Envelope) -> Iterator[ev.Effect]:
        message = envelope.message
        result = isinstance(message, Result)
        if self.kind == "silent":
            return
        if self.kind == "withhold" and result:
            if self._peers:
                yield ev.SendTo(self._peers[0], envelope)
        elif self.kind == "equivocate" and isinstance(message, Result):
            other = self._seal(replace(message, nonce=message.nonce + 1))
            for place, peer in enumerate(self._peers):
                yield ev.SendTo(peer, other if place % 2 else envelope)
        else:
            yield effect

    def _report(self, report: Witness) -> Iterator[ev.Effect]:
        match self.kind:
            case "silent":
                yield replace(report, merkle=EMPTY_ROOT)
            case "lone":
                nobody = participants_bloom(0, ())
                yield replace(report, merkle=EMPTY_ROOT, participants=nobody)
                yield HealthCheck(report.epoch, report.height, self._peers)
            case "false roots":
                yield replace(report, merkle=self._noise())
            case "false digests":
                yield replace(report, digest=self._noise())
            case "false offers":
                yield report
                for peer in self._peers:
                    offer = Offer(report.epoch, self._rng.randrange(report.height + 1), self._noise())
                    yield ev.SendTo(peer, self._seal(offer))
            case "accuse":
                yield report
                yield Accuse(self._noise(), self._noise())
            case "ask":
                yield report
                for peer in self._peers:
                    yield ev.SendTo(peer, self._seal(Ask(report.epoch, report.height, self._rng.randrange(1000))))
            case _:
                yield report
