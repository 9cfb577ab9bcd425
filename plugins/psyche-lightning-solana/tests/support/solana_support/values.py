"""Random values of the programs' types: any that the decoders accept, and configurations with which a run can go on."""

from __future__ import annotations

import struct
from random import Random
from typing import Any

from psyche_lightning_solana.borsh import (
    Array,
    Boolean,
    Enum,
    Fixed,
    FixedVector,
    Number,
    Option,
    Raw,
    String,
    Struct,
    Type,
    Vector,
)
from psyche_lightning_solana.types import MODEL

_BITS = {"u8": 8, "u16": 16, "u32": 32, "u64": 64, "i32": 32, "i64": 64}


def any_value(kind: Type, random: Random) -> Any:
    """A value of that type, often an extreme one."""
    if isinstance(kind, Number):
        return _number(kind, random)
    if isinstance(kind, Boolean):
        return random.random() < 0.5
    if isinstance(kind, Fixed):
        return (
            "".join(random.choices("aé/{}", k=random.choice([0, 1, 5, kind.size // 2])))
            if random.random() < 0.9
            else "x" * kind.size
        )
    if isinstance(kind, Raw):
        return random.randbytes(kind.size)
    if isinstance(kind, String):
        return "v" * random.choice([0, 1, 7, min(kind.limit, 200)])
    if isinstance(kind, Option):
        return any_value(kind.item, random) if random.random() < 0.5 else None
    if isinstance(kind, Array):
        return [any_value(kind.item, random) for _ in range(kind.count)]
    if isinstance(kind, (Vector, FixedVector)):
        most = kind.count if isinstance(kind, FixedVector) else 3
        return [any_value(kind.item, random) for _ in range(random.randint(0, most))]
    if isinstance(kind, Struct):
        return {name: any_value(field, random) for name, field in kind.fields.items()}
    assert isinstance(kind, Enum)
    name, body = random.choice(list(kind.variants.items()))
    return name if body is None else {name: any_value(body, random)}


def _number(kind: Number, random: Random) -> int | float:
    if kind.floating:
        chosen = random.choice([0.0, -0.0, 0.5, 1e-4, -3.25, float("inf")])
        return float(struct.unpack(kind.form, struct.pack(kind.form, chosen))[0])
    bits = _BITS[kind.name]
    if kind.name.startswith("i"):
        return random.choice([0, 1, -1, (1 << bits - 1) - 1, -(1 << bits - 1)])
    return random.choice([0, 1, 2, 7, random.getrandbits(bits), (1 << bits) - 1, (1 << bits) - 2, 1 << bits - 1])


def sane_model(random: Random) -> dict[str, Any]:
    """A model section that passes the checks, of any kind."""
    model: dict[str, Any] = any_value(MODEL, random)
    llm = model["LLM"]
    llm["max_seq_len"] = random.choice([1, 8, 2048, 2**32 - 1])
    llm["cold_start_warmup_steps"] = random.choice([0, 0, 0, 1])
    kind = random.choice(["Dummy", "Hub", "P2P", "Gcs", "P2PGcs"])
    place = "bucket" if kind.endswith("cs") else "repo_id"
    more = "prefix" if kind.endswith("cs") else "revision"
    llm["checkpoint"] = {kind: {place: "org/model", more: random.choice([None, "", "main"])}}
    if random.random() < 0.7:
        llm["data_location"] = random.choice(["Dummy", {"Server": "localhost:1"}, {"Local": ""}])
    if llm["optimizer"] == "Dummy":
        llm["optimizer"] = {"AdamW": {"betas": [0.0, 0.5], "weight_decay": 0.5, "eps": 0.25, "clip_grad_norm": None}}
    return model


def sane_config(random: Random, clients: int, *, patient: bool = False) -> dict[str, int]:
    """A configuration that passes the checks, for a run of so many clients; a patient one waits long for them."""
    epoch = random.choice([8, 60, 300]) if not patient else 100_000
    witness_nodes = random.choice([0, 0, 1, 2, 3])
    least = min(max(1, witness_nodes, random.randint(1, max(clients // 2, 1))), clients)
    if patient:
        least = random.choice([clients // 2, clients * 9 // 10])
    start = random.choice([1, 3, 16])
    return {
        "warmup_time": random.randint(1, epoch - 1) if not patient else 10_000,
        "cooldown_time": random.randint(1, 20) if not patient else 10_000,
        "max_round_train_time": random.randint(1, max(epoch // 6, 1)) if not patient else 10_000,
        "round_witness_time": random.randint(1, 5),
        "global_batch_size_warmup_tokens": random.choice([0, 10, 1 << 40, 2**64 - 1]),
        "epoch_time": epoch if random.random() < 0.95 else 2**64 - 1,
        "total_steps": random.choice([2, 4, 8, 1000, 2**32 - 2]),
        "init_min_clients": clients if patient else min(least + random.randint(0, 2), clients),
        "min_clients": least,
        "witness_nodes": min(witness_nodes, least) if not patient else random.choice([0, min(32, least)]),
        "global_batch_size_start": start,
        "global_batch_size_end": random.choice(
            [max(start, clients), 65535] if random.random() < 0.9 else [max(start, clients - 1)]
        ),
        "verification_percent": 0,
        "waiting_for_members_extra_time": random.randint(1, 5),
    }
