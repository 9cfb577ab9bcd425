"""TLS between a coordinator and those who ask it: bound to the coordinator's own key, or with an authority's help.

A coordinator shows a certificate of its own key. Who has a join link knows that key. A proxy in front shows a
certificate that an authority vouches for, and the coordinator behind it proves its key in the websocket's greeting.
"""

from __future__ import annotations

import http.client
import ssl
import urllib.error
import urllib.request
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from psyche_lightning.errors import CoordinatorError
from psyche_lightning.protocol.link import JoinLink
from psyche_lightning.sites import is_loopback
from psyche_lightning.wire.certificate import client_context, is_of, self_signed, server_context
from psyche_lightning.wire.identity import Identity


def coordinator_context(identity: Identity) -> ssl.SSLContext:
    """The server's settings: a certificate of the coordinator's key."""
    key = Ed25519PrivateKey.from_private_bytes(identity.secret_bytes())
    return server_context(key, self_signed(key))


def is_near(url: str) -> bool:
    """Whether a URL leads to this machine, where nobody is in between."""
    return is_loopback(urlsplit(url).hostname or "")


def untrusted(url: str) -> CoordinatorError:
    """The error when neither the key nor an authority speaks for a certificate."""
    return CoordinatorError(
        f"{url} shows a certificate for which no authority vouches, and which is not of the key in a join link. Give "
        "the run's join link in place of the URL; `psyche run link` prints it on the coordinator's machine. With the "
        "link, somebody else answers there.",
        code="Untrusted",
    )


class Door:
    """Opens requests at one coordinator with ``urllib``.

    Args:
        link: a join link or plain URL.
    """

    def __init__(self, link: JoinLink) -> None:
        self._url = link.url
        # Proxies of the environment are for other machines; a coordinator on this machine needs none.
        near: list[Any] = [urllib.request.ProxyHandler({})] if is_near(link.url) else []
        handlers: list[list[Any]] = [[]]
        if urlsplit(link.url).scheme == "https":
            if link.key:
                handlers = [[_Pinning(link.key)], []]
            elif near:
                handlers = [[urllib.request.HTTPSHandler(context=client_context())]]
        self._openers = [urllib.request.build_opener(*near, *each) for each in handlers]

    def open(self, request: urllib.request.Request, timeout: float) -> Any:
        """Send a request; returns the answer, as ``urllib`` does. Nothing is sent to who does not show the key.

        Raises:
            CoordinatorError: neither the key nor an authority speaks for the certificate (``Untrusted``).
            OSError: as ``urllib`` raises it.
        """
        for opener in self._openers:
            try:
                return opener.open(request, timeout=timeout)
            except urllib.error.URLError as error:
                reason = error.reason
                if isinstance(reason, ssl.SSLCertVerificationError):
                    raise untrusted(self._url) from error
                if not isinstance(reason, _AnotherKey):
                    raise
        raise untrusted(self._url)


class _AnotherKey(OSError):
    """The certificate is not of the link's key."""


class _Pinning(urllib.request.HTTPSHandler):
    """Accepts the certificates of one key."""

    def __init__(self, key: bytes) -> None:
        super().__init__(context=client_context())
        self._key = key

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Connection, self._key), request, context=client_context())


class _Connection(http.client.HTTPSConnection):
    def __init__(self, key: bytes, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._key = key

    def connect(self) -> None:
        super().connect()
        if not is_of(self._key, self.sock.getpeercert(True)):
            self.close()
            raise _AnotherKey("its certificate is of another key")
