"""Join links: where a run's coordinator is, whose key it has, and the secret that lets a node join.

A link is ``URL#RUN:KEY`` for an open run, and ``URL#RUN:KEY:SECRET`` for one that only holders of the link join; key
and secret are base64url without padding. ``URL#:KEY`` is a coordinator with its key, for its owner. No client sends
what follows ``#`` to a server.
"""

from __future__ import annotations

import base64
import hmac
import re
from dataclasses import dataclass, field

from psyche_lightning.errors import ConfigError
from psyche_lightning.text import plain
from psyche_lightning.wire.canonical import pack
from psyche_lightning.wire.identity import KEY_SIZE, Identity

SECRET_SIZE = 16
PROOF_SIZE = 32
_SECRET = b"psyche-lightning join secret 1"
_PROOF = b"psyche-lightning join proof 1"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*")
_PLACE = re.compile(r"([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}(/.*)?")


def whole_url(text: str) -> str:
    """A coordinator's URL or join link as a user types it, with ``http://`` before a bare ``host:port``."""
    return f"http://{text}" if _PLACE.fullmatch(text.partition("#")[0]) else text


def split_url(text: str) -> tuple[str, str]:
    """A coordinator's whole URL, as :func:`whole_url` gives it, and its scheme, which names the coordinator's kind.

    Raises:
        ConfigError: it has no scheme; ``host:port`` with a wrong port has none.
    """
    url = whole_url(text)
    scheme, colon, _ = url.partition(":")
    if not colon or not _SCHEME.fullmatch(scheme) or scheme == "localhost":
        raise no_url(url)
    return url, scheme


def no_url(url: str) -> ConfigError:
    """The error for what is not a coordinator's URL."""
    return ConfigError(
        f"{plain(url.partition('#')[0])!r} is not a coordinator's URL; expected one such as http://127.0.0.1:8080"
    )


@dataclass(frozen=True)
class JoinLink:
    """A join link, or a coordinator's plain URL, which has nothing but itself.

    Attributes:
        url: the coordinator's URL.
        run: the run's name; empty in a plain URL, and where only the coordinator is meant.
        key: the coordinator's public key; empty in a plain URL.
        secret: 16 bytes; empty for an open run and in a plain URL.
    """

    url: str
    run: str = ""
    key: bytes = b""
    secret: bytes = field(default=b"", repr=False)

    @classmethod
    def parse(cls, text: str) -> JoinLink:
        """Read a link or a plain URL; the URL itself is not checked.

        Raises:
            ConfigError: what follows ``#`` is not that of a link. The text shows nothing of it.
        """
        url, mark, rest = whole_url(text).partition("#")
        if not mark:
            return cls(url)
        run, *coded = rest.split(":")
        try:
            key, secret = (_decode(part) for part in (coded if len(coded) == 2 else [*coded, ""]))
        except ValueError:
            key, secret = b"", b""
        if len(key) != KEY_SIZE or len(secret) not in ((0, SECRET_SIZE) if run else (0,)):
            raise ConfigError(
                f"the join link to {url} is damaged: it must go on after # with RUN:KEY or RUN:KEY:SECRET. Copy it "
                "whole, as `psyche run create` and `psyche run link` print it, and put it in quotes."
            )
        return cls(url, run, key, secret)

    def __str__(self) -> str:
        """The link, with its secret; for its owner's eyes."""
        parts = [self.run, _encode(self.key), *([_encode(self.secret)] if self.secret else [])]
        return f"{self.url}#{':'.join(parts)}" if self.key else self.url


def join_secret(coordinator: Identity, scope: str, number: int = 0) -> bytes:
    """The secret of a run's join link, 16 bytes: of the coordinator's secret key, so nothing secret need be kept.

    Args:
        coordinator: the coordinator's key.
        scope: names the run and its incarnation.
        number: how many links the run had before.
    """
    return hmac.digest(coordinator.secret_bytes(), _SECRET + pack([scope, number]), "sha256")[:SECRET_SIZE]


def join_proof(secret: bytes, challenge: bytes, node: bytes) -> bytes:
    """Proves that a node has a secret, on the connection with this challenge, and reveals nothing of the secret.

    Args:
        secret: the join link's, or the owner's token, which opens every run of the coordinator.
        challenge: the connection's, 32 bytes.
        node: the node's public key.
    """
    return hmac.digest(secret, _PROOF + challenge + node, "sha256")


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    if not text.isascii():
        raise ValueError("not base64url")
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if _encode(data) != text:
        raise ValueError("not the one form of these bytes")
    return data
