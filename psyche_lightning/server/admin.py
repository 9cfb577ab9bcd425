"""The requests of people to a coordinator server: create, list, inspect, pause and resume runs, over plain HTTP."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning.protocol.link import JoinLink, no_url
from psyche_lightning.protocol.owner import Creation
from psyche_lightning.server.answers import PROBLEM, RUNS, STATUS, Shape, misfit
from psyche_lightning.server.channel import coordinator_error
from psyche_lightning.server.tls import Door, is_near
from psyche_lightning.server.token import check_token, find_token, read_token
from psyche_lightning.text import plain
from psyche_lightning.urls import http_parts

URL_VARIABLE = "PSYCHE_COORDINATOR"
TOKEN_VARIABLE = "PSYCHE_COORDINATOR_TOKEN"
TOKEN_FILE_VARIABLE = "PSYCHE_COORDINATOR_TOKEN_FILE"
TIMEOUT = 5.0
MAX_ANSWER_SIZE = 64 * 1024 * 1024
BACKUP_TIMEOUT = 60.0
MAX_BACKUP_SIZE = 1024 * 1024 * 1024
_KEY = re.compile("[0-9A-Fa-f]{64}")


def check_url(url: str) -> str:
    """Returns the URL without a slash at its end; of a join link, only the URL.

    Raises:
        ConfigError: it is not an http or https URL, or has a space, a user's name, or letters that a URL may not have.
    """
    url = JoinLink.parse(url).url
    parts = http_parts(url)
    good = parts is not None and f"{parts.path}{parts.query}".isascii() and "@" not in parts.netloc
    if not good or " " in url:
        raise no_url(url)
    return url.rstrip("/")


class CoordinatorAdmin:
    """A client for the requests of people.

    Args:
        url: URL of the server, or a join link, whose key it then must have; None for ``PSYCHE_COORDINATOR`` in the
            environment.
        token: the owner's token, which only requests that change something carry. None for that of the environment
            (``PSYCHE_COORDINATOR_TOKEN``, or the file ``PSYCHE_COORDINATOR_TOKEN_FILE``), else for that of a
            coordinator that this user runs on this machine, if it has this URL.
        attempts: how often to try to reach the server.

    Raises:
        ConfigError: the URL is missing or malformed. From requests that change something: there is no token in the file
            or variable, or other users can read the file.
    """

    def __init__(self, url: str | None = None, *, token: str | None = None, attempts: int = 5) -> None:
        url = url or os.environ.get(URL_VARIABLE)
        if not url:
            raise ConfigError(f"no coordinator given: pass --coordinator URL or set {URL_VARIABLE}")
        self.url = check_url(url)
        self._given = token
        self._attempts = attempts
        self._door = Door(JoinLink.parse(url))

    def create(
        self,
        run_id: str,
        config: dict[str, Any] | None = None,
        *,
        manifest: dict[str, Any] | None = None,
        seed: int | None = None,
        max_seq_len: int = 1,
        everybody: bool = True,
        by_link: bool = False,
    ) -> dict[str, Any]:
        """Create a run and return its status. An identical second request changes nothing.

        Args:
            run_id: the run's name: 1 to 32 letters, digits, ``.``, ``_`` and ``-``.
            config: values of :class:`~psyche_lightning.protocol.state.CoordinatorConfig`; the others are defaults.
            manifest: the known part of the run's manifest.
            seed: decides all committees and assignments; None for a random one.
            max_seq_len: tokens of a sample.
            everybody: whether every node may join; if not, only those that the owner authorizes.
            by_link: whether nodes need the run's join link, unless the owner authorizes them.

        Raises:
            CoordinatorError: the request is refused, or the server cannot be reached.
        """
        body = {
            "run_id": run_id, "config": config or {}, "manifest": manifest, "seed": seed, "max_seq_len": max_seq_len,
            "everybody": everybody,
            "by_link": by_link,
        }  # fmt: skip
        return self._shaped(self._ask("POST", "/v1/runs", body), STATUS)

    def link(self, run_id: str, *, new: bool = False) -> JoinLink:
        """The run's join link, with the URL of this client.

        Args:
            run_id: the run.
            new: whether to make a new one. The former one is then worth nothing, and members need none.

        Raises:
            CoordinatorError: ``NoLink``: the run is joined without a link, so there is none to make.
        """
        found = self.command(run_id, "link", new=new)
        try:
            return JoinLink(self.url, run_id, bytes.fromhex(found["key"]), bytes.fromhex(found["secret"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CoordinatorError(f"{self.url} gave no join link: {error}", code="Unreachable") from error

    def status(self, run_id: str) -> dict[str, Any]:
        """The answer of ``GET /v1/runs/RUN``: the run's status for people and programs."""
        return self._shaped(self._ask("GET", _path(run_id)), STATUS)

    def manifest(self, digest: str) -> dict[str, Any]:
        """The manifest with this SHA-256 in hex, which a run's status contains as ``manifest_digest``."""
        return self._ask("GET", f"/v1/manifests/{digest}")

    def runs(self) -> list[dict[str, Any]]:
        """A summary of each run: ``run_id``, ``phase``, ``epoch``, ``step``, ``total_steps``, ``clients``."""
        runs: list[dict[str, Any]] = self._shaped(self._ask("GET", "/v1/runs"), RUNS)["runs"]
        return runs

    def backup(self) -> bytes:
        """A backup of the coordinator: all runs, its key and the owner's token.

        Raises:
            ConfigError: it would travel to another machine without encryption.
        """
        if self.url.startswith("http:") and not is_near(self.url):
            raise ConfigError(
                f"{self.url} does not encrypt, and a backup has the coordinator's key; make it on the coordinator's "
                "own machine, or give an https:// URL"
            )
        data = self._send("POST", "/v1/backup", {}, timeout=BACKUP_TIMEOUT, most=MAX_BACKUP_SIZE + 1)
        if len(data) > MAX_BACKUP_SIZE:
            raise CoordinatorError(
                f"the backup of {self.url} has more than {MAX_BACKUP_SIZE} bytes; stop the coordinator and copy its "
                "folder instead",
                code="TooLarge",
            )
        return data

    def pause(self, run_id: str) -> dict[str, Any]:
        """Pause the run at the end of its epoch, or at once if no epoch has begun; returns the status."""
        return self.command(run_id, "pause")

    def resume(self, run_id: str) -> dict[str, Any]:
        """Resume a paused run; returns the status."""
        return self.command(run_id, "resume")

    def command(self, run_id: str, name: str, **body: Any) -> dict[str, Any]:
        """Send one of the owner's commands for a run; returns the answer.

        Args:
            run_id: the run.
            name: ``pause``, ``resume``, ``start``, ``update``, ``close``, ``delete``, ``authorize``, ``revoke``,
                ``kick``, ``link`` or ``restart-from``.
            body: the command's arguments.
        """
        answer = self._ask("POST", f"{_path(run_id)}/{name}", body)
        return answer if name in ("close", "delete", "link") else self._shaped(answer, STATUS)

    @cached_property
    def _token(self) -> str | None:
        given, file = self._given or os.environ.get(TOKEN_VARIABLE), os.environ.get(TOKEN_FILE_VARIABLE)
        if given:
            return check_token(given, TOKEN_VARIABLE)
        return read_token(Path(file)) if file else find_token(self.url)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._parse(self._send(method, path, body), 200)

    def _send(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        *,
        timeout: float = TIMEOUT,
        most: int = MAX_ANSWER_SIZE,
    ) -> bytes:
        retrying = Retrying(
            retry=retry_if_exception_type(OSError),
            wait=wait_exponential(multiplier=0.5, max=3.0) + wait_random(0.0, 0.5),
            stop=stop_after_attempt(self._attempts),
            reraise=True,
        )
        try:
            return retrying(self._once, method, path, body, timeout, most)
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise CoordinatorError(
                f"cannot reach the coordinator at {self.url}: {reason}. Tried {self._attempts} times. Start one with "
                f"`psyche coordinator --port N`, or give its URL with --coordinator or {URL_VARIABLE}; "
                "https:// if it encrypts.",
                code="Unreachable",
                retryable=True,
            ) from error

    def _once(self, method: str, path: str, body: dict[str, Any] | None, timeout: float, most: int) -> bytes:
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data, headers=headers, method=method)
        if body is not None and self._token:  # reading needs no token, and a redirection must not carry it elsewhere
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            with self._door.open(request, timeout) as answer:
                found: bytes = answer.read(most)
                return found
        except urllib.error.HTTPError as error:
            with error:
                problem = self._parse(error.read(MAX_ANSWER_SIZE), error.code)
                raise coordinator_error(self._shaped(problem, PROBLEM, error.code)) from None

    def _parse(self, data: bytes, status: int) -> dict[str, Any]:
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise CoordinatorError(
                f"{self.url} answered {status} with something that is not JSON: it is not a psyche coordinator",
                code="Unreachable",
            )
        return value

    def _shaped(self, answer: dict[str, Any], shape: Shape, status: int = 200) -> dict[str, Any]:
        wrong = misfit(answer, shape)
        if wrong:
            raise CoordinatorError(
                f"{self.url} answered {status} with JSON of another shape: {plain(wrong)}. It is not a psyche "
                "coordinator, or of another version: look at the URL, and use the same version of psyche-lightning.",
                code="Unreachable",
            )
        return answer


