"""Builds every instruction of the coordinator and the authorizer, and reads the coordinator's.

A :class:`RunKeys` holds the addresses of one run and its instructions; the authorizer's are functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM
from solders.system_program import CreateAccountParams, create_account

from psyche_lightning.errors import WireError
from psyche_lightning.protocol.bloom import BLOOM_SIZE, Bloom
from psyche_lightning.protocol.committee import Committee
from psyche_lightning.protocol.state import WitnessProof
from psyche_lightning.wire.canonical import ZERO_HASH
from psyche_lightning_solana.addresses import (
    authorization_address,
    instance_address,
    manifest_address,
    node_address,
)
from psyche_lightning_solana.borsh import Reader
from psyche_lightning_solana.errors import Refused
from psyche_lightning_solana.interface import (
    AUTHORIZER,
    COORDINATOR,
    WARMUP_TRAILER,
    WITNESS_TRAILER,
    InstructionSpec,
)
from psyche_lightning_solana.layout import COORDINATOR_SIZE

_COMMITTEES = {Committee.TIE_BREAKER: "TieBreaker", Committee.VERIFIER: "Verifier", Committee.TRAINER: "Trainer"}


def build(
    spec: InstructionSpec,
    program: Pubkey,
    accounts: Mapping[str, Pubkey],
    arguments: Mapping[str, Any] | None = None,
    trailer: bytes = b"",
) -> Instruction:
    """Any instruction of any of the programs.

    Args:
        spec: from :mod:`psyche_lightning_solana.interface`.
        program: the program's id.
        accounts: an address for each name in ``spec.accounts``; those of ``spec.more`` are optional.
        arguments: its arguments by name.
        trailer: bytes after them.

    Raises:
        ConfigError: an argument does not fit the instruction.
    """
    given = [*spec.accounts, *(meta for meta in spec.more if meta.name in accounts)]
    metas = [AccountMeta(accounts[meta.name], meta.signer, meta.writable) for meta in given]
    return Instruction(program, spec.discriminator + spec.arguments.write(dict(arguments or {})) + trailer, metas)


def new_coordinator_account(payer: Pubkey, account: Pubkey, program: Pubkey, lamports: int) -> Instruction:
    """Create the coordinator account, plain, 119,160 bytes, before ``init``; ``account`` signs, too.

    Args:
        payer: pays.
        account: its address, a new key.
        program: the coordinator program.
        lamports: an account of that size needs them to be exempt from rent.
    """
    return create_account(
        CreateAccountParams(
            from_pubkey=payer, to_pubkey=account, lamports=lamports, space=COORDINATOR_SIZE, owner=program
        )
    )


@dataclass(frozen=True)
class RunKeys:
    """The addresses of a run; each method builds one instruction.

    Attributes:
        program: the coordinator program.
        run_id: the run's name.
        coordinator_account: address of its coordinator account.
    """

    program: Pubkey
    run_id: str
    coordinator_account: Pubkey

    @cached_property
    def instance(self) -> Pubkey:
        """The instance account."""
        return instance_address(self.program, self.run_id)

    @cached_property
    def manifest(self) -> Pubkey:
        """The manifest account."""
        return manifest_address(self.program, self.run_id)

    def _build(
        self, name: str, accounts: Mapping[str, Pubkey], arguments: Mapping[str, Any], trailer: bytes = b""
    ) -> Instruction:
        own = {
            "coordinator_instance": self.instance,
            "coordinator_account": self.coordinator_account,
            "manifest": self.manifest,
            "system_program": SYSTEM_PROGRAM,
        }
        return self._instruction(name, {**own, **accounts}, arguments, trailer)

    def _instruction(
        self, name: str, accounts: Mapping[str, Pubkey], arguments: Mapping[str, Any], trailer: bytes
    ) -> Instruction:
        return build(COORDINATOR.instructions[name], self.program, accounts, arguments, trailer)

    # Owner.

    def init_coordinator(
        self,
        payer: Pubkey,
        authorizer: Pubkey,
        main_authority: Pubkey,
        join_authority: Pubkey,
        client_version: str = "",
    ) -> Instruction:
        """Create the run; the coordinator account must exist, full of zeros."""
        return self._build(
            "init_coordinator",
            {"payer": payer, "authorizer": authorizer},
            {
                "main_authority": bytes(main_authority),
                "join_authority": bytes(join_authority),
                "run_id": self.run_id,
                "client_version": client_version,
            },
        )

    def free_coordinator(self, authority: Pubkey, spill: Pubkey) -> Instruction:
        """Close the run's accounts; ``spill`` gets their balance."""
        return self._build("free_coordinator", {"authority": authority, "spill": spill}, {})

    def update(
        self,
        authority: Pubkey,
        *,
        metadata: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        model: Mapping[str, Any] | None = None,
        progress: Mapping[str, Any] | None = None,
    ) -> Instruction:
        """Set the given values, in the form of a TOML run configuration (``model`` is ``{"LLM": {...}}``)."""
        arguments = {"metadata": metadata, "config": config, "model": model, "progress": progress}
        return self._build("update", {"authority": authority}, arguments)

    def update_client_version(self, authority: Pubkey, client_version: str) -> Instruction:
        """Require another client version."""
        return self._build("update_client_version", {"authority": authority}, {"client_version": client_version})

    def set_future_epoch_rates(self, authority: Pubkey, earning: int | None, slashing: int | None) -> Instruction:
        """Set the points of future epochs; None keeps a rate."""
        arguments = {"epoch_earning_rate_total_shared": earning, "epoch_slashing_rate_per_client": slashing}
        return self._build("set_future_epoch_rates", {"authority": authority}, arguments)

    def set_paused(self, authority: Pubkey, paused: bool) -> Instruction:
        """Pause the run, or open it, also for the first time."""
        return self._build("set_paused", {"authority": authority}, {"paused": paused})

    def set_manifest(self, authority: Pubkey, digest: bytes, address: str) -> Instruction:
        """Set the run's manifest and its place."""
        return self._build("set_manifest", {"authority": authority}, {"digest": digest, "address": address})

    def checkpoint(self, user: Pubkey, checkpoint: Any, authorization: Pubkey | None = None) -> Instruction:
        """Set the checkpoint's place (``{"Hub": {...}}``); the main authority needs no authorization."""
        accounts = {"user": user} | ({} if authorization is None else {"authorization": authorization})
        return self._build("checkpoint", accounts, {"repo": checkpoint})

    def restart_from(self, authority: Pubkey, step: int, digest: bytes) -> Instruction:
        """Go on from other parameters than the newest; later steps are undone."""
        return self._build("restart_from", {"authority": authority}, {"step": step, "digest": digest})

    def kick(self, authority: Pubkey, wallet: Pubkey) -> Instruction:
        """Remove a member at once, also from the epoch; for the join authority."""
        return self._build("kick", {"authority": authority}, {"signer": bytes(wallet)})

    # Clients.

    def join_run(self, user: Pubkey, node: bytes, authorization: Pubkey) -> Instruction:
        """Take part from the next epoch on, with that node key (32 bytes), which signs, too."""
        identity = {"signer": bytes(user), "p2p_identity": node}
        accounts = {"user": user, "authorization": authorization, "node": Pubkey(node)}
        return self._build("join_run", accounts, {"client_id": identity})

    def withdraw(self, user: Pubkey) -> Instruction:
        """Leave the run."""
        return self._build("withdraw", {"user": user}, {})

    def tick(self, user: Pubkey) -> Instruction:
        """Let the run make its due steps."""
        return self._build("tick", {"user": user}, {})

    def warmup_witness(self, user: Pubkey, index: int, digest: bytes, epoch: int | None = None) -> Instruction:
        """Report that the client at ``index`` holds the parameters with that digest."""
        arguments = _report(WitnessProof(index, index), digest)
        trailer = b"" if epoch is None else WARMUP_TRAILER.write({"epoch": epoch})
        return self._build("warmup_witness", {"user": user}, arguments, trailer)

    def witness(
        self,
        user: Pubkey,
        proof: WitnessProof,
        merkle: bytes,
        participants: bytes = bytes(BLOOM_SIZE),
        broadcasts: bytes = bytes(BLOOM_SIZE),
        *,
        metadata: Mapping[str, Any] | None = None,
        at: tuple[int, int] | None = None,
        held: tuple[int, bytes] = (0, ZERO_HASH),
    ) -> Instruction:
        """A witness' report.

        Args:
            user: signs.
            proof: its seat.
            merkle: root of its list.
            participants: serialized Bloom filter (192 bytes).
            broadcasts: serialized Bloom filter (192 bytes).
            metadata: figures; omitted ones are zero.
            at: its epoch and height; None for the run's current ones.
            held: with these: steps and digest of the newest parameters that it holds; a digest of zeros if not known.
        """
        arguments = {
            **_report(proof, merkle, participants, broadcasts),
            "metadata": {**_NO_FIGURES, **(metadata or {})},
        }
        place = {} if at is None else {"epoch": at[0], "height": at[1], "step": held[0], "digest": held[1]}
        trailer = WITNESS_TRAILER.write(place) if place else b""
        return self._build("witness", {"user": user}, arguments, trailer)

    def health_check(
        self,
        user: Pubkey,
        listed: bytes,
        node: bytes,
        position: int,
        index: int,
        committee: Committee = Committee.TRAINER,
    ) -> Instruction:
        """Drop the client ``listed``: the witnesses of the previous round heard nothing from it.

        Args:
            user: signs.
            listed: the client's signer.
            node: its node key.
            position: its committee position in the previous round.
            index: its index in the previous round.
            committee: its committee there.
        """
        identity = {"signer": listed, "p2p_identity": node}
        arguments = {"id": identity, "committee": _COMMITTEES[committee], "position": position, "index": index}
        return self._build("health_check", {"user": user}, arguments)

    def set_address(self, user: Pubkey, address: str) -> Instruction:
        """Set the address of the user's node; an empty one returns the rent."""
        where = node_address(self.program, self.run_id, user)
        return self._build("set_address", {"user": user, "address": where}, {"address": address})


