from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.distro import DistroConfig
from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.state import CoordinatorConfig
from psyche_lightning.recipe import Recipe, find_recipe, load_recipe, resolve
from psyche_lightning.recipe.config import RunSection
from psyche_lightning.recipe.loading import resolve_key
from psyche_lightning.recipe.manifest import manifest
from psyche_lightning.recipe.options import NodeOptions, RunValues
from psyche_lightning.recipe.schedule import Cosine

SOURCE = """
run: {total_steps: 50, global_batch_size_start: 4, global_batch_size_end: 8}
model: {name: mla, config: {hidden_size: 64, nested: {a: 1, b: 2}}}
optimizer: {lr: 2e-4, schedule: {kind: cosine, warmup_steps: 5, final_lr: 0}}
twin:
  model: {config: {hidden_size: 8, nested: {b: 3}}}
  run: {total_steps: 6}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(SOURCE)
    return file


def test_a_file_becomes_typed_sections_with_defaults(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.run == RunSection(total_steps=50, global_batch_size_start=4, global_batch_size_end=8)
    assert recipe.model.config == {"hidden_size": 64, "nested": {"a": 1, "b": 2}}
    assert recipe.optimizer.lr == 2e-4
    assert isinstance(recipe.optimizer.schedule.final_lr, float)
    assert recipe.schedule == Cosine(2e-4, 5, 0.0, 50, 0.0)  # total_steps is the run's unless set
    assert recipe.node.transport == "tcp"
    with pytest.raises(FrozenInstanceError):
        recipe.run.total_steps = 3  # type: ignore[misc]


def test_overrides_come_last_and_resolve_short_keys(path: Path) -> None:
    recipe = load_recipe(
        path,
        [
            "init_min_clients=2",
            "lr=1e-3",
            "run.total_steps=7",
            "total_steps=9",
            "schedule.warmup_steps=3",
            "model.config.hidden_size=16",
            "model.config.new.deep=[1, a]",
            "transport_options.port=4000",
            "data.config.path=/a=b",
            "clip_grad_norm=null",
            "overlap=true",
            "name=other",
            "epoch_time=7200",
        ],
    )
    assert (recipe.run.init_min_clients, recipe.optimizer.lr, recipe.run.total_steps) == (2, 1e-3, 9)
    assert recipe.optimizer.schedule.warmup_steps == 3
    assert recipe.model.config == {"hidden_size": 16, "nested": {"a": 1, "b": 2}, "new": {"deep": [1, "a"]}}
    assert recipe.node.transport_options == {"port": 4000}
    assert recipe.data.config == {"path": "/a=b"}
    assert recipe.optimizer.clip_grad_norm is None
    assert recipe.run.overlap is True
    assert recipe.name == "other"
    assert recipe.run.epoch_time == 7200.0


@pytest.mark.parametrize(
    ("section", "kind"),
    [("run", CoordinatorConfig), ("run", RunValues), ("distro", DistroConfig), ("node", NodeOptions)],
)
def test_every_key_of_a_run_and_a_node_is_reachable_bare(section: str, kind: type[CoordinatorConfig]) -> None:
    for item in fields(kind):
        assert resolve_key(item.name) == f"{section}.{item.name}"


def test_a_recipe_becomes_a_node_s_options() -> None:
    recipe = load_recipe("demo", ["overlap=true", "digest_every=3", "k=2", "transport=memory", "patience=7"])
    sections = manifest(recipe)
    options = recipe.options("http://x:1", "r", "folder", sections, tokens_per_sample=32)
    assert options.given == {"run": sections["run"], "distro": sections["distro"]}
    assert {**options.given, **options.manifest} == sections
    assert (options.coordinator, options.run, options.directory) == ("http://x:1", "r", "folder")
    assert (options.transport, options.patience, options.config) == ("memory", 7.0, None)
    alone = recipe.options(None, "r", "folder", sections, start=(3, 4), tokens_per_sample=32)
    assert (alone.run, alone.directory, alone.start) == (None, None, (3, 4))
    assert alone.config == recipe.run.coordinator


def test_the_twin_replaces_what_it_names_before_the_overrides(path: Path) -> None:
    twin = load_recipe(path, ["model.config.hidden_size=9"], twin=True)
    assert twin.model.config == {"hidden_size": 9, "nested": {"a": 1, "b": 3}}
    assert twin.run.total_steps == 6
    assert twin.run.global_batch_size_end == 8
    path.write_text("run: {total_steps: 1}")
    with pytest.raises(ConfigError, match="no section 'twin'"):
        load_recipe(path, twin=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rte=1", r"Unknown key 'optimizer\.learning_rte'.* Keys of 'optimizer': lr, weight_decay"),
        ("run.totl_steps=3", r"Did you mean 'run\.total_steps'\?"),
        ("transprt=a", r"Did you mean 'node\.transport'\?"),
        ("optimizer.transport=a", r"Did you mean 'node\.transport'\?"),
        ("optimizer.schedule.wurmup_steps=1", r"'optimizer\.schedule\.warmup_steps'\?.*Keys of 'optimizer\.schedule'"),
        ("modl.name=a", r"Unknown key 'modl\.name'.* Sections and keys: name, run"),
        ("run.total_steps.x=1", r"Unknown key 'run\.total_steps\.x'"),
        ("config.x=1", r"'config\.x' could be any of model\.config, data\.config"),
        ("model=3", r"'model' is a section; set one of its keys, such as model\.name="),
        ("nonsense", r"'nonsense' does not have the form key=value"),
        ("=3", r"'=3' does not have the form"),
        ("lr=[1", r"'lr=\[1' has a value that is not YAML"),
        ("lr=abc", r"optimizer\.lr is 'abc' \(text\); a number was expected"),
        ("lr=.nan", r"optimizer\.lr is nan"),
        ("lr=.inf", r"optimizer\.lr is inf"),
        ("lr=0", r"optimizer\.lr is 0; it must be more than 0"),
        ("lr=", r"optimizer\.lr is None \(null\); a number was expected"),
        ("decay=1.5", r"The override decay=1\.5 of .*mine\.yaml: distro\.decay is 1\.5; choose a number from 0 to 1"),
        ("k=0", r"distro\.k is 0; with distro\.chunk=64 choose a whole number from 1 to 128"),
        ("k=2000", r"distro\.k is 2000; with distro\.chunk=64 choose a whole number from 1 to 128"),
        ("distro.k_for={'*head*': 0}", r"distro\.k_for of '\*head\*' is 0; with distro\.chunk=64 choose"),
        ("chunk=64.0", r"distro\.chunk is 64\.0 \(a number\); an integer was expected"),
        ("chunk=65", r"distro\.chunk is 65; choose 8, 16, 32 or 64"),
        ("seq_len=1.5", r"data\.seq_len is 1\.5 \(a number\); an integer was expected"),
        ("seq_len=true", r"data\.seq_len is True \(true or false\); an integer was expected"),
        ("overlap=1", r"run\.overlap is 1 \(an integer\); true or false was expected"),
        ("digest_every=0", r"mine\.yaml: run\.digest_every is 0; choose a whole number from 1 on"),
        ("cold_start_warmup_steps=-1", r"run\.cold_start_warmup_steps is -1; choose a whole number from 0 on"),
        ("cold_start_warmup_steps=99999", r"run\.cold_start_warmup_steps is 99999; an epoch has room for \d+ rounds"),
        ("keep_bytes=-1", r"run\.keep_bytes is -1; choose a whole number from 0 on"),
        ("run.seed=18446744073709551616", r"run\.seed is 18446744073709551616; choose .* from 0 to 2\^64 - 1"),
        ("digest_evry=3", r"Did you mean 'run\.digest_every'\?"),
        ("patience=0", r"node\.patience is 0.*; choose a number of seconds above 0"),
        ("region=" + "x" * 41, r"node\.region is 'x+'; choose at most 40 printable characters.*such as eu-west"),
        ("dtype=bfloat", r"model\.dtype is 'bfloat', which is not a choice\. Did you mean 'bfloat16'\?"),
        ("model.config=3", r"model\.config is 3 \(an integer\); a section with keys was expected"),
        ("kind=wsd", r"schedule 'wsd' has no final_lr; its fields are .*stable_steps"),
        ("final_lr=null", r"schedule 'cosine' needs final_lr"),
        ("warmup_steps=50", r"schedule of 50 steps has no steps left"),
        ("min_clients=2", r"init_min_clients is 1; it must be at least min_clients \(2\)"),
        ("global_batch_size_end=3", r"global_batch_size_end is 3"),
        ("masters=half", r"trainer\.masters is 'half', which is not a choice"),
        ("delta=int4", r"trainer\.delta is 'int4', which is not a choice"),
        ("name=" + "x" * 33, r"'x+' is no name of a run; it has 1 to 32 letters"),
    ],
)
def test_mistakes_are_explained(path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(path, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("clip_grad_norm=1", r"optimizer\.clip_grad_norm clips by the norm of all of them"),
        ("distro.local_steps=2", r"distro\.local_steps needs them for the steps"),
        ("optimizer.name=muon", r"optimizer\.name=muon makes directions of whole ones"),
        ("precision=16-mixed", r"trainer\.precision=16-mixed unscales all of them"),
    ],
)
def test_what_needs_all_gradients_goes_without_streaming(path: Path, override: str, message: str) -> None:
    load_recipe(path, [override])
    with pytest.raises(ConfigError, match=rf"{message}.*Choose trainer\.gradients=kept"):
        load_recipe(path, [override, "trainer.gradients=streamed"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [1", "not a readable YAML file"),
        ("- 1\n- 2\n", "does not contain sections"),
        ("1: 2\n", "does not contain sections"),
        ("run: 5\n", "run is 5; a section with keys was expected"),
        ("run: {total_stps: 5}\n", r"mine\.yaml: Unknown key 'run\.total_stps'\. Did you mean 'run\.total_steps'\?"),
        ("optmizer: {lr: 5}\n", r"Unknown key 'optmizer'.* Did you mean 'optimizer'\?"),
        ("run: {seed: '${nowhere}'}\n", "not a readable YAML file.*nowhere"),
    ],
)
def test_wrong_files_are_refused(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_an_empty_file_is_a_recipe_of_defaults(path: Path) -> None:
    path.write_text("")
    assert load_recipe(path) == Recipe("mine")


def test_a_file_that_is_not_text_is_refused(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ConfigError, match="not a readable YAML file"):
        load_recipe(path)


def test_recipes_are_found_by_name_and_by_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_recipe(str(path)) == path
    assert find_recipe("demo").name == "demo.yaml"
    assert find_recipe("demo.yaml").name == "demo.yaml"
    (path.parent / "recipes").mkdir()
    (path.parent / "recipes" / "demo.yaml").write_text(SOURCE)
    monkeypatch.chdir(path.parent)
    assert find_recipe("demo") == Path("recipes/demo.yaml")  # the folder at hand wins
    with pytest.raises(ConfigError, match=r"no recipe 'dmo'.* Did you mean 'demo'\? Names: consilience-40b, demo"):
        find_recipe("dmo")
    with pytest.raises(ConfigError, match=r"no recipe 'x/demo\.yaml'"):
        find_recipe("x/demo.yaml")


def test_defaults_agree_with_the_rooms_that_own_them() -> None:
    assert Recipe("a").distro == DistroConfig()
    assert RunSection().coordinator == CoordinatorConfig()
    values: dict[str, Any] = {"run": {"min_clients": 2, "init_min_clients": 3, "seed": 4}}
    assert resolve({"name": "a", **values}).run.coordinator == CoordinatorConfig(min_clients=2, init_min_clients=3)


def test_loading_a_recipe_imports_no_torch() -> None:
    script = "import sys, psyche_lightning.recipe as r; r.load_recipe('demo'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["optimizer.lr=fast", "run.seed=3"], "optimizer.lr=fast"),
        (["seed=3", "total_steps=-1"], "total_steps=-1"),
        (["seed=3", "min_clients=2"], "seed=3 min_clients=2"),  # which of them is to blame is not known
    ],
)
def test_an_error_of_an_override_names_it(path: Path, overrides: list[str], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    assert named in str(caught.value).partition(": ")[0]


def test_an_error_of_the_file_names_no_override(path: Path) -> None:
    path.write_text(SOURCE.replace("lr: 2e-4", "lr: fast"))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, ["seed=3"])
    assert str(caught.value).startswith(f"{path}: optimizer.lr")
    assert load_recipe(path, ["optimizer.lr=1e-3"]).optimizer.lr == 1e-3
