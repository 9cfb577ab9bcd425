"""Several RPC services as one: retries failed requests, first at the same service, then at the others."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import certifi
import httpx
from solana.exceptions import SolanaRpcException
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Commitment, Confirmed
from solana.rpc.providers.async_http import AsyncHTTPProvider
from solders.rpc.requests import Body
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from psyche_lightning.aio import within
from psyche_lightning.errors import CoordinatorError, PsycheError
from psyche_lightning.logs import Outage
from psyche_lightning_solana.client.cluster import LOOPBACK, Cluster, Endpoint, shown

logger = logging.getLogger(__name__)

FINAL_CODES = frozenset({-32600, -32601, -32602, -32700, -32003, -32006, -32013, -32015})
"""Codes of JSON-RPC and of Solana for requests that are wrong: malformed, unsigned, of an unknown version."""
PREFLIGHT_FAILURE = -32002
MIN_CONTEXT_SLOT = -32016

RETRYABLE_ERRORS = frozenset(
    {
        "BlockhashNotFound",
        "AccountInUse",
        "ClusterMaintenance",
        "WouldExceedMaxBlockCostLimit",
        "WouldExceedMaxAccountCostLimit",
        "WouldExceedMaxVoteCostLimit",
        "WouldExceedAccountDataBlockLimit",
        "WouldExceedAccountDataTotalLimit",
        "TooManyAccountLocks",
        "ResanitizationNeeded",
        "ProgramCacheHitMaxLimit",
        "CommitCancelled",
    }
)
"""Transaction errors that depend on the moment."""
ALREADY = "AlreadyProcessed"
UNFUNDED = frozenset({"AccountNotFound", "InsufficientFundsForFee", "InsufficientFundsForRent"})


class RpcProblem(Exception):
    """A request failed.

    Attributes:
        text: the problem, without secrets.
        retryable: whether the same request, perhaps to another service, may succeed.
        code: of JSON-RPC; None without such an answer.
        data: the code's data.
        endpoint: the service's name; empty if irrelevant.
        wait: seconds that the service asked to wait; None if it did not.
        lost: whether the request may have been executed: some attempt got no answer.
    """

    def __init__(
        self,
        text: str,
        *,
        retryable: bool,
        code: int | None = None,
        data: Mapping[str, Any] | None = None,
        endpoint: str = "",
        wait: float | None = None,
    ) -> None:
        super().__init__(text)
        self.text = text
        self.retryable = retryable
        self.code = code
        self.data = dict(data or {})
        self.endpoint = endpoint
        self.wait = wait
        self.lost = code is None

    @property
    def transaction_error(self) -> Any:
        """The preflight failure, in the JSON of a ``TransactionError``; None for another problem."""
        return self.data.get("err") if self.code == PREFLIGHT_FAILURE else None


def from_error(error: object, endpoint: str) -> RpcProblem:
    """The problem in an answer's ``error`` object; malformed objects count as problems, too."""
    if not isinstance(error, Mapping) or type(error.get("code")) is not int:
        return RpcProblem("it answered with a malformed error", retryable=True, endpoint=endpoint)
    code, message, data = error["code"], str(error.get("message"))[:500], error.get("data")
    data = data if isinstance(data, Mapping) else {}
    retryable = code not in FINAL_CODES
    if code == PREFLIGHT_FAILURE:
        retryable = is_retryable(data.get("err"))
    return RpcProblem(f"{message} ({code})", retryable=retryable, code=code, data=data, endpoint=endpoint)


def error_name(error: Any) -> str:
    """The name of a ``TransactionError`` in JSON form; for an instruction's error, the inner name."""
    if isinstance(error, str):
        return error
    if isinstance(error, Mapping) and len(error) == 1:
        name, value = next(iter(error.items()))
        if name == "InstructionError" and isinstance(value, list) and len(value) == 2:
            return error_name(value[1])
        if name == "Custom":
            return f"Custom {value}"
        return str(name)
    return "an unknown error"


def custom_code(error: Any) -> int | None:
    """The program's own error number in a ``TransactionError``; None for other errors."""
    if isinstance(error, Mapping) and isinstance(error.get("InstructionError"), list):
        inner = error["InstructionError"][-1]
        if isinstance(inner, Mapping) and type(inner.get("Custom")) is int:
            return int(inner["Custom"])
    return None


def is_retryable(error: Any) -> bool:
    """Whether a retry of the failed transaction may succeed; program errors are final."""
    return error_name(error) in RETRYABLE_ERRORS


