"""Examines what a node of a run must reach: its coordinator, its peers, and itself at its own address."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from psyche_lightning.doctor.finding import Finding, Verdict, duration, speed
from psyche_lightning.doctor.link import MeasuredLink
from psyche_lightning.errors import CoordinatorError, TransportError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.protocol.link import JoinLink, split_url, whole_url
from psyche_lightning.protocol.owner import ClockReading
from psyche_lightning.transports.base import Link, Transport, TransportContext
from psyche_lightning.wire.identity import Identity, short

AREA, LINK = "run", "link"
SKEW = 2.0
"""Seconds of clock difference from which on there is a warning."""
LATE = 0.5
"""Seconds to the coordinator and back from which on rounds suffer."""
REACH_SECONDS = 12.0
_POLL = 0.02


@dataclass(frozen=True)
class Reached:
    """A peer that was dialled.

    Attributes:
        key: its public key.
        address: where it listens.
        link: the link after dialling.
    """

    key: bytes
    address: str
    link: Link

    @property
    def there(self) -> bool:
        """Whether it proved its key, even if it then refused this node."""
        return self.link.connected or self.link.answered is not None


def coordinator(url: str) -> tuple[list[Finding], ClockReading | None]:
    """Check whether a coordinator can be reached, and how far this machine's clock differs from its clock.

    Args:
        url: its URL, or a join link.

    Raises:
        ConfigError, PluginError: the URL is not a coordinator's.
    """
    url, scheme = split_url(url)
    clock = load_plugins().coordinators()[scheme].clock
    if clock is None:
        text = f"a coordinator of the kind {scheme!r} does not tell the time"
        return [Finding(AREA, "clock", text, Verdict.UNKNOWN)], None
    try:
        reading = clock(url)
    except CoordinatorError as error:
        advice = "check the URL, that `psyche coordinator` runs there, and that no firewall blocks it"
        if error.code == "NoClock":
            return [Finding(AREA, "clock", str(error), Verdict.UNKNOWN)], None
        return [Finding(AREA, "coordinator", str(error), Verdict.PROBLEM, advice)], None
    late = reading.answer_seconds > LATE
    there = Finding(
        AREA,
        "coordinator",
        f"{JoinLink.parse(url).url} answers within {duration(reading.answer_seconds)}, connecting included",
        Verdict.WARNING if late else Verdict.OK,
        "every round waits for it once; choose a coordinator nearby, or longer rounds (a larger global batch)" * late,
    )
    return [there, clock_finding(AREA, "the coordinator", reading.offset, reading.uncertainty)], reading


def clock_finding(area: str, whose: str, offset: float, uncertainty: float) -> Finding:
    """A row about the difference between this machine's clock and another one."""
    far = abs(offset) - uncertainty > SKEW
    side = "behind" if offset > 0 else "ahead of"
    value = f"{duration(abs(offset))} {side} {whose}, give or take {duration(uncertainty)}"
    if abs(offset) <= uncertainty:
        value = f"equal to {whose}'s, give or take {duration(uncertainty)}"
    advice = (
        "rounds do not depend on it, but logs are hard to compare and certificates may fail: turn time sync (NTP) on"
    )
    return Finding(area, "clock", value, Verdict.WARNING if far else Verdict.OK, advice if far else "")


def members(status: Mapping[str, Any]) -> dict[bytes, dict[str, Any]]:
    """The participants of a run, by node key, from its status."""
    rows = [row for row in (*status["clients"], *status["pending"]) if row["status"] in ("healthy", "pending")]
    return {bytes.fromhex(row["signer"]): row for row in rows}


def own_key(folder: Path) -> bytes | None:
    """The public key of the node with this folder; None if it has never run."""
    path = folder / "node.key"
    return Identity.load_or_create(path).public if path.is_file() else None