_NO_FIGURES: dict[str, Any] = {
    "step": 0,
    "tokens_per_sec": 0.0,
    "bandwidth_per_sec": 0.0,
    "loss": 0.0,
    "evals": [],
    "prompt_results": [],
    "prompt_index": 0,
    "efficency": 0.0,
}


def _filter(data: bytes) -> dict[str, Any]:
    bloom = Bloom.from_bytes(data)
    mask = (1 << 64) - 1
    return {"keys": list(bloom.keys), "bits": [bloom.bits >> 64 * i & mask for i in range(bloom.words)]}


def _report(
    proof: WitnessProof,
    merkle: bytes,
    participants: bytes = bytes(BLOOM_SIZE),
    broadcasts: bytes = bytes(BLOOM_SIZE),
) -> dict[str, Any]:
    return {
        "proof": {"position": proof.position, "index": proof.index, "witness": proof.witness},
        "participant_bloom": _filter(participants),
        "broadcast_bloom": _filter(broadcasts),
        "broadcast_merkle": merkle,
    }


# Reading.

_SPECS = {spec.discriminator: spec for spec in COORDINATOR.instructions.values()}


def decode(data: bytes) -> tuple[str, dict[str, Any]]:
    """An instruction's name and arguments, with the witness' trailer if given.

    Raises:
        Refused: unknown discriminator, or the arguments are not in canonical form.
    """
    spec = _SPECS.get(data[:8])
    if spec is None:
        raise Refused("InstructionFallbackNotFound")
    trailer = {"witness": WITNESS_TRAILER, "warmup_witness": WARMUP_TRAILER}.get(spec.name)
    reader = Reader(data[8:])
    try:
        arguments: dict[str, Any] = spec.arguments.read(reader)
        if reader.left and trailer is not None:
            arguments.update(trailer.read(reader))
        reader.end()
    except WireError as error:
        raise Refused("InstructionDidNotDeserialize") from error
    return spec.name, arguments


