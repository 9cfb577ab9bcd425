"""Converts a run's two accounts to Python values and back (docs/solana-account.md has the bytes).

The coordinator account is Psyche's, so any Psyche run is readable. The manifest account has the fields that its layout
lacks; without one (a run that this program does not own) they are empty.

Other values are derived (see ``docs/solana-account.md``): step and batch size of the stored rounds.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from psyche_lightning.coordinator.machine import batch_size, gathered
from psyche_lightning.errors import CoordinatorError, WireError
from psyche_lightning.protocol.bloom import BLOOM_SIZE
from psyche_lightning.protocol.committee import round_selection
from psyche_lightning.protocol.state import (
    Checkpoint,
    Client,
    ClientStatus,
    CoordinatorConfig,
    Phase,
    Round,
    RunState,
    WitnessProof,
    WitnessRecord,
)
from psyche_lightning.wire.canonical import ZERO_HASH
from psyche_lightning_solana.layout import (
    CLIENT,
    CONFIG,
    COORDINATOR,
    COORDINATOR_DISCRIMINATOR,
    COORDINATOR_SIZE,
    MANIFEST,
    MANIFEST_DISCRIMINATOR,
    MANIFEST_SIZE,
    MAX_CLIENTS,
    MAX_WITNESSES,
    MEMBER,
    VERSION,
    VOTE,
    WITNESS,
    AccountError,
    Record,
    view_coordinator,
    view_manifest,
)
from psyche_lightning_solana.types import METADATA, MODEL

_CLIENT, _MEMBER = struct.Struct("<32s32sBBxxI"), struct.Struct("<32s32s4Q")
_WITNESS = struct.Struct("<QQB7x192s192s32s")
_TRAINING = (Phase.ROUND_TRAIN, Phase.ROUND_WITNESS)
_COOLDOWN = 5
"""Psyche's phase after an epoch's last round, which this program does not have."""


@dataclass(frozen=True)
class Member:
    """A wallet that once joined the run; it keeps its place forever.

    Attributes:
        signer: its 32-byte key.
        p2p: the 32-byte key of its node.
        earned: points.
        slashed: points taken away.
        active: if equal to the account's ``next_active``, it takes part in the next epoch.
    """

    signer: bytes
    p2p: bytes
    earned: int = 0
    slashed: int = 0
    active: int = 0


@dataclass(frozen=True)
class Rates:
    """Points of an epoch: shared by the clients healthy at its end, and taken from an ejected one."""

    earning_total_shared: int = 0
    slashing_per_client: int = 0


@dataclass(frozen=True)
class ManifestAccount:
    """The manifest account's fixed values; the :class:`RunState` has the changing ones.

    Attributes:
        bump: of its address.
        coordinator_account: the account that it belongs to.
        authorizer: the program whose authorizations count.
        digest: SHA-256 of the run's manifest; empty until one is set.
        address: its place for nodes.
    """

    bump: int
    coordinator_account: bytes
    authorizer: bytes
    digest: bytes = b""
    address: str = ""


@dataclass(frozen=True)
class RunAccounts:
    """A run's state on the chain.

    Attributes:
        state: the state machine's input; clients without addresses.
        metadata: name, description, parameters and vocabulary, in the account's form (360 bytes).
        model: Psyche's model section, in the account's form (552 bytes).
        members: all wallets that ever joined, in joining order.
        next_active: see :class:`Member`.
        current_rates: points of the current epoch.
        future_rates: points of future epochs.
        first_round: an epoch is formed, and none of its rounds has ended.
        is_warmup_first_tick: the next epoch's warm-up has not begun.
        is_training_first_tick: the epoch's first round has not begun.
        client_version: the version that the run's owner requires.
        manifest: the manifest account's values; None without one.
    """

    state: RunState
    metadata: bytes = bytes(METADATA.size)
    model: bytes = bytes(MODEL.size)
    members: tuple[Member, ...] = ()
    next_active: int = 0
    current_rates: Rates = Rates()
    future_rates: Rates = Rates()
    first_round: bool = False
    is_warmup_first_tick: bool = False
    is_training_first_tick: bool = False
    client_version: str = ""
    manifest: ManifestAccount | None = None

    @property
    def described(self) -> dict[str, Any]:
        """Name, description, ``num_parameters`` and ``vocab_size``."""
        values: dict[str, Any] = METADATA.unpack(self.metadata)
        return values

    @property
    def llm(self) -> dict[str, Any]:
        """The model section in the form of a TOML configuration's ``[model]``: ``{"LLM": {...}}``."""
        values: dict[str, Any] = MODEL.unpack(self.model)
        return values

    @property
    def pending(self) -> tuple[Client, ...]:
        """The members waiting for the next epoch."""
        return tuple(Client(m.signer, m.p2p) for m in self.members if m.active == self.next_active)


