"""The programs compiled for this machine, under ASan and UBSan, fed with the instructions that the chain got.

A process of its own runs them (``program/native/replay.c``), so that what a sanitizer finds ends that process and is
reported with its text.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

NATIVE = Path(__file__).parents[3] / "program" / "native"
_GROWTH = 10_240
"""Room that the loader leaves behind the data of each account."""


@dataclass
class NativeAccount:
    """An account as one instruction sees it; the same object twice is the same account twice."""

    key: bytes
    owner: bytes
    lamports: int
    data: bytes
    signer: bool = False
    writable: bool = False
    executable: bool = False


class NativeProgram:
    """One program as a native process.

    Args:
        name: ``coordinator``, ``authorizer`` or ``treasurer``.
        folder: where it is built.

    Raises:
        subprocess.CalledProcessError: it cannot be compiled.
    """

    def __init__(self, name: str, folder: Path) -> None:
        command = ["make", "-s", "-C", str(NATIVE), f"OUT={folder.resolve()}", f"replay-{name}"]
        subprocess.run(command, check=True, capture_output=True)
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [folder / f"replay-{name}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        assert self._process.stdin
        assert self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout

    def __enter__(self) -> NativeProgram:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        self._to.close()
        self._process.wait(timeout=30)
        self._from.close()
        self._errors.close()

    def run(
        self, program: bytes, accounts: Sequence[NativeAccount], data: bytes, slot: int, timestamp: int
    ) -> tuple[int, str]:
        """Run one instruction, and write into ``accounts`` what it left, if it succeeded.

        Args:
            program: its address, 32 bytes.
            accounts: in the order of the instruction, 16 at most.
            data: discriminator and arguments.
            slot: the clock's slot.
            timestamp: the clock's Unix time in seconds.

        Returns:
            0 or the number of the error, and the program's log.

        Raises:
            AssertionError: a sanitizer ended the process.
        """
        buffer, places = _serialize(program, accounts, data)
        try:
            self._to.write(struct.pack("<QqQ", slot, timestamp, len(buffer)) + buffer)
            self._to.flush()
            result, length = struct.unpack("<QQ", self._read(16))
            log = self._read(length).decode("utf-8", "replace")
            after = self._read(len(buffer))
        except (BrokenPipeError, EOFError) as error:
            self._errors.seek(0)
            raise AssertionError(self._errors.read().decode("utf-8", "replace")) from error
        if result == 0:
            for account, place in places:
                account.owner = after[place + 40 : place + 72]
                account.lamports, size = struct.unpack_from("<QQ", after, place + 72)
                account.data = after[place + 88 : place + 88 + size]
        return result, log

    def _read(self, size: int) -> bytes:
        data = self._from.read(size)
        if len(data) < size:
            raise EOFError
        return data


def _serialize(
    program: bytes, accounts: Sequence[NativeAccount], data: bytes
) -> tuple[bytes, list[tuple[NativeAccount, int]]]:
    """The buffer that the loader hands to a program (its aligned form), and where each account lies in it."""
    parts = [struct.pack("<Q", len(accounts))]
    place = 8
    places: list[tuple[NativeAccount, int]] = []
    first: dict[bytes, int] = {}
    for index, account in enumerate(accounts):
        earlier = first.setdefault(account.key, index)
        if earlier != index:
            part = struct.pack("<B7x", earlier)
        else:
            places.append((account, place))
            flags = (account.signer, account.writable, account.executable)
            head = struct.pack("<4B4x", 0xFF, *flags) + account.key + account.owner
            size = len(account.data)
            part = head + struct.pack("<QQ", account.lamports, size) + account.data
            part += bytes(_GROWTH + -size % 8) + struct.pack("<Q", 2**64 - 1)
        parts.append(part)
        place += len(part)
    parts.append(struct.pack("<Q", len(data)) + data + program)
    return b"".join(parts), places
