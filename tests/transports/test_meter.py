from __future__ import annotations

import asyncio
import socket
import threading

import aiohttp
from aiohttp import web

from psyche_lightning.transports.meter import ByteMeter, MeteredSocket, socket_factory


class RawPeer:
    """A plain blocking relay that counts what passes between a client and a server, as a wire would."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.up = self.down = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with self._listener.accept()[0] as client, socket.create_connection(self._target) as server:
            back = threading.Thread(target=self._copy, args=(server, client, "down"), daemon=True)
            back.start()
            self._copy(client, server, "up")
            back.join(20)

    def _copy(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        try:
            while data := source.recv(65536):
                setattr(self, name, getattr(self, name) + len(data))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def join(self) -> None:
        self._thread.join(20)
        self._listener.close()


def test_a_client_and_a_server_count_what_the_wire_carries() -> None:
    async def main() -> None:
        outside, listening = ByteMeter(), ByteMeter()
        app = web.Application()

        async def echo(request: web.Request) -> web.Response:
            return web.Response(body=2 * await request.read())

        app.router.add_post("/", echo)
        runner = web.AppRunner(app)
        await runner.setup()
        listener = MeteredSocket(socket.AF_INET, socket.SOCK_STREAM, meter=listening)
        listener.bind(("127.0.0.1", 0))
        site = web.SockSite(runner, listener)
        await site.start()
        wire = RawPeer(listener.getsockname())
        connector = aiohttp.TCPConnector(socket_factory=socket_factory(outside))
        async with aiohttp.ClientSession(connector=connector) as session:
            for size in (0, 10, 300_000):
                async with session.post("http://{}:{}/".format(*wire.address), data=bytes(size)) as response:
                    assert len(await response.read()) == 2 * size
        await asyncio.get_running_loop().run_in_executor(None, wire.join)
        await runner.cleanup()
        assert wire.up > 300_000
        assert wire.down > 600_000
        assert (outside.up, outside.down) == (wire.up, wire.down)
        assert (listening.up, listening.down) == (wire.down, wire.up)

    asyncio.run(main())


def test_every_way_to_send_and_receive_is_counted() -> None:
    listener = MeteredSocket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    client = MeteredSocket(socket.AF_INET, socket.SOCK_STREAM)
    client.connect(listener.getsockname())
    server, _ = listener.accept()
    assert server.gettimeout() is None
    client.send(b"12345")
    client.sendall(bytes(1000))
    client.sendmsg([b"ab", memoryview(b"cde")])
    assert client.meter.up == 1010
    assert server.recv(5, socket.MSG_PEEK) == b"12345"
    assert server.meter.down == 0
    assert server.recv(5) == b"12345"
    left = 1005
    while left:
        left -= server.recv_into(bytearray(left))
    assert server.meter.down == 1010
    assert listener.meter.down == 1010
    assert (client.meter.down, server.meter.up) == (0, 0)
    for sock in (client, server, listener):
        sock.close()


def test_threads_lose_no_byte() -> None:
    whole = ByteMeter()
    parts = [ByteMeter(whole) for _ in range(4)]
    threads = [threading.Thread(target=lambda m=part: [m.count(1, 2) for _ in range(5000)]) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (whole.up, whole.down) == (20_000, 40_000)
    assert all((part.up, part.down) == (5000, 10_000) for part in parts)