def at_rest(run: RunAccounts) -> RunAccounts:
    """The run without the values that accounts drop; no decision depends on them."""
    state = run.state
    order = {member.signer: place for place, member in enumerate(run.members)}
    waits = state.phase is Phase.WAITING_FOR_MEMBERS and state.gathered_at is not None
    state = replace(
        state,
        phase_start=state.gathered_at if waits and state.gathered_at is not None else state.phase_start,
        rounds=tuple(_round_at_rest(state, round_) for round_ in state.rounds),
        warmup_witnesses=state.warmup_witnesses if state.phase is Phase.WARMUP else (),
        checkpoint_votes=state.checkpoint_votes if state.phase in _TRAINING else (),
        holders=tuple(sorted(state.holders, key=order.__getitem__)),
    )
    return replace(run, state=state)


def _round_at_rest(state: RunState, round_: Round) -> Round:
    planned = _planned(state, round_.height, round_.data_index)
    same = planned == {"step": round_.step, "batch_size": round_.batch_size}
    return round_ if same else replace(round_, **planned)


def _planned(state: RunState, height: int, data_index: int) -> dict[str, Any]:
    """Step and batch size of the round of that height."""
    step = state.start_step + height
    if state.last_step and step >= state.last_step:
        return {"step": 0, "batch_size": 0}
    return {"step": step, "batch_size": batch_size(state.config, data_index * state.max_seq_len)}


def _bytes(field: Any) -> bytes:
    data: bytes = field.tobytes()
    return data


def _text(field: Any) -> str:
    return _bytes(field).rstrip(b"\0").decode("utf-8", "surrogateescape")


def _count(record: Any, field: str, most: int) -> int:
    count = int(record[field])
    if count > most:
        raise AccountError(f"the account is damaged: {field} is {count}, and there is room for {most}")
    return count


# Reading


def read(coordinator: bytes | memoryview, manifest: bytes | memoryview | None = None) -> RunAccounts:
    """Read a run.

    Args:
        coordinator: bytes of the coordinator account.
        manifest: bytes of the manifest account; None without one.

    Raises:
        AccountError: the account has another kind, size or version, or is damaged.
    """
    record = view_coordinator(coordinator)
    members = _members(record)
    try:
        state = _state(record, members)
        MODEL.unpack(_bytes(record["model"]))
    except AccountError:
        raise
    except (ValueError, WireError) as error:
        raise AccountError(f"the account is damaged: {error}") from error
    run = RunAccounts(
        state,
        _bytes(record["metadata"]),
        _bytes(record["model"]),
        members,
        int(record["next_active"]),
        Rates(*map(int, record["current_rates"].item())),
        Rates(*map(int, record["future_rates"].item())),
        bool(record["first_round"]),
        bool(record["is_warmup_first_tick"]),
        bool(record["is_training_first_tick"]),
        _text(record["client_version"]),
    )
    return run if manifest is None else _with_manifest(run, view_manifest(manifest))


def _members(record: Record) -> tuple[Member, ...]:
    items = record["members"][: _count(record, "members_len", MAX_CLIENTS)]
    keys = [_bytes(items[field]) for field in ("signer", "p2p")]
    numbers = [items[field].tolist() for field in ("earned", "slashed", "active")]
    return tuple(
        Member(keys[0][32 * i : 32 * i + 32], keys[1][32 * i : 32 * i + 32], *(column[i] for column in numbers))
        for i in range(len(items))
    )