async def reach(
    make: Callable[[], Transport],
    scope: str,
    addresses: Mapping[bytes, str],
    progress: Callable[[str, float], None] = lambda what, done: None,
    seconds: float = REACH_SECONDS,
) -> list[Reached]:
    """Dial the participants of a run with a random key. They prove their keys and refuse it.

    Args:
        make: makes the transport.
        scope: names the run and its incarnation.
        addresses: public key to address.
        progress: called with how many have answered.
        seconds: the most seconds to wait.

    Raises:
        TransportError: this machine's transport does not start.
    """
    transport = make()
    context = TransportContext(_eager(addresses), scope, lambda peer, message: True, lambda digest: None)
    try:
        await transport.start(context)
        transport.set_peers(addresses)
        until = time.monotonic() + seconds
        while True:
            links = transport.links()
            done = [one for one in links if one.tried]
            progress("peers", len(done) / max(len(links), 1))
            if len(done) == len(links) or time.monotonic() > until:
                return [Reached(one.peer, addresses[one.peer], one) for one in links]
            await asyncio.sleep(_POLL)
    finally:
        await transport.stop()


def _eager(addresses: Mapping[bytes, str]) -> Identity:
    """A new key, the smallest of several, because the node with the smaller key dials at once."""
    return min((Identity.generate() for _ in range(4 * len(addresses) + 4)), key=lambda one: one.public)


def peer_finding(found: Reached) -> Finding:
    """A row about one participant."""
    name, link = f"peer {short(found.key)}", found.link
    if link.connected:
        trip = "" if link.round_trip is None else f", {duration(link.round_trip)} there and back"
        return Finding(AREA, name, f"{found.address}: {link.path or 'connected'}{trip}")
    if link.answered is not None:
        return Finding(AREA, name, f"{found.address}: answers within {duration(link.answered)}, handshake included")
    advice = "one direction is enough: that node may reach this one; otherwise see docs/transports.md about relays"
    reason = link.reason if found.address in link.reason else f"{found.address}: {link.reason}"
    return Finding(AREA, name, reason, Verdict.WARNING, advice)


async def own_address(make: Callable[[], Transport], scope: str) -> str:
    """Where a node with these options would listen.

    Raises:
        TransportError: it cannot listen.
    """
    transport = make()
    context = TransportContext(Identity.generate(), scope, lambda peer, message: True, lambda digest: None)
    try:
        return await transport.start(context)
    finally:
        await transport.stop()


def address_finding(address: str, *, called_back: str | None = None, why_not: str = "", far: bool = False) -> Finding:
    """A row about this machine's own address.

    Args:
        address: where this machine listens.
        called_back: the path by which a peer reached it; empty if it could not, None if nobody tried.
        why_not: why it could not.
        far: whether other nodes are on other machines.
    """
    if called_back:
        return Finding(LINK, "own address", f"{address}, which the peer reached ({called_back})")
    kind = _kind(address)
    if called_back is not None:
        advice = (
            "the link works, because this machine reached the peer. Other machines like this one cannot reach it: "
            "forward the port and set PSYCHE_HOST, PSYCHE_PORT and PSYCHE_ADVERTISE, or use node.transport=iroh with a "
            "relay"
        )
        return Finding(LINK, "own address", f"{address}: the peer cannot reach it: {why_not}", Verdict.WARNING, advice)
    if why_not:
        text = f"{address}: the peer could not try to reach it, for a reason of its own: {why_not}"
        return Finding(LINK, "own address", text, Verdict.UNKNOWN, "it has to start psyche doctor --listen anew")
    ask = "only another machine can tell whether it is reachable: run psyche doctor --listen there, --peer here"
    if kind == "loopback":
        advice = "for nodes on other machines set PSYCHE_HOST=0.0.0.0 and PSYCHE_ADVERTISE=HOST"
        return Finding(
            AREA,
            "own address",
            f"{address}, for this machine only",
            Verdict.WARNING if far else Verdict.OK,
            advice if far else "",
        )
    value = f"{address}, in a private network" if kind == "private" else address
    return Finding(AREA, "own address", value, Verdict.UNKNOWN, ask)


def way_out(url: str) -> str:
    """The IP address with which this machine reaches a server; empty if there is no way. Sends nothing."""
    parts = urlsplit(whole_url(url))
    try:
        family, kind, *_, place = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as sock:
            sock.connect(place)
            return str(sock.getsockname()[0])
    except (OSError, ValueError):
        return ""


