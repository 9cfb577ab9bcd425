"""What a node, an attacker and a spectator may send to the server's websocket, and what they get."""

from __future__ import annotations

import asyncio
import json
import random

import aiohttp
import pytest

from psyche_lightning.protocol.codec import patch, state_to_json
from psyche_lightning.protocol.manifest import manifest_digest, manifest_text
from psyche_lightning.protocol.requests import REQUESTS, wire_types
from psyche_lightning.server.channel import SYNC, seal_frame, seal_hello
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.wire.canonical import pack
from psyche_lightning.wire.identity import Identity

SETTINGS = {"init_min_clients": 2, "total_steps": 5, "global_batch_size_start": 2}
BLOOM = bytes(192)


async def create(url, run_id="r", **settings):
    body = {"run_id": run_id, "config": {**SETTINGS, **settings}, "seed": 7}
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/runs", json=body) as answer:
        assert answer.status == 201, await answer.text()


class Raw:
    """A websocket on which anything can be sent."""

    def __init__(self, socket, session):
        self.socket, self.session, self.state = socket, session, None

    @classmethod
    async def open(cls, url, run_id="r", identity=None):
        session = aiohttp.ClientSession()
        raw = cls(await session.ws_connect(f"{url}/v1/runs/{run_id}/watch", compress=15), session)
        hello = await raw.frame()
        assert hello[:2] == ["hello", 2]
        raw.challenge = bytes.fromhex(hello[2])
        assert (await raw.frame())[0] == "state"
        if identity is not None:
            await raw.socket.send_bytes(seal_hello(identity, run_id, raw.challenge))
        return raw

    async def frame(self):
        return json.loads(await self.socket.receive_str(timeout=30))

    async def answer(self, frame):
        """Send a frame; the answer to it, past what else comes."""
        await self.socket.send_bytes(frame)
        while True:
            got = await self.frame()
            if got[0] in ("ok", "error"):
                return got

    async def refused(self, frame):
        """Send a frame that ends the connection; the error's text."""
        kind, number, problem = await self.answer(frame)
        assert (kind, number, problem["code"]) == ("error", 0, "BadRequest")
        while (message := await self.socket.receive(30)).type is aiohttp.WSMsgType.TEXT:
            pass
        assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 4002)
        await self.close()
        return problem["error"]

    async def close(self):
        await self.socket.close()
        await self.session.close()


def join(identity, challenge, number=1, run_id="r", address="a"):
    manifest = {"model": {"name": "m"}}
    arguments = [address, manifest_digest(manifest), manifest_text(manifest)]
    return seal_frame(identity, run_id, challenge, number, "join", arguments)


def test_a_request_works_once_and_only_on_its_own_connection(served, run):
    alice = Identity.generate()

    async def main():
        async with served() as (server, url):
            await create(url)
            first = await Raw.open(url, identity=alice)
            request = join(alice, first.challenge)
            assert await first.answer(request) == ["ok", 1, None]
            assert "replayed; numbers must increase" in await first.refused(request)
            second = await Raw.open(url, identity=alice)
            assert "replayed from another connection" in await second.refused(request)
            assert server.runs["r"].host.membership.members.keys() == set([alice.public])

    run(main())


@pytest.mark.parametrize("way", ["key", "run", "bit", "hello", "hello run", "hello short"])
def test_wrong_signatures(served, run, way):
    alice, mallory = Identity.generate(), Identity.generate()

    async def main():
        async with served() as (server, url):
            await create(url)
            raw = await Raw.open(url, identity=None if "hello" in way else alice)
            good = join(alice, raw.challenge)
            frame = {
                "key": join(mallory, raw.challenge),
                "run": join(alice, raw.challenge, run_id="other"),
                "bit": good[:-1] + bytes([good[-1] ^ 1]),
                "hello": alice.public + seal_hello(mallory, "r", raw.challenge)[32:],
                "hello run": seal_hello(alice, "other", raw.challenge),
                "hello short": seal_hello(alice, "r", raw.challenge)[:-1],
            }[way]
            text = await raw.refused(frame)
            assert ("wrong signature" in text) or (way == "hello short" and "95 bytes" in text)
            assert server.runs["r"].host.membership.members.keys() == set([])

    run(main())


