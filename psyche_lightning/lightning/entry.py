"""Prepares a node to join a run: queries the run, agrees on its values, and builds the client and the transport."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from psyche_lightning.distro import DistroConfig
from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning.lightning.world import World
from psyche_lightning.logs import ensure_heard
from psyche_lightning.node.journal import MemoryJournal
from psyche_lightning.node.store import MemoryBlobStore
from psyche_lightning.plugins import load_plugins, packages
from psyche_lightning.protocol.link import split_url
from psyche_lightning.protocol.manifest import START, differences, manifest_text, mismatch
from psyche_lightning.protocol.requests import Coordinator, GetTerms, Terms
from psyche_lightning.protocol.state import CoordinatorConfig, scope_of
from psyche_lightning.recipe.options import SHARED, RunOptions, RunValues
from psyche_lightning.transports.base import Transport
from psyche_lightning.transports.memory import MemoryTransport
from psyche_lightning.transports.meter import ByteMeter, socket_factory
from psyche_lightning.wire.identity import Identity

logger = logging.getLogger(__name__)

ALONE_RUN = "alone"


def look(client: Coordinator, timeout: float = 60.0) -> Terms:
    """Ask a run for its fixed values, on a separate event loop.

    Raises:
        CoordinatorError: the coordinator is unreachable, does not answer in time, or does not have the run.
    """

    async def ask() -> Terms:
        try:
            return await asyncio.wait_for(client.request(GetTerms()), timeout)
        except asyncio.TimeoutError:
            why = client.away or "no answer"
            raise CoordinatorError(f"waited {timeout:.0f} s for {why}. Try again later.", code="Unreachable") from None
        finally:
            await client.close()

    # In a thread, because notebooks already run a loop in this one.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: asyncio.run(ask())).result()


def terms_of(url: str, run: str) -> Terms:
    """The fixed values of a run, for a program that has not joined it.

    Args:
        url: its coordinator's URL or its join link.
        run: its name.

    Raises:
        PsycheError: as for :func:`look`, or no plugin brings this kind of coordinator.
    """
    url, scheme = split_url(url)
    client = load_plugins().coordinators()[scheme].client
    return look(client(url, run, Identity.generate(), {}))


@dataclass
class Memory:
    """A node without a folder.

    Attributes:
        identity: its key.
        store: blobs.
        journal: promises.
    """

    identity: Identity = field(default_factory=Identity.generate)
    store: MemoryBlobStore = field(default_factory=MemoryBlobStore)
    journal: MemoryJournal = field(default_factory=MemoryJournal)

    def forget(self) -> None:
        """The node's run is over: whoever comes next is another node."""
        self.identity, self.store, self.journal = Identity.generate(), MemoryBlobStore(), MemoryJournal()


