"""Texts that nodes write in their waits: a real small model, whose own generation says what must come."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import train_all

from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.session import Session
from psyche_lightning.protocol.requests import MAX_TOKENS
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.recipe.manifest import manifest
from psyche_lightning.train.runner import train_recipe

STEPS, LENGTH = 6, 64
PROMPTS = ["def main(", "class A"]
ASKED = f"evals.prompts=[{', '.join(PROMPTS)}]"
MODEL = [
    "model.name=hf",
    "model.config={model_type: llama, vocab_size: 259, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
    "num_attention_heads: 2, max_position_embeddings: 256, attention_dropout: 0.2}",
]


def recipe(text: Path, *options: str) -> Recipe:
    own = [f"data.config.path={text}", "validate_every=0", f"total_steps={STEPS}", f"seq_len={LENGTH}"]
    return load_recipe("demo", [*MODEL, *own, *options], twin=True)


def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What nodes write from now on, in every wait, however short."""
    monkeypatch.setattr("psyche_lightning.node.spare.SHARE", 1e9)
    written: list[tuple[int, int]] = []
    real = Session.wrote

    def wrote(self: Session, prompt: int, token: int) -> None:
        written.append((prompt, token))
        real(self, prompt, token)

    monkeypatch.setattr(Session, "wrote", wrote)
    return written


def greedy(checkpoint: Path, prompt: str, count: int) -> list[int]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]])
    found = model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return [int(token) for token in found[0, ids.shape[1] :]]


def test_each_text_is_what_the_model_itself_generates_and_training_is_the_same(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    still = ["optimizer.lr=1e-20", "optimizer.schedule.final_lr=1e-20"]  # the parameters stay those of the start
    written = told(monkeypatch)
    with caplog.at_level(logging.INFO, logger="psyche_lightning"):
        found = train_recipe(recipe(text, *still, ASKED), directory=tmp_path / "with")
    plain = train_recipe(recipe(text, *still), directory=tmp_path / "without")
    assert found["digest"] == plain["digest"]
    assert found["loss"] == plain["loss"]
    assert len(written) == MAX_TOKENS * (STEPS - 1)  # in the waits between the steps, no more than a report holds
    first = written[0][0]
    room = LENGTH - len(PROMPTS[first])  # a sample's length
    texts = [[token for place, token in written if place == one] for one in (first, 1 - first)]
    assert [place for place, _ in written] == [first] * room + [1 - first] * (len(written) - room)
    for place, tokens in zip((first, 1 - first), texts, strict=True):
        assert tokens == greedy(tmp_path / "with" / "checkpoint", PROMPTS[place], len(tokens))
    assert [record for record in caplog.messages if f'after "{PROMPTS[first]}" follows "' in record]


def test_nodes_of_a_run_write_and_stay_equal(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, create_run: Any
) -> None:
    written = told(monkeypatch)
    url, run = create_run(init_min_clients=2, global_batch_size_start=6, global_batch_size_end=6)
    results = train_all([recipe(text, ASKED)] * 2, url, run, [tmp_path / str(place) for place in range(2)])
    assert len({result["digest"] for result in results}) == 1
    assert {place for place, _ in written} <= {0, 1}
    assert written


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["evals.prompts=[a, a]"], "evals.prompts has 2 texts; expected at most 64, each once"),
        (["evals.prompts=[1]"], r"evals\.prompts\.0 is 1"),
        ([f"evals.prompts=[{'a' * 1001}]"], "a text of 1001 characters, 'a{40}'; expected 1 to 1000"),
        (["evals.prompts=['']"], "a text of 0 characters"),
    ],
)
def test_prompts_that_cannot_be_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("demo", options, twin=True)


def test_a_prompt_as_long_as_a_sample_is_refused_before_training(text: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"evals.prompts has 'a{40}' of 64 tokens; between 1 and data.seq_len - 1, 63"
    ):
        train_recipe(recipe(text, f"evals.prompts=[{'a' * 64}]"), directory=tmp_path / "node")


def test_prompts_are_the_runs_and_a_recipe_without_them_has_the_same_manifest_as_ever(text: Path) -> None:
    assert manifest(recipe(text, "evals.prompts=[a]"))["evals"]["prompts"] == ["a"]
    assert "evals" not in manifest(recipe(text))
    assert set(manifest(recipe(text, "evals.tasks=[arc_easy]"))["evals"]) == {"tasks", "every", "limit"}
