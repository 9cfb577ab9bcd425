"""Psyche's types (coordinator.rs, model.rs and definitions.rs), described once for arguments, accounts and IDL."""

from __future__ import annotations

from typing import Any

from psyche_lightning_solana.borsh import (
    BOOL,
    F32,
    F64,
    I32,
    U8,
    U16,
    U32,
    U64,
    Array,
    Enum,
    Fixed,
    FixedVector,
    Option,
    Raw,
    Struct,
)

SHORT, URL = 64, 192
"""Bytes of a name (repository, bucket, server) and of a URL, path or folder."""

METADATA = Struct(
    "RunMetadata", {"name": Fixed(SHORT), "description": Fixed(280), "num_parameters": U64, "vocab_size": U64}
)

CONFIG = Struct(
    "CoordinatorConfig",
    {
        "warmup_time": U64,
        "cooldown_time": U64,
        "max_round_train_time": U64,
        "round_witness_time": U64,
        "global_batch_size_warmup_tokens": U64,
        "epoch_time": U64,
        "total_steps": U32,
        "init_min_clients": U16,
        "min_clients": U16,
        "witness_nodes": U16,
        "global_batch_size_start": U16,
        "global_batch_size_end": U16,
        "verification_percent": U8,
        "waiting_for_members_extra_time": U8,
    },
)

PROGRESS = Struct("CoordinatorProgress", {"epoch": U16, "step": U32, "epoch_start_data_index": U64})

# The option with its text comes first in memory, the name first in borsh (docs/solana-account.md, offset 436).
_HUB = Struct("HubRepo", {"repo_id": Fixed(SHORT), "revision": Option(Fixed(SHORT))}, ("revision", "repo_id"))
_GCS = Struct("GcsRepo", {"bucket": Fixed(SHORT), "prefix": Option(Fixed(SHORT))}, ("prefix", "bucket"))
CHECKPOINT = Enum(
    "Checkpoint", {"Ephemeral": None, "Dummy": _HUB, "Hub": _HUB, "P2P": _HUB, "Gcs": _GCS, "P2PGcs": _GCS}
)

_HTTP_LOCATION = Enum(
    "HttpTrainingDataLocation",
    {
        "SingleUrl": Fixed(URL),
        "NumberedFiles": Struct(
            "NumberedFiles",
            {"url_template": Fixed(SHORT), "start_index": U32, "n_left_pad_zeros": U8, "num_files": U32},
        ),
        "Gcp": Struct("Gcp", {"bucket_name": Fixed(SHORT), "filter_directory": Fixed(URL)}),
    },
)
_HTTP = Struct(
    "HttpLLMTrainingDataLocation",
    {
        "location": _HTTP_LOCATION,
        "token_size_in_bytes": Enum("TokenSize", {"TwoBytes": None, "FourBytes": None}),
        "shuffle": Enum("Shuffle", {"DontShuffle": None, "Seeded": Raw(32)}),
    },
)
DATA_LOCATION = Enum(
    "LLMTrainingDataLocation",
    {
        "Dummy": None,
        "Server": Fixed(SHORT),
        "Local": Fixed(URL),
        "Http": _HTTP,
        "WeightedHttp": Fixed(URL),
        "Preprocessed": Fixed(URL),
    },
)

_RAMPED = {"base_lr": F64, "warmup_init_lr": F64, "final_lr": F64, "warmup_steps": U32, "total_steps": U32}
LR_SCHEDULE = Enum(
    "LearningRateSchedule",
    {
        "Constant": Struct("ConstantLR", {"base_lr": F64, "warmup_init_lr": F64, "warmup_steps": U32}),
        "Linear": Struct("LinearLR", dict(_RAMPED)),
        "Cosine": Struct("CosineLR", dict(_RAMPED)),
        "WarmupStableDecay": Struct(
            "WarmupStableDecayLR",
            {
                "base_lr": F64,
                "warmup_init_lr": F64,
                "cosine_decay_final_lr": F64,
                "linear_decay_final_lr": F64,
                "warmup_steps": U32,
                "stable_steps": U32,
                "cosine_decay_steps": U32,
                "linear_decay_steps": U32,
            },
        ),
    },
)