def _clients(record: Record, field: str) -> tuple[Client, ...]:
    items = record[field]["items"][: _count(record[field], "len", MAX_CLIENTS)]
    signers, nodes = _bytes(items["signer"]), _bytes(items["p2p"])
    statuses, heights = items["status"].tolist(), items["exited_height"].tolist()
    return tuple(
        Client(signers[32 * i : 32 * i + 32], nodes[32 * i : 32 * i + 32], "", ClientStatus(status), heights[i])
        for i, status in enumerate(statuses)
    )


def _config(record: Record) -> CoordinatorConfig:
    values = record["config"].item()
    return CoordinatorConfig(**dict(zip(CONFIG.names or (), values, strict=True)))


def _state(record: Record, members: tuple[Member, ...]) -> RunState:
    number = int(record["run_state"])
    phase = Phase.ROUND_WITNESS if number == _COOLDOWN else Phase(number)
    clients, exited = _clients(record, "clients"), _clients(record, "exited_clients")
    config = _config(record)
    state = RunState(
        run_id=_text(record["run_id"]),
        phase=phase,
        phase_start=int(record["run_state_start"]),
        config=config,
        max_seq_len=int.from_bytes(_bytes(record["model"])[8:12], "little"),
        epoch=int(record["epoch"]),
        step=int(record["step"]),
        epoch_start_data_index=int(record["epoch_start_data_index"]),
        epoch_start=int(record["epoch_start"]),
        start_step=int(record["start_step"]),
        last_step=int(record["last_step"]),
        head=_count(record, "rounds_head", 3),
        clients=clients,
        exited_clients=exited,
        pending_pause=bool(record["pending_pause"]),
        cold_start_epoch=bool(record["cold_start_epoch"]),
        nonce=int(record["nonce"]),
    )
    order = {member.signer: place for place, member in enumerate(members)}
    rounds = _rounds(record, state, order)
    if (rounds or phase in _TRAINING) and state.head >= len(rounds):
        raise AccountError("the account is damaged: its newest round is missing")
    return replace(state, rounds=rounds)


def _rounds(record: Record, state: RunState, order: dict[bytes, int]) -> tuple[Round, ...]:
    head = record["rounds"][state.head]
    if not (head["clients_len"] or head["height"]):
        return ()  # an epoch's first round has clients
    everyone = [*state.clients, *state.exited_clients]
    everyone.sort(key=lambda client: order.get(client.signer, len(order)))
    # Clients that left in the warm-up have height 0, too, and left first.
    early: set[bytes] = set()
    if head["height"] < len(record["rounds"]):
        early_count = max(len(everyone) - int(record["rounds"][0]["clients_len"]), 0)
        early = {client.signer for client in state.exited_clients[:early_count]}
    here = {client.signer for client in state.clients}
    rounds = []
    for round_ in record["rounds"][: int(head["height"]) + 1]:
        height, data_index = int(round_["height"]), int(round_["data_index"])
        items = round_["witnesses"][: _count(round_, "witnesses_len", MAX_WITNESSES)]
        rounds.append(
            Round(
                height=height,
                seed=int(round_["seed"]),
                data_index=data_index,
                clients=tuple(
                    client.signer
                    for client in everyone
                    if client.signer in here or (client.exited_height >= height and client.signer not in early)
                ),
                tie_breaker_tasks=int(round_["tie_breaker_tasks"]),
                witnesses=tuple(_witness(item) for item in items),
                **_planned(state, height, data_index),
            )
        )
    return tuple(rounds)


def _witness(item: Any) -> WitnessRecord:
    proof = WitnessProof(int(item["position"]), int(item["index"]), bool(item["witness"]))
    filters = _bytes(item["participants"]), _bytes(item["broadcasts"])
    return WitnessRecord(proof, _bytes(item["merkle"]), *filters)