def nat_finding(seen: str, own: str, links: Sequence[MeasuredLink]) -> Finding | None:
    """A row about what stands between this machine and others; None if nothing is known of it.

    A TCP port is either reached from outside or not, which only somebody outside can tell. So this tells kinds of NAT
    apart only as far as that matters: by who can dial whom.

    Args:
        seen: the address from which the coordinator sees this machine's requests come; empty if unknown.
        own: the address with which this machine sends them; empty if unknown.
        links: links to other doctors, who may have dialled back.
    """
    area = LINK if links else AREA
    there, here = _plain_address(seen), _plain_address(own)
    if there is None or here is None or there.version != here.version or there.is_loopback:
        translated = None
    else:
        translated = there != here
    way = {
        None: "",
        True: f"behind NAT: the coordinator sees {there}, and this machine's own address is {here}",
        False: f"no NAT on the way to the coordinator, which sees this machine's own address {here}",
    }[translated]
    tried = [link for link in links if link.called_back is not None]
    if not tried:
        later = "; only another machine can tell whether this one is reached: psyche doctor --listen there, --peer here"
        return Finding(area, "NAT", way + later, Verdict.UNKNOWN) if way else None
    from_outside = [link for link in tried if not _kind(link.address)]
    reached = [link for link in from_outside or tried if link.called_back]
    if not reached:
        text = f"{way or 'NAT or a firewall'}; this machine reaches others, and others do not reach it"
        advice = (
            "nodes that others reach will do as peers. Two like this one have no link: forward a port on one side, or "
            "use node.transport=iroh with a relay"
        )
        return Finding(area, "NAT", text, Verdict.WARNING, advice)
    if not from_outside:
        text = f"{way}{'; ' * bool(way)}open to the network of the peer; nobody outside of it has tried"
        return Finding(area, "NAT", text, Verdict.UNKNOWN)
    forwarded = ", and the port is forwarded" * bool(translated)
    return Finding(area, "NAT", f"{way}{forwarded}{'; ' * bool(way)}open: another machine reached this one")


def _plain_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def is_far(url: str) -> bool:
    """Whether a URL leads to another machine, judged by its text."""
    host = urlsplit(url).hostname or ""
    return host not in ("localhost", "") and _kind(f"x://{_bracketed(host)}:1") != "loopback"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _kind(address: str) -> str:
    """``loopback`` or ``private`` if all its IP addresses are, else empty."""
    hosts = []
    for part in address.partition("://")[2].partition("?")[0].split(","):
        try:
            hosts.append(ipaddress.ip_address(urlsplit(f"//{part}").hostname or ""))
        except ValueError:
            return ""
    if all(host.is_loopback for host in hosts):
        return "loopback"
    return "private" if all(host.is_private for host in hosts) else ""


def link_findings(found: MeasuredLink, area: str = LINK) -> list[Finding]:
    """Rows about a measured link.

    Args:
        found: the link.
        area: the area of the rows, which differs if there are several links.
    """
    rows = [
        Finding(LINK, "peer", f"{found.address}: {found.path}, {duration(found.round_trip)} there and back"),
        _rate("upload", found.upload),
        _rate("download", found.download),
        clock_finding(LINK, "the peer", found.clock_offset, found.clock_uncertainty),
        address_finding(found.own_address, called_back=found.called_back, why_not=found.why_not),
    ]
    return [replace(row, area=area) for row in rows]


def _rate(name: str, rate: float | None) -> Finding:
    if rate is None:
        advice = "try again with more --seconds; a firewall or a limit (PSYCHE_UPLOAD, PSYCHE_DOWNLOAD) may block it"
        return Finding(LINK, name, "nothing arrived in time", Verdict.PROBLEM, advice)
    return Finding(LINK, name, speed(rate))


def listening_problem(error: TransportError) -> Finding:
    """A row about a transport that does not start."""
    where = "node.transport_options or PSYCHE_HOST, PSYCHE_PORT and PSYCHE_ADVERTISE"
    advice = f"correct {where}; another node may use the port already"
    return Finding(AREA, "own address", str(error), Verdict.PROBLEM, advice)
