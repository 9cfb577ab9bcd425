"""Reads token files over HTTP by range requests: in parallel, in bounded memory, and in advance."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from psyche_lightning.data.cache import Found, RangeCache
from psyche_lightning.data.client import GONE, Client, FetchOptions, Refused, Temporary, check_url, is_local
from psyche_lightning.data.files import HEAD_SIZE, MAX_FILES, FileInfo, Lost, Range, changed
from psyche_lightning.data.options import whole
from psyche_lightning.errors import ConfigError, DataError

MAX_REQUEST = 4 << 20
"""The most bytes of one range request; adjacent ranges are joined up to it."""
_OTHER_FILE = (200, 412, 416)


class RemoteFiles:
    """Files at URLs, as :class:`~psyche_lightning.data.files.Files`.

    It keeps the last ranges that were read or prefetched, up to ``fetch.cache_mb``.

    Args:
        urls: URLs of the files, in order.
        fetch: how to fetch.

    Raises:
        ConfigError: a URL is malformed, does not exist, or its server does not support range requests.
        DataError: a server cannot be reached.
    """

    def __init__(self, urls: Sequence[str], fetch: FetchOptions) -> None:
        self._urls = [check_url(url) for url in urls]
        self._fetch = fetch
        self._begin()
        self.infos: list[FileInfo] = self._running().submit(self._look_at_all()).result()

    def _begin(self) -> None:
        self._cache = RangeCache(self._fetch.cache_mb << 20)
        self._client: Client | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_urls": self._urls, "_fetch": self._fetch, "infos": self.infos}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _running(self) -> Client:
        if self._process != os.getpid():  # a forked worker has no loop, and its locks may be held
            self._begin()
        if self._client is None:
            self._client = Client(self._fetch, local=all(map(is_local, self._urls)))
            weakref.finalize(self, self._client.close)
        return self._client

    def read(self, ranges: Sequence[Range]) -> list[bytes | Lost]:
        """Returns the bytes of each range, or why it is not available."""
        found = self._want(ranges)
        return [found[part].result() for part in ranges]

    def prefetch(self, ranges: Sequence[Range]) -> None:
        """Start to fetch ranges that will be read soon, up to half of the memory; returns at once."""
        self._want(ranges, room=True)

    def _want(self, ranges: Sequence[Range], *, room: bool = False) -> dict[Range, Future[Found]]:
        """Start to fetch ranges that are not in the cache, adjacent ones in one request."""
        client, asked = self._running(), time.monotonic()
        found, missing = self._cache.request(ranges, room=room)
        for group in _joined(missing):
            client.submit(self._bring(client, group, asked))
        return found

    async def _bring(self, client: Client, group: list[Range], asked: float) -> None:
        """Fetch adjacent ranges and deliver them; each of them gets an answer, whatever happens."""
        first = group[0]
        length = sum(part.length for part in group)
        found: bytes | Lost = Lost("the request was given up")
        try:
            found = await self._get(client, Range(first.file, first.start, length), asked)
        finally:
            for part in group:
                place = part.start - first.start
                piece = found if isinstance(found, Lost) else found[place : place + part.length]
                self._cache.deliver(part, piece)

    async def _get(self, client: Client, part: Range, asked: float) -> bytes | Lost:
        info = self.infos[part.file]
        try:
            answer = await client.part(info.name, part.start, part.length, asked)
        except Temporary as error:
            return Lost(str(error))
        except Refused as error:
            if error.status in _OTHER_FILE:
                return Lost(changed(info, f"another length, or its server no ranges ({error})"), lasting=True)
            return Lost(f"{info.name}: the server answers {error}")
        if answer.size != info.size or (answer.version and info.version and answer.version != info.version):
            return Lost(changed(info, f"{answer.size} bytes, {answer.version or 'no version'}"), lasting=True)
        return answer.data

    async def _look_at_all(self) -> list[FileInfo]:
        asked = time.monotonic()
        tasks = [asyncio.ensure_future(self._look(self._running(), url, asked)) for url in self._urls]
        try:
            return await asyncio.gather(*tasks)
        except Temporary as error:
            raise DataError(f"The data cannot be reached: {error}. Is the address right, and the server up?") from error
        finally:
            for task in tasks:
                task.cancel()

    async def _look(self, client: Client, url: str, asked: float) -> FileInfo:
        """Size, version and beginning of a file, from one range request."""
        try:
            answer = await client.part(url, 0, HEAD_SIZE, asked)
        except Refused as error:
            raise refusal(url, error) from None
        return FileInfo(url, answer.size, answer.data, answer.version)


def refusal(url: str, error: Refused) -> ConfigError:
    """The error for an address whose server gives a wrong answer, with what to do."""
    if error.status in GONE:
        return ConfigError(
            f"The data address {url} does not exist or is not public: its server answers {error}. Check data.config."
        )
    if error.status == 416:
        return ConfigError(f"The data file {url} is empty.")
    return ConfigError(
        f"The server of {url} does not support range requests (it answers {error}), which are needed to read single "
        "samples. Use another server, such as `psyche data serve`, or copy the files to this machine."
    )


def read_text(url: str, fetch: FetchOptions, limit: int) -> bytes:
    """Fetch a small document at a URL.

    Raises:
        ConfigError: it does not exist, or is larger than ``limit`` bytes.
        DataError: its server cannot be reached.
    """
    client = Client(fetch, local=is_local(check_url(url)))
    try:
        return client.submit(client.text(url, limit)).result()
    except Refused as error:
        raise ConfigError(f"The data address {url} cannot be read: its server answers {error}.") from None
    except Temporary as error:
        raise DataError(f"The data cannot be reached: {error}. Is the address right, and the server up?") from None
    finally:
        client.close()


def numbered(template: object, *, start: object, pad: object, count: object) -> list[str]:
    """The URLs of numbered files, built as in Psyche's http.rs.

    Args:
        template: a URL with exactly one ``{}`` for the number.
        start: the first number.
        pad: digits to which zeros fill up numbers; 0 for none.
        count: number of files.

    Raises:
        ConfigError: an argument is wrong.
    """
    if not isinstance(template, str) or template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
        raise ConfigError(
            f"The URL of numbered files is {template!r}, expected a URL with exactly one {{}} for the number, "
            "such as https://example.org/tokens-{}.bin."
        )
    first, width = whole("start", start, least=0), whole("pad", pad, least=0)
    files = whole("count", count, least=1)
    if files > MAX_FILES or width > 20:
        raise ConfigError(f"There are {files} files with {width} digits, expected at most {MAX_FILES} with 20.")
    return [template.replace("{}", str(number).zfill(width)) for number in range(first, first + files)]


def _joined(ranges: Sequence[Range]) -> list[list[Range]]:
    """Groups of ranges that follow each other in a file without a gap, of at most :data:`MAX_REQUEST` bytes each."""
    groups: list[list[Range]] = []
    size = 0
    for part in sorted(ranges):
        last = groups[-1][-1] if groups else None
        follows = last is not None and (last.file, last.start + last.length) == (part.file, part.start)
        if follows and size + part.length <= MAX_REQUEST:
            groups[-1].append(part)
            size += part.length
        else:
            groups.append([part])
            size = part.length
    return groups
