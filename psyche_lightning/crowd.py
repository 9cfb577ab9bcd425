"""Many callers at one door: which of them has to go, so that one address does not keep the others out."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

_T = TypeVar("_T")


def network(host: str) -> str:
    """The host itself, or the /64 of an IPv6 address, all of which one customer has."""
    try:
        ip = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return host
    return host if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))


def surplus(found: Mapping[_T, str], host: str, most: int, most_of_host: int) -> _T | None:
    """Which connection to end before one more comes from a host; None if there is room.

    Args:
        found: the connections in order of arrival, with their hosts.
        host: the newcomer's.
        most: how many there may be.
        most_of_host: how many of one host.

    Returns:
        The oldest of the newcomer's host, or else of the host that has most: honest callers are quick.
    """
    hosts = Counter(found.values())
    worst = host if hosts[host] >= most_of_host else None
    if worst is None and len(found) >= most:
        worst = hosts.most_common(1)[0][0]
    return next((one for one, other in found.items() if other == worst), None)
