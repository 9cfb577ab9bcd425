"""Token files over HTTP: what is asked for, what is kept, and servers that fail, change, lie or are slow."""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from psyche_lightning import entrance
from psyche_lightning.data import client
from psyche_lightning.data.client import FetchOptions
from psyche_lightning.data.files import Lost, Range
from psyche_lightning.data.remote import RemoteFiles, numbered
from psyche_lightning.data.serve import FileServer
from psyche_lightning.data.tokens import TokenData
from psyche_lightning.errors import ConfigError, DataError

Make = Callable[..., Any]
SOON = {"retry_seconds": 0.1}


class Server(FileServer):
    """A server that counts what it is asked for, and can be told to answer otherwise."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ranges: list[str] = []
        self.answer: Callable[[web.Request], Any] = lambda request: None

    def application(self) -> web.Application:
        application = super().application()
        application.middlewares.append(self._middleware)
        return application

    @property
    def _middleware(self) -> Any:
        @web.middleware
        async def between(request: web.Request, handler: Any) -> web.StreamResponse:
            self.ranges.append(request.headers.get("Range", ""))
            answer = self.answer(request)
            return (await answer if inspect.isawaitable(answer) else answer) or await handler(request)

        return between


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    with Server(folder) as running:
        yield running


def write(server: Server, name: str, count: int, first: int = 0) -> Path:
    path = server._folder / name
    path.write_bytes((np.arange(first, first + count) % 1000).astype("<u2").tobytes())
    return path


def opened(server: Server, name: str = "a.bin", **options: Any) -> TokenData:
    given = {"seq_len": 4, "url": f"{server.url}/{name}", "vocab_size": 1000, "shuffle": False, "fetch": SOON}
    return TokenData(1, **{**given, **options})


def first_ids(data: TokenData) -> list[int]:
    return [int(sample["input_ids"][0]) for sample in data.samples(0, len(data))]


def test_the_last_sequence_is_there(server: Server) -> None:
    write(server, "a.bin", 12)
    assert first_ids(opened(server)) == [0, 4, 8]


def test_neighbours_come_in_one_request_and_are_kept(server: Server) -> None:
    write(server, "a.bin", 4000)
    data = opened(server)
    server.ranges.clear()
    data.samples(10, 20)
    assert server.ranges == ["bytes=80-159"]
    data.samples(12, 15)
    assert len(server.ranges) == 1, "from memory"
    data.samples(18, 22)
    assert server.ranges[1:] == ["bytes=160-175"]


def test_a_request_has_a_largest_size(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psyche_lightning.data.remote.MAX_REQUEST", 80)
    write(server, "a.bin", 4000)
    data = opened(server)
    server.ranges.clear()
    assert len(data.samples(0, 25)) == 25
    assert sorted(server.ranges) == ["bytes=0-79", "bytes=160-199", "bytes=80-159"]


def test_memory_is_bounded(server: Server) -> None:
    write(server, "a.bin", 3 << 19)
    files = RemoteFiles([f"{server.url}/a.bin"], FetchOptions(cache_mb=1))
    size = 1 << 15
    ranges = [Range(0, start, size) for start in range(0, 3 << 20, size)]
    for part in ranges:
        assert len(files.read([part])[0]) == size
        assert files._cache.size <= 1 << 20
    server.ranges.clear()
    files.read(ranges[-32:])
    assert server.ranges == [], "the newest MiB is here"
    files.read(ranges[:1])
    assert len(server.ranges) == 1, "the oldest is not"


def test_prefetching_is_bounded_and_its_ranges_are_used(server: Server) -> None:
    write(server, "a.bin", 3 << 19)
    files = RemoteFiles([f"{server.url}/a.bin"], FetchOptions(cache_mb=1, connections=1))
    size = 1 << 15
    ranges = [Range(0, start, size) for start in range(0, 3 << 20, 2 * size)]
    gate = threading.Event()
    seen: list[str] = []

    def hold(request: web.Request) -> None:
        seen.append(request.headers["Range"])
        gate.wait(20)

    server.answer = hold
    files.prefetch(ranges)
    files.prefetch(ranges)
    waiting = len(files._cache._coming)
    gate.set()
    assert 8 <= waiting <= 16, "no more than half of the memory is under way"
    found = files.read(ranges[:8])
    assert all(isinstance(part, bytes) and len(part) == size for part in found)
    assert len(set(seen)) == len(seen), "nothing is fetched twice"


def test_numbered_files_and_a_description(server: Server, tmp_path: Path) -> None:
    for number in range(3):
        write(server, f"part-{number + 8:03}.bin", 8, first=100 * number)
    data = opened(server, "part-{}.bin", count=3, start=8, pad=3)
    assert first_ids(data) == [0, 4, 100, 104, 200, 204]
    from psyche_lightning.data.description import TokenWriter
    from psyche_lightning.data.tokenizer import Encoder

    writer = TokenWriter(server._folder / "made", Encoder("bytes"), file_tokens=8)
    writer.write(np.arange(20))
    writer.close()
    made = opened(server, "made/dataset.json", vocab_size=None)
    assert first_ids(made) == [0, 4, 8, 12, 16]
    assert made.vocab_size == 256
    local = TokenData(1, 4, path=str(server._folder / "made"), shuffle=False)
    assert made.fingerprint == local.fingerprint, "a node with a copy may train with one without"


def test_a_numpy_header_is_not_read_as_tokens(server: Server) -> None:
    np.save(server._folder / "a.npy", np.arange(9, dtype="<u4"))
    assert first_ids(opened(server, "a.npy")) == [0, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://x/y"}, "not an http or https URL"),
        ({"url": 5}, "5 is not an http"),
        ({"url": "http://[::1"}, "not an http or https URL"),
        ({"url": "http://a..b/x"}, "not an http or https URL"),
        ({"url": "http://a b/x"}, "not an http or https URL"),
        ({"url": "http://x/a.bin", "count": 2}, "exactly one {}"),
        ({"url": "http://x/{}{}.bin", "count": 2}, "exactly one {}"),
        ({"url": "http://x/{}.bin", "count": 0}, "count is 0"),
        ({"url": "http://x/{}.bin", "count": 10**9}, "at most 10000"),
        ({"url": "http://x/{}.bin", "count": 2, "pad": 99}, "with 20"),
        ({"url": "http://x/{}.bin", "count": 2, "start": -1}, "start is -1"),
    ],
)
def test_wrong_addresses_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenData(1, 4, vocab_size=10, **options)


def test_numbers_are_padded() -> None:
    assert numbered("http://x/{}.bin", start=9, pad=3, count=2) == ["http://x/009.bin", "http://x/010.bin"]
    assert numbered("http://x/{}.bin", start=9, pad=0, count=2) == ["http://x/9.bin", "http://x/10.bin"]


def test_an_address_that_does_not_exist(server: Server) -> None:
    write(server, "p-0.bin", 8)
    with pytest.raises(ConfigError, match=r"a.bin does not exist or is not public: its server answers 404 Not Found"):
        opened(server)
    with pytest.raises(ConfigError, match=r"p-1.bin does not exist"):
        opened(server, "p-{}.bin", count=2)
    with pytest.raises(ConfigError, match=r"no/dataset.json cannot be read: its server answers 404"):
        opened(server, "no/dataset.json")


def test_an_empty_file(server: Server) -> None:
    write(server, "a.bin", 0)
    with pytest.raises(ConfigError, match=r"a.bin is empty|makes 0 samples"):
        opened(server)


def test_no_server_at_the_address() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match=r"cannot be reached: .*no connection to 127.0.0.1.* Is the address right"):
        TokenData(1, 4, url=f"http://127.0.0.1:{port}/a.bin", vocab_size=10, fetch=SOON)


def test_a_server_without_ranges(server: Server) -> None:
    write(server, "a.bin", 100)
    server.answer = lambda request: web.Response(body=b"x" * 200)
    with pytest.raises(ConfigError, match=r"does not support range requests .it answers 200 OK"):
        opened(server)


def test_another_file_under_the_same_address(server: Server) -> None:
    path = write(server, "a.bin", 100)
    data = opened(server)
    write(server, "a.bin", 101)
    with pytest.raises(DataError, match=r"a.bin has changed: at the start it had 200 bytes") as caught:
        data.samples(3, 6)
    assert caught.value.lasting
    assert caught.value.ids == (3, 4, 5)
    time.sleep(0.01)
    write(server, "a.bin", 100, first=7)
    assert path.stat().st_size == 200
    with pytest.raises(DataError, match="has changed"):
        data.samples(0, 1)
    write(server, "a.bin", 4)
    with pytest.raises(DataError, match="has changed"):
        data.samples(20, 21)


def test_joining_nodes_notice_other_data(server: Server) -> None:
    write(server, "a.bin", 100)
    before = opened(server).fingerprint
    write(server, "a.bin", 100, first=1)
    assert opened(server).fingerprint != before


@pytest.mark.parametrize("status", [500, 503, 429, 408, 404, 403])
def test_temporary_errors_are_tried_again(server: Server, status: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "psyche_lightning")
    write(server, "a.bin", 100)
    data = opened(server, fetch={"retry_seconds": 30})
    left = [2]

    def fail(request: web.Request) -> web.StreamResponse | None:
        left[0] -= 1
        return web.Response(status=status) if left[0] >= 0 else None

    server.answer = fail
    if status in (404, 403):  # the file is away; what repeats then is the run, in its next round
        with pytest.raises(DataError, match=f"the server answers {status}") as caught:
            data.samples(0, 2)
        assert not caught.value.lasting
        left[0] = 0
    assert len(data.samples(0, 2)) == 2
    if status not in (404, 403):
        name = f"the data server {server.url.removeprefix('http://')}"
        lost, back = caplog.messages  # once each, however often it was tried
        assert lost.startswith(f"lost {name}: {server.url}/a.bin: the server answers {status}")
        assert back.startswith(f"{name} is back after ")


def lie(status: int = 206, body: bytes = b"", **headers: str) -> Callable[[web.Request], web.StreamResponse]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda request: web.Response(status=status, body=body, headers=named)


@pytest.mark.parametrize(
    "answer",
    [
        lie(body=b"12345678"),
        lie(body=b"12345678", Content_Range="bytes 0-7/x"),
        lie(body=b"12345678", Content_Range="bytes 8-15/200"),
        lie(body=b"12345678", Content_Range="bytes 0-3/200"),
        lie(body=b"12345678", Content_Range="bytes 0-7/" + "9" * 40),
        lie(body=b"1234", Content_Range="bytes 0-7/200"),
    ],
)
def test_answers_with_other_bytes_are_not_used(server: Server, answer: Any) -> None:
    write(server, "a.bin", 100)
    data = opened(server)
    server.answer = answer
    with pytest.raises(DataError) as caught:
        data.samples(0, 1)
    assert not caught.value.lasting


def test_one_file_that_is_away_does_not_hold_up_the_others(server: Server) -> None:
    for number in range(2):
        write(server, f"p-{number}.bin", 40, first=100 * number)
    data = opened(server, "p-{}.bin", count=2)
    (server._folder / "p-0.bin").rename(server._folder / "away")
    with pytest.raises(DataError) as caught:
        data.samples(8, 13)
    assert caught.value.ids == (8, 9)
    assert [int(sample["input_ids"][0]) for sample in data.samples(10, 13)] == [100, 104, 108]


def test_a_dead_server_costs_one_wait_however_much_is_asked(server: Server) -> None:
    write(server, "a.bin", 4000)
    files = RemoteFiles([f"{server.url}/a.bin"], FetchOptions(retry_seconds=0.5, connections=2))
    server.stop()
    try:
        attempts = [0]
        real = client.Client._part

        async def counted(self: Any, *arguments: Any) -> Any:
            attempts[0] += 1
            return await real(self, *arguments)

        client.Client._part = counted  # type: ignore[method-assign]
        try:
            found = files.read([Range(0, 16 * number, 8) for number in range(400)])
        finally:
            client.Client._part = real  # type: ignore[method-assign]
        assert all(isinstance(part, Lost) and not part.lasting for part in found)
        assert attempts[0] < 100, "those that waited failed with the first"
    finally:
        server.start()


def test_a_very_slow_server_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    write(server, "a.bin", 100)
    monkeypatch.setattr(client, "READ_TIMEOUT", 0.3)
    monkeypatch.setattr(client, "CONNECT_TIMEOUT", 0.3)
    data = opened(server)

    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=206, headers={"Content-Range": "bytes 0-7/200", "Content-Length": "8"})
        await response.prepare(request)
        await response.write(b"1")
        await asyncio.sleep(3)
        return response

    server.answer = drip
    with pytest.raises(DataError, match="does not answer in time"):
        data.samples(0, 1)


def test_a_description_of_any_size_is_not_read(server: Server) -> None:
    (server._folder / "dataset.json").write_bytes(b" " * (5 << 20))
    with pytest.raises(ConfigError, match="is larger than"):
        opened(server, "dataset.json")


def test_the_file_server_gives_nothing_else(server: Server, tmp_path: Path) -> None:
    import urllib.error
    import urllib.request

    (tmp_path / "secret.bin").write_bytes(b"secret")
    (server._folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    for path in ("../secret.bin", "%2e%2e/secret.bin", "link.bin", ""):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{server.url}/{path}")
    with pytest.raises(ConfigError, match="does not exist"):
        FileServer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="cannot listen on"), FileServer(tmp_path, port=server._port):
        pass


# --- mixes ----------------------------------------------------------------------------------------------------------


def entry(location: Any, weight: Any = None, **changes: Any) -> Any:
    one = {"location": location, "token_size_in_bytes": "TwoBytes", "shuffle": "DontShuffle", **changes}
    return one if weight is None else [one, weight]


def mixed(server: Server, *providers: Any, **options: Any) -> Any:
    from psyche_lightning.data.mix import MixedData

    index = {"shuffle": options.pop("shuffle", "DontShuffle"), "providers": list(providers)}
    (server._folder / "mix.json").write_text(json.dumps(index))
    where = options.pop("where", {"url": f"{server.url}/mix.json"})
    return MixedData(1, 4, vocab_size=1000, fetch=SOON, **{**where, **options})


def test_a_mix_equals_psyches(server: Server) -> None:
    """Weights .7 and .3 of five samples each: Psyche's vector."""
    write(server, "a.bin", 20)
    write(server, "b.bin", 20, first=100)
    sources = [{"SingleUrl": f"{server.url}/{name}.bin"} for name in "ab"]
    data = mixed(server, entry(sources[0], 0.7), entry(sources[1], 0.3))
    assert first_ids(data) == [0, 100, 4, 8, 104, 12, 16, 108, 0, 4]
    assert [int(sample["input_ids"][0]) for sample in data.samples(10, 12)] == [0, 100], "and wraps around"
    seeded = mixed(server, entry(sources[0], 7), entry(sources[1], 3), shuffle={"Seeded": list(range(1, 33))})
    assert sorted(first_ids(seeded)) == sorted(first_ids(data))
    assert first_ids(seeded) != first_ids(data)


