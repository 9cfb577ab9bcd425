"""Which advertised addresses a node dials."""

from __future__ import annotations

import asyncio
import socket

import pytest

from psyche_lightning.errors import TransportError
from psyche_lightning.testing.peers import Node, eventually
from psyche_lightning.transports.reach import Reach, Scope, scope
from psyche_lightning.transports.tcp import TcpTransport
from psyche_lightning.wire.identity import Identity

NOWHERE = ["0.0.0.0", "0.1.2.3", "::", "224.0.0.1", "ff02::1", "255.255.255.255", "240.0.0.1", "::ffff:224.0.0.1"]
MACHINE = ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"]
NETWORK = ["10.0.0.1", "192.168.1.1", "172.16.0.9", "100.64.0.1", "fd00::1"]
LINK = ["169.254.169.254", "fe80::1", "fe80::1%eth0"]
PUBLIC = ["8.8.8.8", "1.1.1.1", "2606:4700::1111"]


def dials(reach: Reach, hosts: list[str]) -> set[bool]:
    return {dialled(reach, host) for host in hosts}


def dialled(reach: Reach, host: str) -> bool:
    try:
        reach.check(host)
    except TransportError:
        return False
    return True


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (NOWHERE, Scope.NOWHERE),
        (MACHINE, Scope.MACHINE),
        (["localhost", "LOCALHOST."], Scope.MACHINE),
        (NETWORK, Scope.NETWORK),
        (LINK, Scope.LINK),
        (PUBLIC, Scope.EVERYWHERE),
        (["node.example"], Scope.EVERYWHERE),
    ],
)
def test_scopes(hosts: list[str], expected: Scope) -> None:
    assert {scope(host) for host in hosts} == {expected}


@pytest.mark.parametrize(
    ("own", "peers", "machine", "network", "link"),
    [
        pytest.param("127.0.0.1", ["127.0.0.1", "127.0.0.1"], True, True, False, id="a demo"),
        pytest.param(
            "127.0.0.1", ["127.0.0.1", "127.0.0.1", "8.8.8.8"], True, True, False, id="one stranger in a demo"
        ),
        pytest.param("127.0.0.1", ["8.8.8.8", "127.0.0.1"], False, False, False, id="only dials, in a public run"),
        pytest.param("192.168.1.2", ["192.168.1.3"], False, True, False, id="a local network"),
        pytest.param("192.168.1.2", ["192.168.1.3", "8.8.8.8"], False, True, False, id="two at home, one away"),
        pytest.param("8.8.4.4", ["8.8.8.8", "10.0.0.1"], False, False, False, id="public"),
        pytest.param("169.254.7.7", ["169.254.7.8"], False, False, True, id="two machines and a cable"),
    ],
)
def test_what_a_node_dials(own: str, peers: list[str], machine: bool, network: bool, link: bool) -> None:
    reach = Reach([own])
    reach.learn([[peer] for peer in peers])
    assert dials(reach, PUBLIC) == {True}
    assert dials(reach, NOWHERE) == {False}
    assert dials(reach, MACHINE) == {machine}
    assert dials(reach, NETWORK) == {network}
    assert dials(reach, LINK) == {link}


def test_nothing_is_sent_to_a_service_within_the_own_machine_in_a_public_run() -> None:
    """Two peers name a port of this machine, one as an address and one as a name that leads there."""

    async def main() -> None:
        first, second, public = (Identity.generate().public for _ in range(3))
        with socket.create_server(("127.0.0.1", 0)) as service:
            port = service.getsockname()[1]
            node = Node(TcpTransport(), Identity(bytes(32)))
            await node.start()
            node.transport.set_peers(
                {first: f"tcp://127.0.0.1:{port}", second: f"tcp://localhost:{port}", public: "tcp://240.0.0.1:9"}
            )
            node.transport._reach.learn([["8.8.8.8"]])  # type: ignore[attr-defined]

            def refused() -> bool:
                reasons = [one.reason for one in node.transport.links()]
                return sum("within a machine" in reason for reason in reasons) == 2 and any(
                    "not the address of a machine" in reason for reason in reasons
                )

            await eventually(refused, "all three are refused")
            await node.transport.stop()
            service.setblocking(False)
            with pytest.raises(BlockingIOError):
                service.accept()

    asyncio.run(main())
