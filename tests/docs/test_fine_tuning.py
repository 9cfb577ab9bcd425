"""The walk-through of docs/fine-tuning.md: two nodes train an adapter on the answers alone, and peft loads it."""

from __future__ import annotations

import itertools
import json
import runpy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from support.training import train_all
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from psyche_lightning.cli import main
from psyche_lightning.recipe import load_recipe
from psyche_lightning.train.module import CausalModule

MARKED = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' -%}
{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else -%}{{ message.content + '<|im_end|>' }}{%- endif -%}{{ '\n' }}
{%- endfor -%}"""
"""What the page's template writes, with marks around the answers."""

Ids = tuple[int, ...]


def marked_by_the_template() -> dict[Ids, list[bool]]:
    """The tokens of each conversation, and which of them are an answer, as transformers marks them."""
    tokenizer: Any = AutoTokenizer.from_pretrained("base")
    found = {}
    for line in Path("talks.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        encoded = tokenizer.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        assert encoded["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
        found[tuple(encoded["input_ids"])] = [bool(one) for one in encoded["assistant_masks"]]
    return found


def conversations(batch: dict[str, torch.Tensor]) -> list[tuple[Ids, list[bool]]]:
    """The texts that are packed into a batch, and which of their tokens are trained; without what fills samples up."""
    found = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*torch.where(positions == 0)[0].tolist(), len(ids)]
        for begin, end in itertools.pairwise(starts):
            trained = labels[begin:end] != -100
            assert torch.equal(labels[begin:end][trained], ids[begin:end][trained])
            if trained.any():
                found.append((tuple(ids[begin:end].tolist()), trained.tolist()))
    return found


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[CausalModule, list[dict[str, torch.Tensor]]]:
    """The micro-batches that each node trains."""
    found: dict[CausalModule, list[dict[str, torch.Tensor]]] = {}
    train, lock = CausalModule.training_step, threading.Lock()

    def training_step(self: CausalModule, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor | None:
        with lock:
            found.setdefault(self, []).append(batch)
        return train(self, batch, batch_idx)

    monkeypatch.setattr(CausalModule, "training_step", training_step)
    return found


def test_two_nodes_fine_tune_a_chat_model(
    page: Callable[[str], Any],
    seen: dict[CausalModule, list[dict[str, torch.Tensor]]],
    coordinator: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = page("fine-tuning.md")
    text.write_files(tmp_path)
    for block in text.blocks:
        if "runnable" in block.words:
            Path("block.py").write_text(block.text)
            runpy.run_path("block.py", run_name="__main__")
    assert "trained: " in capsys.readouterr().out
    (base_file,) = Path("base").glob("*.safetensors")
    base_bytes = base_file.read_bytes()
    marked = marked_by_the_template()

    fewer = ["total_steps=20"]
    assert main(["run", "create", "chat", "chat.yaml", *fewer, "init_min_clients=2", "--coordinator", coordinator]) == 0
    recipe = load_recipe("chat.yaml", fewer)
    results = train_all([recipe] * 2, coordinator, "chat", [Path("a"), Path("b")])
    assert results[0]["digest"] == results[1]["digest"]
    assert results[0]["loss"]["validation"] == pytest.approx(results[1]["loss"]["validation"])
    first, last = results[0]["loss"]["validation"]
    assert last < first - 0.1
    assert [result["empty_rounds"] for result in results] == [0, 0]

    # What was trained is what the template marks, token for token, and nothing else.
    trained = [one for batches in seen.values() for batch in batches for one in conversations(batch)]
    assert len(trained) > recipe.run.total_steps * recipe.run.global_batch_size_start
    assert all(marks == marked[ids] for ids, marks in trained)
    labels = sum(int((batch["labels"] != -100).sum()) for batches in seen.values() for batch in batches)
    assert labels == sum(sum(marked[ids]) for ids, _ in trained)
    assert 0 < labels < sum(len(ids) for ids, _ in trained) / 2

    # The loss of a node's first share is that of its answers, each conversation by itself, in plain transformers.
    plain: Any = AutoModelForCausalLM.from_pretrained("base")
    ids_of_step = recipe.run.global_batch_size_start // 2 // recipe.trainer.micro_batch_size
    losses = []
    for batches in seen.values():
        total, count = 0.0, 0
        for ids, marks in [one for batch in batches[:ids_of_step] for one in conversations(batch)]:
            with torch.no_grad():
                logits = plain(input_ids=torch.tensor([ids])).logits[0]
            wanted = torch.tensor(ids).masked_fill(~torch.tensor(marks), -100)
            total += float(cross_entropy(logits[:-1], wanted[1:], ignore_index=-100, reduction="sum"))
            count += int((wanted[1:] != -100).sum())
        losses.append(total / count)
    assert sorted(result["loss"]["train"][0] for result in results) == pytest.approx(sorted(losses), abs=1e-4)

    # Only the adapter is saved and exchanged; onto its model it gives the logits of the model that was trained.
    assert base_file.read_bytes() == base_bytes
    saved = [Path(node, "checkpoint", "adapter_model.safetensors").read_bytes() for node in ("a", "b")]
    assert saved[0] == saved[1]
    assert not Path("a/checkpoint/model.safetensors").exists()
    ids = torch.tensor([trained[0][0]])
    adapted: Any = AutoPeftModelForCausalLM.from_pretrained("a/checkpoint")
    with torch.no_grad():
        loaded = adapted.eval()(input_ids=ids).logits
        for module in seen:
            assert torch.equal(module.model.eval()(input_ids=ids).logits, loaded)
        assert not torch.equal(plain(input_ids=ids).logits, loaded)

    runpy.run_path("load.py", run_name="__main__")
    assert "<|im_start|>assistant\n" in capsys.readouterr().out
    merged: Any = AutoModelForCausalLM.from_pretrained("merged")
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(input_ids=ids).logits, loaded, atol=1e-4, rtol=0)
    asked = ["generate", "a/checkpoint", "--chat", "--prompt", "What is 2 + 3?", "--temperature", "0"]
    assert main([*asked, "--max-new-tokens", "20"]) == 0
    assert "What is 2 + 3?\nassistant\n" in capsys.readouterr().out
