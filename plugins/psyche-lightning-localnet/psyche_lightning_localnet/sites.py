"""Which web pages may use the chain: those of this machine, and none that only pretends to be.

A page of any site can have its own name resolve to 127.0.0.1 (DNS rebinding). The browser then lets it read the
answers, but sends that name as ``Host``. Without the trick, it names the page's site as ``Origin``. Programs send no
``Origin``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import urlsplit

from aiohttp import hdrs, web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_PREFLIGHT: dict[str, str] = {
    hdrs.ACCESS_CONTROL_ALLOW_METHODS: "POST, GET, OPTIONS",
    hdrs.ACCESS_CONTROL_MAX_AGE: "600",
}
_ALLOWED = "content-type, solana-client"  # web3.js sends the second
_MAX_HEADERS = 1024


class Sites:
    """The names of one server, and the pages that may use it.

    Args:
        host: the address on which it listens.
        hosts: further names of it, such as that of a proxy in front of it; pages of these sites may use it, too.
    """

    def __init__(self, host: str, hosts: Collection[str] = ()) -> None:
        self._near = is_loopback(host)
        self._hosts = frozenset(name.lower() for name in hosts)

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """A middleware that refuses pages of other sites, and lets those of this machine read the answers (CORS)."""
        host, origin = request.headers.get(hdrs.HOST), request.headers.get(hdrs.ORIGIN)
        if host is not None and not self._serves(_name(f"//{host}")):
            text = f"this chain does not serve the name {host[:80]!r}. If that is its own, start it with --allow-host."
            return web.Response(status=421, text=text)
        if origin is None:
            return await handler(request)
        if not self._trusts(origin, host or ""):
            text = f"a page of {origin[:80]!r} may not use this chain; pages of this machine may, and of --allow-host."
            return web.Response(status=403, text=text)
        readable: dict[str, str] = {hdrs.ACCESS_CONTROL_ALLOW_ORIGIN: origin, hdrs.VARY: hdrs.ORIGIN}
        if request.method == hdrs.METH_OPTIONS:
            return web.Response(status=204, headers={**readable, **_PREFLIGHT, **_wanted(request)})
        try:
            response = await handler(request)
        except web.HTTPException as error:  # a page must be able to read why its request was refused
            error.headers.update(readable)
            raise
        if not response.prepared:  # a websocket has sent its headers
            response.headers.update(readable)
        return response

    def _serves(self, name: str) -> bool:
        if is_loopback(name) or name in self._hosts:
            return True
        # Nobody can have made an address resolve to this machine. Elsewhere only the owner knows the names.
        return not self._near and (not self._hosts or _is_address(name))

    def _trusts(self, origin: str, host: str) -> bool:
        name = _name(origin)
        own = bool(host) and _place(origin) == host.lower()
        return own or is_loopback(name) or name in self._hosts


def _wanted(request: web.Request) -> dict[str, str]:
    """The answer to what a preflight asks for: clients add headers of their own, and browsers ask before local use."""
    headers = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")[:_MAX_HEADERS]
    allowed: dict[str, str] = {hdrs.ACCESS_CONTROL_ALLOW_HEADERS: headers or _ALLOWED}
    if request.headers.get("Access-Control-Request-Private-Network") == "true":
        allowed["Access-Control-Allow-Private-Network"] = "true"
    return allowed


def is_loopback(host: str) -> bool:
    """Whether a host, as a URL names it, is this machine for itself."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _name(url: str) -> str:
    """The host of a URL without its port, in lower case; empty if there is none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _place(url: str) -> str:
    """Host and port of a URL, in lower case; empty if there is none."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return ""