def test_a_mix_without_weights_goes_by_length_and_may_be_local(server: Server) -> None:
    write(server, "a.bin", 24)
    write(server, "b.bin", 8, first=100)
    local = {"path": str(server._folder / "mix.json")}
    data = mixed(server, entry({"Local": "a.bin"}), entry({"SingleUrl": f"{server.url}/b.bin"}), where=local)
    found = first_ids(data)
    assert len(found) == 8
    assert sorted(found) == [0, 4, 8, 12, 16, 20, 100, 104]
    write(server, "c.bin", 80)
    shuffled = entry({"Local": "c.bin"}, shuffle={"Seeded": list(range(1, 33))})
    expected = [18, 1, 17, 6, 15, 9, 8, 14, 16, 12, 19, 5, 0, 2, 4, 7, 11, 10, 3, 13]
    assert [first // 4 for first in first_ids(mixed(server, shuffled, where=local))] == expected, "its own order"


def test_part_of_a_mix_may_be_away(server: Server) -> None:
    write(server, "a.bin", 20)
    write(server, "b.bin", 20, first=100)
    sources = [{"SingleUrl": f"{server.url}/{name}.bin"} for name in "ab"]
    data = mixed(server, entry(sources[0], 0.7), entry(sources[1], 0.3))
    (server._folder / "b.bin").unlink()
    with pytest.raises(DataError, match=r"b.bin: the server answers 404") as caught:
        data.samples(0, 10)
    assert caught.value.ids == (1, 4, 7)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("[]", "expected the keys shuffle, providers"),
        ({"shuffle": "DontShuffle"}, "expected the keys"),
        ({"shuffle": "DontShuffle", "providers": []}, "not a list of 1 to"),
        ({"shuffle": {"Seeded": [1]}, "providers": [1]}, "a list of 32 numbers"),
        ({"shuffle": {"Seeded": True}, "providers": [1]}, "a 'shuffle' is"),
        ({"shuffle": "Yes", "providers": [1]}, "a 'shuffle' is Yes"),
        ({"shuffle": "DontShuffle", "providers": [entry({"SingleUrl": "x"}), entry({"SingleUrl": "x"}, 1)]}, "some of"),
        ({"shuffle": "DontShuffle", "providers": [[1, 2, 3]]}, "does not have the form"),
        ({"shuffle": "DontShuffle", "providers": [entry({"SingleUrl": "x"}, 0)]}, "a weight is 0"),
        ({"shuffle": "DontShuffle", "providers": [entry({"SingleUrl": "x"}, "1")]}, "a weight is '1'"),
        ({"shuffle": "DontShuffle", "providers": [entry({"Gcp": {"bucket_name": "x"}})]}, "expected one of SingleUrl"),
        ({"shuffle": "DontShuffle", "providers": [entry({"SingleUrl": "x"})]}, "not an http or https URL"),
        ({"shuffle": "DontShuffle", "providers": [entry({"NumberedFiles": {}})]}, "expected the keys url_template"),
        ({"shuffle": "DontShuffle", "providers": [entry({"Local": "/etc"})]}, "names files of this machine"),
        ({"shuffle": "DontShuffle", "providers": [entry({"SingleUrl": "x"}, token_size_in_bytes=2)]}, "'token_size"),
        ({"shuffle": "DontShuffle", "providers": [{"location": 1}]}, "expected the keys location"),
    ],
)
def test_other_indices_are_refused(server: Server, index: Any, message: str) -> None:
    from psyche_lightning.data.mix import MixedData

    (server._folder / "mix.json").write_text(index if isinstance(index, str) else json.dumps(index))
    with pytest.raises(ConfigError, match=message):
        MixedData(1, 4, url=f"{server.url}/mix.json", vocab_size=1000, fetch=SOON)


def test_an_index_has_a_largest_size(server: Server) -> None:
    from psyche_lightning.data.mix import MixedData

    (server._folder / "mix.json").write_bytes(b" " * ((1 << 20) + 1))
    for where in ({"url": f"{server.url}/mix.json"}, {"path": str(server._folder / "mix.json")}):
        with pytest.raises(ConfigError, match="larger than"):
            MixedData(1, 4, vocab_size=1000, **where)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        MixedData(1, 4, vocab_size=1000, path="nowhere.json")
    with pytest.raises(ConfigError, match="got neither"):
        MixedData(1, 4, vocab_size=1000)


def test_connections_that_ask_for_nothing_do_not_keep_readers_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entrance, "MAX_SILENT_OF_HOST", 3)
    (tmp_path / "dataset.json").write_text("{}")
    with FileServer(tmp_path) as server:
        host, port = server.url.removeprefix("http://").split(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(8)]
        for one in silent[:5]:
            one.settimeout(20)
            assert one.recv(1) == b""
        with socket.create_connection((host, int(port))) as reader:
            reader.sendall(f"GET /dataset.json HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
            reader.settimeout(20)
            assert b"200 OK" in reader.recv(1000)
        for one in silent:
            one.close()
