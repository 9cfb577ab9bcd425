"""Special tokens: of a new model they are those of the data, and of another model a difference is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from psyche_lightning.cli import main
from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe import load_recipe
from psyche_lightning.train.runner import check_data, train_recipe
from psyche_lightning.train.vocabulary import settle_vocabulary

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def hf(**fields: Any) -> Any:
    return load_plugins().models()["hf"](fields)


def data(end: int | None = 0, size: int = 256, **tokenizer: Any) -> Any:
    return SimpleNamespace(vocab_size=size, end_of_text=end, tokenizer=SimpleNamespace(**tokenizer))


def test_data_with_more_token_ids_than_a_model_that_also_sees_has_room_for_is_refused() -> None:
    """The configuration of such a model has its vocabulary in a part of its own."""
    text = {name: value for name, value in TINY.items() if name != "model_type"}
    model = hf(
        model_type="gemma3",
        text_config={**text, "num_key_value_heads": 1, "head_dim": 8},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    with pytest.raises(ConfigError, match="the data has 300 token ids and the model has 256"):
        check_data(model, data(size=300))


def test_what_a_new_model_learns_to_end_with_ends_what_it_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "hello!"}\n' * 400)
    changes = [
        "data.name=datasets",
        f"data.config={{path: {tmp_path}/texts.jsonl}}",
        "data.seq_len=14",
        "run.total_steps=40",
        "optimizer.lr=0.002",
        "optimizer.weight_decay=0",
        "distro.k=64",
        "distro.chunk=32",
        "model.dtype=float32",
        "trainer.precision=32-true",
        "trainer.validate_every=0",
    ]
    train_recipe(load_recipe("hf-llama", changes, twin=True), directory=tmp_path / "node")
    capsys.readouterr()
    arguments = ["--prompt", "hello", "--max-new-tokens", "40", "--temperature", "0"]
    assert main(["generate", str(tmp_path / "node" / "checkpoint"), *arguments]) == 0
    assert capsys.readouterr().out == "hello!\n"


def test_a_new_model_takes_the_ids_of_the_data(caplog: pytest.LogCaptureFixture) -> None:
    model = hf(**TINY)
    settle_vocabulary(model, data(7, eos_token_id=9, bos_token_id=5), fresh=True, given=())
    for holder in (model.config, model.generation_config):
        assert (holder.eos_token_id, holder.bos_token_id) == (7, 5)
    assert not caplog.records


def test_what_the_user_has_set_stays_and_a_difference_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = hf(**TINY, eos_token_id=3)
    settle_vocabulary(model, data(), fresh=True, given={"eos_token_id"})
    assert model.config.eos_token_id == 3
    assert "end with the token id 0, but the model ends them with 3" in caplog.text
    caplog.clear()
    loaded = hf(**TINY)
    loaded.generation_config.eos_token_id = [4, 5]
    settle_vocabulary(loaded, data(), fresh=False, given=())
    assert loaded.config.eos_token_id == 2
    assert "the model ends them with 2 or 4 or 5" in caplog.text
    assert "Set model.config.eos_token_id=0" in caplog.text
    caplog.clear()
    settle_vocabulary(loaded, data(5, bos_token_id=7), fresh=False, given=())
    assert "with the token id 1 according to the model, and with 7" in caplog.text
    caplog.clear()
    settle_vocabulary(loaded, data(5, bos_token_id=1), fresh=False, given=())
    settle_vocabulary(torch.nn.Linear(2, 2), data(5), fresh=False, given=())
    assert not caplog.records


def test_a_vocabulary_that_is_much_larger_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = hf(**TINY)
    settle_vocabulary(model, data(size=200), fresh=True, given=())
    assert not caplog.records
    settle_vocabulary(model, data(size=100), fresh=True, given=())
    assert "the model has 256 token ids and the tokenizer of the data 100" in caplog.text


def test_another_vocabulary_resizes_the_embeddings(tmp_path: Path) -> None:
    model = hf(**TINY)
    model.save_pretrained(tmp_path)
    for size in (300, 200):
        torch.manual_seed(1)
        resized = hf(path=str(tmp_path), vocab_size=size)
        kept = min(size, 256)
        assert resized.config.vocab_size == size
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert resized.get_parameter(name).shape == (size, 16)
            assert torch.equal(resized.get_parameter(name)[:kept], model.get_parameter(name)[:kept])
        resized.save_pretrained(tmp_path / str(size))
        assert hf(path=str(tmp_path / str(size))).config.vocab_size == size
    with torch.device("meta"):
        assert hf(path=str(tmp_path), vocab_size=300).lm_head.weight.shape == (300, 16)
    with pytest.raises(ConfigError, match="cannot be built"):
        hf(path=str(tmp_path), vocab_size="many")
