"""Ensures that a node trains on one device: runs do not use Lightning's own multi-device training."""

from __future__ import annotations

import torch

from psyche_lightning.errors import ConfigError


class OneDevice:
    """The device interface that Trainer and Fabric expect of a strategy; a base beside Lightning's.

    Attributes:
        owner: the class with the argument ``devices``, for errors.
    """

    owner: str
    _devices: list[torch.device] | None = None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The node's device in a list, as Lightning sets it."""
        return self._devices

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        if devices and len(devices) > 1:
            raise ConfigError(
                f"{self.owner} has devices={len(devices)}, but a node of the strategy 'psyche' trains on one device. "
                "Set devices=1 and start a process for each device: each is a node of the run."
            )
        self._devices = devices

    @property
    def root_device(self) -> torch.device:
        """The node's device; the CPU until Lightning sets one."""
        return torch.device(self._devices[0]) if self._devices else torch.device("cpu")

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
