"""The devices of a node: one for each of its ranks, which are processes that train one share together."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.internals import gathered, note_rank, reduced
from psyche_lightning.lightning.world import RankError, World, check_devices, meet

logger = logging.getLogger(__name__)

INNER = ("ddp", "fsdp")
"""How the ranks of a node may share their work."""


def check_inner(inner: str, save_distributed_checkpoint: bool) -> str:
    """Refuse an unknown way to share work, and checkpoints in parts of what each rank has as a whole."""
    if inner not in INNER:
        raise ConfigError(
            f"inner is {inner!r}; choose ddp, where each rank of a node has the whole model, or fsdp, where each has a "
            "part of it."
        )
    if save_distributed_checkpoint and inner != "fsdp":
        raise ConfigError(
            f"save_distributed_checkpoint has each rank write its part of the model, but with inner={inner!r} each has "
            "all of it; set inner='fsdp', or leave it out."
        )
    return inner


def rank_here(devices: int) -> int:
    """The rank of this process in its node, as whoever started it says; 0 for a node with one device."""
    if devices == 1:
        return 0
    kinds = (TorchElasticEnvironment, SLURMEnvironment)
    return next((kind for kind in kinds if kind.detect()), LightningEnvironment)().local_rank()


class NodeDevices:
    """The device interface that Trainer and Fabric expect of a strategy; a base beside Lightning's.

    Attributes:
        owner: the class with the argument ``devices``, for errors.
        inner: how the ranks of the node share their work.
        cluster_environment: who this process is among the ranks; set by Lightning.
        world: the ranks of the node once they have met; None for a node with one device.
    """

    owner: str
    inner: str
    launcher_class: Any
    cluster_environment: ClusterEnvironment | None = None
    world: World | None = None
    _devices: list[torch.device] | None = None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The devices of the node's ranks, as Lightning sets them."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices:
            check_devices(self.owner, devices)
        self._devices = devices

    @property
    def num_processes(self) -> int:
        """The number of the node's ranks."""
        return len(self._devices) if self._devices else 1

    @property
    def root_device(self) -> torch.device:
        """This rank's device; the CPU until Lightning sets one."""
        return torch.device(self._devices[self.local_rank]) if self._devices else torch.device("cpu")

    @property
    def num_nodes(self) -> int:
        """Machines of Lightning's own world: always one."""
        return 1

    @num_nodes.setter
    def num_nodes(self, count: int) -> None:
        if count > 1:
            raise ConfigError(
                f"{self.owner} has num_nodes={count}, but {self.owner} does not start the nodes of a run: leave "
                "num_nodes at 1 and start the same program on every machine."
            )

    # --- ranks ------------------------------------------------------------------------------------------------------

    global_rank = 0
    local_rank = 0
    world_size = 1

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the node's rank 0, which alone writes files and talks to the run."""
        return self.global_rank == 0

    def set_world_ranks(self) -> None:
        """Called by Lightning when it knows the devices."""
        environment = self.cluster_environment
        if environment is None:
            return
        if self.num_processes > 1:
            environment.set_world_size(self.num_processes)
            environment.set_global_rank(environment.local_rank())
            self.global_rank, self.local_rank = environment.global_rank(), environment.local_rank()
            self.world_size = self.num_processes
            note_rank(self.global_rank)
        elif isinstance(environment, TorchElasticEnvironment) and environment.world_size() > 1:
            raise ConfigError(
                f"torchrun started {environment.world_size()} processes, but {self.owner} has devices=1. Set "
                f"devices={environment.world_size()} for one node of that many ranks, or start nodes without torchrun."
            )

    _set_world_ranks = set_world_ranks  # as Fabric calls it

    def _configure_launcher(self) -> None:
        """Called by Lightning: start the other ranks later, unless somebody else starts them."""
        if self.num_processes > 1:
            self._launcher = self.launcher_class(self.cluster_environment, self.num_processes, self.num_nodes)

    def _meet(self) -> None:
        """Wait for the other ranks."""
        if self.num_processes > 1 and self.world is None:
            assert self.cluster_environment is not None  # Lightning set it
            assert self._devices is not None
            self.world = meet(self.cluster_environment, self._devices, self._alive)
            if self.world.rank == 0:
                on = ", ".join(str(device) for device in self._devices)
                logger.info("%s ranks share this node's work (%s): %s", self.num_processes, self.inner, on)

    def _alive(self) -> None:
        for rank, process in enumerate(getattr(self._launcher, "procs", []), 1):
            if (code := process.poll()) is not None:
                raise RankError(
                    f"rank {rank} of this node's {self.num_processes} ended with exit code {code} before it began; "
                    "its own message is above"
                )

    # --- what Trainer and Fabric exchange among ranks -----------------------------------------------------------------

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the other ranks of the node."""
        if self.world is not None:
            self.world.sum([0.0])

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object of the node's rank ``src``."""
        if self.world is None:
            return obj
        objects = [obj]
        with self.world.together():
            dist.broadcast_object_list(objects, src)
        return objects[0]

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        """Whether all ranks of the node decide so, or any."""
        if self.world is None:
            return decision
        (yes,) = self.world.sum([float(decision)])
        return yes == self.world.size if all else yes > 0

    def _reduced(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        if self.world is None or not isinstance(tensor, torch.Tensor):
            return tensor
        with self.world.together():
            return reduced(tensor, group, reduce_op)

    def _gathered(self, tensor: torch.Tensor, group: Any, sync_grads: bool) -> torch.Tensor:
        if self.world is None:
            return tensor
        with self.world.together():
            return gathered(tensor, group, sync_grads)
