"""Who controls a run: a wallet, or the treasurer program, which forwards its owner's commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from solders.instruction import Instruction
from solders.pubkey import Pubkey
from solders.system_program import ID as SYSTEM_PROGRAM

from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning_solana.addresses import participant_address, treasurer_index, treasurer_run_address
from psyche_lightning_solana.client.rpc import RpcProblem, unreachable
from psyche_lightning_solana.client.run import SolanaRun
from psyche_lightning_solana.instructions import RunKeys, build
from psyche_lightning_solana.interface import TREASURER
from psyche_lightning_solana.layout import discriminator

TOKEN_PROGRAM = Pubkey.from_string("TokenkegQfeZyiNwAJbNbGKPFXCWuBvf9Ss623VQ5DA")
ASSOCIATED_TOKEN_PROGRAM = Pubkey.from_string("ATokenGPvbdGVxr1b2hvZbsiqW5xWH25efTNsLJA8knL")
MINT_SIZE = 82
"""Bytes of a token's own account."""
AMOUNT_AT = 64
"""Offset of the amount (u64) in a token account."""


class Owner(Protocol):
    """Builds the main authority's instructions."""

    def update(self, **changes: Any) -> Instruction:
        """Metadata, config, model, progress."""

    def version(self, client_version: str) -> Instruction:
        """The version that nodes need."""

    def rates(self, earning: int | None, slashing: int | None) -> Instruction:
        """Points of future epochs."""

    def paused(self, paused: bool) -> Instruction:
        """Pause or resume."""

    def manifest(self, digest: bytes, address: str) -> Instruction:
        """The manifest's digest and place."""

    def checkpoint(self, checkpoint: dict[str, Any]) -> Instruction:
        """The checkpoint's place."""

    def restart(self, step: int, digest: bytes) -> Instruction:
        """Other parameters than the newest."""
        ...

    def free(self) -> Instruction:
        """Close the run.

        Raises:
            CoordinatorError: the program cannot.
        """


@dataclass(frozen=True)
class Direct:
    """A wallet is the main authority.

    Attributes:
        keys: the run's addresses.
        me: the wallet.
    """

    keys: RunKeys
    me: Pubkey

    def update(self, **changes: Any) -> Instruction:
        """Metadata, config, model, progress."""
        return self.keys.update(self.me, **changes)

    def version(self, client_version: str) -> Instruction:
        """The version that nodes need."""
        return self.keys.update_client_version(self.me, client_version)

    def rates(self, earning: int | None, slashing: int | None) -> Instruction:
        """Points of future epochs."""
        return self.keys.set_future_epoch_rates(self.me, earning, slashing)

    def paused(self, paused: bool) -> Instruction:
        """Pause or resume."""
        return self.keys.set_paused(self.me, paused)

    def manifest(self, digest: bytes, address: str) -> Instruction:
        """The manifest's digest and place."""
        return self.keys.set_manifest(self.me, digest, address)

    def checkpoint(self, checkpoint: dict[str, Any]) -> Instruction:
        """The checkpoint's place."""
        return self.keys.checkpoint(self.me, checkpoint)

    def restart(self, step: int, digest: bytes) -> Instruction:
        """Other parameters than the newest."""
        return self.keys.restart_from(self.me, step, digest)

    def free(self) -> Instruction:
        """Close the run."""
        return self.keys.free_coordinator(self.me, self.me)


