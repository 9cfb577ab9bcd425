"""Reads a ``solana:`` URL and its options: the chain, the programs, and limits of payments.

``solana:localnet``, ``solana:devnet``, ``solana:mainnet``, or ``solana:`` and one or several RPC URLs with commas
between them. Options follow as a fragment, which no server sees: ``solana:devnet#program=ADDRESS&poll=1``. Each may
also be an environment variable (``PSYCHE_SOLANA_PROGRAM``, ``PSYCHE_SOLANA_AUTHORIZER``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from urllib.parse import parse_qsl, urlsplit

from solders.keypair import Keypair
from solders.pubkey import Pubkey

from psyche_lightning.errors import ConfigError, nearest
from psyche_lightning.wire.canonical import sha256

SCHEME = "solana"
VARIABLE_PREFIX = "PSYCHE_SOLANA_"
MAX_COMPUTE_UNITS = 1_400_000
COMMITMENTS = ("processed", "confirmed", "finalized")
LOCAL_URL = "http://127.0.0.1:8899"
LOOPBACK = ("127.0.0.1", "localhost", "::1")

CLUSTERS = {
    "localnet": (LOCAL_URL, None),
    "devnet": ("https://api.devnet.solana.com", "EtWTRABZaYq6iMfeYKouRu166VU2xqa1wcaWoxkZrfBG"),
    "mainnet": ("https://api.mainnet-beta.solana.com", "5eykt4UsFv8P8NJdTREpY1vzqKqZKvdpKuc147dw2N9d"),
}
"""Name -> RPC URL and hash of the first block, which identifies a cluster."""


def local_program(name: str) -> Keypair:
    """The key pair of a program on the local chain only: its seed is public."""
    return Keypair.from_seed(sha256(f"psyche-lightning localnet {name}".encode()))


def local_faucet() -> Keypair:
    """The faucet of every local chain; may upgrade the initial programs. Its seed is public, too."""
    return local_program("faucet")


@dataclass(frozen=True)
class Endpoint:
    """One RPC service.

    Attributes:
        http: URL for requests.
        ws: URL for subscriptions.
    """

    http: str = field(repr=False)
    ws: str = field(repr=False)

    @property
    def name(self) -> str:
        """Scheme and host: the rest of a URL often has a key."""
        return shown(self.http)


def shown(url: str) -> str:
    """A URL without user, path and query, which may be secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}" + (f":{parts.port}" if parts.port else "")


@dataclass(frozen=True)
class Options:
    """Options besides the cluster.

    Attributes:
        program: address of the coordinator program.
        authorizer: address of the authorizer program.
        treasurer: address of the treasurer program.
        wallet: file of the wallet; None for the environment's.
        rpc: further RPC URLs, separated by commas, used if the first fails.
        ws: the websocket URL of each RPC URL, if it differs from the default.
        compute_limit: largest compute limit of a transaction, in units.
        priority_fee_min: least priority fee, in micro-lamports for each compute unit.
        priority_fee_max: largest priority fee; the accounts' current price decides in between.
        commitment: when a transaction counts: ``processed``, ``confirmed`` or ``finalized``.
        grantee: authorized to join for this wallet; by default the wallet or everybody.
        log: file that gets a JSON line for each transaction.
        poll: seconds between polls of the account while no subscription works.
    """

    program: str | None = None
    authorizer: str | None = None
    treasurer: str | None = None
    wallet: str | None = None
    rpc: str | None = None
    ws: str | None = None
    compute_limit: int = MAX_COMPUTE_UNITS
    priority_fee_min: int = 0
    priority_fee_max: int = 20_000
    commitment: str = "confirmed"
    grantee: str | None = None
    log: str | None = None
    poll: float = 2.0


@dataclass(frozen=True)
class Cluster:
    """A chain and the programs on it.

    Attributes:
        name: as the user named it; a URL without secrets.
        endpoints: RPC services, in the order of preference.
        genesis: the required hash of the first block; None for a custom chain.
        options: the rest.
    """

    name: str
    endpoints: tuple[Endpoint, ...]
    genesis: str | None
    options: Options

    @property
    def local(self) -> bool:
        """Whether all services are local."""
        return all(urlsplit(endpoint.http).hostname in LOOPBACK for endpoint in self.endpoints)

    def program(self, name: str = "coordinator") -> Pubkey:
        """Address of a program: ``coordinator``, ``authorizer`` or ``treasurer``.

        Raises:
            ConfigError: no address is given, and the chain is not local.
        """
        option = "program" if name == "coordinator" else name
        given = getattr(self.options, option)
        if given is not None:
            return _address(given, option)
        if self.local:
            return local_program(name).pubkey()
        raise ConfigError(
            f"which {name} program on {self.name}? Give its address as {SCHEME}:{self.name}#{option}=ADDRESS or in "
            f"{VARIABLE_PREFIX}{option.upper()}; `psyche solana deploy` puts one there and prints it."
        )


