"""An HTTP client for a training thread: a background event loop, bounded answers, retries, remembered failures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from psyche_lightning.data.options import whole
from psyche_lightning.errors import ConfigError, cause, nearest
from psyche_lightning.logs import Outage
from psyche_lightning.urls import http_parts

if TYPE_CHECKING:
    import aiohttp

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0
READ_TIMEOUT = 10.0
SLOWEST = 32 << 10
"""Bytes a second; a slower server counts as gone."""
GONE = (401, 403, 404, 410)
_LATER = (408, 425, 429)
_T = TypeVar("_T")


@dataclass(frozen=True)
class FetchOptions:
    """How this node fetches data; nodes may differ.

    Attributes:
        cache_mb: memory for samples, in MiB.
        retry_seconds: how long to repeat a request before its samples count as lost.
        connections: the most requests at a time.
    """

    cache_mb: int = 256
    retry_seconds: float = 30.0
    connections: int = 8

    @classmethod
    def of(cls, values: object) -> FetchOptions:
        """Check the option ``fetch``.

        Raises:
            ConfigError: it is not a mapping, or a key is unknown or has a wrong value.
        """
        names = [item.name for item in fields(cls)]
        given = {} if values is None else values
        if not isinstance(given, dict):
            raise ConfigError(f"fetch is {values!r}, expected keys and values: {', '.join(names)}.")
        for name in given:
            if name not in names:
                raise ConfigError(f"fetch has no key {name!r}.{nearest(str(name), names)} Keys: {', '.join(names)}.")
        fetch = cls(**given)
        whole("fetch.cache_mb", fetch.cache_mb, least=1)
        whole("fetch.connections", fetch.connections, least=1)
        if type(fetch.retry_seconds) not in (int, float) or not 0 <= fetch.retry_seconds < float("inf"):
            raise ConfigError(f"fetch.retry_seconds is {fetch.retry_seconds!r}, expected seconds, 0 or more.")
        return fetch


class Temporary(Exception):
    """A request failed, but may succeed later.

    Attributes:
        server: whether other requests to the same server would fail, too.
    """

    def __init__(self, reason: str, *, server: bool = True) -> None:
        super().__init__(reason)
        self.server = server


@dataclass(frozen=True)
class Answer:
    """A part of a file from a server.

    Attributes:
        data: the bytes.
        start: position of the first byte in the file.
        size: bytes of the whole file.
        version: changes with the file: its entity tag, or else the time of its last change.
    """

    data: bytes
    start: int
    size: int
    version: str


class Refused(Exception):
    """The server answers, but not with a range of the file; a repetition is useless.

    Attributes:
        status: the HTTP status.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} {reason}")
        self.status = status