class Treasury:
    """The treasurer's run is the main authority; a wallet controls it.

    Args:
        run: access to the run.
        keys: its addresses.
        values: the treasurer's account of it.

    Attributes:
        authority: sends the commands that it forwards.
        mint: the token it pays.
        place: the treasurer's account of the run, which is the run's main authority.
    """

    def __init__(self, run: SolanaRun, keys: RunKeys, values: dict[str, Any]) -> None:
        self.authority = Pubkey(values["main_authority"])
        self.mint = Pubkey(values["collateral_mint"])
        self._run = run
        self._keys = keys
        self._program = run.cluster.program("treasurer")
        self.place = treasurer_run_address(self._program, treasurer_index(run.run_id))

    @classmethod
    async def of(cls, run: SolanaRun) -> Treasury | None:
        """The run's treasury; None if it has none.

        Raises:
            CoordinatorError: no service answers.
        """
        try:
            program = run.cluster.program("treasurer")
        except ConfigError:
            return None  # no program is given, so this run has none
        place = treasurer_run_address(program, treasurer_index(run.run_id))
        try:
            found = await run.reader.account(place)
        except RpcProblem as problem:
            raise unreachable(problem, "the run's treasurer", run.cluster.name) from problem
        kind = TREASURER.accounts["Run"]
        if found is None or found.owner != program or found.data[:8] != discriminator(kind.name):
            return None
        return cls(run, await run.keys(), kind.decode(found.data[8:]))

    @staticmethod
    def create(run: SolanaRun, keys: RunKeys, authorizer: Pubkey, mint: Pubkey, client_version: str) -> Instruction:
        """The instruction that creates a run with a treasury; ``run``'s wallet owns it."""
        program, index, me = run.cluster.program("treasurer"), treasurer_index(run.run_id), run.wallet.public
        place = treasurer_run_address(program, index)
        accounts = {
            "payer": me,
            "run": place,
            "run_collateral": token_account(place, mint),
            "collateral_mint": mint,
            "coordinator_instance": keys.instance,
            "coordinator_account": keys.coordinator_account,
            "coordinator_program": keys.program,
            "associated_token_program": ASSOCIATED_TOKEN_PROGRAM,
            "token_program": TOKEN_PROGRAM,
            "system_program": SYSTEM_PROGRAM,
            "authorizer": authorizer,
            "coordinator_manifest": keys.manifest,
        }
        arguments = {
            "index": index,
            "run_id": run.run_id,
            "client_version": client_version,
            "main_authority": bytes(me),
            "join_authority": bytes(me),
        }
        return build(TREASURER.instructions["run_create"], program, accounts, arguments)

    # The run owner's commands.

    def _command(self, name: str, arguments: dict[str, Any]) -> Instruction:
        accounts = {
            "authority": self._run.wallet.public,
            "run": self.place,
            "coordinator_instance": self._keys.instance,
            "coordinator_account": self._keys.coordinator_account,
            "coordinator_program": self._keys.program,
            "coordinator_manifest": self._keys.manifest,
        }
        return build(TREASURER.instructions[name], self._program, accounts, arguments)

    def update(self, **changes: Any) -> Instruction:
        """Metadata, config, model, progress."""
        return self._command("run_update", changes)

    def version(self, client_version: str) -> Instruction:
        """The version that nodes need."""
        return self._command("run_update", {"client_version": client_version})

    def rates(self, earning: int | None, slashing: int | None) -> Instruction:
        """Points of future epochs."""
        values = {"epoch_earning_rate_total_shared": earning, "epoch_slashing_rate_per_client": slashing}
        return self._command("run_update", values)

    def paused(self, paused: bool) -> Instruction:
        """Pause or resume."""
        return self._command("run_update", {"paused": paused})

    def manifest(self, digest: bytes, address: str) -> Instruction:
        """The manifest's digest and place."""
        return self._command("run_set_manifest", {"digest": digest, "address": address})

    def checkpoint(self, checkpoint: dict[str, Any]) -> Instruction:
        """The checkpoint's place."""
        return self._command("run_checkpoint", {"repo": checkpoint})

    def restart(self, step: int, digest: bytes) -> Instruction:
        """Other parameters than the newest."""
        return self._command("run_restart_from", {"step": step, "digest": digest})

    def free(self) -> Instruction:
        """Always refused: points may still be claimed."""
        raise CoordinatorError(
            f"run {self._run.run_id!r} has a treasurer and stays, because its nodes may still claim their points",
            code="HasTreasurer",
        )

    # Node commands.

    async def claimed(self, wallets: Sequence[Pubkey]) -> dict[Pubkey, int]:
        """Points claimed by each wallet; omits wallets without claims."""
        places = [participant_address(self._program, self.place, wallet) for wallet in wallets]
        try:
            found = await self._run.reader.many(places)
        except RpcProblem as problem:
            raise unreachable(problem, "what was claimed", self._run.cluster.name) from problem
        kind = TREASURER.accounts["Participant"]
        return {
            wallet: int(kind.decode(account.data[8:])["claimed_earned_points"])
            for wallet, account in zip(wallets, found, strict=True)
            if account is not None
        }

    async def vault(self) -> int:
        """Tokens that the treasury holds."""
        return await self.held(self.place)

    def fund(self, giver: Pubkey, amount: int) -> Instruction:
        """The instruction that gives the treasury tokens of a wallet."""
        from spl.token.instructions import TransferParams, transfer

        source, vault = token_account(giver, self.mint), token_account(self.place, self.mint)
        return transfer(TransferParams(TOKEN_PROGRAM, source, vault, giver, amount))

    async def held(self, owner: Pubkey) -> int:
        """Base units of the token that an owner holds."""
        try:
            found = await self._run.reader.account(token_account(owner, self.mint))
        except RpcProblem as problem:
            raise unreachable(problem, "a token account", self._run.cluster.name) from problem
        return 0 if found is None else int.from_bytes(found.data[AMOUNT_AT : AMOUNT_AT + 8], "little")

    async def claim(self, me: Pubkey, points: int) -> tuple[str, list[Instruction]]:
        """The instructions that pay a wallet; they create its token account and participant if missing."""
        participant = participant_address(self._program, self.place, me)
        mine = token_account(me, self.mint)
        try:
            _, (held, tokens) = await self._run.reader.accounts([participant, mine])
        except RpcProblem as problem:
            raise unreachable(problem, "what was claimed", self._run.cluster.name) from problem
        parts, names = [], []
        if tokens is None:
            parts.append(make_token_account(me, me, self.mint))
            names.append("create_token_account")
        if held is None:
            accounts = {"payer": me, "user": me, "run": self.place, "participant": participant}
            accounts["system_program"] = SYSTEM_PROGRAM
            parts.append(build(TREASURER.instructions["participant_create"], self._program, accounts))
            names.append("participant_create")
        accounts = {
            "user": me,
            "user_collateral": mine,
            "run": self.place,
            "run_collateral": token_account(self.place, self.mint),
            "participant": participant,
            "coordinator_account": self._keys.coordinator_account,
            "token_program": TOKEN_PROGRAM,
        }
        spec = TREASURER.instructions["participant_claim"]
        parts.append(build(spec, self._program, accounts, {"claim_earned_points": points}))
        return "+".join([*names, "participant_claim"]), parts


async def find_owner(run: SolanaRun) -> Owner | None:
    """The wallet's control of the run; None if it has none.

    Raises:
        CoordinatorError: the run does not exist, or no service answers.
    """
    keys, instance, me = await run.keys(), await run.instance(), run.wallet.public
    assert instance is not None
    if instance.main_authority == me:
        return Direct(run.anchored(keys), me)
    treasury = await Treasury.of(run)
    if treasury is not None and treasury.authority == me and treasury.place == instance.main_authority:
        return treasury
    return None


def token_account(owner: Pubkey, mint: Pubkey) -> Pubkey:
    """The conventional account for an owner's tokens."""
    seeds = [bytes(owner), bytes(TOKEN_PROGRAM), bytes(mint)]
    return Pubkey.find_program_address(seeds, ASSOCIATED_TOKEN_PROGRAM)[0]


def make_token_account(payer: Pubkey, owner: Pubkey, mint: Pubkey) -> Instruction:
    """Create it; keeps an existing one."""
    from spl.token.instructions import create_idempotent_associated_token_account

    return create_idempotent_associated_token_account(payer, owner, mint)