# The authorizer.


def authorization_create(
    authorizer: Pubkey, payer: Pubkey, grantor: Pubkey, grantee: Pubkey, scope: bytes
) -> Instruction:
    """Create an inactive authorization; a grantee of zeros means everybody."""
    accounts = {
        "payer": payer,
        "grantor": grantor,
        "authorization": authorization_address(authorizer, grantor, grantee, scope),
        "system_program": SYSTEM_PROGRAM,
    }
    spec = AUTHORIZER.instructions["authorization_create"]
    return build(spec, authorizer, accounts, {"grantee": bytes(grantee), "scope": list(scope)})


def authorization_grantor_update(
    authorizer: Pubkey, grantor: Pubkey, authorization: Pubkey, active: bool
) -> Instruction:
    """Grant, or revoke."""
    spec = AUTHORIZER.instructions["authorization_grantor_update"]
    accounts = {"grantor": grantor, "authorization": authorization}
    return build(spec, authorizer, accounts, {"active": active})


def authorization_grantee_update(
    authorizer: Pubkey,
    payer: Pubkey,
    grantee: Pubkey,
    authorization: Pubkey,
    delegates: Sequence[Pubkey],
    clear: bool = False,
) -> Instruction:
    """Let delegates use the grantee's authorization; ``clear`` replaces the earlier ones."""
    spec = AUTHORIZER.instructions["authorization_grantee_update"]
    accounts = {
        "payer": payer,
        "grantee": grantee,
        "authorization": authorization,
        "system_program": SYSTEM_PROGRAM,
    }
    arguments = {"delegates_clear": clear, "delegates_added": [bytes(key) for key in delegates]}
    return build(spec, authorizer, accounts, arguments)


def authorization_close(authorizer: Pubkey, grantor: Pubkey, spill: Pubkey, authorization: Pubkey) -> Instruction:
    """Close an inactive authorization; ``spill`` gets the rent."""
    spec = AUTHORIZER.instructions["authorization_close"]
    accounts = {"grantor": grantor, "spill": spill, "authorization": authorization, "system_program": SYSTEM_PROGRAM}
    return build(spec, authorizer, accounts)
