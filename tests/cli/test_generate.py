from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning.cli import main
from psyche_lightning.data.tokenizer import byte_tokenizer
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe import load_recipe


@pytest.fixture(scope="module", params=["demo", "hf-llama"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as training leaves it: model and tokenizer in one folder."""
    recipe = load_recipe(request.param, ["data.config.max_bytes=200000"], twin=True)
    plugins = load_plugins()
    data = plugins.data_providers()[recipe.data.name](recipe.data.options, seed=0)
    torch.manual_seed(0)
    model: Any = plugins.models()[recipe.model.name](recipe.model.options)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    return folder


def test_it_goes_on_from_the_prompt_and_the_seed_decides(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        arguments = ["generate", str(checkpoint), "--prompt", "def f(x):\n", "--max-new-tokens", "12", "--seed", seed]
        assert main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("def f(x):\n") and len(text) > 12 for text in texts)


def test_temperature_zero_needs_no_seed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        assert main(["generate", str(checkpoint), "--prompt", "a", "--max-new-tokens", "5", "--temperature", "0"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("not json", "names no model_type"),
        ("{}", "names no model_type"),
        ("[]", "names no model_type"),
        (json.dumps({"model_type": "nothing_like_it"}), "'nothing_like_it' is unknown to transformers"),
        (json.dumps({"model_type": "llama"}), "cannot be loaded"),
    ],
)
def test_a_folder_that_is_no_checkpoint(
    config: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(config)
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 1
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_a_tokenizer(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 1
    assert "The tokenizer in" in capsys.readouterr().err


def test_a_prompt_is_encoded_as_in_training(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a tokenizer puts before a text belongs to the prompt, what it puts after it does not."""
    from types import SimpleNamespace

    from psyche_lightning.cli.generate import _encoded

    class Tokenizer(SimpleNamespace):
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = [ord(one) for one in text]
            return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    assert _encoded(Tokenizer(), "ab", chat=False) == [1, 97, 98]
    assert main(["generate", str(checkpoint), "--prompt", "a", "--chat"]) == 1
    assert "has no chat template" in capsys.readouterr().err


def test_a_prompt_and_its_answer_fit_into_the_positions_that_the_model_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"model_type": "mpt", "max_seq_len": 16, "vocab_size": 256, "d_model": 16, "n_layers": 1, "n_heads": 2}
    model: Any = load_plugins().models()["hf"](fields)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "a" * 16]) == 1
    assert "The prompt has 16 tokens, but the model takes only 16; shorten it." in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "a" * 14, "--temperature", "0"]) == 0
    assert "the model takes 16 tokens, so at most 2 are added" in capsys.readouterr().err


def test_an_empty_prompt(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(checkpoint), "--prompt", ""]) == 1
    assert "The prompt is empty" in capsys.readouterr().err
