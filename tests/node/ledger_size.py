"""Measures a node's ledger: ``python tests/node/ledger_size.py [ROUNDS] [NODES]``; not a test.

Writes a ledger of that many rounds, with results that their trainers signed, and audits it as
``psyche run ledger --check`` does. Prints its bytes, those of its lines without compression, and the
most memory that the audit took.
"""

from __future__ import annotations

import os
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

from psyche_lightning.node.agreement import DecidedRound
from psyche_lightning.node.audit import _shares, audit_files
from psyche_lightning.node.ledger import FILE, Ledger, row_of
from psyche_lightning.protocol.messages import Result, seal
from psyche_lightning.protocol.state import Round
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity

EPOCH = 500
SCOPE = "measured#" + 16 * "ab"


def records(rounds: int, nodes: int):  # type: ignore[no-untyped-def]
    """The decided rounds of a run in which nobody is ever late."""
    keys = [Identity.generate() for _ in range(nodes)]
    signers = tuple(key.public for key in keys)
    layout, start = sha256(b"layout"), sha256(b"start")
    for number in range(rounds):
        epoch, height = divmod(number, EPOCH)
        seed = int.from_bytes(sha256(struct.pack("<Q", number))[:8], "little")
        round_ = Round(height, number + 1, seed, 8 * nodes * number, 8 * nodes, signers)
        shares = _shares(row_of(SCOPE, DecidedRound(epoch, round_, signers, (), (), start)))
        results = []
        for place, ((first, stop),) in shares.items():
            loss, payload = struct.unpack("<I", os.urandom(4))[0], os.urandom(32)
            told = (number, payload, 24_000, layout, (0x3A83126F,), loss, 8)
            result = Result(epoch, height, number + 1, first, stop - 1, *told)
            results.append(seal(keys[place], SCOPE, result))
        yield DecidedRound(epoch, round_, signers, (), tuple(results), start)


def main(rounds: int = 100_000, nodes: int = 2) -> None:
    """Write, audit, print."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder) / FILE)
        lines = 0
        for record in records(rounds, nodes):
            lines += len(str(row_of(SCOPE, record)))
            ledger.append(SCOPE, [record])
        ledger.close()
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.monotonic()
        found = audit_files([ledger.path], newest=20)
        seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert found.rounds == rounds, found.problems
        assert not found.problems, found.problems
    print(f"{rounds} rounds of {nodes} nodes: {size / 1e6:.1f} MB, as lines {lines / 1e6:.1f} MB")
    print(f"the audit took {seconds:.0f} s, and {(after - before) / 1024:.0f} MiB more than before it")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
