"""Serves a folder of token files over HTTP with range requests, for nodes without a copy."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path

from aiohttp import web

from psyche_lightning.entrance import Entrance
from psyche_lightning.errors import ConfigError
from psyche_lightning.sites import Sites

START_TIMEOUT = 30.0


class FileServer:
    """Serves the files of a folder, read-only, from a thread; a context manager.

    Args:
        folder: the folder; folders within it are served as well, but links that lead out of it are not followed.
        host: address to listen on.
        port: port to listen on; 0 for any free one.
        hosts: names under which it is reached; see :class:`~psyche_lightning.sites.Sites`.

    Attributes:
        url: URL of the folder, without a slash at its end; set by :meth:`start`.

    Raises:
        ConfigError: the folder does not exist.
    """

    def __init__(self, folder: str | Path, host: str = "127.0.0.1", port: int = 0, hosts: Collection[str] = ()) -> None:
        self._folder = Path(folder).expanduser()
        if not self._folder.is_dir():
            raise ConfigError(f"The folder {str(folder)!r} does not exist (looked for {self._folder.absolute()}).")
        self._host = host
        self._port = port
        self._sites = Sites(hosts)
        self.url = ""

    def __enter__(self) -> FileServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start to listen; after :meth:`stop`, again on the same port.

        Raises:
            ConfigError: this process cannot listen on the address.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="psyche-files", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(START_TIMEOUT)
        except OSError as error:
            self.stop()
            raise ConfigError(
                f"cannot listen on {self._host}:{self._port}: {error.strerror or error}. Choose another port; 0 takes "
                "any."
            ) from error

    def stop(self) -> None:
        """Close all connections and stop listening."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(START_TIMEOUT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def application(self) -> web.Application:
        """The application that answers requests."""
        application = web.Application(middlewares=[self._refuse_foreign])
        application.router.add_static("/", self._folder, follow_symlinks=False)
        return application

    @web.middleware
    async def _refuse_foreign(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        foreign = self._sites.refusal(request.headers)
        if foreign is not None:
            return web.Response(status=foreign.status, text=foreign.text)
        return await handler(request)

    async def _listen(self) -> None:
        application = self.application()
        self._runner = Entrance(application, shutdown_timeout=0.5)
        application.middlewares.insert(0, self._runner.check)
        await self._runner.setup()
        site = web.TCPSite(self._runner, self._host, self._port)
        await site.start()
        self._sites.listening(address[0] for address in self._runner.addresses)
        host, self._port = self._runner.addresses[0][:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._port}"
