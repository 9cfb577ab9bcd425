"""How providers share a blob: providers and time are played here, real ones are in the conformance kit."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from psyche_lightning.errors import AbsentError, TransportError
from psyche_lightning.transports.download import Download, DownloadAttempt, Span
from psyche_lightning.transports.throttle import Throttle
from psyche_lightning.wire.canonical import sha256

BLOCK = 64 * 1024
DATA = random.Random(0).randbytes(5_000_003)


class Played:
    """A provider that delivers what the test says."""

    def __init__(self, name: str, data: bytes | None = DATA, pause: float = 0.0, dies_after: float = 1e18) -> None:
        self.key = name.encode().ljust(32)
        self.trusted = True
        self.data = data
        self.pause = pause
        self.dies_after = dies_after
        self.given = 0
        self.requests = 0
        self.lies: list[str] = []

    async def pull(self, span: Span) -> None:
        self.requests += 1
        loop = asyncio.get_running_loop()
        await asyncio.sleep(self.pause)
        if self.data is None:
            raise AbsentError("does not have it")
        at, wanted = span.at, span.found(len(self.data), loop.time())
        while wanted:
            if self.given >= self.dies_after:
                raise TransportError("was lost: it died")
            block = self.data[at : at + BLOCK]
            at += len(block)
            self.given += len(block)
            wanted = span.write(block, loop.time())
            await asyncio.sleep(self.pause)

    def lied(self, what: str) -> None:
        self.lies.append(what)
        self.trusted = False


class PlayedTime(asyncio.SelectorEventLoop):
    """A loop whose clock goes on to the next timer as soon as nothing else is to be done."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        selector: Any = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def skip(timeout: float | None) -> Any:
            self.now += timeout or 0.0
            return select(timeout and 0.0)

        selector.select = skip

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, call: Callable[..., Any], *arguments: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        done = self.create_future()
        done.set_result(call(*arguments))
        return done


def play(
    *providers: Played, download: Download | None = None, timeout: float = 30, limit: float | None = None
) -> tuple[bytes, float]:
    """Fetch from these providers; returns the bytes, and the seconds that passed in the played time."""
    loop = PlayedTime()

    async def main() -> bytes:
        throttle = Throttle(limit, clock=loop.time)
        try:
            return await DownloadAttempt(
                download or Download(sha256(DATA), 6_000_000), list(providers), timeout, throttle
            ).run()
        finally:
            throttle.close()

    try:
        return loop.run_until_complete(main()), loop.now
    finally:
        loop.close()


def fetch(*providers: Played, download: Download | None = None, timeout: float = 30) -> bytes:
    return play(*providers, download=download, timeout=timeout)[0]


def test_one_provider_gets_one_request() -> None:
    one = Played("one")
    assert fetch(one) == DATA
    assert (one.requests, one.given) == (1, len(DATA))


def test_providers_share_a_blob_by_their_speed() -> None:
    quick, slow = Played("quick", pause=0.001), Played("slow", pause=0.02)
    assert fetch(slow, quick) == DATA
    assert quick.given > 3 * slow.given > 0
    assert quick.given + slow.given <= len(DATA) + 6 * BLOCK


def test_a_small_blob_is_not_divided() -> None:
    small = b"x" * 100_000
    one, two = Played("one", small, 0.01), Played("two", small)
    assert fetch(one, two, download=Download(sha256(small), 200_000)) == small
    assert two.requests == 0


def test_a_provider_that_does_not_answer_is_replaced() -> None:
    silent, one = Played("silent", pause=1000), Played("one")
    assert fetch(silent, one) == DATA


def test_a_slow_provider_loses_its_span() -> None:
    stops, one = Played("stops", pause=0.0), Played("one", pause=0.001)

    async def pull(span: Span) -> None:
        span.found(len(DATA), asyncio.get_running_loop().time())
        for at in range(span.at, span.end):
            span.write(DATA[at : at + 1], asyncio.get_running_loop().time())
            await asyncio.sleep(0.01)

    stops.pull = pull  # type: ignore[method-assign]
    assert fetch(stops, one) == DATA