TRIES = 3
"""Attempts at one service before the next."""
FIRST_WAIT, WAIT_FACTOR, LONGEST_WAIT = 0.5, 1.5, 10.0
TIMEOUT = 10.0
MAX_ANSWER_SIZE = 64 * 1024 * 1024

_Answer = TypeVar("_Answer")
Sleep = Callable[[float], Awaitable[None]]


class PoolProvider(AsyncHTTPProvider):
    """Carries requests of ``solana``'s client to the first service that answers.

    The next request starts with the service that answered last, so a dead one costs one time-out.

    Args:
        endpoints: the services, in order of preference.
        tries: attempts at each.
        timeout: seconds for one attempt.
        sleep: waits between attempts.
        randomness: spreads the waits of many nodes.
        clock: monotonic seconds, for log messages about outages.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        tries: int = TRIES,
        timeout: float = TIMEOUT,
        sleep: Sleep = asyncio.sleep,
        randomness: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super(AsyncHTTPProvider, self).__init__(endpoints[0].http)  # without its session: this class has its own
        urls = [urlsplit(endpoint.http) for endpoint in endpoints]
        # The environment's proxies are for external hosts; the whole request has one time-out; and loading all
        # certificates takes a while.
        self.session = httpx.AsyncClient(
            timeout=None,
            trust_env=any(url.hostname not in LOOPBACK for url in urls),
            verify=_certificates() if any(url.scheme == "https" for url in urls) else False,
        )
        self._endpoints = tuple(endpoints)
        self._first = 0
        self._tries = tries
        self._longest = timeout
        self._sleep = sleep
        self._randomness = randomness or random.Random()
        # Only if another service may answer; else the caller reports it.
        self._outages = {
            endpoint: Outage(logger, f"the RPC service {endpoint.name}", level=logging.INFO, clock=clock)
            for endpoint in (endpoints if len(endpoints) > 1 else ())
        }

    @property
    def endpoint(self) -> Endpoint:
        """The first service to ask."""
        return self._endpoints[self._first]

    async def make_request(
        self, body: Body, parser: type[_Answer], check: Callable[[_Answer], None] | None = None
    ) -> _Answer:
        """Ask, and decode the answer.

        Args:
            body: the request.
            parser: the class of the answer.
            check: raises :class:`RpcProblem` for an unusable answer.

        Raises:
            RpcProblem: a service refused finally, or all failed.
        """

        def decode(text: str) -> _Answer:
            answer: _Answer = _decode(text, parser)
            if check is not None:
                check(answer)
            return answer

        return await self._ask(body.to_json(), decode)

    async def ask(self, body: Body, decode: Callable[[Any], _Answer]) -> _Answer:
        """Ask, and decode the answer's result without ``solders``, which decompresses whatever it gets.

        Args:
            body: the request.
            decode: makes the answer of JSON; its errors count as a malformed one.

        Raises:
            RpcProblem: a service refused finally, or all failed.
        """

        def read(text: str) -> _Answer:
            try:
                return decode(json.loads(text)["result"])
            except (TypeError, ValueError, LookupError, AttributeError) as error:
                problem = f"its answer does not fit this request ({type(error).__name__})"
                raise RpcProblem(problem, retryable=True) from None

        return await self._ask(body.to_json(), read)

    async def make_request_unparsed(self, body: Body) -> str:
        """Ask, and return the answer's text."""
        return await self._ask(body.to_json(), lambda text: text)

    async def call(self, method: str, params: list[Any]) -> Any:
        """Send a request without ``solders`` classes; returns the answer's result."""
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        return json.loads(await self._ask(json.dumps(body), lambda text: text))["result"]

    async def _ask(self, request: str, decode: Callable[[str], _Answer]) -> _Answer:
        count = len(self._endpoints)
        problem: RpcProblem | None = None
        lost = False
        for place in [(self._first + i) % count for i in range(count)]:
            try:
                async for attempt in self._retrying():
                    with attempt:
                        try:
                            answer = await self._once(self._endpoints[place], request, decode)
                        except RpcProblem as error:
                            lost = error.lost = error.lost or lost
                            raise
            except RpcProblem as error:
                if not error.retryable:
                    raise
                problem = error
            else:
                self._first = place
                return answer
        assert problem is not None
        raise problem

    def _retrying(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, RpcProblem) and error.retryable),
            wait=self._wait,
            stop=stop_after_attempt(self._tries),
            sleep=self._sleep,
            reraise=True,
        )

    def _wait(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.wait if isinstance(error, RpcProblem) else None
        wait = FIRST_WAIT * WAIT_FACTOR ** (state.attempt_number - 1) if asked is None else asked
        return min(wait, LONGEST_WAIT) * (1 + self._randomness.random() / 4)

    async def _once(self, endpoint: Endpoint, request: str, decode: Callable[[str], _Answer]) -> _Answer:
        try:
            try:
                text = await within(self._longest, self._post(endpoint, request))
            except asyncio.TimeoutError:
                raise RpcProblem(f"no answer within {self._longest:.0f} s", retryable=True) from None
            found = decode(text)
        except RpcProblem as problem:
            problem.endpoint = endpoint.name
            logger.debug("%s: %s", problem.endpoint, problem.text)
            if problem.code is None and endpoint in self._outages:
                self._outages[endpoint].fails(problem.text)
            raise
        if endpoint in self._outages:
            self._outages[endpoint].works()
        return found

    async def _post(self, endpoint: Endpoint, request: str) -> str:
        headers = {"Content-Type": "application/json"}
        try:
            async with self.session.stream("POST", endpoint.http, content=request, headers=headers) as answer:
                text = bytearray()
                async for part in answer.aiter_bytes():
                    text += part
                    if len(text) > MAX_ANSWER_SIZE:
                        raise RpcProblem(f"its answer has more than {MAX_ANSWER_SIZE} bytes", retryable=True)
                status, after = answer.status_code, answer.headers.get("retry-after", "")
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            # Their texts may quote the URL, and with it a key.
            raise RpcProblem(f"no connection ({type(error).__name__})", retryable=True) from None
        return _checked(bytes(text), status, after)


def _checked(text: bytes, status: int, after: str) -> str:
    """The text of a valid answer; solders panics on some invalid ones."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and "error" in value:
        raise from_error(value["error"], "")
    if status == 429:
        wait = float(after) if after.isdigit() else None
        raise RpcProblem("too many requests", retryable=True, wait=wait)
    if status != 200:
        raise RpcProblem(f"it answered with HTTP status {status}", retryable=True)
    if not isinstance(value, dict) or "result" not in value:
        raise RpcProblem("it answered with something that is not JSON-RPC", retryable=True)
    return text.decode()


def _decode(text: str, parser: Any) -> Any:
    try:
        return parser.from_json(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # solders panics, which is a BaseException, on some malformed answers
        raise RpcProblem(f"its answer does not fit this request ({type(error).__name__})", retryable=True) from None


@functools.cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certifi.where())


class PoolClient(AsyncClient):
    """An ordinary ``solana`` client whose requests go through the pool.

    Args:
        provider: the pool.
        commitment: the commitment of its reads.
    """

    def __init__(self, provider: PoolProvider, commitment: str) -> None:
        super(AsyncClient, self).__init__(Commitment(commitment))
        self._provider = provider


def unreachable(problem: RpcProblem, what: str, cluster: str) -> CoordinatorError:
    """The error for users after all retries."""
    where = f" at {problem.endpoint}" if problem.endpoint else ""
    if not problem.retryable:
        return CoordinatorError(f"{cluster} refused {what}{where}: {problem.text}", code="Refused")
    return CoordinatorError(
        f"cannot reach the chain {cluster}{where} for {what}: {problem.text}. Check the RPC URL (--coordinator or "
        "PSYCHE_COORDINATOR) and the network; PSYCHE_SOLANA_RPC may name further services. "
        "A local chain starts with `psyche solana localnet`.",
        code="Unreachable",
        retryable=True,
    )


@contextlib.asynccontextmanager
async def connect(cluster: Cluster) -> AsyncIterator[AsyncClient]:
    """A client of the first service of a cluster that answers.

    Raises:
        PsycheError: no answer, or it is another cluster.
    """
    problems = []
    for endpoint in cluster.endpoints:
        async with AsyncClient(endpoint.http, Confirmed, timeout=30) as client:
            try:
                genesis = str((await client.get_genesis_hash()).value)
            except SolanaRpcException as error:
                problems.append(f"{endpoint.name}: {error.__cause__ or error.error_msg}")
                continue
            if cluster.genesis not in (None, genesis):
                raise PsycheError(f"{shown(endpoint.http)} is not {cluster.name}: its first block is {genesis}")
            yield client
            return
    hint = " `psyche solana localnet` starts a local chain." if cluster.local else ""
    raise PsycheError(f"no RPC service of {cluster.name} answers ({'; '.join(problems)}).{hint}")
