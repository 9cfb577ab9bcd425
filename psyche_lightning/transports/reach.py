"""Which advertised addresses a node dials. A peer may name any: also a service within this node's own network.

Public addresses are always dialled, and those that belong to no single machine never. A node dials addresses within a
network if its own address is such a one. The nodes of a demo advertise loopback addresses; so do nodes that only dial,
behind a router. Therefore a node with a loopback address dials such addresses, and those within a network, unless its
run is public: unless more than a third of its peers have public addresses.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Collection

from psyche_lightning.errors import TransportError

_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")


class Scope(enum.IntEnum):
    """From where an address can be reached."""

    NOWHERE = 0
    MACHINE = 1
    LINK = 2
    NETWORK = 3
    EVERYWHERE = 4


def scope(host: str) -> Scope:
    """The scope of a host: of an IP address, or of a name, which counts as public until it is looked up."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return Scope.MACHINE if host.rstrip(".").lower() in ("localhost", "localhost.localdomain") else Scope.EVERYWHERE
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if ip.is_loopback:  # before is_reserved, which ::1 is
        return Scope.MACHINE
    if ip.is_unspecified or ip.is_multicast or ip.is_reserved or ip in _THIS_NETWORK:
        return Scope.NOWHERE
    if ip.is_link_local:
        return Scope.LINK
    return Scope.EVERYWHERE if ip.is_global else Scope.NETWORK


class Reach:
    """What one node dials.

    Args:
        own: the hosts of its own address.
    """

    def __init__(self, own: Collection[str]) -> None:
        self._own = {scope(host) for host in own}
        self._public = False

    def learn(self, peers: Collection[Collection[str]]) -> None:
        """Learn the hosts of each peer's address."""
        public = sum(any(scope(host) is Scope.EVERYWHERE for host in hosts) for hosts in peers)
        self._public = 3 * public > len(peers)

    def check(self, ip: str) -> None:
        """Check an IP address before it is dialled.

        Raises:
            TransportError: this node does not dial it.
        """
        found = scope(ip)
        local = Scope.MACHINE in self._own and not self._public
        if (
            found is Scope.EVERYWHERE
            or (found in (Scope.NETWORK, Scope.LINK) and found in self._own)
            or (found in (Scope.NETWORK, Scope.MACHINE) and local)
        ):
            return
        if found is Scope.NOWHERE:
            raise TransportError(f"{ip} is not the address of a machine")
        where = "a machine" if found is Scope.MACHINE else "a network"
        raise TransportError(f"{ip} is an address within {where}, which this node does not dial in this run")
