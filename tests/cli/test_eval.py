"""``psyche eval``: the harness itself on a task made here, since the published ones come from the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.tasks import sums
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from psyche_lightning.cli import main


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return sums(tmp_path / "tasks")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate("?+=0123456789")}, "?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="?")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_the_figures_are_those_of_the_harness(
    tasks: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    written = tmp_path / "figures.json"
    arguments = ["eval", str(checkpoint), "--tasks", "sums", "--tasks-from", str(tasks), "--json", str(written)]
    assert main([*arguments, "--device", "cpu"]) == 0
    wanted: Any = lm_eval.simple_evaluate(
        "hf",
        f"pretrained={checkpoint}",
        tasks=["sums"],
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks)),
    )
    found = json.loads(written.read_text())["results"]["sums"]
    assert found == json.loads(json.dumps(wanted["results"]["sums"]))
    assert 0 <= found["acc,none"] <= 1
    shown = capsys.readouterr().out
    assert "acc_norm" in shown
    assert f"{found['acc,none']:.4f}" in shown


def test_unknown_tasks_are_explained(checkpoint: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", str(checkpoint), "--tasks", "summs", "--tasks-from", str(tasks)]
    assert main(arguments) == 1
    assert "has no task 'summs'. Did you mean 'sums'?" in capsys.readouterr().err
