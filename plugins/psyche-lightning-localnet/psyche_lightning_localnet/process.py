"""Runs a local chain in a process of its own, for tests and demos."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from psyche_lightning_localnet.errors import LocalnetError

COMMAND = ("-m", "psyche_lightning_localnet")
_BANNER = re.compile(r"on (http://\S+) \(websocket (ws://[^,; ]+)")


class LocalnetProcess:
    """``solana-localnet`` as a child of this process; a context manager that stops it.

    Args:
        arguments: arguments of the command (``"--slot-ms", "50"``). Without ``--port``, it uses free ports.
        log: file for its log; None for this process' standard error.
        command: what Python runs: ``solana-localnet``, or a command with the same arguments.

    Attributes:
        url: URL for requests.
        ws_url: URL for subscriptions.
        process: the child process.

    Raises:
        LocalnetError: the chain did not start.
    """

    def __init__(self, *arguments: str, log: Path | None = None, command: Sequence[str] = COMMAND) -> None:
        port = () if "--port" in arguments else ("--port", "0")
        errors = None if log is None else log.open("ab")
        try:
            self.process = subprocess.Popen(
                [sys.executable, *command, *port, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        finally:
            if errors is not None:
                errors.close()
        assert self.process.stdout is not None
        banner = self.process.stdout.readline()
        found = _BANNER.search(banner)
        if found is None:
            self.kill()
            raise LocalnetError(f"the local chain did not start: {banner.strip() or 'see its messages above'}")
        self.url, self.ws_url = found.group(1), found.group(2)

    def __enter__(self) -> LocalnetProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, timeout: float = 20.0) -> int:
        """Stop the process like Ctrl-C, which saves its ledger; returns its exit code."""
        if self.process.poll() is None:
            # Windows can only kill a process; its ledger then keeps the last snapshot.
            self.process.send_signal(signal.SIGINT if os.name == "posix" else signal.SIGTERM)
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
        self._close()
        return self.process.returncode

    def kill(self) -> None:
        """Kill the process at once, like a crash."""
        self.process.kill()
        self.process.wait()
        self._close()

    def _close(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()