class Client:
    """Makes requests on an event loop in a thread.

    If a server did not answer for ``fetch.retry_seconds``, the requests that waited meanwhile fail as well. So a server
    that is down delays a round only once, however many requests the round needs.

    Args:
        fetch: how to fetch.
        local: whether the servers run on this machine.
    """

    def __init__(self, fetch: FetchOptions, *, local: bool) -> None:
        self._fetch = fetch
        self._local = local
        self._slots = asyncio.Semaphore(fetch.connections)
        self._session: aiohttp.ClientSession | None = None
        self._failed_at = -1.0
        self._failure = ""
        self._outages: dict[str, Outage] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="psyche-data", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run a coroutine on the loop; call it from another thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """End the thread, and give up requests in progress."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._stop()))
            if threading.current_thread() is not self._thread:
                self._thread.join(2.0)

    async def _stop(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()
        self._loop.stop()

    # --- requests ---------------------------------------------------------------------------------------------------

    async def part(self, url: str, start: int, length: int, asked: float) -> Answer:
        """Fetch bytes of a file; returns fewer than ``length`` only at its end.

        Args:
            url: URL of the file.
            start: the first byte.
            length: number of bytes.
            asked: ``time.monotonic()`` when they were requested.

        Raises:
            Temporary: time is up.
            Refused: the server answers with something else.
        """
        return await self._retry(url, lambda: self._part(url, start, length), asked)

    async def text(self, url: str, limit: int) -> bytes:
        """Fetch a small document.

        Raises:
            Temporary: time is up.
            Refused: the server answers with something else.
            ConfigError: the document is larger than ``limit`` bytes.
        """
        return await self._retry(url, lambda: self._text(url, limit), time.monotonic())

    async def _retry(self, url: str, request: Callable[[], Awaitable[_T]], asked: float) -> _T:
        server = urlsplit(url).netloc.rpartition("@")[2]
        outage = self._outages.setdefault(server, Outage(logger, f"the data server {server}", level=logging.INFO))
        async with self._slots:
            if self._failed_at >= asked:
                raise Temporary(self._failure)
            try:
                async for attempt in AsyncRetrying(
                    stop=stop_after_delay(self._fetch.retry_seconds),
                    wait=wait_random_exponential(multiplier=0.2, max=3.0),
                    retry=retry_if_exception_type(Temporary),
                    before_sleep=lambda attempt: outage.fails(attempt.outcome.exception() if attempt.outcome else None),
                    reraise=True,
                ):
                    with attempt:
                        found = await request()
            except Temporary as error:
                outage.fails(error)
                if error.server:
                    self._failed_at, self._failure = time.monotonic(), str(error)
                raise
            except Refused:
                outage.works()
                raise
            outage.works()
            return found

    async def _part(self, url: str, start: int, length: int) -> Answer:
        headers = {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        async with self._open(url, length, headers) as response:
            if response.status != 206 or response.headers.get("Content-Encoding", "identity") != "identity":
                raise Refused(response.status, response.reason or "")
            text = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", text)
            first, last, size = map(int, match.groups()) if match else (-1, -1, -1)
            if match is None or first != start or last != min(start + length, size) - 1:
                raise Temporary(f"{url}: the server sent {text[:80]!r} instead of bytes {start}-{start + length - 1}")
            try:
                data = await response.content.readexactly(last - first + 1)
            except asyncio.IncompleteReadError as error:
                raise Temporary(f"{url}: the connection ended after {len(error.partial)} of {length} bytes") from error
            version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            return Answer(data, start, size, version)

    async def _text(self, url: str, limit: int) -> bytes:
        async with self._open(url, limit, {}) as response:
            if response.status != 200:
                raise Refused(response.status, response.reason or "")
            found = b""
            while chunk := await response.content.read(1 << 16):
                found += chunk
                if len(found) > limit:
                    raise ConfigError(f"{url} is larger than {limit} bytes, so it cannot be the expected document.")
            return found

    @contextlib.asynccontextmanager
    async def _open(self, url: str, length: int, headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        import aiohttp

        if self._session is None:
            # Proxies of the environment are for other machines; a server on this machine needs none.
            self._session = aiohttp.ClientSession(trust_env=not self._local)
        total = CONNECT_TIMEOUT + READ_TIMEOUT + length / SLOWEST
        timeout = aiohttp.ClientTimeout(total=total, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
        try:
            async with self._session.get(url, headers=headers, timeout=timeout) as response:
                if response.status in _LATER or response.status >= 500:
                    raise Temporary(f"{url}: the server answers {response.status} {response.reason}")
                yield response
        except asyncio.TimeoutError as error:
            raise Temporary(f"{url}: the server does not answer in time") from error
        except aiohttp.ClientConnectorError as error:
            raise Temporary(f"{url}: no connection to {error.host}:{error.port} ({cause(error.os_error)})") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Temporary(f"{url}: {error or type(error).__name__}") from error


def check_url(url: object) -> str:
    """Returns ``url`` if it is an HTTP URL.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(url, str) or http_parts(url) is None:
        raise ConfigError(f"{url!r} is not an http or https URL, such as https://example.org/tokens.bin.")
    return url


def is_local(url: str) -> bool:
    """Whether the server runs on this machine."""
    return urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