class Entry:
    """What a process knows about its run before it joins. It queries the run once.

    Args:
        options: the node's options.
        memory: what an earlier session of the same strategy kept.
        terms: the run's fixed values, if another rank of the node has asked for them; this one then asks nobody.

    Attributes:
        options: as given.
        run_id: the run's name.
        terms: the run's fixed values; for a run of this process alone, the values of its options.
        run: the values that all nodes share.
        distro: the compression, which all nodes share too.
        transport: the node's; not started.
        meter: counts the bytes at the sockets to the coordinator.
        memory: what a node without a folder keeps for a later session, which goes on as the same node.

    Raises:
        PsycheError: the transport is unknown or refuses its options, the coordinator is unreachable or does not have
            the run, or the options contradict the run's values.
    """

    def __init__(self, options: RunOptions, memory: Memory | None = None, terms: Terms | None = None) -> None:
        ensure_heard(packages())
        self.options = options
        self.run_id = options.run or ALONE_RUN
        self.meter = ByteMeter()
        # Training alone needs no transport, but wrong options still raise here.
        transport = load_plugins().transports()[options.transport](options.transport_options)
        apart = options.coordinator is None or terms is not None
        self.transport: Transport = MemoryTransport() if apart else transport
        if terms is not None:
            self.terms = terms
        elif options.coordinator is None:
            logger.info("no coordinator given: this process trains alone")
            unset = () if options.config else ("global_batch_size", "total_steps")
            self.terms = Terms(options.config or CoordinatorConfig(), unset)
        else:
            self.terms = look(self.client(options.coordinator, Identity.generate()))
        self.run, self.distro = agree(options, self.terms)
        self.memory = memory or Memory()

    @property
    def scope(self) -> str:
        """Names the run and its incarnation; a process alone goes on under one name."""
        return scope_of(self.run_id, self.terms.incarnation)

    def client(self, url: str, identity: Identity) -> Coordinator:
        """A client of the run's coordinator for a node with that key."""
        url, scheme = split_url(url)
        options = {"socket_factory": socket_factory(self.meter)} if scheme in ("http", "https") else {}
        return load_plugins().coordinators()[scheme].client(url, self.run_id, identity, options)

    def apart(self) -> Entry:
        """The same values for a run of this process alone, of which nothing is kept."""
        entry = copy.copy(self)
        entry.options = replace(self.options, coordinator=None, run=None, directory=None, start=None)
        entry.run_id, entry.memory, entry.transport = ALONE_RUN, Memory(), MemoryTransport()
        if self.options.coordinator is not None:
            entry.terms = Terms(CoordinatorConfig(), ("global_batch_size", "total_steps"))
        return entry

    def steps(self, step: int) -> int:
        """Steps that a node makes with its share in the round of that step of the run."""
        return max(1, self.distro.at(step).local_steps)

    def global_batch(self, local: int) -> int:
        """Samples of a round of the whole run.

        Args:
            local: samples of one step of one node: its DataLoader's batch size times the accumulated batches. If the
                number of local steps changes, those of the rounds with most steps count, so that no step has fewer.
        """
        if "global_batch_size" not in self.terms.unset:
            return self.terms.config.global_batch_size_end
        each = local * max(self.steps(first) for first, _ in self.distro.stages)
        return self.options.global_batch_size or each * self.terms.config.init_min_clients

    def manifest(self, sections: dict[str, dict[str, Any]], sizes: dict[str, int]) -> dict[str, dict[str, Any]]:
        """This node's manifest.

        Args:
            sections: the sections of model, optimizer and data; those of the options replace them.
            sizes: sizes that this node fixes, by name, if the run leaves them to its first node.
        """
        held = self.terms.manifest or {}
        shared = {name: dict(held.get(name, asdict(getattr(self, name)))) for name in SHARED}
        shared["run"].update((name, sizes[name]) for name in self.terms.unset)
        return {**sections, **{name: dict(section) for name, section in self.options.manifest.items()}, **shared}


def enter(options: RunOptions, memory: Memory | None, world: World | None) -> Entry:
    """What this rank of a node knows of its run: rank 0 asks, and tells the others, which have no folder."""
    if world is None:
        return Entry(options, memory)
    if world.rank == 0:
        entry = Entry(options, memory)
        world.tell("terms", json.dumps(GetTerms.answer_to_json(entry.terms)))
        return entry
    _, text = world.hear()
    return Entry(replace(options, directory=None), memory, GetTerms.answer_from_json(json.loads(text)))


def agree(options: RunOptions, terms: Terms) -> tuple[RunValues, DistroConfig]:
    """Combine a node's options with its run's fixed values: the run's values win, and options must not contradict them.

    Raises:
        ManifestMismatchError: options, or sections of this node, differ from the run's; it lists all fields.
        ConfigError: the run has a value that this version does not know, or resumes from a checkpoint that this node
            does not have.
    """
    held = terms.manifest or {}
    shared: dict[str, Any] = {}
    found: list[tuple[str, object, object]] = []
    for section, kind in SHARED.items():
        defaults, given = asdict(kind()), options.given[section]
        fixed = {**defaults, **held[section]} if section in held else {}
        unknown = fixed.keys() - defaults.keys()
        if unknown:
            raise ConfigError(
                f"the run has the setting {section}.{min(unknown)}, which this version does not know; install the "
                f"version with which the run was created. Known: {', '.join(defaults)}."
            )
        theirs, mine = kind(**fixed), kind(**given)
        for name in given if fixed else ():
            if getattr(theirs, name) != getattr(mine, name):
                found += differences(fixed[name], getattr(mine, name), f"{section}.{name}")
        shared[section] = {**defaults, **given, **fixed}
    sizes = {"global_batch_size": terms.config.global_batch_size_end, "total_steps": terms.config.total_steps}
    for name, size in sizes.items():
        value = getattr(options, name)
        if name not in terms.unset and value not in (None, size):
            found.append((f"run.{name}", size, value))
    for name, section in json.loads(manifest_text(options.manifest)).items():
        found += differences(held[name], section, name) if name in held else []
    if found:
        raise mismatch(
            found,
            "Give this node the run's values, or omit these options of the strategy: then it takes the run's values.",
        )
    begun = held.get(START)
    if begun is not None and START not in options.manifest:
        raise ConfigError(
            f"the run resumes from the checkpoint of step {begun.get('step')}, but this node starts at step 1: set "
            "checkpoint.resume=ADDRESS in its recipe to that checkpoint."
        )
    return RunValues(**shared["run"]), DistroConfig(**shared["distro"])