def _with_manifest(run: RunAccounts, record: Record) -> RunAccounts:
    state = run.state
    agreed, digest, begun = (_bytes(record[field]) for field in ("checkpoint_digest", "digest", "epoch_digest"))
    order = [member.signer for member in run.members]
    trainers = [_among(order, places) for places in record["trainers"]]
    votes = [
        (int(vote["client"]), int(vote["step"]), _bytes(vote["digest"]))
        for vote in record["votes"][: _count(record, "votes_len", MAX_CLIENTS)]
    ]
    said: dict[str, Any]
    if any(client >= len(state.clients) for client, *_ in votes):
        raise AccountError("the account is damaged: a vote of a client that is not in the list")
    if state.phase is Phase.WARMUP:
        said = {"warmup_witnesses": tuple(WitnessRecord(WitnessProof(i, i), digest) for i, _, digest in votes)}
    else:
        said = {"checkpoint_votes": tuple((state.clients[i].signer, step, vote) for i, step, vote in votes)}
    state = replace(
        state,
        checkpoint=Checkpoint(b"" if agreed == ZERO_HASH else agreed, int(record["checkpoint_step"])),
        epoch_digest=b"" if begun == ZERO_HASH else begun,
        holders=_among(order, record["holders"]),
        rounds=tuple(replace(round_, clients=trainers[slot]) for slot, round_ in enumerate(state.rounds)),
        needed=int(record["needed"]),
        **said,
    )
    try:
        for round_ in state.rounds:
            round_selection(round_, state.config)
    except CoordinatorError as error:
        raise AccountError(f"the account is damaged: {error}") from error
    if state.phase is Phase.WAITING_FOR_MEMBERS and gathered(state, run.pending):
        state = replace(state, gathered_at=state.phase_start)
    fixed = ManifestAccount(
        int(record["bump"]),
        _bytes(record["coordinator_account"]),
        _bytes(record["authorizer"]),
        b"" if digest == ZERO_HASH else digest,
        _text(record["address"]),
    )
    return replace(run, state=state, manifest=fixed)


# Writing


def _array(data: bytes) -> Any:
    return np.frombuffer(data, np.uint8)


def write_coordinator(run: RunAccounts) -> bytes:
    """The bytes of the coordinator account, 119,160 of them; unused elements and padding are zero."""
    data = bytearray(COORDINATOR_SIZE)
    record: Any = np.frombuffer(data, COORDINATOR, 1).reshape(())
    state = run.state
    record["discriminator"] = _array(COORDINATOR_DISCRIMINATOR)
    record["version"] = VERSION
    record["metadata"] = _array(run.metadata)
    record["run_id"] = _array(state.run_id.encode("utf-8", "surrogateescape").ljust(32, b"\0"))
    record["run_state"] = state.phase
    record["model"] = _array(run.model)
    record["config"] = tuple(int(getattr(state.config, field)) for field in CONFIG.names or ())
    waits = state.phase is Phase.WAITING_FOR_MEMBERS and state.gathered_at is not None
    for field, value in (
        ("epoch", state.epoch),
        ("step", state.step),
        ("epoch_start_data_index", state.epoch_start_data_index),
        ("rounds_head", state.head),
        ("start_step", state.start_step),
        ("last_step", state.last_step),
        ("epoch_start", state.epoch_start),
        ("first_round", run.first_round),
        ("cold_start_epoch", state.cold_start_epoch),
        ("run_state_start", state.gathered_at if waits else state.phase_start),
        ("pending_pause", state.pending_pause),
        ("members_len", len(run.members)),
        ("next_active", run.next_active),
        ("is_warmup_first_tick", run.is_warmup_first_tick),
        ("is_training_first_tick", run.is_training_first_tick),
        ("nonce", state.nonce),
    ):
        record[field] = int(value)  # type: ignore[arg-type]
    for field, rates in (("current_rates", run.current_rates), ("future_rates", run.future_rates)):
        record[field] = (rates.earning_total_shared, rates.slashing_per_client)
    record["client_version"] = _array(run.client_version.encode("utf-8", "surrogateescape").ljust(96, b"\0"))
    for slot, round_ in enumerate(state.rounds):
        _write_round(record["rounds"][slot], round_)
    places = {member.signer: place for place, member in enumerate(run.members)}
    for field, clients in (("clients", state.clients), ("exited_clients", state.exited_clients)):
        parts = [_CLIENT.pack(c.signer, c.node, c.status, places[c.signer], c.exited_height) for c in clients]
        record[field]["items"][: len(parts)] = np.frombuffer(b"".join(parts), CLIENT)
        record[field]["len"] = len(parts)
    parts = [_MEMBER.pack(m.signer, m.p2p, 0, m.earned, m.slashed, m.active) for m in run.members]
    record["members"][: len(parts)] = np.frombuffer(b"".join(parts), MEMBER)
    return bytes(data)


