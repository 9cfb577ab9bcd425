"""Gives all nodes one node's model buffers (BatchNorm's running statistics) at the start of an epoch.

That node is the first to report its parameters in the warm-up. It shares its buffers before it trains. The others wait
for them before their first round, up to a limit. Part of the node core, so it does no I/O.
"""

from __future__ import annotations

from psyche_lightning.node import events as ev
from psyche_lightning.node.agreement import EpochLog
from psyche_lightning.node.exchange import Exchange
from psyche_lightning.node.notices import BuffersNotObtained, KeepsOwnBuffers
from psyche_lightning.node.outbox import Outbox
from psyche_lightning.node.settings import Settings
from psyche_lightning.protocol.messages import Buffers, Envelope
from psyche_lightning.protocol.state import Phase, RunState


class BufferCopy:
    """One node's sharing.

    Args:
        public: this node's key.
        settings: see :class:`Settings`.
        exchange: talks to the peers.
        out: where effects go.
    """

    def __init__(self, public: bytes, settings: Settings, exchange: Exchange, out: Outbox) -> None:
        self._public = public
        self._settings = settings
        self._exchange = exchange
        self._out = out
        self._epoch = -1
        self._source: bytes | None = None
        self._offers: dict[bytes, Envelope] = {}
        self._loading: bytes | None = None
        self._done = False

    def hear(self, envelope: Envelope) -> None:
        """Note where a peer's buffers are, perhaps before this node knows whose to take."""
        message, before = envelope.message, self._offers.get(envelope.sender)
        assert isinstance(message, Buffers)
        known = envelope.sender == self._source or self._exchange.knows(envelope.sender)
        if known and (before is None or before.message.epoch <= message.epoch):
            self._offers[envelope.sender] = envelope

    def taken(self, event: ev.BuffersTaken) -> None:
        """Note that this node's buffers are stored."""
        if event.epoch == self._epoch:
            self._exchange.share_buffers(event.epoch, event.index)

    def loaded(self, event: ev.BuffersLoaded) -> None:
        """The answer to :class:`~psyche_lightning.node.events.LoadBuffers`."""
        if event.index != self._loading:
            return
        self._loading, self._done = None, not event.reason
        if event.reason:
            self._out.say(BuffersNotObtained(event.reason))

    def advance(self, state: RunState, log: EpochLog | None) -> None:
        """Share, take or ask for buffers once their owner is known."""
        if not self._settings.buffers:
            return
        before = self._source if state.epoch == self._epoch else None
        source = _source(state, log) or before
        if (state.epoch, source) != (self._epoch, self._source):
            self._epoch, self._source, self._loading, self._done = state.epoch, source, None, False
        first = state.phase is Phase.WARMUP or (state.current is not None and state.current.height == 0)
        if self._source is None or self._done:
            return
        if self._source == self._public:
            self._done = True
            if first:  # later they no longer match the epoch's start
                self._out.emit(ev.ShareBuffers(state.epoch))
            return
        offer = self._offers.get(self._source)
        if self._loading is not None:
            return
        if offer is not None and offer.message.epoch == state.epoch:
            if self._out.due(("buffers", state.epoch)):
                assert isinstance(offer.message, Buffers)
                self._loading = offer.message.index
                self._exchange.pass_on(offer)
                self._out.emit(ev.LoadBuffers(self._loading, self._exchange.providers(self._source)))
        elif state.phase is not Phase.WARMUP and state.current is not None:
            self._exchange.ask(state.epoch, state.current.height, self._source, after=self._settings.retry / 2)

    def awaited(self, state: RunState, height: int) -> bool:
        """Whether training round ``height`` must wait for the buffers."""
        if not self._settings.buffers or self._done or height:
            return False
        there = {client.node for client in state.healthy}
        patience = state.config.max_round_train_time / 2
        if self._source in there and not self._out.due(("without buffers", state.epoch), after=patience):
            return True
        self._done = True
        if self._source is not None:
            self._out.say(KeepsOwnBuffers(self._source))
        return False


def _source(state: RunState, log: EpochLog | None) -> bytes | None:
    """The node key of the first warm-up witness; its record holds its place at the epoch's start."""
    if not state.warmup_witnesses:
        return None
    index = state.warmup_witnesses[0].proof.index
    if state.phase is Phase.WARMUP:
        nodes = tuple(client.node for client in state.clients)
    else:
        start = log.rounds.get(0) if log is not None and log.epoch == state.epoch else None
        nodes = start.nodes if start is not None else ()
    return nodes[index] if index < len(nodes) else None
