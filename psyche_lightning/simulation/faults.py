"""The faults of a simulated history and their times, all drawn from the scenario's seed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any, Protocol

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.requests import Withdraw
from psyche_lightning.protocol.state import Phase, RunState
from psyche_lightning.simulation.node import SimNode
from psyche_lightning.simulation.scenario import Scenario
from psyche_lightning.wire.canonical import sha256


class World(Protocol):
    """What faults act on: a history under way.

    Attributes:
        scenario: what may happen.
        rng: the history's randomness.
        now: virtual seconds.
        nodes: all that there ever were.
        host: the coordinator; None while it is down.
        disk: what a coordinator that is down had stored.
        clock: how far the coordinator's clock is ahead of virtual time.
    """

    scenario: Scenario
    rng: random.Random
    now: float
    nodes: list[SimNode]
    host: RunHost | None
    disk: dict[str, Any]
    clock: float

    @property
    def host_time(self) -> float:
        """What the coordinator's clock says."""
        ...

    def at(self, delay: float, action: Callable[[], None]) -> None:
        """Does something after ``delay`` virtual seconds."""

    def trace(self, text: str, node: SimNode | None = None) -> None:
        """Notes a fault, perhaps of a node, for the reader of the history."""

    def begin_record(self, text: str) -> None:
        """Has the coordinator, which begins or is back, write its events."""

    def state(self) -> RunState:
        """The run's state, which outlives the coordinator."""
        ...

    def changed(self) -> None:
        """Announces a change of the coordinator's state."""

    def go_back(self) -> None:
        """Notes that the coordinator's disk has an older state now."""

    def start(self, node: SimNode) -> None:
        """Starts a node that is not running, unless it is gone for good."""

    def add_node(self) -> SimNode:
        """A new node, which is not running yet."""
        ...