class ServerRun:
    """The owner's side of one run of a server (:class:`~psyche_lightning.protocol.owner.RunAdmin`).

    Args:
        url: URL of the server.
        run_id: the run.
        token: the owner's token; see :class:`CoordinatorAdmin`.
    """

    def __init__(self, url: str, run_id: str, token: str | None = None) -> None:
        self._admin = CoordinatorAdmin(url, token=token)
        self._run = run_id

    def create(self, wanted: Creation) -> dict[str, Any]:
        """Create the run, which is open at once."""
        if wanted.rates != (None, None) or wanted.mint:
            raise self._no_rates()
        manifest = None if wanted.manifest is None else dict(wanted.manifest)
        return self._admin.create(
            self._run,
            dict(wanted.config),
            manifest=manifest,
            seed=wanted.seed,
            max_seq_len=wanted.max_seq_len,
            everybody=wanted.everybody,
            by_link=wanted.by_link,
        )

    def update(self, wanted: Creation) -> dict[str, Any]:
        """Change the configuration of a halted run."""
        if wanted.described:
            raise ConfigError("a name, a description and a client version belong to runs on a chain")
        return self._admin.command(self._run, "update", config=dict(wanted.config))

    def start(self) -> dict[str, Any]:
        """Open a halted run."""
        return self._admin.command(self._run, "start")

    def pause(self) -> dict[str, Any]:
        """Pause the run at the end of its epoch."""
        return self._admin.pause(self._run)

    def resume(self) -> dict[str, Any]:
        """Open a paused run."""
        return self._admin.resume(self._run)

    def status(self) -> dict[str, Any]:
        """Returns the run's status."""
        return self._admin.status(self._run)

    def close(self) -> str:
        """Remove a halted run from the server, which keeps its history if it ever trained."""
        answer = self._admin.command(self._run, "close")
        text = f"run {self._run} is removed from {self._admin.url}"
        if answer.get("archived"):
            text += f"; its history stays there until `psyche run delete {self._run}`"
        forgotten = answer.get("forgotten")
        for one in forgotten if isinstance(forgotten, list) else ():
            text += f"\nthe history of the closed run {plain(str(one))} is deleted there: only the newest ones are kept"
        return text

    def authorize(self, node: str | None) -> str:
        """Let a node join, by its key in hex, or everybody."""
        self._admin.command(self._run, "authorize", node=node)
        return f"{node or 'everybody'} may join run {self._run}"

    def revoke(self, node: str | None) -> str:
        """Undo :meth:`authorize`."""
        node = node and self._key(node)
        status = self._admin.command(self._run, "revoke", node=node)
        if node is None:
            return f"only the members of run {self._run} and nodes that were authorized by their keys may join it"
        return f"{node} may not join run {self._run} again, and is in no epoch after this one{_reentry(status)}"

    def kick(self, node: str) -> str:
        """Remove a node at once."""
        node = self._key(node)
        status = self._admin.command(self._run, "kick", node=node)
        return f"{node} is removed from run {self._run} and may not join it again{_reentry(status)}"

    def restart_from(self, digest: str | None, step: int) -> str:
        """Go on from other parameters than the newest."""
        if digest is None:
            raise ConfigError(
                f"name the parameters by their digest: `psyche run restart-from {self._run} DIGEST {step}`"
            )
        status = self._admin.command(self._run, "restart-from", digest=digest, step=step)
        return f"run {self._run} goes on from the parameters {digest[:8]} of step {step}: {status['waits_for']}"

    def _key(self, node: str) -> str:
        """The whole key of a member that is given by the first digits of its key; a whole key as it is.

        Raises:
            ConfigError: it is neither.
        """
        status = self.status()
        keys = {each["signer"] for group in ("clients", "pending", "exited") for each in status[group]}
        found = sorted(key for key in keys if node and key.startswith(node.lower()))
        if len(found) > 1:
            raise ConfigError(f"{node} begins the keys of several nodes; give more of one: {', '.join(found)}")
        if not found and not _KEY.fullmatch(node):
            known = ", ".join(sorted(key[:8] for key in keys)) or "none yet"
            raise ConfigError(
                f"run {self._run} has no node whose key begins with {node!r}; its nodes: {known}. Of any other node, "
                "give the whole key, 64 hexadecimal digits."
            )
        return found[0] if found else node

    def link(self, *, new: bool = False) -> str:
        """The run's join link."""
        return str(self._admin.link(self._run, new=new))

    def points(self) -> list[dict[str, Any]]:
        """Points of each node: the samples of decided rounds, in equal parts to those whose results they have."""
        points: list[dict[str, Any]] = self.status()["points"]
        return points

    def rates(self, earned: int | None, slashed: int | None) -> str:
        """Refuse: a server counts samples."""
        raise self._no_rates()

    def fund(self, amount: int) -> str:
        """Refuse: a server does not pay."""
        return self.claim(None)

    def _no_rates(self) -> CoordinatorError:
        return CoordinatorError(
            f"{self._admin.url} gives a point for each sample and does not pay; a run on a chain has rates and a token",
            code="NoTreasurer",
        )

    def claim(self, points: int | None) -> str:
        """Refuse: a server does not pay."""
        raise CoordinatorError(
            f"{self._admin.url} counts points but does not pay; a run on a chain with a treasurer does",
            code="NoTreasurer",
        )


def _reentry(status: dict[str, Any]) -> str:
    """What a revocation does not prevent, in words."""
    if status["allowed"] is not None:
        return ""
    if status["by_link"]:
        run = status["run_id"]
        return f". It may know the join link and come with another key: `psyche run link {run} --new` makes a new one"
    return ". Everybody may join this run, so it may come with another key"


def _path(run_id: str) -> str:
    return f"/v1/runs/{quote(run_id, safe='')}"