@pytest.mark.parametrize(
    "body",
    [
        pack([1, "join", []]),
        pack([1, "join", ["a", b"", 7]]),
        pack([1, "no such thing", []]),
        pack([1, "withdraw", [1]]),
        pack([0, "withdraw", []]),
        pack([True, "withdraw", []]),
        pack([1.0, "withdraw", []]),
        pack([1, "withdraw"]),
        pack([1, b"withdraw", []]),
        pack(None),
        b"",
        b"\xc1",
        b"\x93\xcd\x00\x01\xa8withdraw\x90",  # number 1 in a longer encoding than needed
    ],
)
def test_malformed_requests_with_a_good_signature(served, run, body):
    alice = Identity.generate()

    async def main():
        async with served() as (server, url):
            await create(url)
            raw = await Raw.open(url, identity=alice)
            statement = alice.sign("psyche-lightning coordinator request 1", "r", raw.challenge + body)
            await raw.refused(statement + body)
            assert server.runs["r"].host.membership.members.keys() == set([])

    run(main())


def test_odd_values_are_refused_with_a_reason_and_change_nothing(served, run):
    alice = Identity.generate()
    most = 2**64 - 1
    report = [1, float("nan"), 1.0, 0, 0]
    requests = [
        ("witness", [0, 0, 0, most, True, bytes(32), BLOOM, BLOOM, 0, b"", report]),
        ("witness", [0, most, most, 0, True, b"", b"", b"", most, b"x", report]),
        ("witness", [-1, -5, -3, -7, False, bytes(32), BLOOM, BLOOM, -9, bytes(32), report]),
        ("warmup_witness", [0, most, bytes(32)]),
        ("warmup_witness", [-1, -1, b""]),
        ("health_check", [0, most, [bytes(32)] * 1000]),
        ("join", ["a", bytes(32), ""]),
        ("join", ["a", bytes(32), "{"]),
        ("join", ["a", bytes(32), "[1]"]),
        ("join", ["a", bytes(32), "[" * 100_000]),
        ("join", ["a" * 100_000, *(f({}) for f in (manifest_digest, manifest_text))]),
    ]

    async def main():
        async with served() as (server, url):
            await create(url)
            raw = await Raw.open(url, identity=alice)
            before = server.runs["r"].host.dump()
            for number, (method, arguments) in enumerate(requests, 1):
                got = await raw.answer(seal_frame(alice, "r", raw.challenge, number, method, arguments))
                assert got[:2] == ["error", number], method
                assert got[2]["error"]
                assert got[2]["code"] != "BadRequest"
            assert {**server.runs["r"].host.dump(), "now": 0} == {**before, "now": 0}
            got = await raw.answer(seal_frame(alice, "r", raw.challenge, 99, "rounds", [most, most]))
            assert (got[:2], got[2]["code"]) == (["error", 99], "NotMember")
            await raw.close()

    run(main())


@pytest.mark.parametrize("figures", [[1], [-1, 1.0, 1.0, 0, 0], [1, 1, 1.0, 0, 0], [1, 1.0, 1.0, 0, "x"], [True] * 5])
def test_a_report_of_other_shape_ends_the_connection(served, run, figures):
    alice = Identity.generate()

    async def main():
        async with served() as (_, url):
            await create(url)
            raw = await Raw.open(url, identity=alice)
            arguments = [0, 0, 0, 0, True, bytes(32), BLOOM, BLOOM, 0, b"", figures]
            kind, number, problem = await raw.answer(seal_frame(alice, "r", raw.challenge, 1, "witness", arguments))
            assert (kind, number) == ("error", 1)
            assert "report" in problem["error"]
            await raw.close()

    run(main())


