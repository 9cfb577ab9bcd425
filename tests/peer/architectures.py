"""Trains architectures of ``transformers``, and compares their checkpoints with plain ``transformers``.

::

    python tests/peer/architectures.py                         # all; goes on where it was stopped
    python tests/peer/architectures.py llama mamba             # these
    python tests/peer/architectures.py --table docs/models.md  # writes the table into that page

For each architecture, in float32 and in bfloat16, a tiny model is trained for four steps on text, with a checkpoint
after two. Then

* plain ``transformers`` loads the last checkpoint: each tensor has the dtype and the bits of the model that was
  trained, and the logits are equal to the bit;
* ``psyche generate`` continues a text with it;
* a second training goes on from the checkpoint after two steps, and ends with the parameters of the first one. In
  bfloat16 a checkpoint lacks the last digits of the float32 masters, so there the loss of step 3 is compared.

No network is used. A line of JSON for each pair is written to the file of results.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 257
LENGTH = 48
DTYPES = ("float32", "bfloat16")
BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"

_BASE = {"hidden_size": 64, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "intermediate_size": 96}
_GROUPED = {**_BASE, **_HEADS, "num_key_value_heads": 2}
_SIZED = {**_GROUPED, "head_dim": 16}
# Two trainings with dropout are never equal.
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
_QWEN_EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}
_ROUTED = {
    "num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
_LATENT = {
    **_BASE, **_HEADS, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "apertus": _GROUPED,
    "bamba": {**_GROUPED, **_MAMBA2, "attn_layer_indices": [1]},
    "biogpt": {**_BASE, **_HEADS, **_NO_DROPOUT},
    "bitnet": _GROUPED,
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "codegen": {**_GPT2, "rotary_dim": 8},
    "cohere": _GROUPED,
    "cohere2": _GROUPED,
    "deepseek_v2": {**_LATENT, **_ROUTED, "topk_method": "greedy"},
    "deepseek_v3": {**_LATENT, **_ROUTED},
    "diffllama": _GROUPED,
    "doge": _GROUPED,
    "ernie4_5_moe": {**_GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "exaone4": _SIZED,
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "falcon_h1": {**_SIZED, **_MAMBA2, "mamba_d_ssm": 128},
    "falcon_mamba": {**_BASE, "state_size": 8},
    "gemma": _SIZED,
    "gemma2": _SIZED,
    "gemma3_text": _SIZED,
    "glm4": {**_SIZED, "pad_token_id": 0},
    "glm4_moe": {**_GROUPED, **_ROUTED},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {**_BASE, **_HEADS},
    "gpt_oss": {**_SIZED, **_EXPERTS},
    "gptj": {**_GPT2, "rotary_dim": 8},
    "granite": _GROUPED,
    "granitemoe": {**_GROUPED, **_EXPERTS},
    "granitemoehybrid": {
        **_GROUPED, **_EXPERTS, **_MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32,
    },
    "jamba": {
        **_GROUPED, "num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8,
    },
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"]},
    "llama": _GROUPED,
    "llama4_text": {**_SIZED, **_EXPERTS, "intermediate_size_mlp": 96},
    "mamba": {**_BASE, "state_size": 8},
    "mamba2": {**_BASE, "num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "minimax": {**_SIZED, **_EXPERTS, "block_size": 16},
    "mistral": _GROUPED,
    "mixtral": {**_GROUPED, **_EXPERTS},
    "mla": {
        **_BASE, **_HEADS, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    },
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
    "nemotron": _GROUPED,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_BASE, "num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},
    "phi": {**_BASE, **_HEADS},
    "phi3": {**_GROUPED, "pad_token_id": 0},
    "phimoe": {**_GROUPED, **_EXPERTS, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen2": _GROUPED,
    "qwen2_moe": {**_GROUPED, **_QWEN_EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3": _SIZED,
    "qwen3_moe": {**_SIZED, **_QWEN_EXPERTS},
    "qwen3_next": {
        **_SIZED, **_QWEN_EXPERTS, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {**_GROUPED, "block_types": ["recurrent", "attention"], "lru_width": 64},
    "rwkv": {**_BASE, "context_length": 64},
    "smollm3": {**_GROUPED, "pad_token_id": 0},
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
    "xglm": {
        "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96, "dropout": 0.0, "attention_dropout": 0.0,
    },
}  # fmt: skip
"""The architectures, each with the fields of a configuration of some hundred thousand parameters."""


@dataclass(frozen=True)
class Outcome:
    """What one architecture did in one dtype; each text is empty if all was well.

    Attributes:
        model: the architecture.
        dtype: ``float32`` or ``bfloat16``.
        parameters: number of parameters.
        losses: of the four steps, in nats per token.
        train: why it could not be trained and saved.
        reload: in what plain ``transformers`` differs from the trained model.
        generate: why ``psyche generate`` failed.
        resume: how the resumed training differs from the first one.
    """

    model: str
    dtype: str
    parameters: int = 0
    losses: tuple[float, ...] = ()
    train: str = ""
    reload: str = ""
    generate: str = ""
    resume: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing differs."""
        return not (self.train or self.reload or self.generate or self.resume)


