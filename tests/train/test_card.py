"""The model card of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from huggingface_hub import ModelCard

from psyche_lightning.checkpoints.manifest import NAME, Manifest, Metadata
from psyche_lightning.recipe import load_recipe
from psyche_lightning.train.card import Facts, card
from psyche_lightning.train.runner import train_recipe


def test_a_checkpoint_says_where_it_is_from(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    recipe = load_recipe("demo", [f"data.config.path={tmp_path / 'text.txt'}"], twin=True)
    result = train_recipe(recipe, directory=tmp_path / "node")
    folder = tmp_path / "node" / "checkpoint"
    shown = ModelCard.load(folder / "README.md")
    manifest = Manifest.parse((folder / NAME).read_bytes(), NAME)
    assert shown.data.library_name == "transformers"
    assert "distro" in shown.data.tags
    assert "# demo, step 4" in shown.text
    assert f"`{manifest.digest}`" in shown.text
    assert "16 samples of 64 tokens" in shown.text
    assert str(tmp_path) not in shown.content  # no path of the machine
    assert result["digest"] == manifest.digest
    assert "README.md" in manifest.files


def test_a_model_of_the_hub_is_named_as_the_base() -> None:
    recipe = load_recipe("demo", [], twin=True)
    metadata = Metadata("run", 1200, 3, 4096, "ab" * 32)
    facts = Facts(parameters=1_000_000, trained=10_000, nodes=3, payload=500)
    hub = replace(recipe, model=replace(recipe.model, path="Qwen/Qwen3-0.6B@main", adapter={"r": 8}))
    shown = ModelCard(card(hub, metadata, "cd" * 32, facts))
    assert shown.data.base_model == "Qwen/Qwen3-0.6B"
    assert shown.data.library_name == "peft"
    assert "1,000,000, of which 10,000 were trained" in shown.text
    assert "500 bytes to each other node, where an all-reduce of float32 gradients has 40,000" in shown.text
    assert "Trained by 3 nodes" in shown.text
