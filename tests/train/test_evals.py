"""Evaluations within a run: lm-eval itself on tasks made here, divided among real nodes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tasks import sums
from support.training import train_all

from psyche_lightning.cli import main
from psyche_lightning.errors import ConfigError
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.train.runner import train_recipe

MODEL = [
    "model.name=hf",
    "model.config={model_type: llama, vocab_size: 259, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, "
    "num_attention_heads: 2, max_position_embeddings: 256}",
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return sums(tmp_path / "tasks")


def recipe(text: Path, tasks: Path, *options: str) -> Recipe:
    own = [f"data.config.path={text}", f"evals.tasks_from={tasks}", "validate_every=0", "total_steps=6", "seq_len=64"]
    return load_recipe("demo", [*MODEL, *own, *options], twin=True)


def whole(checkpoint: Path, tasks: Path, names: str, written: Path) -> dict[str, dict[str, float]]:
    """What ``psyche eval`` finds, by task and metric."""
    arguments = ["eval", str(checkpoint), "--tasks", names, "--tasks-from", str(tasks), "--device", "cpu"]
    assert main([*arguments, "--json", str(written)]) == 0
    return {
        task: {
            key.removesuffix(",none"): value
            for key, value in figures.items()
            if key.endswith(",none") and "stderr" not in key and "bleu" not in key
        }
        for task, figures in json.loads(written.read_text())["results"].items()
    }


def test_three_nodes_together_find_what_one_evaluation_of_the_checkpoint_finds(
    text: Path, tasks: Path, tmp_path: Path, create_run: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["sums", "lines", "examples"]
    chosen = recipe(text, tasks, f"evals.tasks=[{', '.join(names)}]", "evals.every=2")
    url, run = create_run(init_min_clients=3, global_batch_size_start=6, global_batch_size_end=6)
    folders = [tmp_path / str(place) for place in range(3)]
    results = train_all([chosen] * 3, url, run, folders)
    assert len({result["digest"] for result in results}) == 1
    wanted = whole(folders[0] / "checkpoint", tasks, ",".join(names), tmp_path / "whole.json")
    assert set(wanted["lines"]) == {"word_perplexity", "bits_per_byte"}
    kept = {(one["task"], one["step"]): one for one in CoordinatorAdmin(url).status(run)["evaluations"]}
    for name in names:
        last = kept[name, 6]
        assert last["measured"] == last["documents"] == (7 if name == "lines" else 20)
        if name == "lines":  # of many digits; the order in which they are added differs
            assert last["figures"] == {
                metric: pytest.approx(value, rel=1e-12) for metric, value in wanted[name].items()
            }
        else:
            assert last["figures"] == wanted[name]
    capsys.readouterr()
    assert main(["run", "status", run, "--coordinator", url]) == 0
    assert f"acc {wanted['sums']['acc']:.4f}" in capsys.readouterr().out
    for folder, result in zip(folders, results, strict=True):
        assert {name: found["figures"] for name, found in result["evals"].items()} == {
            name: kept[name, 6]["figures"] for name in names
        }
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last_row = next(row for row in rows if row["step"] == 6 and "eval/sums/acc" in row)
        assert last_row["eval/sums/acc"] == wanted["sums"]["acc"]
        assert last_row["eval/sums/documents"] == 20


def test_evaluating_changes_nothing_that_is_trained(
    text: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psyche_lightning.node.spare.SHARE", 1000.0)  # in every wait, however short
    options = ["evals.tasks=[sums]", "evals.every=2", "evals.limit=2", "model.config.attention_dropout=0.2"]
    found = train_recipe(recipe(text, tasks, *options), directory=tmp_path / "with")
    plain = load_recipe(
        "demo",
        [*MODEL, f"data.config.path={text}", "validate_every=0", "total_steps=6", "seq_len=64", options[-1]],
        twin=True,
    )
    assert train_recipe(plain, directory=tmp_path / "without")["digest"] == found["digest"]
    rows = [json.loads(line) for line in (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()]
    told = [(row["step"], row["eval/sums/documents"]) for row in rows if "eval/sums/acc" in row]
    assert told == [(2, 2), (4, 2), (6, 2)]
    assert found["evals"]["sums"]["measured"] == 2


def test_unknown_tasks_are_refused_before_training(
    text: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=r"no task 'summs'\. Did you mean 'sums'\?.* has examples, lines, sums\."):
        train_recipe(recipe(text, tasks, "evals.tasks=[summs]"), directory=tmp_path / "node")
    assert not (tmp_path / "node").exists()
    dry = ["train", "demo", "--twin", "--dry-run", f"data.config.path={text}", f"evals.tasks_from={tasks}"]
    assert main([*dry, "evals.tasks=[sums]"]) == 0
    assert "copy for evaluations" in capsys.readouterr().out


def test_a_task_without_a_mean_and_a_folder_that_is_not_there_are_refused(
    text: Path, tasks: Path, tmp_path: Path
) -> None:
    path = tasks / "examples.yaml"
    path.write_text(path.read_text().replace("  - metric: exact_match\n", ""))
    with pytest.raises(ConfigError, match=r"'examples' cannot be evaluated: it has no metric that is a mean"):
        train_recipe(recipe(text, tasks, "evals.tasks=[examples]"), directory=tmp_path / "node")
    with pytest.raises(ConfigError, match="There is no folder '/nowhere' with tasks"):
        train_recipe(recipe(text, Path("/nowhere"), "evals.tasks=[sums]"), directory=tmp_path / "node")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["evals.every=5"], "evals.tasks names no tasks"),
        (["evals.tasks=sums"], r"evals.tasks is 'sums' \(text\); a list such as \[a, b\] was expected"),
        (["evals.tasks=[1]"], r"evals.tasks.0 is 1"),
        (["evals.tasks=[sums, sums]"], "each once"),
        ([f"evals.tasks=[{'a' * 65}]"], "1 to 64 characters"),
        (["evals.tasks=[sums]", "evals.limit=0"], "evals.limit is 0; it must be at least 1"),
    ],
)
def test_keys_that_cannot_be_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("demo", options, twin=True)
