"""Refuses requests before a handler sees them: foreign names, pages of other sites, changes without the owner's token.

A page of any site can have its name resolve to 127.0.0.1 (DNS rebinding). Its requests then reach a coordinator that
listens for its own machine only, and the browser lets the page read the answers. The name gives it away, because the
browser sends it as ``Host``.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import urlsplit

from aiohttp import hdrs, web

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.server.token import FILE, is_loopback

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
READING = ("GET", "HEAD")


class Guard:
    """The checks of one server.

    Args:
        token: the owner's token, which everything but reading needs; None lets every caller on the same machine.
        hosts: names under which the server is reached, such as that of a proxy in front of it.

    Attributes:
        near: whether the server listens for its own machine only.
    """

    def __init__(self, token: str | None, hosts: Collection[str] = ()) -> None:
        self.near = True
        self._token = token
        self._hosts = frozenset(host.lower() for host in hosts)

    @property
    def secrets(self) -> list[bytes]:
        """The owner's token, if there is one, for proofs."""
        return [] if self._token is None else [self._token.encode()]

    def obeys(self, request: web.Request) -> bool:
        """Whether whoever sends this is taken for the owner without a token."""
        return self._token is None and _is_near(request)

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A middleware.

        Raises:
            CoordinatorError: ``ForeignHost``, ``ForeignOrigin`` or ``Unauthorized``.
        """
        self._check_host(request)
        self._check_origin(request)
        if request.method not in READING:
            self._check_token(request)
        return await handler(request)

    def _check_host(self, request: web.Request) -> None:
        if not self.near and not self._hosts:
            return  # it serves a network, under names that only its owner knows
        for shown in request.headers.getall(hdrs.HOST, []):
            host = _name(f"//{shown}")
            address = not self.near and _is_address(host)  # no name, so nobody can have made it resolve to this machine
            if not (address or host in self._hosts or is_loopback(host)):
                raise CoordinatorError(
                    f"this coordinator does not serve the name {shown[:80]!r}. If that is its own or that of a proxy "
                    f"in front of it, start it with --allow-host {host[:80] or 'NAME'}",
                    code="ForeignHost",
                )

    def _check_origin(self, request: web.Request) -> None:
        origin = request.headers.get(hdrs.ORIGIN)
        if origin is None:
            return
        # A page of another site cannot set X-Forwarded-Host, so it does not help such a page.
        forwarded = request.headers.get("X-Forwarded-Host", "").replace(" ", "").split(",")
        own = {name.lower() for name in (request.headers.get(hdrs.HOST, ""), *forwarded) if name}
        if _place(origin) not in own and _name(origin) not in self._hosts:
            raise CoordinatorError(
                f"a page of another site, {origin[:80]!r}, may not use this coordinator. If that site is a proxy in "
                "front of it, start the coordinator with --allow-host and the site's name",
                code="ForeignOrigin",
            )

    def _check_token(self, request: web.Request) -> None:
        if self.obeys(request):
            return
        if self._token is None:
            raise CoordinatorError(
                "this coordinator has no owner's token, so only programs on its own machine may create and change runs",
                code="Unauthorized",
            )
        shown = request.headers.get(hdrs.AUTHORIZATION, "")
        if not hmac.compare_digest(shown.encode(errors="surrogateescape"), f"Bearer {self._token}".encode()):
            raise CoordinatorError(
                "creating and changing runs needs the token of this coordinator's owner. It lies in the folder of the "
                f"coordinator's runs (--dir), as {FILE}: pass --token-file FILE, or set PSYCHE_COORDINATOR_TOKEN_FILE "
                "or PSYCHE_COORDINATOR_TOKEN",
                code="Unauthorized",
            )


def _name(url: str) -> str:
    """The host of a URL without its port, in lower case; empty if there is none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _place(url: str) -> str:
    """Host and port of a URL, in lower case; empty if there is none."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""


def _is_near(request: web.Request) -> bool:
    """Whether the caller is a program on this machine, and not a proxy that speaks for others."""
    relayed = any(name in request.headers for name in ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host"))
    return not relayed and is_loopback(request.remote or "")
