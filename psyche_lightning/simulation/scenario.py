"""What may happen in a simulated history, and its result."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from psyche_lightning.errors import PsycheError
from psyche_lightning.protocol.committee import quorum


class SimulationError(PsycheError):
    """A history broke a promise; the text names the seed and the command that replays it."""


@dataclass(frozen=True)
class Scenario:
    """What may happen in one history; everything else follows from the seed.

    Attributes:
        seed: the seed of all randomness.
        nodes: number of nodes.
        overlap: whether results travel while the next round trains.
        steps: training rounds of the run.
        loss: probability that a message or a request is lost.
        delay: longest one-way delay in seconds; shorter ones are drawn uniformly, which reorders.
        duplicate: probability that a message arrives twice.
        kills: node kills, each followed by a restart.
        coordinator_kills: coordinator kills, each followed by a restart.
        pauses: times that the run is paused, and resumed a while after it halted.
        cuts: pairs of nodes that cannot reach each other for a while.
        cheats: nodes that break the rules on purpose; the others make a quorum of every epoch.
        calm: virtual time after which nothing of the above fails any more.
        payload_loss: probability that a payload is not delivered when it is fetched, during the whole run.
        flips: times that the parameters of a node change by themselves.
        replacements: nodes that are killed for good, each followed by a new one; never all holders of a round.
        keep_bytes: agreed payloads that nodes keep until they take a new snapshot.
        power_cuts: times that all nodes lose power together; their disks stay.
        stops: times that all nodes leave politely, and come back.
        outages: times that the coordinator is out of reach, while its clock goes on.
        one_way: of the cuts, those that hold in one direction.
        full_disks: times that a write of a node fails; the node ends, and comes back when there is room.
        leaps: times that a node's clock leaps ahead, as after a machine slept.
        journals: nodes that come back without what they promised; they count as nodes that break the rules.
        blobs: nodes that come back with their journal, and without their blobs.
        copies: times that the coordinator is restored from an older copy of the same epoch.
        schedule: whether the learning rate is that of a schedule in the manifest.
        speeds: whether nodes differ in speed, shares follow what they say of it, and cheats boast.
        changes: times that k and the number of local steps change during the run (``distro.schedule``).
    """

    seed: int
    nodes: int
    overlap: bool
    steps: int
    loss: float
    delay: float
    duplicate: float
    kills: int
    coordinator_kills: int
    pauses: int
    cuts: int
    cheats: int
    calm: float
    payload_loss: float = 0.0
    flips: int = 0
    replacements: int = 0
    keep_bytes: int = 1 << 30
    power_cuts: int = 0
    stops: int = 0
    outages: int = 0
    one_way: int = 0
    full_disks: int = 0
    leaps: int = 0
    journals: int = 0
    blobs: int = 0
    schedule: bool = False
    copies: int = 0
    speeds: bool = False
    changes: int = 0

    @property
    def unreliable(self) -> int:
        """Nodes to which no promise is given."""
        return self.cheats + self.journals

    @property
    def ejects(self) -> bool:
        """Whether the others can form an epoch when all unreliable nodes are ejected."""
        return self.nodes - self.unreliable >= self.init_min_clients

    @property
    def init_min_clients(self) -> int:
        """Members that form an epoch, such that those who keep the rules are a quorum of them."""
        least = max(2, self.nodes - 2)
        return next(n for n in range(least, self.nodes + 1) if all(self._safe(m) for m in range(n, self.nodes + 1)))

    @property
    def spare(self) -> int:
        """Nodes that may be lost for good while some reliable node of every quorum stays, and holds what it decided."""
        return max(0, quorum(self.init_min_clients) - self.unreliable - 1)

    def _safe(self, members: int) -> bool:
        return members - self.unreliable >= quorum(members)

    @classmethod
    def draw(cls, seed: int) -> Scenario:
        """The scenario of a seed."""
        rng = random.Random(f"scenario {seed}")
        nodes = rng.choice([4, 5, 6, 7, 8]) if rng.random() < 0.95 else rng.choice([12, 16, 32])
        drawn = cls(
            seed=seed,
            nodes=nodes,
            overlap=rng.random() < 0.5,
            steps=rng.randint(6, 16) if nodes <= 8 else 6,
            loss=rng.choice([0.0, 0.02, 0.1, 0.25]),
            delay=rng.choice([0.01, 0.1, 0.5, 1.5]),
            duplicate=rng.choice([0.0, 0.05, 0.3]),
            kills=rng.choice([0, 1, 2, 4]),
            coordinator_kills=rng.choice([0, 0, 1, 2]),
            pauses=rng.choice([0, 0, 0, 1]),
            cuts=rng.choice([0, 0, 1, 3]),
            cheats=rng.randint(0, nodes - quorum(nodes)) if rng.random() < 0.4 else 0,
            calm=150.0,
            payload_loss=rng.choice([0.0, 0.0, 0.1]),
            flips=rng.choice([0, 0, 0, 1]),
            replacements=rng.choice([0, 0, 1, 2]),
            keep_bytes=rng.choice([1 << 30, 300]),
            power_cuts=rng.choice([0, 0, 0, 1, 2]),
            stops=rng.choice([0, 0, 0, 0, 1]),
            outages=rng.choice([0, 0, 0, 1]),
            one_way=rng.choice([0, 0, 0, 1, 2]),
            full_disks=rng.choice([0, 0, 1, 2]),
            leaps=rng.choice([0, 0, 1, 3]),
            blobs=rng.choice([0, 0, 0, 1]),
            schedule=rng.random() < 0.5,
        )
        if drawn.keep_bytes > 300 and rng.random() < 0.2:  # else nodes do not keep what an older state needs
            drawn = replace(drawn, copies=1)
        forgetful = replace(drawn, journals=1)
        # A node without its journal signs a second result when an older coordinator asks again: no promise covers both.
        room = not drawn.copies and nodes - forgetful.unreliable >= quorum(nodes) and forgetful.ejects
        drawn = forgetful if room and rng.random() < 0.3 else drawn
        speeds, changes = rng.random() < 0.3, rng.choice([0, 0, 1, 3])
        return replace(
            drawn, replacements=min(drawn.replacements, drawn.spare), speeds=speeds, changes=min(changes, drawn.steps)
        )


@dataclass(frozen=True)
class History:
    """What a history showed.

    Attributes:
        scenario: what was simulated.
        seconds: virtual seconds it took.
        rounds: rounds applied by somebody.
        digest: parameters that all surviving nodes ended with.
        epochs: epochs of the run.
        faults: kills, cuts, lost and duplicated messages.
        again: data ids that were trained in a later round than their own.
        untrained: data ids of the last rounds that nobody trained.
        snapshots: times that parameters were taken from others.
        repaired: nodes that found out that their parameters had changed.
    """

    scenario: Scenario
    seconds: float
    rounds: int
    digest: bytes
    epochs: int
    faults: int
    again: int = 0
    untrained: int = 0
    snapshots: int = 0
    repaired: int = 0
