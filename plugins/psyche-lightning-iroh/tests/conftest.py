"""These tests run in a network namespace that has nothing but a loopback interface: no byte can leave the machine.

iroh asks the router of the local network for a port whenever it starts, and its Python binding has no switch for that.
Where this process may not make a namespace (it is not root), the tests run in a second pytest inside ``unshare -rn``.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import iroh
import pytest
from psyche_lightning_iroh.address import Address

from psyche_lightning.testing.peers import Node
from psyche_lightning.wire.identity import Identity

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
HERE = os.path.dirname(__file__)


def is_alone() -> bool:
    """Whether there is no interface but loopback."""
    return [name for _, name in socket.if_nameindex()] == ["lo"]


def may_leave() -> bool:
    """Whether this process can go into a namespace of its own."""
    return subprocess.run(["unshare", "-n", "true"], capture_output=True, check=False).returncode == 0


MODULES = [name for name in os.listdir(HERE) if name.startswith("test_") and name != "test_elsewhere.py"]
collect_ignore = ["test_elsewhere.py"] if is_alone() or may_leave() else MODULES
_made: list[int] = []  # the namespace: iroh's threads stay in the one in which they were started


def _switch(call: str, *arguments: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), call)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{call}: {os.strerror(error)}")


def _loopback_up() -> None:
    with socket.socket() as sock:
        fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


@pytest.fixture(scope="module", autouse=True)
def loopback_only(request: pytest.FixtureRequest) -> Iterator[None]:
    """Move this thread into the namespace, and back at the end."""
    if is_alone() or request.path.name == "test_elsewhere.py":
        if is_alone():
            _loopback_up()
        yield
        return
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    if _made:
        _switch("setns", _made[0], CLONE_NEWNET)
    else:
        _switch("unshare", CLONE_NEWNET)
        _made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))
        _loopback_up()
    try:
        assert is_alone()
        yield
    finally:
        _switch("setns", home, CLONE_NEWNET)
        os.close(home)


async def _reach(node: Node, guest: Identity, alpn: bytes) -> tuple[Any, Any]:
    """An endpoint of the guest, and its connection to a node."""
    endpoint = await iroh.Endpoint.bind(
        iroh.EndpointOptions(
            preset=iroh.preset_minimal(),
            bind_addr="127.0.0.1:0",
            secret_key=guest.secret_bytes(),
            relay_mode=iroh.RelayMode.disabled(),
        )
    )
    hosts = await Address.parse(node.address).resolve()
    try:
        target = iroh.EndpointAddr(iroh.EndpointId.from_bytes(node.key), None, hosts)
        return endpoint, await endpoint.connect(target, alpn)
    except BaseException:
        await endpoint.close()
        raise


@pytest.fixture
def reach() -> Callable[..., Any]:
    """Makes a connection to a node below the transport: ``await reach(node, guest, alpn)``."""
    return _reach
