"""Several RPC services as one: requests that fail are tried again, then elsewhere, as long as that can help."""

from __future__ import annotations

import asyncio
import functools
import json
import random
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

import certifi
import httpx
from solana.rpc.async_api import AsyncClient
from solana.rpc.commitment import Commitment
from solana.rpc.providers.async_http import AsyncHTTPProvider
from solders.rpc.requests import Body
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from psyche_lightning.errors import CoordinatorError
from psyche_lightning_solana.client.cluster import LOOPBACK, Endpoint
from psyche_lightning_solana.client.problems import RpcProblem, from_error
from psyche_lightning_solana.client.waiting import within

TRIES = 3
"""Attempts at one service before the next one is asked."""
FIRST_WAIT, WAIT_FACTOR, LONGEST_WAIT = 0.5, 1.5, 10.0
TIMEOUT = 10.0
MAX_ANSWER_SIZE = 64 * 1024 * 1024

_Answer = TypeVar("_Answer")
Sleep = Callable[[float], Awaitable[None]]


class PoolProvider(AsyncHTTPProvider):
    """Carries requests of ``solana``'s client to the first service that answers.

    The service that answered last is asked first the next time, so a dead one costs its time-out only once.

    Args:
        endpoints: the services, in order of preference.
        tries: attempts at each.
        timeout: seconds for one attempt.
        sleep: waits between attempts.
        randomness: spreads the waits of many nodes.
        on_problem: is told of each failed attempt.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        tries: int = TRIES,
        timeout: float = TIMEOUT,
        sleep: Sleep = asyncio.sleep,
        randomness: random.Random | None = None,
        on_problem: Callable[[RpcProblem], None] | None = None,
    ) -> None:
        super(AsyncHTTPProvider, self).__init__(endpoints[0].http)  # without its session, which would be another one
        urls = [urlsplit(endpoint.http) for endpoint in endpoints]
        # The environment's proxies are for the world outside; one time-out for the whole request is ours; and reading
        # all certificates of the world takes a while.
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
        self._on_problem = on_problem

    @property
    def endpoint(self) -> Endpoint:
        """The service that is asked first."""
        return self._endpoints[self._first]

    async def make_request(
        self, body: Body, parser: type[_Answer], check: Callable[[_Answer], None] | None = None
    ) -> _Answer:
        """Ask, and decode the answer.

        Args:
            body: the request.
            parser: the class of the answer.
            check: raises :class:`RpcProblem` for an answer that does not do.

        Raises:
            RpcProblem: a service refused for good, or all of them failed.
        """

        def decode(text: str) -> _Answer:
            answer: _Answer = _decode(text, parser)
            if check is not None:
                check(answer)
            return answer

        return await self._ask(body.to_json(), decode)

    async def make_request_unparsed(self, body: Body) -> str:
        """Ask, and return the answer's text."""
        return await self._ask(body.to_json(), lambda text: text)

    async def call(self, method: str, params: list[Any]) -> Any:
        """Ask for what ``solders`` has no classes for; returns the answer's result."""
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
            return decode(text)
        except RpcProblem as problem:
            problem.endpoint = endpoint.name
            if self._on_problem is not None:
                self._on_problem(problem)
            raise

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
    """The answer's text when it is one; solders would panic on some that are none."""
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
        raise RpcProblem(f"its answer is not one to this request ({type(error).__name__})", retryable=True) from None


@functools.cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certifi.where())


class PoolClient(AsyncClient):
    """An ordinary ``solana`` client whose requests go through the pool.

    Args:
        provider: the pool.
        commitment: how settled what it reads must be.
    """

    def __init__(self, provider: PoolProvider, commitment: str) -> None:
        super(AsyncClient, self).__init__(Commitment(commitment))
        self._provider = provider


def unreachable(problem: RpcProblem, what: str, cluster: str) -> CoordinatorError:
    """The error for people when nothing helped."""
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
