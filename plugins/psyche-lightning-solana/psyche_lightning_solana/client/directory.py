"""Which runs a coordinator program has."""

from __future__ import annotations

from typing import Any

import numpy as np
from solders.pubkey import Pubkey

from psyche_lightning.protocol.state import Phase
from psyche_lightning_solana.client.reader import Reader
from psyche_lightning_solana.layout import CLIENTS, COORDINATOR, COORDINATOR_DISCRIMINATOR, COORDINATOR_SIZE

# An account has 119,160 bytes; these few say how a run stands, and how many clients its epoch has.
_STANDS = ("run_id", "run_state", "config", "epoch", "step")


def _place(field: str) -> tuple[np.dtype[Any], int]:
    assert COORDINATOR.fields is not None
    kind, offset, *_ = COORDINATOR.fields[field]
    return kind, offset


_START = _place("run_id")[1]
_HEAD = np.dtype(
    {
        "names": list(_STANDS),
        "formats": [_place(name)[0] for name in _STANDS],
        "offsets": [_place(name)[1] - _START for name in _STANDS],
    }
)
assert CLIENTS.fields is not None
_COUNT = _place("clients")[1] + CLIENTS.fields["len"][1]


async def runs_of(reader: Reader, program: Pubkey) -> list[dict[str, Any]]:
    """How each run of a program stands, by name.

    Args:
        reader: the RPC services; many public ones do not list the accounts of programs.
        program: a coordinator program, Psyche's or ours.

    Returns:
        ``run_id``, ``phase``, ``epoch``, ``step``, ``total_steps``, ``clients`` and ``account`` of each.

    Raises:
        RpcProblem: no service answers, or lists accounts.
    """
    kind = (COORDINATOR_SIZE, COORDINATOR_DISCRIMINATOR)
    heads = await reader.owned(program, *kind, slice(_START, _START + _HEAD.itemsize))
    counts = await reader.owned(program, *kind, slice(_COUNT, _COUNT + 8))
    rows = []
    for place, data in heads.items():
        head = np.frombuffer(data, _HEAD, 1)[0]
        rows.append(
            {
                "run_id": head["run_id"].tobytes().rstrip(b"\0").decode("utf-8", "replace"),
                "phase": _phase(int(head["run_state"])),
                "epoch": int(head["epoch"]),
                "step": int(head["step"]),
                "total_steps": int(head["config"]["total_steps"]),
                "clients": int.from_bytes(counts.get(place, b""), "little"),
                "account": str(place),
            }
        )
    return sorted(rows, key=lambda row: str(row["run_id"]))


def _phase(number: int) -> str:
    try:
        return Phase(number).name.lower()
    except ValueError:  # Psyche's cooldown
        return f"phase {number}"
