"""Addresses of the iroh transport: ``iroh://192.0.2.7:4433,10.0.0.7:4433?relay=https://relay.example/``.

An address says where a node may be found: its own addresses, and its relay, if any. It does not say who the node is:
peers already know its key, which QUIC proves.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import parse_qs, quote, urlsplit

from psyche_lightning.errors import TransportError

MAX_HOSTS = 16


@dataclass(frozen=True)
class Address:
    """Where a node may be found.

    Attributes:
        hosts: ``(name or IP address, port)``.
        relay: URL of a relay, or None.
    """

    hosts: tuple[tuple[str, int], ...]
    relay: str | None = None

    def __str__(self) -> str:
        hosts = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts)
        return f"iroh://{hosts}" + (f"?relay={quote(self.relay, safe=':/')}" if self.relay else "")

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address.

        Raises:
            TransportError: it is not an address of this transport.
        """
        try:
            # Not urlsplit: several hosts do not form a URL's authority, and some versions of Python refuse them.
            scheme, _, rest = text.partition("://")
            authority, _, options = rest.partition("?")
            query = parse_qs(options, strict_parsing=True) if options else {}
            relays = query.pop("relay", [])
            hosts = tuple(split(one) for one in authority.split(",") if one)
            if (
                len(text) <= 2000
                and scheme == "iroh"
                and not query
                and len(relays) <= 1
                and len(hosts) <= MAX_HOSTS
                and (hosts or relays)
            ):
                return cls(hosts, relays[0] if relays else None)
        except ValueError:
            pass
        raise TransportError(
            f"{text[:100]!r} is not an address of the iroh transport, such as iroh://10.0.0.7:4433 or "
            "iroh://10.0.0.7:4433?relay=https://relay.example"
        )

    async def resolve(self) -> list[str]:
        """``IP:PORT`` of each host, with names looked up."""
        loop = asyncio.get_running_loop()
        found: dict[str, None] = {}
        for host, port in self.hosts:
            if is_ip(host):
                found[join(host, port)] = None
                continue
            for entry in (await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM))[:4]:
                found[join(str(entry[4][0]), port)] = None
        return list(found)


def split(text: str, default: int | None = None) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` (or of ``HOST``, if there is a default); IPv6 addresses are in brackets.

    Raises:
        ValueError: the text is malformed.
    """
    if default is not None and text.count(":") > 1 and not text.startswith("["):
        return text, default
    parts = urlsplit(f"//{text}")
    port = parts.port or default
    if not parts.hostname or not port or parts.path or parts.query or parts.username or "," in text:
        raise ValueError(text)
    return parts.hostname, port


def join(host: str, port: int) -> str:
    """``HOST:PORT``, with IPv6 addresses in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_ip(host: str) -> bool:
    """Whether it is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def usable(found: Iterable[str], host: str) -> list[tuple[str, int]]:
    """Select the socket addresses that peers should learn from those that iroh knows of this node.

    Args:
        found: ``IP:PORT``.
        host: the IP address on which the node listens. If it is a wildcard, all addresses but loopback are selected,
            else only this one.
    """
    listening = ipaddress.ip_address(host)
    chosen = []
    for text in found:
        one, port = split(text)
        ip = ipaddress.ip_address(one)
        if ip == listening or (listening.is_unspecified and not ip.is_loopback and not ip.is_unspecified):
            chosen.append((one, port))
    return chosen[:MAX_HOSTS]
