"""Several machines on one: network namespaces, each with one link to a relay in user space that shapes it.

A link is a TUN device whose packets the relay reads, delays, drops and writes to the device of the machine that they
are for. Nothing else connects the namespaces, to each other or to the world. The shaping can be switched off and on
while packets flow, so that both are measured in one run. Needs root and ``/dev/net/tun``.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import multiprocessing
import os
import random
import selectors
import signal
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MTU = 1500
QUEUE = 256_000
"""Bytes that wait for a link before it drops what comes, as a home router's buffer would."""
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000


@dataclass(frozen=True)
class Link:
    """One machine's way to the others.

    Attributes:
        rate: bits per second that it can send; None for no limit.
        delay: seconds that each packet takes (half of a round trip).
        loss: share of its packets that vanish, 0 to 1.
    """

    rate: float | None = None
    delay: float = 0.0
    loss: float = 0.0


class Machine:
    """A network namespace.

    Attributes:
        name: of the namespace.
        address: its IPv4 address.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address

    @property
    def inside(self) -> tuple[str, ...]:
        """The command that runs another one in it."""
        return ("ip", "netns", "exec", self.name)

    def traffic(self) -> tuple[int, int]:
        """Bytes ``(up, down)`` on its link so far, headers of IP and TCP included."""
        found = subprocess.run(
            [*self.inside, "cat", *(f"/sys/class/net/tun0/statistics/{way}_bytes" for way in ("tx", "rx"))],
            check=True,
            capture_output=True,
            text=True,
        )
        up, down = found.stdout.split()
        return int(up), int(down)


class Network:
    """The machines and the relay between them.

    Attributes:
        machines: in the order of their links.
    """

    def __init__(self, machines: list[Machine], shaped: Any) -> None:
        self.machines, self._shaped = machines, shaped

    def shape(self, on: bool) -> None:
        """Let the links' limits hold, or not, from the next packet on."""
        self._shaped.value = on


@contextmanager
def network(links: Sequence[Link], seed: int = 0) -> Iterator[Network]:
    """One machine for each link, while the block runs; the limits hold.

    Raises:
        PermissionError: this process may not make namespaces.
    """
    if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
        raise PermissionError("shaped links need root and /dev/net/tun: run this as root on Linux")
    _clear_away()
    machines = [Machine(f"links-{os.getpid()}-{number}", f"10.77.0.{number + 1}") for number in range(len(links))]
    devices: list[int] = []
    try:
        for machine in machines:
            devices.append(_join(machine))
        # A process of its own: the relay's speed must not depend on what the measuring program does.
        context = multiprocessing.get_context("fork")
        shaped = context.Value("b", True, lock=False)
        relay: Any = context.Process(target=_relay, args=(devices, list(links), seed, shaped, os.getpid()))
        relay.start()
        try:
            yield Network(machines, shaped)
        finally:
            relay.terminate()
            relay.join()
    finally:
        for device in devices:
            os.close(device)
        for machine in machines:
            subprocess.run(["ip", "netns", "del", machine.name], check=False, capture_output=True)


def _clear_away() -> None:
    """Remove the namespaces of measurements that were killed, with the processes that are left in them."""
    listed = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    for line in listed.splitlines():
        name = line.split()[0]
        kind, _, owner = name.rpartition("-")[0].partition("-")
        if kind != "links" or not owner.isdecimal() or os.path.exists(f"/proc/{owner}"):
            continue
        inside = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True).stdout
        for process in map(int, inside.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _join(machine: Machine) -> int:
    """Make the namespace and its device; returns the relay's end."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    here = f"ln{machine.address.rpartition('.')[2]}-{os.getpid() % 100000}"
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", here.encode(), _IFF_TUN | _IFF_NO_PI))
    for command in (
        f"ip netns add {machine.name}",
        f"ip link set {here} netns {machine.name} name tun0",
        f"ip -n {machine.name} addr add {machine.address}/24 dev tun0",
        f"ip -n {machine.name} link set tun0 up mtu {MTU}",
        f"ip -n {machine.name} link set lo up",
    ):
        subprocess.run(command.split(), check=True, capture_output=True)
    return device


def _relay(devices: list[int], links: list[Link], seed: int, shaped: Any, measurer: int) -> None:
    """Carry packets until the process is ended, or the one that measures is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who interrupts the measurement ends it, and that ends this
    chance, open_link = random.Random(seed), Link()
    owner = {bytes([10, 77, 0, number + 1]): number for number in range(len(devices))}
    free = [0.0] * len(devices)  # when each link has sent what it was given
    waiting: list[tuple[float, int, int, bytes]] = []
    count = 0
    selector = selectors.DefaultSelector()
    for number, device in enumerate(devices):
        selector.register(device, selectors.EVENT_READ, number)
    while os.getppid() == measurer:
        timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else 1.0
        for key, _ in selector.select(timeout):
            link = links[key.data] if shaped.value else open_link
            for _ in range(64):
                try:
                    packet = os.read(key.fd, MTU)
                except BlockingIOError:
                    break
                except OSError:  # another measurement cleared away what a killed one left
                    return
                target = owner.get(packet[16:20])  # the destination, if this is IPv4
                if target is None or packet[0] >> 4 != 4 or chance.random() < link.loss:
                    continue
                now = time.monotonic()
                due = now
                if link.rate is not None:
                    begins = max(free[key.data], now)
                    if (begins - now) * link.rate > 8 * QUEUE:
                        continue
                    due = free[key.data] = begins + 8 * len(packet) / link.rate
                count += 1
                heapq.heappush(waiting, (due + link.delay, count, target, packet))
        now = time.monotonic()
        while waiting and waiting[0][0] <= now:
            _, _, target, packet = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the machine's own queue is full: a loss like any other
                os.write(devices[target], packet)
