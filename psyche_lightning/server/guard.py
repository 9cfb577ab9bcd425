"""Refuses requests before a handler sees them: those of pages of other sites, and changes without the owner's token."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, Collection

from aiohttp import hdrs, web

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.server.token import FILE
from psyche_lightning.sites import Sites, is_loopback

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
READING = ("GET", "HEAD")


class Guard:
    """The checks of one server.

    Args:
        token: the owner's token, which everything but reading needs; None lets every caller on the same machine.
        hosts: see :class:`~psyche_lightning.sites.Sites`.

    Attributes:
        sites: the server's names.
        token: as given.
    """

    def __init__(self, token: str | None, hosts: Collection[str] = ()) -> None:
        self.sites = Sites(hosts)
        self.token = token

    @property
    def secrets(self) -> list[bytes]:
        """The owner's token, if there is one, for proofs."""
        return [] if self.token is None else [self.token.encode()]

    def obeys(self, request: web.Request) -> bool:
        """Whether whoever sends this is taken for the owner without a token."""
        return self.token is None and _is_near(request)

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A middleware.

        Raises:
            CoordinatorError: ``ForeignHost``, ``ForeignOrigin`` or ``Unauthorized``.
        """
        foreign = self.sites.refusal(request.headers)
        if foreign is not None:
            raise CoordinatorError(foreign.text, code=foreign.code)
        if request.method not in READING:
            self._check_token(request)
        return await handler(request)

    def _check_token(self, request: web.Request) -> None:
        if self.obeys(request):
            return
        if self.token is None:
            raise CoordinatorError(
                "this coordinator has no owner's token, so only programs on its own machine may create and change runs",
                code="Unauthorized",
            )
        shown = request.headers.get(hdrs.AUTHORIZATION, "")
        if not hmac.compare_digest(shown.encode(errors="surrogateescape"), f"Bearer {self.token}".encode()):
            raise CoordinatorError(
                "creating and changing runs needs the token of this coordinator's owner. It lies in the folder of the "
                f"coordinator's runs (--dir), as {FILE}: pass --token-file FILE, or set PSYCHE_COORDINATOR_TOKEN_FILE "
                "or PSYCHE_COORDINATOR_TOKEN",
                code="Unauthorized",
            )


def caller(request: web.Request) -> str:
    """The IP address from which a request comes; empty if a proxy speaks for somebody else."""
    relayed = any(name in request.headers for name in ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host"))
    return "" if relayed else request.remote or ""


def _is_near(request: web.Request) -> bool:
    """Whether the caller is a program on this machine."""
    return is_loopback(caller(request))
