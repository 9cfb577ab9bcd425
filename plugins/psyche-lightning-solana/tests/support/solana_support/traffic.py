"""Random instructions that keep a run going: valid ones chosen by what the run is at, and spoiled ones in between.

A run of traffic follows from its seed. What was sent is recorded, so that a failure can be shortened and replayed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

from psyche_lightning_solana.account import RunAccounts
from psyche_lightning_solana.instructions import RunKeys
from psyche_lightning_solana.interface import AUTHORIZER, CHECKPOINT_SCOPE, JOIN_SCOPE
from psyche_lightning_solana.layout import COORDINATOR_DISCRIMINATOR, COORDINATOR_SIZE, discriminator
from psyche_lightning_solana.types import CHECKPOINT, CONFIG, METADATA, MODEL, PROGRESS
from solders.instruction import AccountMeta, Instruction
from solders.pubkey import Pubkey

from psyche_lightning.coordinator.machine import deadline
from psyche_lightning.protocol.bloom import BLOOM_SIZE, participants_bloom
from psyche_lightning.protocol.committee import round_selection, starting_digest
from psyche_lightning.protocol.state import Phase, WitnessProof
from psyche_lightning.wire.canonical import ZERO_HASH, sha256
from solana_support.model import Account
from solana_support.native import NativeProgram
from solana_support.twins import Disagreement, Seen, Twins
from solana_support.values import any_value, sane_config, sane_model


@dataclass(frozen=True)
class Step:
    """So many seconds pass, then this is sent."""

    seconds: int
    instruction: Instruction


class World:
    """Accounts of all kinds on both chains, the same for every seed."""

    def __init__(self, wallets: int, *, remember: bool = True, native: NativeProgram | None = None) -> None:
        self.twins = twins = Twins(remember=remember, native=native)
        self.owner, self.stranger = twins.wallet(), twins.wallet()
        self.wallets = [twins.wallet() for _ in range(wallets)]
        self.keys = RunKeys(twins.program, "traffic", twins.blank())
        other = RunKeys(twins.program, "other", twins.blank())
        twins.send(other.init_coordinator(self.stranger, twins.authorizer, self.stranger, self.stranger, "test"))
        first = self.wallets[0]
        self.open = self._authorization(Pubkey.default())
        self.authorizations = [
            self.open,
            self._authorization(first),
            self._authorization(first, delegates=self.wallets[1:3]),
            self._authorization(Pubkey.default(), active=False),
            self._authorization(Pubkey.default(), scope=CHECKPOINT_SCOPE),
            self._authorization(Pubkey.default(), grantor=self.stranger),
            self._authorization(Pubkey.default(), owner=twins.program),
            self._authorization(Pubkey.default(), cut=20),
        ]
        self.keeper = self._authorization(first, scope=CHECKPOINT_SCOPE)
        odd = [
            COORDINATOR_DISCRIMINATOR + (2).to_bytes(8, "little") + bytes(COORDINATOR_SIZE - 16),
            COORDINATOR_DISCRIMINATOR + bytes(64),
            discriminator("RunManifest") + bytes(100),
            b"short",
        ]
        self.odd = [twins.vm.keypair().pubkey() for _ in odd]
        for address, data in zip(self.odd, odd, strict=True):
            twins.put(address, twins.program, data)
        self.places = [
            *(self.owner, self.stranger, *self.wallets[:4], *self.authorizations, self.keeper, *self.odd),
            *(other.instance, other.manifest, other.coordinator_account),
            *(self.keys.instance, self.keys.manifest, self.keys.coordinator_account),
        ]

    def _authorization(
        self,
        grantee: Pubkey,
        *,
        grantor: Pubkey | None = None,
        scope: bytes = JOIN_SCOPE,
        active: bool = True,
        delegates: Sequence[Pubkey] = (),
        owner: Pubkey | None = None,
        cut: int = 0,
    ) -> Pubkey:
        kind = AUTHORIZER.accounts["Authorization"]
        values = {
            "bump": 255,
            "grantor": bytes(grantor or self.owner),
            "grantee": bytes(grantee),
            "scope": list(scope),
            "active": active,
            "delegates": [bytes(key) for key in delegates],
            "grantor_update_unix_timestamp": 0,
        }
        data = discriminator(kind.name) + kind.write(values)
        address = self.twins.vm.keypair().pubkey()
        self.twins.put(address, owner or self.twins.authorizer, data[: len(data) - cut])
        return address

    def describe(self, instruction: Instruction) -> str:
        """An instruction on one line."""
        known = {
            self.keys.instance: "instance",
            self.keys.manifest: "manifest",
            self.owner: "owner",
            self.keys.coordinator_account: "run",
        }
        known |= {wallet: f"wallet{i}" for i, wallet in enumerate(self.wallets)}
        flags = ("", "s", "w", "sw")
        accounts = " ".join(
            f"{known.get(meta.pubkey, str(meta.pubkey)[:6])}:{flags[meta.is_signer + 2 * meta.is_writable]}"
            for meta in instruction.accounts
        )
        data = bytes(instruction.data)
        shown = data[8:].hex() if len(data) < 90 else f"{data[8:40].hex()}... {len(data)} bytes"
        return f"{self.twins.name(instruction)} [{accounts}] {shown}"

    @property
    def exists(self) -> bool:
        """Whether the run is made."""
        return bytes(self.keys.instance) in self.twins.chain

    def take(self, step: Step) -> None:
        """Let the time pass, send, and note what became of it."""
        twins, existed = self.twins, self.exists
        twins.vm.advance(step.seconds)
        before = twins.run(self.keys).state.epoch if existed else 0
        twins.send(step.instruction)
        if existed and not self.exists:
            twins.put(self.keys.coordinator_account, twins.program, bytes(COORDINATOR_SIZE))  # to be made anew
        elif self.exists:
            state = twins.run(self.keys).state
            twins.seen.phases[state.phase.name] += 1
            twins.seen.epochs += state.epoch == before + 1


@lru_cache(maxsize=64)
def _heard(seed: int, clients: tuple[bytes, ...], silence: float, variant: int) -> bytes:
    """The filter of a witness that heard from some of the clients; two witnesses need not agree."""
    random = Random(seed + variant)
    return participants_bloom(seed, [signer for signer in clients if random.random() >= silence])


class Traffic:
    """Chooses what is sent next.

    Args:
        seed: decides everything.
        world: the chains.
        patient: clients do not let time pass while they still have something to say; for large runs.
    """

    def __init__(self, seed: int, world: World, *, patient: bool = False) -> None:
        self.random = Random(seed)
        self.world = world
        self.patient = patient
        self.recent: deque[Instruction] = deque(maxlen=12)
        self.silence = self.random.choice([0.0, 0.05, 0.4])
        self.discord = self.random.choice([0.0, 0.1, 0.5])
        self.root = self.random.choice([ZERO_HASH, *[sha256(b"merkle")] * 4])
        self.spoil = 0.02 if patient else self.random.choice([0.05, 0.2])

    def next(self) -> Step:
        """What happens next."""
        instruction = self._valid()
        if self.recent and self.random.random() < 0.04:
            instruction = self.random.choice(self.recent)  # once more
        self.recent.append(instruction)
        if self.random.random() < self.spoil:
            instruction = self._spoiled(instruction)
        return Step(self._seconds(), instruction)

    def _seconds(self) -> int:
        state = self.world.twins.run(self.world.keys).state if self.world.exists else None
        # A warm-up needs the reports of two thirds of all.
        warming = state is not None and state.phase is Phase.WARMUP
        if self.patient and self.random.random() < (0.997 if warming else 0.97):
            return 0
        due = deadline(state) if state is not None else None
        if due is not None and self.random.random() < (0.5 if self.patient else 0.08):
            return max(0, min(int(due) - self.world.twins.vm.time, 10**6) + self.random.choice([-1, 0, 0, 1]))
        return self.random.choices([0, 1, 3, 40], [80, 12, 5, 1])[0]

    # Valid instructions: the run's state says which are likely to be accepted.

    def _valid(self) -> Instruction:
        world = self.world
        if not world.exists:
            authority = world.owner
            return world.keys.init_coordinator(world.owner, world.twins.authorizer, authority, authority, "v")
        run = world.twins.run(world.keys)
        phase = run.state.phase
        general: list[tuple[float, Callable[[RunAccounts], Instruction]]] = [
            (1, self._tick),
            (0.5, self._join),
            (0.2, self._withdraw),
            (0.02 if self.patient else 0.1, self._kick),
            (0.02 if self.patient else 0.1, self._restart),
            (0.1, self._rates),
            (0.1, self._address),
            (0.1, self._move_checkpoint),
            (0.05, lambda run: world.keys.update(world.owner, metadata=any_value(METADATA, self.random))),
            (0.05, self._set_manifest),
            (0.05, self._any),
            (0.02 if self.patient else 0.15, lambda run: world.keys.set_paused(world.owner, True)),
            (0.1, self._witness),
            (0.1, self._warm_up),
        ]
        if phase.halted:
            unfit = not run.state.config.epoch_time or not run.state.max_seq_len
            general += [
                (3 if unfit else 0.3, self._configure),
                (0 if unfit else 2, lambda run: world.keys.set_paused(world.owner, False)),
                (0.2, lambda run: world.keys.update_client_version(world.owner, "v" * self.random.randint(0, 96))),
                (
                    2 if phase is Phase.FINISHED else 0.02,
                    lambda run: world.keys.free_coordinator(world.owner, world.owner),
                ),
            ]
        special: dict[Phase, list[tuple[float, Callable[[RunAccounts], Instruction]]]] = {
            Phase.WAITING_FOR_MEMBERS: [(6, self._join), (0.3, self._warm_up)],
            Phase.WARMUP: [(6, self._warm_up), (0.1, self._health)],
            Phase.ROUND_TRAIN: [(6, self._witness), (0.7, self._health), (1, self._join)],
            Phase.ROUND_WITNESS: [(6, self._witness), (0.7, self._health)],
        }
        share = 0.25 if self.patient else 1
        weighted = [(share * weight, choose) for weight, choose in general] + special.get(phase, [])
        choose = self.random.choices([choose for _, choose in weighted], [weight for weight, _ in weighted])[0]
        return choose(run)

    def _someone(self) -> Pubkey:
        return self.random.choice(self.world.wallets)

    def _digest(self) -> bytes:
        return sha256(b"other") if self.random.random() < self.discord else sha256(b"parameters")

    def _tick(self, run: RunAccounts) -> Instruction:
        return self.world.keys.tick(self._someone())

    def _any(self, run: RunAccounts) -> Instruction:
        """Any arguments."""
        random, keys, owner = self.random, self.world.keys, self.world.owner
        what = random.choice(["config", "model", "progress", "checkpoint"])
        if what == "checkpoint":
            return keys.checkpoint(owner, any_value(CHECKPOINT, random))
        kind = {"config": CONFIG, "model": MODEL, "progress": PROGRESS}[what]
        return keys.update(owner, **{what: any_value(kind, random)})

    def _configure(self, run: RunAccounts) -> Instruction:
        random, keys = self.random, self.world.keys
        unfit = not run.state.config.epoch_time or not run.state.max_seq_len
        config = sane_config(random, len(self.world.wallets), patient=self.patient)
        progress = {
            "epoch": random.choice([0, 7, 65534, 65535]),
            "step": random.choice([1, 3, 2**32 - 4, 2**32 - 1]),
            "epoch_start_data_index": random.choice([0, 1000, 2**63 - 1, 2**63]),
        }
        return keys.update(
            self.world.owner,
            config=config if unfit or random.random() < 0.7 else None,
            model=sane_model(random) if unfit or random.random() < 0.3 else None,
            progress=progress if random.random() < 0.1 else None,
        )

    def _rates(self, run: RunAccounts) -> Instruction:
        rates = [self.random.choice([None, 0, 444_444, 2**64 - 1]) for _ in range(2)]
        return self.world.keys.set_future_epoch_rates(self.world.owner, *rates)

    def _set_manifest(self, run: RunAccounts) -> Instruction:
        digest = self.random.choice([ZERO_HASH, sha256(b"manifest")])
        return self.world.keys.set_manifest(self.world.owner, digest, "m" * self.random.choice([0, 20, 192]))

    def _address(self, run: RunAccounts) -> Instruction:
        return self.world.keys.set_address(self._someone(), "a" * self.random.choice([0, 9, 126]))

    def _move_checkpoint(self, run: RunAccounts) -> Instruction:
        place = any_value(CHECKPOINT, self.random)
        who = self.random.choice([self.world.owner, self.world.wallets[0], self._someone()])
        authorization = self.random.choice([None, self.world.keeper, self.world.keeper, self.world.open])
        return self.world.keys.checkpoint(who, place, authorization)

    def _join(self, run: RunAccounts) -> Instruction:
        active = {member.signer for member in run.members if member.active == run.next_active}
        free = [wallet for wallet in self.world.wallets if bytes(wallet) not in active]
        wallet = self.random.choice(free or self.world.wallets)
        node = sha256(bytes(wallet) + bytes([self.random.random() < 0.03]))
        authorization = self.world.open
        if self.random.random() < 0.05:
            authorization = self.random.choice(self.world.authorizations)
        return self.world.keys.join_run(wallet, node, authorization)

    def _withdraw(self, run: RunAccounts) -> Instruction:
        return self.world.keys.withdraw(self._someone())

    def _restart(self, run: RunAccounts) -> Instruction:
        step = self.random.choice([run.state.step, *[max(run.state.step - 1 - i, 0) for i in range(4)]])
        return self.world.keys.restart_from(self.world.owner, step, self.random.choice([ZERO_HASH, self._digest()]))

    def _kick(self, run: RunAccounts) -> Instruction:
        return self.world.keys.kick(self.world.owner, self._someone())

    def _client(self, run: RunAccounts, done: set[bytes]) -> int | None:
        """The index of a healthy client that has something left to say."""
        clients = enumerate(run.state.clients)
        left = [i for i, client in clients if client.signer not in done and not client.status]
        if not left or self.random.random() < self.silence / 4:
            return None
        return self.random.choice(left)

    def _warm_up(self, run: RunAccounts) -> Instruction:
        state = run.state
        done = {
            state.clients[w.proof.index].signer for w in state.warmup_witnesses if w.proof.index < len(state.clients)
        }
        index = self._client(run, done)
        if index is None:
            held = state.checkpoint.digest or ZERO_HASH
            return (
                self._tick(run)
                if state.phase is Phase.WARMUP
                else self.world.keys.warmup_witness(self._someone(), 0, self.random.choice([held, held, ZERO_HASH]))
            )
        decided = starting_digest(state)
        if not decided and not state.checkpoint.digest and self.random.random() < 0.9:
            index = 0  # in a fresh run it is first
        digest = decided if decided and self.random.random() < 0.9 else self._digest()
        epoch = self.random.choice([None, state.epoch, state.epoch])
        return self.world.keys.warmup_witness(Pubkey(state.clients[index].signer), index, digest, epoch)

    def _witness(self, run: RunAccounts) -> Instruction:
        state, round_ = run.state, run.state.current
        if round_ is None or not round_.clients:
            return self.world.keys.witness(self._someone(), WitnessProof(0, 0), ZERO_HASH)
        selection = round_selection(round_, state.config)
        done = {witness.proof.index for witness in round_.witnesses}
        again = self.random.random() < self.discord / 2  # who has reported may change its mind
        seats = [i for i in selection.witnesses() if again or i not in done]
        if not seats or self.random.random() < self.silence:
            return self._tick(run)
        index = self.random.choice(seats)
        random = self.random.randbytes(BLOOM_SIZE)
        heard = _heard(round_.seed, round_.clients, self.silence, self.random.randrange(2))
        filters = [heard, self.random.choice([bytes(BLOOM_SIZE), random])]
        at = self.random.choice([None, (state.epoch, round_.height), (state.epoch, round_.height)])
        step = self.random.choice([0, state.step])
        contained = max(state.step - self.random.choice([0, 1, 1, 1, 1, 2]), 0)
        held = contained, self.random.choice([ZERO_HASH, self._digest(), self._digest()])
        roots = [ZERO_HASH, sha256(b"other")] if self.random.random() < self.discord / 2 else [self.root]
        return self.world.keys.witness(
            Pubkey(round_.clients[index]),
            selection.witness_proof(index),
            self.random.choice(roots),
            *filters,
            metadata={"step": step, "loss": 2.5},
            at=at,
            held=held,
        )

    def _health(self, run: RunAccounts) -> Instruction:
        state, round_ = run.state, run.state.current
        before = None if round_ is None else state.round_at(round_.height - 1)
        if before is None or not before.clients:
            return self.world.keys.health_check(self._someone(), bytes(self._someone()), ZERO_HASH, 0, 0)
        index = self.random.randrange(len(before.clients))
        position = round_selection(before, state.config).committee_position(index)
        callers = [client.signer for client in state.healthy] or [bytes(self._someone())]
        return self.world.keys.health_check(
            Pubkey(self.random.choice(callers)), before.clients[index], ZERO_HASH, position, index
        )

    # Spoiled instructions.

    def _spoiled(self, instruction: Instruction) -> Instruction:
        data, metas = bytearray(instruction.data), list(instruction.accounts)
        begins = not self.world.exists  # with other authorities nothing more would come of the run
        for _ in range(self.random.choice([1, 1, 1, 2])):
            kind = self.random.randrange(7)
            if kind == 0 and data:
                del data[self.random.randrange(len(data)) :]
            elif kind == 1:
                data += self.random.randbytes(self.random.randint(1, 8))
            elif kind == 2 and data and not begins:
                data[self.random.randrange(len(data))] = self.random.choice([0, 1, 2, 255, self.random.getrandbits(8)])
            elif kind == 3 and metas:
                at = self.random.randrange(len(metas))
                metas[at] = self._other_account(metas[at], at)
            elif kind == 4 and metas:
                at = self.random.randrange(len(metas))
                flags = [metas[at].is_signer, metas[at].is_writable]
                flags[self.random.randrange(2)] ^= True
                metas[at] = AccountMeta(metas[at].pubkey, *flags)
            elif kind == 5:
                del metas[self.random.randrange(len(metas) + 1) :]
            elif metas:
                metas.append(self.random.choice(metas))
        return Instruction(instruction.program_id, bytes(data), metas)

    def _other_account(self, meta: AccountMeta, at: int) -> AccountMeta:
        """Another account in its place; who pays stays a wallet, as the runtime has its own words about others."""
        places = self.world.wallets if at == 0 else self.world.places
        chosen = self.random.choice(places)
        account: Account | None = self.world.twins.chain.get(bytes(chosen))
        writable = meta.is_writable and not (account is not None and account.executable)
        return AccountMeta(chosen, meta.is_signer, writable)


@dataclass(frozen=True)
class Trial:
    """One run of traffic.

    Attributes:
        seed: decides everything.
        steps: how many instructions.
        wallets: how many clients there may be.
        patient: see :class:`Traffic`.
        remember: see :class:`~solana_support.model.ModelProgram`.
    """

    seed: int
    steps: int = 400
    wallets: int = 6
    patient: bool = False
    remember: bool = True

    def run(self, native: NativeProgram | None = None) -> Seen:
        """Send the traffic.

        Raises:
            Disagreement: with the shortest sequence that was found to show it.
        """
        world = World(self.wallets, remember=self.remember, native=native)
        traffic = Traffic(self.seed, world, patient=self.patient)
        steps: list[Step] = []
        try:
            for _ in range(self.steps):
                steps.append(traffic.next())
                world.take(steps[-1])
        except Disagreement as found:
            short = self.shorten(steps, native)
            listed = "\n".join(f"+{step.seconds}s {world.describe(step.instruction)}" for step in short)
            raise Disagreement(f"{self}, after {len(steps)} instructions:\n{found}\nshortest:\n{listed}") from found
        return world.twins.seen

    def shorten(self, steps: list[Step], native: NativeProgram | None = None, budget: int = 60) -> list[Step]:
        """Leave out what the disagreement does not need, as far as ``budget`` trials show."""
        size = len(steps) // 2
        while size and budget:
            at = 0
            while at + size < len(steps) and budget:
                budget -= 1
                passed = sum(step.seconds for step in steps[at : at + size])
                rest = [*steps[:at], *steps[at + size :]]
                rest[at] = replace(rest[at], seconds=rest[at].seconds + passed)
                if self.fails(rest, native):
                    steps = rest
                else:
                    at += size
            size //= 2
        return steps

    def fails(self, steps: Sequence[Step], native: NativeProgram | None = None) -> bool:
        """Whether these steps show a disagreement."""
        world = World(self.wallets, remember=self.remember, native=native)
        try:
            for step in steps:
                world.take(step)
        except Disagreement:
            return True
        return False
