"""The processes of a node with several devices: rank 0, which is the node for the run, and the ranks that follow it.

Tensors travel by ``torch.distributed``. What rank 0 decides travels on a line of its own, a socket on this machine from
rank 0 to each other rank: such a wait has no time limit, ends at a signal, and ends when the other process does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from psyche_lightning.errors import KILLED, ConfigError, PsycheError
from psyche_lightning.lightning.internals import backend_for
from psyche_lightning.wire.canonical import pack, unpack

logger = logging.getLogger(__name__)

MEETING = 600.0
"""Longest wait for the other ranks of a node to start, in seconds."""
LONGEST = timedelta(days=20)
"""Limit of a collective: about what its milliseconds can count. A rank that is gone ends one at once."""
REASON = 5.0
"""Longest wait, in seconds, for the reason why another rank is gone."""
LOOK_EVERY = 0.25
BUCKET = 1 << 24
"""Elements that are reduced at once."""
FAILED = "failed"
_HOST = "127.0.0.1"
_TOKEN = 16
_world: World | None = None


class RankError(PsycheError):
    """Another rank of this node ended, so this one ends as well."""


class World:
    """The ranks of a node, as seen from one of them.

    Args:
        rank: this process, from 0.
        size: the number of ranks.
        device: of this rank.
        lines: on rank 0 those to ranks 1, 2, ...; on others the one to rank 0.

    Attributes:
        rank: as given.
        size: as given.
        device: as given.
        watch: called on another thread of rank 0 when another rank is gone; None while that does not matter.
    """

    def __init__(self, rank: int, size: int, device: torch.device, lines: Sequence[socket.socket]) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.watch: Callable[[BaseException], None] | None = None
        self._lines = list(lines)
        self._failure: RankError | None = None
        self._failing = threading.Event()
        self._host = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo", timeout=LONGEST)
        if rank == 0:
            for number, line in enumerate(lines, 1):
                threading.Thread(target=self._listen, args=(number, line), name=f"rank-{number}", daemon=True).start()

    # --- what rank 0 tells ------------------------------------------------------------------------------------------

    def tell(self, kind: str, *values: Any) -> None:
        """On rank 0: send the others a message of whole numbers, text, bytes, None, and lists of them.

        Raises:
            RankError: one of them is gone.
        """
        self._check()
        try:
            self._send(kind, *values)
        except OSError as error:
            raise self._gone() from error

    def _send(self, kind: str, *values: Any) -> None:
        data = pack([kind, *values])
        for line in self._lines:
            line.sendall(struct.pack(">Q", len(data)) + data)

    def hear(self, stops: Callable[[], None] = lambda: None) -> list[Any]:
        """On the others: wait for rank 0's next message, as ``[kind, *values]``.

        Args:
            stops: raises an error when this rank wants to wait no longer.

        Raises:
            RankError: another rank is gone.
        """
        (line,) = self._lines
        try:
            while not select.select([line], [], [], LOOK_EVERY)[0]:
                stops()
            message = _receive(line)
        except OSError as error:
            raise self._lost(0, None) from error
        if message[0] == FAILED:
            raise self._lost(int(message[1]), str(message[2]))
        return message

    # --- who is gone ------------------------------------------------------------------------------------------------

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends, and why; what they wait in for it breaks when its process ends."""
        if self._failing.is_set():
            return
        self._failing.set()
        text = str(error) if isinstance(error, PsycheError) else f"{type(error).__name__}: {error}"
        self._failure = self._failure or RankError(f"this node's ranks ended before: {text}")
        with contextlib.suppress(OSError):
            self._send(FAILED, self.rank, text)

    def _listen(self, rank: int, line: socket.socket) -> None:
        """On rank 0: wait until another rank ends."""
        try:
            _, _, text = _receive(line)
        except (OSError, ValueError, PsycheError):
            text = None
        watch = self.watch
        if text is None and watch is None:
            return  # its program is over, as ours will be
        failure = self._lost(rank, text)
        with contextlib.suppress(OSError):
            self._send(FAILED, rank, "its process ended" if text is None else text)
        if watch is not None:
            watch(failure)

    def _lost(self, rank: int, text: str | None) -> RankError:
        if self._failure is None:
            why = (
                "its process ended without a word, for instance because it was killed or the machine's memory is full"
                if text is None
                else text
            )
            self._failure = RankError(f"rank {rank} of this node's {self.size} ended, so the node ends: {why}")
            if text is None:
                self._failure.exit_code = KILLED
        self._failing.set()
        return self._failure

    def _gone(self) -> RankError:
        """The reason why a message or a collective did not reach all ranks."""
        if self.rank == 0:
            self._failing.wait(REASON)
            return self._failure or _unknown()
        deadline = time.monotonic() + REASON
        try:
            while time.monotonic() < deadline:
                self.hear()
        except RankError as error:
            return error
        return _unknown()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block with collectives.

        Raises:
            RankError: another rank is gone.
        """
        self._check()
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if isinstance(error, (dist.DistError, ValueError)) or "gloo" in str(error) or "onnection" in str(error):
                raise self._gone() from error
            raise

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """A block of other people's code, which may have collectives of its own.

        Raises:
            RankError: another rank is gone, so a collective failed.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):
                raise self._gone() from error
            raise

    # --- tensors ----------------------------------------------------------------------------------------------------

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all ranks of each value, the same on all ranks."""
        total = torch.tensor(list(values), dtype=torch.float64)
        with self.together():
            dist.all_reduce(total, group=self._host)
        return [float(value) for value in total.tolist()]

    def equal(self, value: bytes) -> int | None:
        """The first rank whose value of 32 bytes is not that of rank 0; None if all are the same."""
        mine = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        with self.together():
            dist.all_gather(found, mine, group=self._host)
        return next((rank for rank, theirs in enumerate(found) if not torch.equal(theirs, found[0])), None)

    def hand_on(self, tensor: torch.Tensor) -> None:
        """Give a tensor the values of rank 0."""
        with self.together(), torch.no_grad():
            if tensor.is_contiguous():
                dist.broadcast(tensor.detach(), 0, group=self._group(tensor))
            else:
                copy = tensor.detach().contiguous()
                dist.broadcast(copy, 0, group=self._group(tensor))
                tensor.copy_(copy)

    def hand_on_bytes(self, data: bytes) -> bytes:
        """The bytes of rank 0; the others give anything."""
        (size,) = self.sum([len(data) if self.rank == 0 else 0])
        whole = torch.empty(int(size), dtype=torch.uint8)
        if self.rank == 0:
            whole.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.hand_on(whole)
        return bytes(whole.numpy().tobytes())

    def mix(self, parameters: Sequence[torch.Tensor], factor: float) -> None:
        """Make each gradient the sum over all ranks of gradient times the rank's factor, added in float32.

        Args:
            parameters: the same on all ranks; a missing gradient counts as zero.
            factor: of this rank; at 0 its gradients are not looked at.
        """
        for some in _buckets(parameters):
            flat = torch.cat([_flat(parameter, factor) for parameter in some])
            with self.together():
                dist.all_reduce(flat, group=self._group(flat))
            for parameter, part in zip(some, torch.split(flat, [one.numel() for one in some]), strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter, dtype=getattr(parameter, "grad_dtype", None))
                parameter.grad.copy_(part.view(parameter.shape))

    def _group(self, tensor: torch.Tensor) -> Any:
        return self._host if tensor.device.type == "cpu" else dist.group.WORLD


def _buckets(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    some: list[torch.Tensor] = []
    size = 0
    for parameter in parameters:
        if some and (size + parameter.numel() > BUCKET or parameter.device != some[0].device):
            yield some
            some, size = [], 0
        some.append(parameter)
        size += parameter.numel()
    if some:
        yield some


def _flat(parameter: torch.Tensor, factor: float) -> torch.Tensor:
    """A gradient times a factor, flat and float32."""
    if parameter.grad is None or not factor:
        return torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    gradient = parameter.grad.to_dense() if parameter.grad.layout != torch.strided else parameter.grad
    return gradient.to(torch.float32).reshape(-1) * factor


def _unknown() -> RankError:
    return RankError("this node's ranks lost each other; the messages of the others say why")


# --- meeting ----------------------------------------------------------------------------------------------------------


def meet(environment: ClusterEnvironment, devices: Sequence[torch.device], alive: Callable[[], None]) -> World:
    """Wait for the other ranks of this node, which Lightning, torchrun or SLURM started.

    Args:
        environment: says who this rank is.
        devices: of all ranks.
        alive: raises an error if a rank that this process started is gone.

    Returns:
        The world, the same one for each call in a process.

    Raises:
        RankError: they did not come.
    """
    global _world
    if _world is not None:
        _world._check()
        return _world
    rank, size = environment.global_rank(), environment.world_size()
    device = devices[environment.local_rank()]
    interface = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if interface is not None:  # all ranks are on this machine, so none listens to others
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    store = _store(environment, rank, size)
    lines = _lines(store, rank, size, alive)
    kwargs: dict[str, Any] = {} if device.type == "cpu" else {"device_id": device}
    if not dist.is_initialized():
        dist.init_process_group(
            backend_for(device),
            store=PrefixStore("world", store),
            rank=rank,
            world_size=size,
            timeout=LONGEST,
            **kwargs,
        )
    _world = World(rank, size, device, lines)
    return _world


def _store(environment: ClusterEnvironment, rank: int, size: int) -> Store:
    """Where ranks find each other."""
    limit = timedelta(seconds=MEETING)
    if isinstance(environment, TorchElasticEnvironment):
        store: Store = next(iter(rendezvous("env://", rank, size, timeout=limit)))[0]
        return store
    kwargs: dict[str, Any] = {}
    if rank == 0:
        server = socket.socket()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((_HOST, environment.main_port))
        server.listen(2 * size)
        kwargs["master_listen_fd"] = server.detach()
    return TCPStore(_HOST, environment.main_port, size, rank == 0, limit, wait_for_workers=False, **kwargs)


def _lines(store: Store, rank: int, size: int, alive: Callable[[], None]) -> list[socket.socket]:
    """Connect rank 0 with each other rank."""
    deadline = time.monotonic() + MEETING
    if rank:
        port, _, word = store.get("line").decode().partition(" ")
        line = socket.create_connection((_HOST, int(port)), MEETING)
        line.sendall(bytes.fromhex(word) + struct.pack(">I", rank))
        line.settimeout(None)
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return [line]
    token = secrets.token_bytes(_TOKEN)
    found: dict[int, socket.socket] = {}
    with socket.create_server((_HOST, 0), backlog=2 * size) as server:
        server.settimeout(LOOK_EVERY)
        store.set("line", f"{server.getsockname()[1]} {token.hex()}")
        while len(found) < size - 1:
            alive()
            if time.monotonic() > deadline:
                missing = sorted(set(range(1, size)) - found.keys())
                raise RankError(
                    f"rank 0 of this node waited {MEETING:.0f} s for its rank {missing[0]}, which did not start. Its "
                    "own messages may say why; torchrun and SLURM must start as many processes as devices."
                )
            with contextlib.suppress(TimeoutError):
                line, _ = server.accept()
                line.settimeout(REASON)
                try:
                    said = _exactly(line, _TOKEN + 4)
                except OSError:
                    said = b""
                (number,) = struct.unpack(">I", said[_TOKEN:]) if said else (0,)
                if said and secrets.compare_digest(said[:_TOKEN], token) and 0 < number < size:
                    line.settimeout(None)
                    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    found[number] = line
                else:
                    line.close()
    return [line for _, line in sorted(found.items())]


def _receive(line: socket.socket) -> list[Any]:
    (size,) = struct.unpack(">Q", _exactly(line, 8))
    message = unpack(_exactly(line, size), max_size=size)
    assert isinstance(message, list)  # ours
    return message


def _exactly(line: socket.socket, size: int) -> bytes:
    """So many bytes.

    Raises:
        ConnectionError: the other side is gone.
    """
    parts = bytearray()
    while len(parts) < size:
        part = line.recv(min(size - len(parts), 1 << 20))
        if not part:
            raise ConnectionResetError("the other rank closed its line")
        parts += part
    return bytes(parts)


def check_devices(owner: str, devices: Sequence[torch.device]) -> None:
    """Refuse devices that cannot train one node together.

    Raises:
        ConfigError: they are of several kinds, one is there twice, or what they need to exchange tensors is missing.
    """
    kinds = sorted({device.type for device in devices})
    named = ", ".join(str(device) for device in devices)
    if len(kinds) > 1:
        raise ConfigError(f"{owner} has the devices {named}, but those of one node must all be of one kind.")
    if kinds[0] != "cpu" and len(set(devices)) < len(devices):
        raise ConfigError(f"{owner} has a device twice: {named}. Each rank of a node needs its own.")
    if len(devices) == 1:
        return
    if kinds[0] == "mps":
        raise ConfigError(f"{owner} has devices={len(devices)}, but this machine's accelerator 'mps' is one device.")
    if not dist.is_available() or not dist.is_gloo_available():
        raise ConfigError(
            f"{owner} has devices={len(devices)}, but this build of torch lacks torch.distributed with gloo. Install "
            "another build, or set devices=1."
        )
    if kinds[0] == "cuda" and not dist.is_nccl_available():
        raise ConfigError(
            f"{owner} has devices={len(devices)}, but this build of torch lacks NCCL, by which GPUs exchange tensors. "
            "Install another build, or set devices=1 and start a node for each GPU."
        )