def test_bytes_from_a_lost_provider_are_not_fetched_again() -> None:
    dying, one = Played("dying", dies_after=1_000_000), Played("one", pause=0.001)
    assert fetch(dying, one) == DATA
    assert one.given <= len(DATA) - 900_000


def test_a_later_attempt_continues() -> None:
    download = Download(sha256(DATA), 6_000_000)
    with pytest.raises(TransportError, match=r"\(\d+ of 5000003 bytes are kept\): .* was lost: it died"):
        fetch(Played("dying", dies_after=2_000_000), download=download)
    one = Played("one")
    assert fetch(one, download=download) == DATA
    assert one.given <= len(DATA) - 2_000_000


@pytest.mark.parametrize("seed", range(8))
def test_wrong_bytes_and_sizes_are_traced_to_their_providers(seed: int) -> None:
    rng = random.Random(seed)
    wrong = bytearray(DATA)
    for _ in range(200):
        wrong[rng.randrange(len(DATA))] ^= 1
    lies = [bytes(wrong), DATA[:-1], DATA + b"x", b"", None]
    providers = [Played(f"honest {n}", pause=rng.random() / 100) for n in range(2)]
    liars = [Played(f"liar {n}", rng.choice(lies), rng.random() / 100) for n in range(2)]
    providers += liars
    rng.shuffle(providers)
    assert fetch(*providers) == DATA
    for provider in providers:
        assert not provider.lies or provider in liars


def test_who_delivers_wrong_bytes_as_one_of_several_and_again_alone_is_blamed_once() -> None:
    liar, one = Played("liar", bytes(len(DATA)), 0.001), Played("one", pause=0.001)
    assert fetch(liar, one) == DATA
    assert liar.requests > 1
    assert len(liar.lies) == 1


def test_if_all_bytes_are_wrong_the_error_names_all_and_nothing_is_kept() -> None:
    providers = [Played("one", DATA[:-1], 0.001), Played("two", bytes(len(DATA)), 0.001)]
    download = Download(sha256(DATA), 6_000_000)
    with pytest.raises(TransportError) as caught:
        fetch(*providers, download=download)
    for provider in providers:
        assert f"{provider.key[:4].hex()} delivered wrong bytes" in str(caught.value)
        assert provider.lies
    assert download.received == 0


def test_an_untrusted_provider_is_asked_last() -> None:
    liar, one = Played("liar", pause=0.001), Played("one", pause=0.001)
    liar.trusted = False
    assert fetch(one, liar) == DATA
    assert liar.requests == 0
    assert fetch(Played("lost", dies_after=0), liar) == DATA


def test_a_blob_that_is_too_large_is_refused_before_it_arrives() -> None:
    with pytest.raises(TransportError, match="has 5000003 bytes, more than the 10 expected"):
        fetch(one := Played("one"), download=Download(sha256(DATA), 10))
    assert one.given == 0


def test_errors_tell_a_lack_of_providers_from_a_lack_of_time() -> None:
    with pytest.raises(TransportError, match="no provider is known"):
        fetch()
    with pytest.raises(TransportError, match="was not asked, because time ran out"):
        fetch(Played("one"), timeout=0)
    with pytest.raises(TransportError, match=r"took too long \(no answer after 0.1 s\)"):
        fetch(Played("one", pause=1000), timeout=0.1)


def test_with_a_limit_requests_stay_within_the_rate() -> None:
    asked: list[int] = []

    class Watched(Played):
        async def pull(self, span: Span) -> None:
            asked.append(span.left)
            await super().pull(span)

    small = random.Random(1).randbytes(200_000)
    providers = [Watched("one", small), Watched("two", small)]
    data, seconds = play(*providers, download=Download(sha256(small), 200_000), limit=100_000)
    assert data == small
    assert max(asked) <= 25_000
    assert 100_000 * seconds + 10_000 + 2 * 25_001 >= 200_000