# A float option has a u32 tag in memory.
_MAYBE = Option(F32, tag=4)
OPTIMIZER = Enum(
    "OptimizerDefinition",
    {
        "Dummy": None,
        "AdamW": Struct("AdamW", {"betas": Array(F32, 2), "weight_decay": F32, "eps": F32, "clip_grad_norm": _MAYBE}),
        "Distro": Struct(
            "Distro",
            {
                "clip_grad_norm": _MAYBE,
                "weight_decay": _MAYBE,
                "compression_decay": F32,
                "compression_topk": U16,
                "compression_chunk": U16,
                "quantize_1bit": BOOL,
            },
        ),
    },
)

LLM = Struct(
    "LLM",
    {
        "max_seq_len": U32,
        "cold_start_warmup_steps": U32,
        "architecture": Enum(
            "LLMArchitecture", {"HfLlama": None, "HfDeepseek": None, "HfAuto": None, "Torchtitan": None}
        ),
        "checkpoint": CHECKPOINT,
        "data_type": Enum("LLMTrainingDataType", {"Pretraining": None, "Finetuning": None}),
        "data_location": DATA_LOCATION,
        "lr_schedule": LR_SCHEDULE,
        "optimizer": OPTIMIZER,
    },
)
MODEL = Enum("Model", {"LLM": LLM})

# Not a public key in the IDL: anchorpy 0.21 cannot write one within a struct.
CLIENT_ID = Struct("ClientId", {"signer": Raw(32), "p2p_identity": Raw(32)})
BLOOM = Struct("WitnessBloom", {"keys": Array(U64, 8), "bits": Array(U64, 16)})
PROOF = Struct("WitnessProof", {"position": U64, "index": U64, "witness": BOOL})
COMMITTEE = Enum("Committee", {"TieBreaker": None, "Verifier": None, "Trainer": None})

_EVAL = Struct("WitnessEvalResult", {"name": Raw(32), "value": F32})
WITNESS_METADATA = Struct(
    "WitnessMetadata",
    {
        "step": U32,
        "tokens_per_sec": F32,
        "bandwidth_per_sec": F32,
        "loss": F32,
        "evals": FixedVector("WitnessEvals", _EVAL, 8, {"name": bytes(32), "value": 0.0}),
        "prompt_results": FixedVector("PromptResults", I32, 16, 0),
        "prompt_index": U8,
        "efficency": F32,
    },
)


def model_problem(model: dict[str, Any]) -> str:
    """The reason why a run with this ``{"LLM": ...}`` cannot continue (Psyche's model.rs, ``check``), or empty."""
    llm = model["LLM"]
    if llm["max_seq_len"] == 0:
        return "max_seq_len is 0"
    location = llm["data_location"]
    if isinstance(location, dict):
        [(kind, body)] = location.items()
        if kind == "Http":
            [(kind, body)] = body["location"].items()
        if kind == "NumberedFiles":
            if not body["url_template"] or body["num_files"] == 0:
                return "data_location names no files: url_template and num_files must be given"
        elif not (body["bucket_name"] if kind == "Gcp" else body) and kind != "Local":
            return f"data_location {kind} is empty"
    if not checkpoint_named(llm["checkpoint"]):
        return "the checkpoint is Ephemeral, or names no repository or bucket"
    return "the optimizer is Dummy; choose AdamW or Distro" if llm["optimizer"] == "Dummy" else ""


def checkpoint_named(checkpoint: Any) -> bool:
    """Whether a checkpoint has a place; a dummy needs none."""
    if checkpoint == "Ephemeral":
        return False
    [(kind, body)] = checkpoint.items()
    return kind == "Dummy" or bool(body["bucket" if kind in ("Gcs", "P2PGcs") else "repo_id"])


def cold_start_problem(config: dict[str, Any], model: dict[str, Any]) -> str:
    """The reason why the cold start does not fit an epoch, or empty."""
    steps = model["LLM"]["cold_start_warmup_steps"]
    room = max(config["epoch_time"] - config["warmup_time"], 0) // max(config["max_round_train_time"], 1)
    return "" if steps <= room else f"cold_start_warmup_steps is {steps}; an epoch has room for {room} rounds"
