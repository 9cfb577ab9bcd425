"""What nodes of the simulator do that break the rules on purpose.

A role changes what leaves a node: the effects of its core, which itself follows the rules.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from psyche_lightning.node import events as ev
from psyche_lightning.protocol.bloom import participants_bloom
from psyche_lightning.protocol.merkle import EMPTY_ROOT
from psyche_lightning.protocol.messages import Ask, Attest, Envelope, Message, Offer, Result, Stuck, seal
from psyche_lightning.protocol.requests import Accuse, HealthCheck, WarmupWitness, Witness
from psyche_lightning.wire.canonical import pack, sha256
from psyche_lightning.wire.identity import Identity

ROLES = (
    "malformed",  # payloads that nobody can decode
    "equivocate",  # two results for one batch, each for half of the peers, and many more for one of them
    "withhold",  # tells one peer alone, and answers nobody
    "silent",  # sends peers nothing, and reports none of their results
    "lone",  # reports at once that it heard nobody, and names all others as silent
    "false roots",  # reports lists that do not exist, and sends other lists
    "false digests",  # names parameters that nobody has
    "false offers",  # offers parameters that do not exist
    "false bytes",  # serves other bytes than those that it was asked for
    "false parameters",  # offers, and begins with, parameters of another shape or that are not finite
    "stale",  # sends on what others signed for earlier rounds and another run, and takes it as proof against them
    "flood",  # sends signed questions, results, lists and offers without end
    "rates",  # other learning rates
    "accuse",  # accuses without proof
    "ask",  # asks for everything, all the time
    "other k",  # payloads of another k than that of their step
)
SIGN_TWICE = ("equivocate", "flood")
"""The roles that sign two results for one round."""
NOT_FINITE = sha256(b"a value is not finite")
"""Parameters that no node may take."""
HEARD = 64
"""Messages of others that a node keeps to send them again."""
FLOOD = 4
"""Messages of each kind for each peer and report."""


class Role:
    """One node's way of breaking the rules.

    Args:
        kind: one of :data:`ROLES`; anything else for a node that keeps them.
        identity: the node's key.
        scope: the run's scope.
        rng: the history's randomness.
        put: stores a blob, which the node then serves.
        former: the keys of a former run of that name, whose messages this node kept.
    """

    def __init__(
        self,
        kind: str,
        identity: Identity,
        scope: str,
        rng: random.Random,
        put: Callable[[bytes], bytes],
        former: Sequence[Identity] = (),
    ) -> None:
        self.kind = kind
        self._identity = identity
        self._scope = scope
        self._rng = rng
        self._put = put
        self._former = {each.public: each for each in former if each is not identity}
        self._peers: tuple[bytes, ...] = ()
        self._heard: deque[Envelope] = deque(maxlen=HEARD)

    def hear(self, envelope: Envelope) -> None:
        """Take note of what the node received."""
        if self.kind == "stale":
            self._heard.append(envelope)

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
            case WarmupWitness() if self.kind == "false parameters":
                yield replace(effect, digest=self._no_parameters())
            case _:
                yield effect

    def _seal(self, message: Message) -> Envelope:
        return seal(self._identity, self._scope, message)

    def _no_parameters(self) -> bytes:
        """The digest of parameters that this node serves and nobody may take."""
        head = NOT_FINITE if self._rng.random() < 0.5 else b"of another shape"
        return self._put(pack([head, []]))

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
            other, *more = (self._seal(replace(message, nonce=message.nonce + 1 + each)) for each in range(10))
            for place, peer in enumerate(self._peers):
                for sent in more if place == 1 and self._rng.random() < 0.5 else ():
                    yield ev.SendTo(peer, sent)
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
            case "false parameters":
                yield report
                for peer in self._peers:
                    offer = Offer(report.epoch, self._rng.randrange(report.height + 1), self._no_parameters())
                    yield ev.SendTo(peer, self._seal(offer))
            case "stale":
                yield report
                yield from self._repeat(report)
            case "flood":
                yield report
                yield from self._flood(report)
            case "accuse":
                yield report
                yield Accuse(self._noise(), self._noise())
            case "ask":
                yield report
                for peer in self._peers:
                    yield ev.SendTo(peer, self._seal(Ask(report.epoch, report.height, self._rng.randrange(1000))))
            case _:
                yield report

    def _repeat(self, report: Witness) -> Iterator[ev.Effect]:
        """Old messages, those of a former run, and accusations that rest on both."""
        yield replace(report, height=max(0, report.height - 1))
        for envelope in self._rng.sample(sorted(self._heard, key=lambda each: each.raw), min(4, len(self._heard))):
            yield ev.Broadcast(envelope)
            signer, message = self._former.get(envelope.sender), envelope.message
            if signer is None or not isinstance(message, Result):
                continue
            former = seal(signer, self._scope + "0", replace(message, nonce=message.nonce + 1))
            yield ev.Broadcast(former)
            yield Accuse(envelope.raw, former.raw)
            for other in self._heard:
                if other.sender == envelope.sender and isinstance(other.message, Result):
                    yield Accuse(envelope.raw, other.raw)
                    break

    def _flood(self, report: Witness) -> Iterator[ev.Effect]:
        number = self._rng.randrange
        for peer in self._peers:
            for _ in range(FLOOD):
                epoch, height = report.epoch + (number(4) == 0), max(0, report.height + number(-3, 3))
                place = number(1000)
                listed = b"".join(sorted(self._noise() for _ in range(3)))
                result = Result(epoch, height, 1 + height, place, place, 0, self._noise(), 9, self._noise(), (1,), 0, 1)
                for message in (
                    Ask(epoch, height, number(1 << 30)),
                    Attest(epoch, height, listed),
                    Offer(epoch, number(1 << 40), self._noise()),
                    Stuck(epoch, height, number(1 << 30)),
                    result,
                ):
                    yield ev.SendTo(peer, self._seal(message))
