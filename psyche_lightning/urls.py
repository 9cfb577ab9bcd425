"""URLs that people type: which of them a client can be asked to reach."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit


def http_parts(text: str) -> SplitResult | None:
    """The parts of an http or https URL; None for other text, and for a host or a port that cannot be."""
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # what name servers are asked for
    except ValueError:
        return None
    good = parts.scheme in ("http", "https") and host and port != 0 and text.isprintable() and " " not in host
    return parts if good else None
