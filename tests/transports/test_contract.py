from __future__ import annotations

import pytest

from psyche_lightning.testing.transport import TransportContract
from psyche_lightning.transports.base import Transport
from psyche_lightning.transports.memory import MemoryNetwork, MemoryTransport
from psyche_lightning.transports.tcp import TcpTransport


class TestMemory(TransportContract):
    @pytest.fixture(autouse=True)
    def _network(self) -> None:
        self.network = MemoryNetwork()

    def make_transport(self) -> Transport:
        return MemoryTransport(self.network)


class TestTcp(TransportContract):
    def make_transport(self) -> Transport:
        return TcpTransport()