def try_out(model: str, dtype: str, folder: Path) -> Outcome:
    """Train, save, reload, generate with and resume one architecture, in an empty folder."""
    text = folder / "text"
    text.mkdir()
    (text / "all.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    done: dict[str, Any] = {}
    try:
        with _trained() as models:
            _train(_recipe(model, dtype, text), folder / "first")
        trained = models[0]
        done["parameters"] = sum(value.numel() for value in trained.parameters())
        done["losses"] = tuple(_losses(folder / "first").values())
    except Exception as error:
        return Outcome(model, dtype, train=_brief(error))
    for name, look in {
        "reload": lambda: _reload(trained, folder / "first" / "checkpoint"),
        "generate": lambda: _generate(folder / "first" / "checkpoint"),
        "resume": lambda: _resume(model, dtype, text, folder),
    }.items():
        try:
            done[name] = look()
        except Exception as error:
            done[name] = _brief(error)
    return Outcome(model, dtype, **done)


def _recipe(model: str, dtype: str, text: Path, resume: Path | None = None) -> Any:
    from psyche_lightning.recipe.loading import resolve

    name, kind = ("mla", {}) if model == "mla" else ("hf", {"model_type": model})
    return resolve(
        {
            "name": model.replace("_", "-"),
            "run": {"total_steps": 4, "global_batch_size_start": 4, "global_batch_size_end": 4},
            # Nothing of an update stays behind, so that resuming can be exact.
            "distro": {"decay": 0.0},
            "model": {
                "name": name,
                "config": {**kind, "vocab_size": VOCABULARY, **ARCHITECTURES[model]},
                "dtype": dtype,
            },
            "data": {"name": "text", "seq_len": LENGTH, "config": {"path": str(text)}},
            "optimizer": {"lr": 1e-3},
            "trainer": {"micro_batch_size": 4, "accelerator": "cpu", "threads": 1},
            "checkpoint": {"every": 2, "keep": 9, "resume": None if resume is None else str(resume)},
        }
    )


@contextlib.contextmanager
def _trained() -> Iterator[list[Any]]:
    """Gives the models that are trained inside the context."""
    from psyche_lightning.train import runner

    kept: list[Any] = []
    module = runner.CausalModule

    class Kept(module):  # type: ignore[misc, valid-type]
        def __init__(self, model: Any, *others: Any, **more: Any) -> None:
            super().__init__(model, *others, **more)
            kept.append(model)

    runner.CausalModule = Kept  # type: ignore[misc]
    try:
        yield kept
    finally:
        runner.CausalModule = module  # type: ignore[misc]


def _train(recipe: Any, folder: Path) -> dict[str, Any]:
    from psyche_lightning.train.runner import train_recipe

    with contextlib.redirect_stdout(io.StringIO()):
        return train_recipe(recipe, directory=folder)


def _losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def _reload(trained: Any, checkpoint: Path) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM  # it has no annotations
    loaded = auto.from_pretrained(checkpoint, local_files_only=True)
    ours, theirs = (
        {**dict(one.named_parameters()), **dict(one.named_buffers())} for one in (trained.cpu().eval(), loaded.eval())
    )
    for name, value in theirs.items():
        if name not in ours or ours[name].dtype != value.dtype or not torch.equal(ours[name], value):
            return f"{name} differs"
    ids = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, second = (one(input_ids=ids, **_uncached(one)).logits.float() for one in (trained, loaded))
    difference = float((first - second).abs().max())
    return f"logits differ by {difference:.1e}" if difference else ""


def _uncached(model: Any) -> dict[str, bool]:
    import inspect

    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def _generate(checkpoint: Path) -> str:
    from psyche_lightning.cli import main

    said, wrong = io.StringIO(), io.StringIO()
    arguments = ["generate", str(checkpoint), "--prompt", "the quick", "--max-new-tokens", "6", "--temperature", "0"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    return "" if not code else " ".join(wrong.getvalue().split())[-200:]


def _resume(model: str, dtype: str, text: Path, folder: Path) -> str:
    from psyche_lightning.checkpoints.manifest import Manifest

    first, second = folder / "first", folder / "second"
    recipe = _recipe(model, dtype, text, first / "checkpoints" / "step-000002")
    _train(recipe, second)
    losses, again = _losses(first), _losses(second)
    if list(again) != [3, 4]:
        return f"steps {list(again)}"
    if abs(losses[3] - again[3]) > (1e-6 if dtype == "float32" else 0.02):
        return f"the loss of step 3 is {again[3]:.4f}, was {losses[3]:.4f}"
    if dtype == "float32":
        one, two = (
            Manifest.parse((each / "checkpoint" / "manifest.json").read_bytes(), each.name) for each in (first, second)
        )
        if one.digest != two.digest:
            return "other parameters"
    return ""


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def table(found: Mapping[tuple[str, str], Outcome]) -> str:
    """The results as a Markdown table, one architecture a row."""

    def cell(values: list[str]) -> str:
        wrong = [f"{dtype}: {text}" for dtype, text in zip(DTYPES, values, strict=True) if text]
        return "<br>".join(wrong).replace("|", "\\|") or "✓"

    lines = [
        "| architecture | trained and saved | equal in transformers | generates | resumes |",
        "|---|---|---|---|---|",
    ]
    for model in ARCHITECTURES:
        both = [found.get((model, dtype)) for dtype in DTYPES]
        if None in both:
            continue
        cells = [cell([getattr(one, key) for one in both]) for key in ("train", "reload", "generate", "resume")]
        lines.append(f"| `{model}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Run what is missing in the file of results; returns 1 if something differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(ARCHITECTURES)}; all by default")
    parser.add_argument("--results", type=Path, default=Path("build/architectures.jsonl"), help="a line for each pair")
    parser.add_argument("--again", action="store_true", help="also those that the file has")
    parser.add_argument("--table", type=Path, help="the page whose table to replace")
    options = parser.parse_args()
    unknown = set(options.models) - set(ARCHITECTURES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(ARCHITECTURES)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    _quiet()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str], Outcome] = {}
    if options.results.is_file():
        for line in options.results.read_text().splitlines():
            one = Outcome(**json.loads(line))
            found[one.model, one.dtype] = one
    for model in options.models or ARCHITECTURES:
        for dtype in DTYPES:
            if (model, dtype) in found and not options.again:
                continue
            folder = Path(tempfile.mkdtemp())
            try:
                found[model, dtype] = one = try_out(model, dtype, folder)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            with options.results.open("a") as file:
                file.write(json.dumps(asdict(one)) + "\n")
            losses = f"{one.parameters:>9,} parameters, loss {' '.join(f'{loss:.2f}' for loss in one.losses)}"
            wrong = "; ".join(filter(None, (one.train, one.reload, one.generate, one.resume)))
            print(f"{model:18} {dtype:9} {losses}  {wrong or 'all equal'}", flush=True)
    if options.table is not None:
        page = options.table.read_text()
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        options.table.write_text(f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}")
    return int(any(not one.good for one in found.values()))


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("psyche_lightning").setLevel(logging.ERROR)
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()  # type: ignore[no-untyped-call]
    theirs.disable_progress_bar()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    raise SystemExit(main())
