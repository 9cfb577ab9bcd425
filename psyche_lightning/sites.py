"""Which requests come from a page of another site, and so are none of a server's business.

A page of any site can have its own name resolve to 127.0.0.1 (DNS rebinding). Its requests then reach a server that
listens for its own machine only, and the browser lets the page read the answers. The name gives it away, because the
browser sends it as ``Host``. Without that trick, the browser names the page's site as ``Origin``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Foreign:
    """Why a request is refused.

    Attributes:
        status: of the answer.
        code: ``ForeignHost`` or ``ForeignOrigin``.
        text: what to do.
    """

    status: int
    code: str
    text: str


class Sites:
    """The names of one server.

    Args:
        hosts: names under which it is reached, such as that of a proxy in front of it. A server that listens on
            loopback serves no names but these and those of loopback. One that listens elsewhere serves every name if
            none is given, otherwise these and all addresses.

    Attributes:
        near: whether the server listens on loopback only.
    """

    def __init__(self, hosts: Collection[str] = ()) -> None:
        self.near = True
        self._hosts = frozenset(host.lower() for host in hosts)

    def listening(self, addresses: Iterable[str]) -> None:
        """Take note of the addresses on which the server listens."""
        self.near = all(is_loopback(address) for address in addresses)

    def refusal(self, headers: Mapping[str, str]) -> Foreign | None:
        """Why a request with these headers is refused; None if it is not."""
        host = headers.get("Host")  # browsers always send it
        if host is not None and not self._serves(_name(f"//{host}")):
            name = _name(f"//{host}")[:80] or "NAME"
            text = (
                f"this server does not serve the name {host[:80]!r}. If that is its own or that of a proxy in front of "
                f"it, start it with --allow-host {name}"
            )
            return Foreign(421, "ForeignHost", text)
        origin = headers.get("Origin")
        if origin is None:
            return None
        # A page of another site cannot set X-Forwarded-Host, so it does not help such a page.
        forwarded = headers.get("X-Forwarded-Host", "").replace(" ", "").split(",")
        own = {name.lower() for name in (host or "", *forwarded) if name}
        if _place(origin) in own or _name(origin) in self._hosts:
            return None
        text = (
            f"a page of another site, {origin[:80]!r}, may not use this server. If that site is a proxy in front of "
            "it, start it with --allow-host and the site's name"
        )
        return Foreign(403, "ForeignOrigin", text)

    def _serves(self, host: str) -> bool:
        if is_loopback(host) or host in self._hosts:
            return True
        # Nobody can have made an address resolve to this machine. Elsewhere only the owner knows the names.
        return not self.near and (not self._hosts or _is_address(host))


def is_loopback(host: str) -> bool:
    """Whether a host, as a URL names it, is this machine for itself."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


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
