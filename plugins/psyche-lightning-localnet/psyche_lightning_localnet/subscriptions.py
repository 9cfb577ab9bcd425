"""Keeps subscriptions, and notifies the subscribers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from solders.account import Account
from solders.pubkey import Pubkey

from psyche_lightning_localnet.chain import COMMITMENTS, Block, LocalChain
from psyche_lightning_localnet.encoding import ACCOUNT_ENCODINGS, account_json, filters_of, matches
from psyche_lightning_localnet.errors import (
    INTERNAL_ERROR,
    METHOD_NOT_FOUND,
    RpcError,
    invalid_params,
)
from psyche_lightning_localnet.rpc import Params, call, parse, refusal
from psyche_lightning_localnet.state import Record
from psyche_lightning_localnet.tokens import Read
from psyche_lightning_localnet.vm import SYSTEM_PROGRAM

KINDS = ("account", "program", "logs", "signature", "slot", "slotsUpdates", "root")
MAX_SUBSCRIPTIONS = 1024
"""The most subscriptions of one connection."""
_GONE = Account(0, b"", SYSTEM_PROGRAM)


@dataclass(frozen=True)
class Subscription:
    """A client's subscription.

    Attributes:
        number: the number that identifies it.
        kind: one of ``KINDS``.
        key: the account, the program, the signature, or the address that logs must mention; None for all.
        commitment: the commitment at which the client wants to see events.
        encoding: the encoding of accounts.
        data_slice: the requested part of an account's data; None for all.
        filters: the filters that an account must pass.
        early: whether to notify already when the transaction of a signature arrives.
    """

    number: int
    kind: str
    key: Pubkey | str | None
    commitment: str
    encoding: str = "binary"
    data_slice: dict[str, int] | None = None
    filters: tuple[dict[str, Any], ...] = ()
    early: bool = False


class Listener:
    """The subscriptions of one connection.

    Args:
        hub: the hub that notifies it.
        send: sends a text to the client; must not block.
    """

    def __init__(self, hub: Hub, send: Callable[[str], None]) -> None:
        self.send = send
        self.subscriptions: dict[int, Subscription] = {}
        self._hub = hub

    def request(self, text: str) -> None:
        """Handle a message of the client, and send the responses."""
        try:
            request = parse(text)
        except RpcError as error:
            self.send(json.dumps(refusal(None, error)))
            return
        for one in request if isinstance(request, list) else [request]:
            added: list[Subscription] = []
            response = call(one, functools.partial(self._run, added))
            if response is not None:
                self.send(json.dumps(response))
            for subscription in added:
                self._hub.greet(self, subscription)

    def _run(self, added: list[Subscription], method: str, params: Params) -> Any:
        for kind in KINDS:
            if method == f"{kind}Unsubscribe":
                if self.subscriptions.pop(params.integer(0), None) is None:
                    raise invalid_params("Invalid subscription id.")
                return True
            if method == f"{kind}Subscribe":
                if len(self.subscriptions) >= MAX_SUBSCRIPTIONS:
                    raise RpcError(
                        INTERNAL_ERROR, "Internal error: subscription refused. Node subscription limit reached"
                    )
                subscription = self._hub.subscription(kind, params)
                self.subscriptions[subscription.number] = subscription
                added.append(subscription)
                return subscription.number
        raise RpcError(METHOD_NOT_FOUND, "Method not found")


class Hub:
    """Observes a chain, and notifies listeners of its events.

    Args:
        chain: the chain.
    """

    def __init__(self, chain: LocalChain) -> None:
        self.listeners: set[Listener] = set()
        self._chain = chain
        self._numbers = 0
        self._root = chain.slot_at("finalized")

    def subscription(self, kind: str, params: Params) -> Subscription:
        """Build a subscription from its parameters, with a new number.

        Raises:
            RpcError: -32602, a parameter is invalid.
        """
        key: Pubkey | str | None = None
        if kind in ("account", "program"):
            key = params.pubkey(0)
        elif kind == "signature":
            key = params.signature(0)
        elif kind == "logs":
            key = _mentioned(params.required(0))
        self._numbers += 1
        if kind in ("slot", "slotsUpdates", "root"):
            return Subscription(self._numbers, kind, None, "processed")
        config = params.config(1)
        return Subscription(
            self._numbers,
            kind,
            key,
            config.choice("commitment", COMMITMENTS, "finalized"),
            config.choice("encoding", ACCOUNT_ENCODINGS, "binary"),
            config.data_slice,
            filters_of(config.get("filters")),
            config.flag("enableReceivedNotification"),
        )

    def greet(self, listener: Listener, subscription: Subscription) -> None:
        """Notify a new subscriber of a signature at once if its transaction has landed already."""
        if subscription.kind == "signature":
            record = self._chain.history.get(str(subscription.key))
            if record is not None and record.slot <= self._chain.slot_at(subscription.commitment):
                self._tell_signature(listener, subscription, record, record.slot)

    # -----------------------------------------------------------------------------------------------------------------
    # The observer
    # -----------------------------------------------------------------------------------------------------------------

    def received(self, signature: str) -> None:
        """Notify the subscribers of a transaction that has arrived."""
        for listener, subscription in self._subscriptions("signature"):
            if subscription.key == signature and subscription.early:
                _tell(listener, subscription, _with_slot(self._chain.slot, json.dumps("receivedSignature")))

    def slot(self, slot: int, parent: int, root: int) -> None:
        """Notify the subscribers of a slot that has begun."""
        text = json.dumps({"parent": parent, "root": root, "slot": slot})
        for listener, subscription in self._subscriptions("slot"):
            _tell(listener, subscription, text)
        rooted = root > self._root
        if rooted:
            self._root = root
            for listener, subscription in self._subscriptions("root"):
                _tell(listener, subscription, json.dumps(root))
        watching = self._subscriptions("slotsUpdates")
        for update in self._updates(slot, parent, root if rooted else None) if watching else ():
            text = json.dumps({**update, "timestamp": self._chain.clock.unix_ms()})
            for listener, subscription in watching:
                _tell(listener, subscription, text)

    def _updates(self, slot: int, parent: int, root: int | None) -> Iterator[dict[str, Any]]:
        """What has happened to slots when one begins: its parent is complete, and older ones have settled."""
        records = self._chain.history.at(parent)
        failed = sum(record.err is not None for record in records)
        stats = {
            "numTransactionEntries": len(records),
            "numSuccessfulTransactions": len(records) - failed,
            "numFailedTransactions": failed,
            "maxTransactionsPerEntry": min(1, len(records)),  # each transaction runs alone
        }
        yield {"type": "completed", "slot": parent}
        yield {"type": "frozen", "slot": parent, "stats": stats}
        yield {"type": "createdBank", "slot": slot, "parent": parent}
        confirmed = slot - self._chain.lags["confirmed"]
        if confirmed > 0:
            yield {"type": "optimisticConfirmation", "slot": confirmed}
        if root is not None:
            yield {"type": "root", "slot": root}

    def settled(self, commitment: str, block: Block) -> None:
        """Notify the subscribers of a block whose events are now visible at a commitment."""
        if not any(listener.subscriptions for listener in self.listeners):
            return
        shown: dict[tuple[Pubkey, str, str], str] = {}
        for listener, subscription in self._subscriptions("account", commitment):
            if subscription.key in block.changed:
                _tell(listener, subscription, self._account(subscription, subscription.key, block.slot, shown))
        for listener, subscription in self._subscriptions("program", commitment):
            for key in block.changed:
                account = self._chain.accounts.get(block.slot, key)
                if account is None or account.owner != subscription.key or not matches(account, subscription.filters):
                    continue
                _tell(listener, subscription, self._account(subscription, key, block.slot, shown, keyed=True))
        for record in block.records:
            for listener, subscription in self._subscriptions("logs", commitment):
                if subscription.key is None or subscription.key in record.addresses:
                    value = {"signature": record.signature, "err": record.err, "logs": list(record.logs)}
                    _tell(listener, subscription, _with_slot(block.slot, json.dumps(value)))
            for listener, subscription in self._subscriptions("signature", commitment):
                if subscription.key == record.signature:
                    self._tell_signature(listener, subscription, record, block.slot)

    def _subscriptions(self, kind: str, commitment: str | None = None) -> list[tuple[Listener, Subscription]]:
        return [
            (listener, subscription)
            for listener in self.listeners
            for subscription in listener.subscriptions.values()
            if subscription.kind == kind and commitment in (None, subscription.commitment)
        ]

    def _tell_signature(self, listener: Listener, subscription: Subscription, record: Record, slot: int) -> None:
        _tell(listener, subscription, _with_slot(slot, json.dumps({"err": record.err})))
        listener.subscriptions.pop(subscription.number, None)

    def _account(
        self,
        subscription: Subscription,
        key: Pubkey,
        slot: int,
        shown: dict[tuple[Pubkey, str, str], str],
        *,
        keyed: bool = False,
    ) -> str:
        # Many clients may watch one large account, so it is encoded only once for equal subscriptions.
        form = (key, subscription.encoding, json.dumps(subscription.data_slice))
        if form not in shown:
            account = self._chain.accounts.get(slot, key) or _GONE
            shown[form] = _account_text(account, subscription.encoding, subscription.data_slice, self._chain.account)
        text = shown[form]
        return _with_slot(slot, f'{{"pubkey": "{key}", "account": {text}}}' if keyed else text)


def _mentioned(wanted: object) -> str | None:
    if wanted in ("all", "allWithVotes"):
        return None
    if isinstance(wanted, dict) and isinstance(wanted.get("mentions"), list):
        if len(wanted["mentions"]) != 1:
            raise invalid_params("Invalid Request: Only 1 address supported")
        return str(Params(wanted["mentions"]).pubkey(0))
    raise invalid_params('Invalid params: logs of "all", "allWithVotes" or {"mentions": [ADDRESS]}.')


def _account_text(account: Account, encoding: str, data_slice: dict[str, int] | None, read: Read) -> str:
    try:
        return json.dumps(account_json(account, encoding, data_slice, read=read))
    except RpcError:  # too long for base58, but a notification cannot be refused
        shown = account_json(account, "base64", {"offset": 0, "length": 0}, read=read)
        problem = "error: data too large for bs58 encoding"
        return json.dumps({**shown, "data": problem if encoding == "binary" else [problem, encoding]})


def _with_slot(slot: int, value: str) -> str:
    return f'{{"context": {{"slot": {slot}}}, "value": {value}}}'


def _tell(listener: Listener, subscription: Subscription, result: str) -> None:
    listener.send(
        f'{{"jsonrpc": "2.0", "method": "{subscription.kind}Notification", '
        f'"params": {{"result": {result}, "subscription": {subscription.number}}}}}'
    )
