"""What nodes tell each other in an epoch: messages are filed, answered and asked for, payloads fetched.

Part of the node core, so without I/O: everything goes out as effects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from psyche_lightning.coordinator.state import ClientStatus, RunState
from psyche_lightning.errors import WireError
from psyche_lightning.node import events as ev
from psyche_lightning.node.ledger import Entry, EpochLog, RoundLog
from psyche_lightning.node.outbox import Outbox
from psyche_lightning.node.settings import Settings
from psyche_lightning.wire.identity import short
from psyche_lightning.wire.messages import Ask, Attest, Buffers, Envelope, Message, Result

EARLY_ROUNDS = 3
"""Messages of at most this many rounds ahead of the coordinator's news are kept."""
EARLY_MESSAGES = 4096


def gone(state: RunState, log: RoundLog) -> set[int]:
    """Indices of clients of a round that cannot be waited for any more."""
    healthy = {client.signer for client in state.clients if client.status is ClientStatus.HEALTHY}
    return {i for i, signer in enumerate(log.round.clients) if signer not in healthy}


class Exchange:
    """One node's talk with its peers.

    Args:
        public: this node's key.
        settings: see :class:`Settings`.
        seal: signs a message.
        promises: envelopes that this node has stored, by key; a batch is never signed for twice (I8).
        out: where effects go.
    """

    def __init__(
        self,
        public: bytes,
        settings: Settings,
        seal: Callable[[Message], Envelope],
        promises: Mapping[str, Envelope],
        out: Outbox,
    ) -> None:
        self._public = public
        self._settings = settings
        self._seal = seal
        self._promises = dict(promises)
        self._out = out
        self._peers: tuple[tuple[bytes, str], ...] = ()
        self._fetching: dict[bytes, tuple[RoundLog, Entry]] = {}
        self._buffers: Envelope | None = None

    # --- peers ----------------------------------------------------------------------------------------------------

    def meet(self, state: RunState) -> None:
        """Talk to the clients of the epoch."""
        peers = tuple((client.node, client.address) for client in state.clients if client.node != self._public)
        if state.clients and peers != self._peers:
            self._peers = peers
            self._out.emit(ev.SetPeers(peers))

    def providers(self, first: bytes | None = None) -> tuple[bytes, ...]:
        """All peers, ``first`` in front."""
        return tuple(sorted((key for key, _ in self._peers), key=lambda key: key != first))

    # --- messages -------------------------------------------------------------------------------------------------

    def receive(self, envelope: Envelope, log: EpochLog | None, state: RunState | None) -> None:
        """Take a peer's message."""
        message = envelope.message
        if isinstance(message, Buffers):
            self._take_buffers(envelope, message, state)
        elif log is None or message.epoch != log.epoch:
            return
        elif isinstance(message, Ask):
            self._answer(envelope.sender, log, message.height)
        elif (known := log.rounds.get(message.height)) is not None:
            self.file(known, envelope)
        elif 0 < message.height - max(log.rounds, default=-1) <= EARLY_ROUNDS:
            waiting = log.early.setdefault(message.height, [])
            if len(waiting) < EARLY_MESSAGES and envelope not in waiting:
                waiting.append(envelope)

    def file(self, log: RoundLog, envelope: Envelope) -> None:
        """Put a message of a known round into its log, or say why not."""
        try:
            if isinstance(envelope.message, Attest):
                log.add_attest(envelope)
                return
            entry = log.add_result(envelope)
        except WireError as error:
            self._out.say("warning", f"refused a message: {error}")
            return
        if entry and len(log.of(entry.trainer)) > 1:
            who = short(envelope.sender)
            self._out.say("warning", f"{who} signed two results for one batch; both are excluded")

    def _answer(self, peer: bytes, log: EpochLog, height: int) -> None:
        known = log.rounds.get(height)
        if peer not in dict(self._peers) or known is None:
            return
        if not self._out.once(("answer", peer, height), every=self._settings.retry / 4):
            return
        for envelope in known.messages():
            self._out.emit(ev.SendTo(peer, envelope))
        if self._buffers is not None:
            self._out.emit(ev.SendTo(peer, self._buffers))

    def ask(self, epoch: int, height: int, peer: bytes | None, *, after: float = 0.0) -> None:
        """Ask one peer (or all) for a round's messages; every third time all, as someone else may have them."""
        key = ("ask", height, peer)
        if not self._out.due(key, after=after):
            return
        attempt = self._out.attempts(key)
        envelope = self._seal(Ask(epoch, height, attempt))
        if peer is None or attempt % 3 == 0:
            self._out.emit(ev.Broadcast(envelope))
        else:
            self._out.emit(ev.SendTo(peer, envelope))

    # --- results --------------------------------------------------------------------------------------------------

    def gather(self, log: EpochLog, state: RunState) -> None:
        """Obtain announcements and payloads of the rounds that are witnessed now or next."""
        head = state.current.height if state.current else -1
        for height in range(max(0, head - self._settings.delay + 1), head + 1):
            known = log.rounds.get(height)
            if known is None:
                continue
            self.fetch(known, known.entries.values())
            away = gone(state, known)
            for index in known.unannounced():
                if index not in away and known.nodes[index] != self._public:
                    self.ask(log.epoch, height, known.nodes[index], after=2 * self._settings.retry)

    def fetch(self, log: RoundLog, entries: Iterable[Entry]) -> None:
        """Fetch payloads that are not here yet."""
        for entry in entries:
            payload = entry.result.payload
            if entry.verified or entry.refused or payload in self._fetching:
                continue
            if self._out.due(("fetch", payload)):
                self._fetching[payload] = (log, entry)
                providers = self.providers(log.nodes[entry.trainer])
                self._out.emit(ev.Fetch(payload, entry.result.size, providers))

    def fetched(self, event: ev.Fetched) -> None:
        """Note that a payload is here, or why not."""
        log, entry = self._fetching.pop(event.payload, (None, None))
        if log is None or entry is None:
            return
        entry.verified = not event.reason
        if event.refused:
            entry.refused = event.reason
            who = short(entry.envelope.sender)
            self._out.say("warning", f"refused the payload of {who} in round {log.round.height}: {event.reason}")

    def announce(self, log: RoundLog, result: Result, key: str) -> None:
        """Promise this node's own result durably, then tell everybody; its payload is stored."""
        if self.promised(key, result.start, result.end) is not None:
            return
        self.publish(log, self._promise(key, result))

    def promised(self, key: str, start: int, end: int) -> Envelope | None:
        """The result that this node, perhaps in a former life, signed for that batch."""
        envelope = self._promises.get(key)
        result = envelope.message if envelope else None
        return envelope if isinstance(result, Result) and (result.start, result.end) == (start, end) else None

    def keep_promises(self, epoch: int) -> tuple[str, ...]:
        """Drop the promises of epochs before ``epoch`` and return the keys of the others."""
        self._promises = {key: kept for key, kept in self._promises.items() if kept.message.epoch >= epoch}
        return tuple(self._promises)

    def publish(self, log: RoundLog, envelope: Envelope) -> None:
        """File and broadcast this node's own announcement."""
        try:
            entry = log.add_result(envelope)
        except WireError as error:
            self._out.say("warning", f"the own result does not fit its round: {error}")
            return
        if entry is not None:
            entry.verified = True
        self._out.emit(ev.Broadcast(envelope))

    def attest(self, log: RoundLog, key: str, make: Callable[[], Attest]) -> Envelope:
        """Promise a witness list durably, unless one was promised before, and tell everybody."""
        envelope = self._promises.get(key) or self._promise(key, make())
        self.file(log, envelope)
        self._out.emit(ev.Broadcast(envelope))
        return envelope

    def _promise(self, key: str, message: Message) -> Envelope:
        envelope = self._seal(message)
        self._promises[key] = envelope
        self._out.emit(ev.Promise(key, envelope))
        return envelope

    # --- buffers --------------------------------------------------------------------------------------------------

    def share_buffers(self, epoch: int, index: bytes) -> None:
        """Tell everybody where this node keeps its buffers."""
        self._buffers = self._seal(Buffers(epoch, index))
        self._out.emit(ev.Broadcast(self._buffers))

    def _take_buffers(self, envelope: Envelope, message: Buffers, state: RunState | None) -> None:
        """The buffers of the epoch are those of its first warm-up witness."""
        taken = self._buffers is not None and self._buffers.message.epoch == message.epoch
        if state is None or taken or message.epoch != state.epoch or not self._settings.buffers:
            return
        first = state.warmup_witnesses[0].proof.index if state.warmup_witnesses else len(state.clients)
        if first < len(state.clients) and state.clients[first].node == envelope.sender:
            self._buffers = envelope
            self._out.emit(ev.LoadBuffers(message.index, self.providers(envelope.sender)))