def _write_witnesses(record: Any, witnesses: tuple[WitnessRecord, ...]) -> None:
    nothing = bytes(BLOOM_SIZE)
    parts = [
        _WITNESS.pack(
            w.proof.position,
            w.proof.index,
            w.proof.witness,
            w.participants or nothing,
            w.broadcasts or nothing,
            w.merkle,
        )
        for w in witnesses
    ]
    record["witnesses"][: len(parts)] = np.frombuffer(b"".join(parts), WITNESS)
    record["witnesses_len"] = len(parts)


def _write_round(record: Any, round_: Round) -> None:
    _write_witnesses(record, round_.witnesses)
    record["data_index"] = round_.data_index
    record["seed"] = round_.seed
    record["height"] = round_.height
    record["clients_len"] = len(round_.clients)
    record["tie_breaker_tasks"] = round_.tie_breaker_tasks


def write_manifest(run: RunAccounts) -> bytes:
    """The bytes of the manifest account, 10,136 of them.

    Raises:
        AccountError: the run has none.
    """
    if run.manifest is None:
        raise AccountError("the run has no manifest account")
    data = bytearray(MANIFEST_SIZE)
    record: Any = np.frombuffer(data, MANIFEST, 1).reshape(())
    state, fixed = run.state, run.manifest
    record["discriminator"] = _array(MANIFEST_DISCRIMINATOR)
    record["bump"] = fixed.bump
    record["coordinator_account"] = _array(fixed.coordinator_account)
    record["authorizer"] = _array(fixed.authorizer)
    record["digest"] = _array(fixed.digest or ZERO_HASH)
    record["address"] = _array(fixed.address.encode("utf-8", "surrogateescape").ljust(192, b"\0"))
    record["checkpoint_digest"] = _array(state.checkpoint.digest or ZERO_HASH)
    record["checkpoint_step"] = state.checkpoint.step
    record["epoch_digest"] = _array(state.epoch_digest or ZERO_HASH)
    record["holders"] = _places(run, state.holders)
    for slot, round_ in enumerate(state.rounds):
        record["trainers"][slot] = _places(run, round_.clients)
    record["needed"] = state.needed
    votes = _votes(state)
    record["votes"][: len(votes)] = np.array(votes, VOTE)
    record["votes_len"] = len(votes)
    return bytes(data)


def _places(run: RunAccounts, signers: Collection[bytes]) -> Any:
    """The bits of these members' places."""
    chosen = set(signers)
    bits = np.zeros(MAX_CLIENTS, np.uint8)
    bits[: len(run.members)] = [member.signer in chosen for member in run.members]
    return np.packbits(bits, bitorder="little")


def _among(members: list[bytes], places: Any) -> tuple[bytes, ...]:
    bits = np.unpackbits(places, bitorder="little")
    return tuple(signer for signer, bit in zip(members, bits, strict=False) if bit)


def _votes(state: RunState) -> list[tuple[int, int, Any]]:
    if state.phase is Phase.WARMUP:
        return [(record.proof.index, 0, _array(record.merkle)) for record in state.warmup_witnesses]
    index = {client.signer: place for place, client in enumerate(state.clients)}
    return [(index[signer], step, _array(digest)) for signer, step, digest in state.checkpoint_votes]
