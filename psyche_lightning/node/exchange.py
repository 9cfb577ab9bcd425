"""Exchanges an epoch's messages with peers: files, answers and requests them, and fetches payloads.

Part of the node core, so it does no I/O: all output is effects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from psyche_lightning.errors import WireError
from psyche_lightning.node import events as ev
from psyche_lightning.node.agreement import EpochLog
from psyche_lightning.node.notices import MessageRefused, PayloadRefused, TwoResults
from psyche_lightning.node.outbox import Outbox
from psyche_lightning.node.rounds import MAX_ENTRIES_PER_BATCH, Entry, RoundLog
from psyche_lightning.node.settings import Settings
from psyche_lightning.node.witness import list_promise, offer_promise, result_promise
from psyche_lightning.protocol.merkle import EMPTY_ROOT, merkle_root
from psyche_lightning.protocol.messages import (
    Ask,
    Attest,
    Buffers,
    Envelope,
    Message,
    Offer,
    Result,
    Stuck,
    commitments,
)
from psyche_lightning.protocol.requests import Accuse
from psyche_lightning.protocol.state import RunState

EARLY_ROUNDS = 3
"""Keeps messages of this many rounds around the newest until their round is known and assigned."""
ASK_ALL = 3
"""One question in this many goes to all peers."""


def gone(state: RunState, log: RoundLog) -> set[int]:
    """Indices of a round's clients that are not healthy any more."""
    healthy = {client.signer for client in state.healthy}
    return {i for i, signer in enumerate(log.round.clients) if signer not in healthy}


