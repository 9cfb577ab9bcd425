"""A short history of the simulator in which one node is killed and does not come back."""

from __future__ import annotations

from functools import cache

from psyche_lightning.chronicle.entry import Entry
from psyche_lightning.simulation.scenario import Scenario
from psyche_lightning.simulation.simulator import Simulation

STEPS, NODES = 12, 4
MOMENT, GRACE = 15.0, 6.0


@cache
def killed() -> tuple[Entry, ...]:
    """All events. The others wait for the node until the coordinator drops it."""
    told: list[Entry] = []
    simulation = Simulation(Scenario(2, NODES, False, STEPS, 0.0, 0.1, 0.0, 0, 0, 0, 0, 0, 150.0), told.append)
    node = simulation.nodes[1]

    def kill() -> None:
        simulation.faults.end(node)
        node.gone = True

    def drop() -> None:
        assert simulation.host is not None
        simulation.host.disconnected(node.identity.public, simulation.host_time, "no connection")
        simulation.changed()

    simulation.at(MOMENT, kill)
    simulation.at(MOMENT + GRACE, drop)
    simulation.run()
    return tuple(told)