def test_garbage_oversized_and_text_frames_leave_the_server_well(served, run):
    dice = random.Random(5)
    alice = Identity.generate()

    async def main():
        async with served() as (server, url):
            await create(url)
            for _ in range(20):
                raw = await Raw.open(url, identity=alice if dice.random() < 0.5 else None)
                await raw.refused(dice.randbytes(dice.randrange(300)))
            raw = await Raw.open(url)
            await raw.socket.send_str('["state", {}]')
            assert "binary frames only" in (await raw.frame())[2]["error"]
            await raw.close()
            for size in (9 * 2**20,):
                raw = await Raw.open(url, identity=alice)
                await raw.socket.send_bytes(bytes(size))  # compresses to next to nothing
                while (message := await raw.socket.receive(30)).type is aiohttp.WSMsgType.TEXT:
                    pass
                assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1009)
                await raw.close()
            good = await Raw.open(url, identity=alice)
            assert await good.answer(join(alice, good.challenge)) == ["ok", 1, None]
            await good.close()
            assert server.runs["r"].host.membership.members.keys() == set([alice.public])

    run(main())


def test_random_valid_requests_never_break_the_connection(served, run):
    """Whatever types fit, the answer is ok or a named error."""
    dice = random.Random(11)
    alice = Identity.generate()

    def value(kind):
        return {
            int: lambda: dice.choice([0, 1, 2, -1, 2**31, 2**64 - 1, dice.randrange(100)]),
            str: lambda: dice.choice(["", "{}", "x" * dice.randrange(50), "\x00é"]),
            bytes: lambda: dice.randbytes(dice.choice([0, 1, 32, 192])),
            bool: lambda: dice.random() < 0.5,
            list: lambda: dice.choice([[], [b""], [alice.public], [1, 2.0, 3.0, 4, 5], [[]], [0, 0.0, 0.0, 0, 0]]),
        }[kind]()

    async def main():
        async with served() as (_, url):
            await create(url, init_min_clients=1)
            raw = await Raw.open(url, identity=alice)
            await raw.answer(join(alice, raw.challenge))
            for number in range(2, 300):
                method = dice.choice([*REQUESTS, SYNC])
                kinds = wire_types(REQUESTS[method]) if method in REQUESTS else ()
                arguments = [value(kind) for kind in kinds]
                got = await raw.answer(seal_frame(alice, "r", raw.challenge, number, method, arguments))
                assert got[0] == "ok" or got[2]["error"]
                assert got[1] == number
            await raw.close()

    run(main())


def test_changes_add_up_to_the_full_state_and_leave_blooms_out(served, walk, run, quick):
    identities = [Identity.generate() for _ in range(3)]

    async def main():
        async with served() as (server, url):
            await create(url, **quick, init_min_clients=3, total_steps=15)
            session = aiohttp.ClientSession()
            socket = await session.ws_connect(f"{url}/v1/runs/r/watch")
            frames = []

            async def spectate():
                async for message in socket:
                    frames.append(json.loads(message.data))

            spectator = asyncio.ensure_future(spectate())
            clients = [HttpCoordinator(url, "r", identity) for identity in identities]
            await asyncio.gather(*map(walk, clients))
            await asyncio.gather(*(client.close() for client in clients))
            await asyncio.sleep(0.1)
            await session.close()
            await asyncio.gather(spectator, return_exceptions=True)
            assert [frame[0] for frame in frames[:2]] == ["hello", "state"]
            assert {frame[0] for frame in frames[2:]} == {"change"}
            state = frames[1][1]
            for _, nonce, change in frames[2:]:
                assert nonce == state["nonce"]
                state = patch(state, change)
            assert state == state_to_json(server.runs["r"].state)
            text = json.dumps(frames)
            assert "participants" not in text
            assert "broadcasts" not in text
            # Changes are small: the whole state would be some 3 KB each time.
            sizes = [len(json.dumps(frame)) for frame in frames[2:]]
            assert sum(sizes) / len(sizes) < len(json.dumps(state)) / 4

    run(main())