def parse(
    url: str, options: Mapping[str, object] | None = None, environment: Mapping[str, str] = os.environ
) -> Cluster:
    """Read a ``solana:`` URL; it overrides ``options``, which override the environment.

    Raises:
        ConfigError: another URL, an unknown option (with the nearest), or an invalid value.
    """
    scheme, _, rest = url.partition(":")
    place, _, fragment = rest.partition("#")
    if scheme != SCHEME or not place:
        raise ConfigError(f"{shown_url(url)!r} is not of the form {SCHEME}:CLUSTER, CLUSTER being {_choices()}")
    read = _options(fragment, options or {}, environment)
    if place in CLUSTERS:
        default, genesis = CLUSTERS[place]
        # A user's own RPC service for a public cluster comes first.
        first = [] if read.rpc and genesis is not None else [default]
        name = place
    else:
        if "://" not in place:
            raise ConfigError(f"there is no cluster {place!r}.{nearest(place, CLUSTERS)} Choose {_choices()}")
        first, genesis = [part for part in place.split(",") if part], None
        name = ",".join(shown(_checked(part, ("http", "https"))) for part in first)
    https = [_checked(part, ("http", "https")) for part in [*first, *_split(read.rpc)]]
    given = [_checked(part, ("ws", "wss")) for part in _split(read.ws)]
    endpoints = tuple(
        Endpoint(http, given[place] if place < len(given) else _websocket(http)) for place, http in enumerate(https)
    )
    return Cluster(name, endpoints, genesis, read)


def shown_url(url: str) -> str:
    """A ``solana:`` URL for display: without secrets of RPC URLs."""
    scheme, _, rest = url.partition(":")
    place = rest.partition("#")[0]
    if "://" not in place:
        return f"{scheme}:{place}"
    return f"{scheme}:" + ",".join(shown(part) for part in place.split(","))


def _choices() -> str:
    return f"{', '.join(CLUSTERS)}, or the URL of an RPC service such as {LOCAL_URL}"


def _options(fragment: str, options: Mapping[str, object], environment: Mapping[str, str]) -> Options:
    names = [item.name for item in fields(Options)]
    values: dict[str, object] = {}
    for name in names:
        if environment.get(VARIABLE_PREFIX + name.upper()):
            values[name] = environment[VARIABLE_PREFIX + name.upper()]
    for name, value in [*options.items(), *parse_qsl(fragment, keep_blank_values=True)]:
        if name not in names:
            raise ConfigError(
                f"the coordinator {SCHEME!r} has no option {name!r}.{nearest(name, names)} Options: {', '.join(names)}."
            )
        values[name] = value
    for item in fields(Options):
        if item.name in values and values[item.name] is not None:
            values[item.name] = _number(item.name, values[item.name], str(item.type))
    read = replace(Options(), **values)  # type: ignore[arg-type]
    for name in ("program", "authorizer", "treasurer", "grantee"):
        if getattr(read, name) is not None:
            _address(getattr(read, name), name)
    if read.commitment not in COMMITMENTS:
        raise ConfigError(f"commitment is {read.commitment!r}; choose {', '.join(COMMITMENTS)}")
    if not 0 < read.compute_limit <= MAX_COMPUTE_UNITS:
        raise ConfigError(f"compute_limit is {read.compute_limit}; it must be 1 to {MAX_COMPUTE_UNITS} units")
    if not 0 <= read.priority_fee_min <= read.priority_fee_max < 1 << 64:
        raise ConfigError(
            f"the priority fee is bounded by {read.priority_fee_min} and {read.priority_fee_max} micro-lamports; the "
            "least must be 0 or more and at most the most"
        )
    if not 0.05 <= read.poll <= 3600:
        raise ConfigError(f"poll is {read.poll}; it must be 0.05 to 3600 seconds")
    return read


def _number(name: str, value: object, kind: str) -> object:
    wanted = {"int": int, "float": float}.get(kind)
    if wanted is None:
        return str(value)
    try:
        return wanted(str(value))
    except ValueError:
        raise ConfigError(f"{name} is {value!r}; expected a {'whole ' if wanted is int else ''}number") from None


def _address(text: str, name: str) -> Pubkey:
    try:
        return Pubkey.from_string(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; expected an address, 32 bytes in base58") from None


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _checked(url: str, schemes: tuple[str, ...]) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in schemes and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            f"an RPC URL cannot be read: {url.partition('?')[0]!r}; expected one such as {schemes[0]}://127.0.0.1:8899"
        )
    return url


def _websocket(http: str) -> str:
    """Solana's convention: the port after the request port; unchanged if none is given."""
    parts = urlsplit(http)
    scheme = {"http": "ws", "https": "wss"}[parts.scheme]
    netloc = parts.netloc
    if parts.port:
        netloc = netloc[: netloc.rindex(":")] + f":{parts.port + 1}"
    return parts._replace(scheme=scheme, netloc=netloc).geturl()
