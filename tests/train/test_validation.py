"""What a node validates on: samples held out, a set of its own, or an error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.recipe.manifest import manifest
from psyche_lightning.train.runner import train_recipe
from psyche_lightning.train.validation import separate_set, validation_samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"<{split}> the row {number}"}) for number in range(60)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    return tmp_path


def recipe(path: Path, *overrides: str, provider: str = "datasets", **config: Any) -> Recipe:
    given = ["trainer.validate_every=2", "total_steps=2", *overrides]
    loaded = load_recipe("demo", given, twin=True)
    data = replace(loaded.data, name=provider, config={"path": str(path), **config})
    return replace(loaded, data=data)


def found(given: Recipe) -> list[Any]:
    provider = load_plugins().data_providers()[given.data.name](given.data.options, seed=0)
    return validation_samples(given, provider)


def test_a_split_of_its_own(folder: Path) -> None:
    given = recipe(folder, "data.validation={split: validation}", "trainer.validation_samples=5")
    provider = load_plugins().data_providers()["datasets"](given.data.options, seed=0)
    separate = separate_set(given, provider)
    assert separate is not None
    text = "".join(provider.tokenizer.decode(one["input_ids"]) for one in separate.samples(0, len(separate)))
    assert "<validation>" in text
    assert "<train>" not in text
    assert len(found(given)) == 5
    assert "validation" not in manifest(given)["data"], "nodes may differ"


@pytest.mark.parametrize("provider", ["text", "tokens", "parquet", "mix"])
def test_every_provider_takes_another_path(tmp_path: Path, provider: str) -> None:
    import pyarrow
    from pyarrow import parquet

    paths, config = {}, {} if provider == "text" else {"vocab_size": 256}
    for name, byte in (("train", 1), ("held", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "a.txt").write_bytes(bytes([byte + 64]) * 400)
        (folder / "a.bin").write_bytes(bytes([byte + 64, 0]) * 400)
        parquet.write_table(pyarrow.table({"inputs": [[byte + 64] * 64] * 5}), folder / "a.parquet")
        source = {"location": {"Local": "a.bin"}, "token_size_in_bytes": "TwoBytes", "shuffle": "DontShuffle"}
        (folder / "mix.json").write_text(json.dumps({"shuffle": "DontShuffle", "providers": [source]}))
        paths[name] = folder / ("mix.json" if provider == "mix" else "a.bin" if provider == "tokens" else "")
    given = recipe(paths["train"], f"data.validation={{path: {paths['held']}}}", provider=provider, **config)
    given = replace(given, data=replace(given.data, seq_len=64))
    samples = found(given)
    assert len(samples) >= 4
    assert {int(sample["input_ids"][0]) for sample in samples} == {66}


def test_nothing_to_validate_on_is_refused(folder: Path, tmp_path: Path) -> None:
    given = recipe(folder)
    with pytest.raises(ConfigError, match=r"nothing to validate on.*data.validation=.split: validation"):
        train_recipe(given, directory=tmp_path / "node")
    assert found(replace(given, trainer=replace(given.trainer, validate_every=0))) == []


@pytest.mark.parametrize(
    ("overrides", "config", "message"),
    [
        (["data.validation={split: validation}"], {"validation_samples": 3}, "expected one of them"),
        (["data.validation={split: nonsense}"], {}, r"data.validation: The split 'nonsense' .* does not exist"),
        (["data.validation={splitt: test}"], {}, r"data.validation: .* no option 'splitt'"),
        (
            ["data.validation={text: ids, vocab_size: 9, path: {folder}/ids.jsonl}"],
            {},
            "has 9 token ids .* the training data 256",
        ),
    ],
)
def test_a_set_that_does_not_fit_is_refused(
    folder: Path, overrides: list[str], config: dict[str, Any], message: str
) -> None:
    (folder / "ids.jsonl").write_text('{"ids": [1, 2, 3, 4, 5, 6, 7, 8]}\n' * 40)
    given = recipe(folder, *(one.replace("{folder}", str(folder)) for one in overrides), **config)
    with pytest.raises(ConfigError, match=message):
        found(given)


def test_training_validates_on_it(folder: Path, tmp_path: Path) -> None:
    given = recipe(folder, "data.validation={split: validation}", "micro_batch_size=2")
    result = train_recipe(given, directory=tmp_path / "node")
    assert len(result["loss"]["validation"]) == 2