class Faults:
    """Kills nodes and the coordinator, cuts links, flips bits, fills disks, moves clocks, pauses the run.

    Args:
        simulation: the history.

    Attributes:
        count: faults so far, lost messages and payloads included.
    """

    def __init__(self, simulation: World) -> None:
        self.count = 0
        self._simulation = simulation
        self._rng = simulation.rng
        self._cut: set[tuple[int, int]] = set()
        self._outage = 0
        self._pausing = False

    def plan(self) -> None:
        """Schedules all faults of the scenario."""
        simulation, rng, scenario = self._simulation, self._rng, self._simulation.scenario
        at, nodes, calm = simulation.at, simulation.nodes, scenario.calm
        for _ in range(scenario.kills):
            node = rng.choice(nodes)
            at(rng.uniform(5, calm), lambda node=node: self._kill(node))  # type: ignore[misc]
        for number in range(scenario.replacements):
            at(rng.uniform(20, calm), lambda node=nodes[-1 - number]: self._replace(node))  # type: ignore[misc]
        for _ in range(scenario.flips):
            node = rng.choice(nodes)
            at(rng.uniform(10, calm), lambda node=node: self._flip(node))  # type: ignore[misc]
        for _ in range(scenario.coordinator_kills):
            at(rng.uniform(5, calm), self._kill_coordinator)
        for _ in range(scenario.pauses):
            at(rng.uniform(3, 60), self._pause)
        for number in range(scenario.cuts + scenario.one_way):
            a, b = rng.sample(range(scenario.nodes), 2)
            ways = {(a, b)} if number < scenario.one_way else {(a, b), (b, a)}
            start = rng.uniform(5, calm)
            at(start, lambda ways=ways: self._cut.update(ways))  # type: ignore[misc]
            at(start + rng.uniform(5, 60), lambda ways=ways: self._cut.difference_update(ways))  # type: ignore[misc]
            self.count += 1
        for _ in range(scenario.power_cuts):
            at(rng.uniform(10, calm), self._cut_power)
        for _ in range(scenario.stops):
            at(rng.uniform(10, calm), self._stop_all)
        for _ in range(scenario.outages):
            start = rng.uniform(10, calm)
            at(start, lambda: self._reach(1))
            at(start + rng.uniform(5, 60), lambda: self._reach(-1))
        for _ in range(scenario.full_disks):
            node = rng.choice(nodes)
            at(rng.uniform(5, calm), lambda node=node: self._fill(node))  # type: ignore[misc]
        for _ in range(scenario.leaps):
            node = rng.choice(nodes)
            at(rng.uniform(5, calm), lambda node=node: self._leap(node))  # type: ignore[misc]
        for _ in range(scenario.copies):
            at(rng.uniform(15, calm), self._copy)
        honest = [node for node in nodes if not node.role]
        for _ in range(scenario.journals):
            at(rng.uniform(10, calm), lambda node=honest[0]: self._lose_journal(node))  # type: ignore[misc]
        for number in range(scenario.blobs):
            at(rng.uniform(10, calm), lambda node=honest[1 + number]: self._lose_blobs(node))  # type: ignore[misc]

    # --- the network ------------------------------------------------------------------------------------------------

    def lost(self) -> bool:
        """Whether a message or a request is lost."""
        scenario = self._simulation.scenario
        lost = self._simulation.now < scenario.calm and self._rng.random() < scenario.loss
        self.count += lost
        return lost

    def payload_lost(self) -> bool:
        """Whether a payload is not delivered; payloads get lost until the end of the run."""
        lost = self._rng.random() < self._simulation.scenario.payload_loss
        self.count += lost
        return lost

    def severed(self, a: SimNode, b: SimNode) -> bool:
        """Whether nothing that ``a`` sends reaches ``b``."""
        return (a.index, b.index) in self._cut

    @property
    def outage(self) -> bool:
        """Whether no node reaches the coordinator."""
        return self._outage > 0

    def _reach(self, change: int) -> None:
        self._outage += change
        self.count += change > 0
        self._simulation.trace("the coordinator is out of reach" if change > 0 else "the coordinator is back")

    # --- nodes ------------------------------------------------------------------------------------------------------

    def end(self, node: SimNode) -> None:
        """Kill a node."""
        self.count += 1
        self._simulation.trace(f"{node.name} is killed", node)
        node.end()

    def _kill(self, node: SimNode) -> None:
        if node.core is None or node.done:
            return
        self.end(node)
        if self._rng.random() < 0.6:
            grace = self._rng.uniform(1, 6)
            self._simulation.at(grace, lambda life=node.life: self._vanished(node, life))  # type: ignore[misc]
        self._simulation.at(self._rng.uniform(0.5, 40), lambda: self._simulation.start(node))

    def _cut_power(self) -> None:
        """All nodes end at the same moment, and come back one after the other."""
        self._simulation.trace("power cut")
        for node in self._simulation.nodes:
            if node.core is not None and not node.done:
                self.end(node)
                self._simulation.at(5.0, lambda node=node, life=node.life: self._vanished(node, life))  # type: ignore[misc]
                self._simulation.at(self._rng.uniform(1, 30), lambda node=node: self._simulation.start(node))  # type: ignore[misc]

    def _stop_all(self) -> None:
        """All nodes say goodbye, and come back one after the other."""
        simulation = self._simulation
        if simulation.host is None:
            simulation.at(1.0, self._stop_all)
            return
        simulation.trace("all nodes leave")
        for node in simulation.nodes:
            if node.core is not None and not node.done:
                self._leave(node)
                simulation.at(self._rng.uniform(1, 30), lambda node=node: simulation.start(node))  # type: ignore[misc]

    def _replace(self, node: SimNode) -> None:
        """Removes a node for good, with its disk; another node takes its place."""
        if node.gone or node.done:
            return
        self.end(node)
        node.gone = True
        node.forget(promises=True, blobs=True)
        grace = self._rng.uniform(1, 6)
        self._simulation.at(grace, lambda life=node.life: self._vanished(node, life))  # type: ignore[misc]
        fresh = self._simulation.add_node()
        self._simulation.at(self._rng.uniform(1, 30), lambda: self._simulation.start(fresh))

    def _flip(self, node: SimNode) -> None:
        """Changes the parameters of a node, but not after the last step, when nobody reads them again."""
        more = self._simulation.state().step <= self._simulation.scenario.steps
        if more and node.core is not None and not node.done:
            self.count += 1
            self._simulation.trace(f"the parameters of {node.name} change by themselves", node)
            node.head, node.flipped = sha256(node.head, b"flipped"), True

    def _fill(self, node: SimNode) -> None:
        """One of the node's next writes fails."""
        if node.core is not None and not node.done:
            node.room, node.torn = self._rng.randrange(8), self._rng.random() < 0.5

    def disk_failed(self, node: SimNode) -> None:
        """A write of a node failed: it withdraws and ends, and comes back when there is room."""
        self._simulation.trace(f"the disk of {node.name} is full", node)
        self._leave(node)
        self._simulation.at(self._rng.uniform(1, 40), lambda: self._simulation.start(node))

    def _leave(self, node: SimNode) -> None:
        simulation = self._simulation
        if simulation.host is not None and not self.outage:
            with contextlib.suppress(CoordinatorError):
                simulation.host.handle(node.identity.public, Withdraw(), simulation.host_time)
        else:
            simulation.at(5.0, lambda life=node.life + 1: self._vanished(node, life))  # type: ignore[misc]
        self.end(node)
        if simulation.host is not None:
            simulation.changed()

    def _leap(self, node: SimNode) -> None:
        self.count += 1
        leap = self._rng.choice([1.0, 30.0, 3600.0])
        self._simulation.trace(f"the clock of {node.name} leaps {leap:.0f} s ahead", node)
        node.clock += leap

    def _lose_journal(self, node: SimNode) -> None:
        """A node comes back without its journal, or with an older one: it may sign a second result."""
        if node.gone or node.done:
            return
        self.end(node)
        node.role = "forgetful"
        older = self._rng.random() < 0.5
        self._simulation.trace(f"{node.name} loses {'the newest promises' if older else 'its journal'}", node)
        if older:
            newest = sorted(node.promises)[len(node.promises) // 2 :]
            node.promises = {key: kept for key, kept in node.promises.items() if key not in newest}
            node.remembered = {}
        else:
            node.forget(promises=True)
        self._simulation.at(self._rng.uniform(0.5, 10), lambda: self._simulation.start(node))

    def _lose_blobs(self, node: SimNode) -> None:
        """A node comes back with its journal alone."""
        if node.core is None or node.gone or node.done:
            return
        self.end(node)
        self._simulation.trace(f"{node.name} loses its blobs", node)
        node.forget(blobs=True)
        self._simulation.at(self._rng.uniform(0.5, 10), lambda: self._simulation.start(node))

    def _vanished(self, node: SimNode, life: int) -> None:
        host = self._simulation.host
        if host is not None and node.core is None and node.life == life:
            host.disconnected(node.identity.public, self._simulation.host_time, "no connection")
            self._simulation.changed()

    # --- the coordinator --------------------------------------------------------------------------------------------

    def _kill_coordinator(self) -> None:
        simulation = self._simulation
        if simulation.host is None:
            return
        self.count += 1
        simulation.trace("the coordinator is killed")
        # It had stored every change before it announced it.
        simulation.disk, simulation.host = simulation.host.dump(), None
        simulation.at(self._rng.uniform(0.5, 15), self._restart_coordinator)

    def _copy(self) -> None:
        host = self._simulation.host
        if host is None or not host.state.phase.active:
            self._simulation.at(5.0, self._copy)
        else:
            copy = host.dump()
            self._simulation.at(self._rng.uniform(2, 30), lambda: self._restore(copy))

    def _restore(self, copy: dict[str, Any]) -> None:
        """The coordinator loses its disk, and comes back with a copy that is not new."""
        simulation = self._simulation
        old, host = RunHost.load(copy), simulation.host
        if host is None or not host.state.phase.active or host.state.epoch != old.state.epoch:
            return
        self.count += 1
        simulation.trace(f"the coordinator goes back to step {old.state.step}")
        simulation.disk, simulation.host = copy, None
        simulation.go_back()
        simulation.at(self._rng.uniform(0.5, 15), self._restart_coordinator)

    def _restart_coordinator(self) -> None:
        simulation = self._simulation
        # Its clock begins with what the wall clock says, which may have been set meanwhile.
        simulation.clock = self._rng.uniform(0, 1e6)
        simulation.host = RunHost.load(simulation.disk)
        simulation.host.restarted(simulation.host_time)
        simulation.begin_record("is back")
        simulation.changed()

    def _pause(self) -> None:
        simulation = self._simulation
        if simulation.host is None:
            simulation.at(1.0, self._pause)
        elif not simulation.host.state.phase.halted:
            self.count += 1
            simulation.trace("pause")
            self._pausing = True
            simulation.host.pause(simulation.host_time)
            simulation.changed()
            simulation.at(self._rng.uniform(1, 30), self._resume)

    def go_on(self) -> None:
        """Resumes a run that has paused by itself, because nothing was applied for some rounds."""
        host = self._simulation.host
        if host is not None and host.state.phase is Phase.PAUSED and not self._pausing:
            self._pausing = True
            self._simulation.at(10.0, self._resume)

    def _resume(self) -> None:
        """Resumes the run once it has halted; does nothing if it has finished."""
        simulation = self._simulation
        if simulation.host is None or simulation.host.state.pending_pause:
            simulation.at(1.0, self._resume)
        elif simulation.host.state.phase is Phase.PAUSED:
            self._pausing = False
            simulation.trace("resume")
            simulation.host.resume(simulation.host_time)
            simulation.changed()