class Exchange:
    """Talks to the peers of one node.

    Args:
        public: this node's key.
        settings: see :class:`Settings`.
        seal: signs a message.
        promises: this node's stored envelopes by key; it never signs a batch twice (I8).
        remembered: announcements of whole rounds that this node stored, by :func:`list_promise`.
        out: where effects go.
        lost: the payloads of its own results that are not in its store any more.
    """

    def __init__(
        self,
        public: bytes,
        settings: Settings,
        seal: Callable[[Message], Envelope],
        promises: Mapping[str, Envelope],
        remembered: Mapping[str, Sequence[Envelope]],
        out: Outbox,
        lost: Collection[bytes] = (),
    ) -> None:
        self._public = public
        self._settings = settings
        self._seal = seal
        self._promises = dict(promises)
        self._remembered: dict[tuple[int, int], dict[str, tuple[Envelope, ...]]] = {}
        for key, kept in remembered.items():
            first = kept[0].message if kept else None
            if isinstance(first, Result):
                self._remembered.setdefault((first.epoch, first.height), {})[key] = tuple(kept)
        self._lost = frozenset(lost)
        self._unheard: list[Accuse] = []
        self._refused: Counter[bytes] = Counter()
        self._out = out
        self._peers: tuple[tuple[bytes, str], ...] = ()
        self._members: frozenset[bytes] = frozenset()
        self._inside = False
        self._questions = 0
        self._fetching: dict[bytes, list[tuple[RoundLog, Entry]]] = {}
        self._buffers: Envelope | None = None

    # --- peers ----------------------------------------------------------------------------------------------------

    def meet(self, state: RunState) -> None:
        """Talk to the clients of the epoch."""
        if not state.clients:
            return
        peers = tuple((client.node, client.address) for client in state.clients if client.node != self._public)
        self._inside = len(peers) < len(state.clients)
        if peers != self._peers:
            self._peers = peers
            self._members = frozenset(key for key, _ in peers)
            self._out.emit(ev.SetPeers(peers))

    def knows(self, key: bytes) -> bool:
        """Whether it is a peer."""
        return key in self._members

    def providers(self, first: bytes | None = None) -> tuple[bytes, ...]:
        """All peers, ``first`` in front; none if this node is not a client, as peers would refuse it."""
        peers = self._peers if self._inside else ()
        return tuple(sorted((key for key, _ in peers), key=lambda key: key != first))

    # --- messages -------------------------------------------------------------------------------------------------

    def receive(self, envelope: Envelope, log: EpochLog, head: int) -> None:
        """Take a peer's result, list or question about a round; ``head`` is the newest announced round."""
        message = envelope.message
        assert isinstance(message, (Result, Attest, Ask))
        known = log.rounds.get(message.height)
        if isinstance(message, Ask):
            self._answer(envelope.sender, log, message.height)
        elif isinstance(message, Attest):
            if known is not None and self.knows(envelope.sender):
                known.add_list(envelope.sender, message.hashes())
        elif known is not None and known.assigned:
            entry = self.file(known, envelope)
            if entry is not None and message.height > head - self._settings.delay:
                self.fetch(known, [entry])
        elif abs(message.height - head) <= EARLY_ROUNDS and self.knows(envelope.sender):
            waiting = log.early.setdefault(message.height, [])
            own = sum(other.sender == envelope.sender for other in waiting)
            if own < MAX_ENTRIES_PER_BATCH and envelope not in waiting:
                waiting.append(envelope)

    def file(self, log: RoundLog, envelope: Envelope) -> Entry | None:
        """Put a known round's announcement into its log, or say why not; returns a new result's entry."""
        try:
            entry = log.add_result(envelope)
        except WireError as error:
            self._refused[envelope.sender] += 1
            times = self._refused[envelope.sender]
            if times & (times - 1) == 0:  # 1, 2, 4, ...: a flood does not fill the log
                self._out.say(MessageRefused(envelope.sender, times, str(error)))
            return None
        if entry is not None and len(log.of(entry.trainer)) == 2:
            self._out.say(TwoResults(envelope.sender))
            first, second = log.of(entry.trainer)
            self._out.emit(Accuse(first.envelope.raw, second.envelope.raw))
        return entry

    def accuse_again(self, proof: Accuse) -> None:
        """Repeat an accusation that did not reach the coordinator, when it is due."""
        self._unheard.append(proof)

    def repeat(self) -> None:
        """Send what did not reach the coordinator, if it is due."""
        due = [proof for proof in self._unheard if self._out.due(("accuse", proof), after=self._settings.retry)]
        for proof in due:
            self._unheard.remove(proof)
            self._out.emit(proof)

    def file_early(self, log: EpochLog, assigned: Iterable[RoundLog]) -> None:
        """File early messages and this node's promises for rounds that now have their batches."""
        for known in assigned:
            height = known.round.height
            for envelope in log.early.pop(height, []):
                self.file(known, envelope)
            own = self._promises.get(result_promise(log.epoch, height))
            if own is not None and known.index_of(self._public) is not None:
                self._file_own(known, own)
            for stored in self._remembered.get((log.epoch, height), {}).values():
                for envelope in stored:
                    self.file(known, envelope)
                known.add_list(b"", commitments(known.run_id, stored))

    def _answer(self, peer: bytes, log: EpochLog, height: int) -> None:
        known = log.rounds.get(height)
        if not self.knows(peer) or known is None:
            return
        if not self._out.once(("answer", peer, height), every=self._settings.retry / 4):
            return
        # What was stored counts even where this node began with later parameters, and so never filed it.
        stored = list(self._remembered.get((log.epoch, height), {}).values())
        results = dict.fromkeys([*known.messages(), *(envelope for each in stored for envelope in each)])
        for envelope in results:
            self._out.emit(ev.SendTo(peer, envelope))
        agreed = log.agreements.get(height)
        lists = [tuple(entry.commitment for entry in agreed.entries)] if agreed and agreed.entries else []
        lists = lists or [known.own()[0], *(tuple(commitments(known.run_id, each)) for each in stored)]
        for listed in dict.fromkeys(each for each in lists if each):
            self._out.emit(ev.SendTo(peer, self._seal(Attest(log.epoch, height, b"".join(listed)))))
        if self._buffers is not None:
            self._out.emit(ev.SendTo(peer, self._buffers))
        self.offer_to(peer, log.epoch)

    def ask(
        self, epoch: int, height: int, peer: bytes | None = None, *, after: float = 0.0, everybody: bool = False
    ) -> None:
        """Ask ``peer``, or peers in turn, for a round's messages; sometimes ask all, as another may have them."""
        key = ("ask", height, "all" if everybody else peer, after)  # a later question puts off no earlier one
        if self._out.due(key, after=after):
            attempt = self._out.attempts(key)
            self._questions += 1
            envelope = self._seal(Ask(epoch, height, self._questions))
            if everybody or attempt % ASK_ALL == 0 or not self._peers:
                self._out.emit(ev.Broadcast(envelope))
            elif peer is None:
                self._out.emit(ev.SendTo(self._peers[(height + attempt) % len(self._peers)][0], envelope))
            else:
                self._out.emit(ev.SendTo(peer, envelope))

    def remember(self, log: EpochLog, height: int, entries: Iterable[Entry]) -> None:
        """Store the announcements in a list of a round's results durably, so that they outlive this process.

        Whoever reports a list can show it, even after all nodes lost power: so what is decided stays available.
        """
        ordered = sorted(entries, key=lambda entry: entry.commitment)
        key = list_promise(log.epoch, height, merkle_root([entry.commitment for entry in ordered]))
        log.rounds[height].add_list(b"", [entry.commitment for entry in ordered])
        kept = self._remembered.setdefault((log.epoch, height), {})
        if ordered and key not in kept:
            envelopes = kept[key] = tuple(entry.envelope for entry in ordered)
            self._out.emit(ev.Remember(key, envelopes))

    def offered(self, epoch: int) -> list[Offer]:
        """The parameters of an epoch that this node stored, perhaps before a restart."""
        offers = [kept.message for kept in self._promises.values() if isinstance(kept.message, Offer)]
        return [offer for offer in offers if offer.epoch == epoch]

    def offer(self, epoch: int, applied: int, snapshot: bytes) -> None:
        """Offer this node's stored parameters to all peers, and remember them over a restart."""
        offer = self._promise(offer_promise(epoch, applied), Offer(epoch, applied, snapshot))
        self._out.emit(ev.Broadcast(offer))

    def complain(self, message: Stuck) -> None:
        """Ask all peers for parameters after a round that this node cannot apply."""
        self._out.emit(ev.Broadcast(self._seal(message)))

    def offer_to(self, peer: bytes, epoch: int) -> None:
        """Send a peer all offers of an epoch: the newest may be too new for it to prove."""
        for kept in self._promises.values():
            if isinstance(kept.message, Offer) and kept.message.epoch == epoch:
                self._out.emit(ev.SendTo(peer, kept))

    # --- results --------------------------------------------------------------------------------------------------

    def gather(self, log: EpochLog, state: RunState) -> None:
        """Obtain announcements and payloads of the rounds that are witnessed now or next."""
        head = state.current.height if state.current else -1
        for height in range(self._settings.applied_before(head), head + 1):
            known = log.rounds.get(height)
            if known is None or not known.assigned or not known.missing:
                continue
            self.fetch(known, known.entries.values())
            away = gone(state, known) if known.silent else set()
            for index in known.silent - away:
                if known.nodes[index] != self._public:
                    self.ask(log.epoch, height, known.nodes[index], after=2 * self._settings.retry)
        self._compare(log, head)

    def _compare(self, log: EpochLog, head: int) -> None:
        """Ask the witnesses whose report shows a list of which this node lacks results, not just their payloads."""
        here, about = log.rounds.get(head), log.rounds.get(head - self._settings.delay + 1)
        if here is None or about is None or not about.assigned or not about.round.step:
            return
        mine = about.own()[1]
        others = [one for one in here.round.witnesses if one.merkle not in (mine, EMPTY_ROOT, *about.lists)]
        if others:
            about.add_list(b"", about.announced())  # what is missing may be payloads alone, which are on the way
        for record in others:
            if record.merkle not in about.lists:
                peer = here.nodes[record.proof.index]
                if peer != self._public:
                    self.ask(log.epoch, about.round.height, peer)

    def fetch(self, log: RoundLog, entries: Iterable[Entry]) -> None:
        """Fetch payloads that are not here yet."""
        for entry in entries:
            payload = entry.result.payload
            if entry.verified or entry.refused:
                continue
            if (waiting := self._fetching.get(payload)) is not None:
                if all(other is not entry for _, other in waiting):
                    waiting.append((log, entry))
            elif self._out.due(("fetch", entry.commitment)):
                self._fetching[payload] = [(log, entry)]
                providers = self.providers(log.nodes[entry.trainer])
                self._out.emit(ev.Fetch(payload, entry.result.size, log.round.step, providers))

    def fetched(self, event: ev.Fetched) -> None:
        """Note that a payload arrived, or why not."""
        waiting = self._fetching.pop(event.payload, [])
        asked = [(entry.result.size, log.round.step) for log, entry in waiting]
        for (log, entry), its in zip(waiting, asked, strict=True):
            if its != asked[0]:  # of another size or step it may be wrong: each for itself
                self._out.forget(("fetch", entry.commitment))
            elif event.refused:
                log.settle(entry, event.reason)
                self._out.say(PayloadRefused(entry.envelope.sender, log.round.height, event.reason))
            elif not event.reason:
                log.settle(entry)

    def announce(self, log: RoundLog, result: Result, key: str) -> None:
        """Promise this node's result durably, then broadcast it; its payload is stored."""
        if self.promised(key) is None:
            self.publish(log, self._promise(key, result))

    def promised(self, key: str) -> Envelope | None:
        """The result that this node, perhaps before a restart, signed for a round; it never signs another one."""
        return self._promises.get(key)

    def keep_promises(self, epoch: int, height: int = 0) -> tuple[tuple[str, ...], tuple[bytes, ...]]:
        """Drop promises of earlier rounds; returns keys and payloads of the others."""
        for key, kept in list(self._promises.items()):
            message = kept.message
            assert isinstance(message, (Result, Offer))
            place = message.applied if isinstance(message, Offer) else message.height
            if (message.epoch, place) < (epoch, height):
                del self._promises[key]
        self._remembered = {place: kept for place, kept in self._remembered.items() if place >= (epoch, height)}
        lists = {key: stored for kept in self._remembered.values() for key, stored in kept.items()}
        every = [*self._promises.values(), *(each for stored in lists.values() for each in stored)]
        payloads = dict.fromkeys(kept.message.payload for kept in every if isinstance(kept.message, Result))
        return (*self._promises, *lists), tuple(payloads)

    def publish(self, log: RoundLog, envelope: Envelope) -> None:
        """File and broadcast this node's announcement."""
        if log.assigned:  # else it is filed once it is assigned
            self._file_own(log, envelope)
        self._out.emit(ev.Broadcast(envelope))

    def _file_own(self, log: RoundLog, envelope: Envelope) -> None:
        """File a result of this node, whose payload is stored unless it was lost: then peers may have it."""
        entry = self.file(log, envelope)
        if entry is not None and entry.result.payload not in self._lost:
            log.settle(entry)

    def _promise(self, key: str, message: Message) -> Envelope:
        envelope = self._seal(message)
        self._promises[key] = envelope
        self._out.emit(ev.Promise(key, envelope))
        return envelope

    # --- buffers --------------------------------------------------------------------------------------------------

    def share_buffers(self, epoch: int, index: bytes) -> None:
        """Broadcast where this node keeps its buffers."""
        envelope = self._seal(Buffers(epoch, index))
        self.pass_on(envelope)
        self._out.emit(ev.Broadcast(envelope))

    def pass_on(self, buffers: Envelope) -> None:
        """Tell asking peers where the epoch's buffers are."""
        self._buffers = buffers
