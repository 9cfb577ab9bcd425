"""A run's recipe, as its manifest tells it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest

from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.requests import Terms
from psyche_lightning.recipe import load_recipe, resolve
from psyche_lightning.recipe.joining import SECTION, offer, recipe_of
from psyche_lightning.recipe.manifest import manifest

RECIPES = sorted(path.stem for path in Path("recipes").glob("*.yaml"))
SMALL = {
    "name": "r",
    "model": {"name": "hf", "path": "org/model@main"},
    "data": {
        "config": {"path": "https://example.org/x.txt", "tokenizer": "org/model"},
        "validation": {"split": "test"},
    },
}


def terms(recipe, *, sealed=False, unset=()):
    sections = manifest(recipe, "f" * 8)
    if not sealed:
        del sections["data"]
    sections[SECTION], _ = offer(recipe)
    return Terms(recipe.run.coordinator, unset, sections)


def small(**changed):
    values = copy.deepcopy(SMALL)
    for key, value in changed.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return resolve(values)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_it_gives_the_manifest_that_it_comes_from(name, sealed):
    recipe = load_recipe(name)
    found = recipe_of(recipe.name, terms(recipe, sealed=sealed))
    assert manifest(found) == manifest(recipe)
    assert found.run == recipe.run
    assert found.schedule == recipe.schedule
    assert found.trainer.precision == recipe.trainer.precision


def test_places_that_all_reach_come_with_it():
    recipe = small()
    found = recipe_of("r", terms(recipe))
    assert found.model.path == "org/model@main"
    assert found.data == recipe.data
    assert offer(recipe)[1] == []


def test_files_of_the_creators_machine_do_not(tmp_path):
    (tmp_path / "books").mkdir()
    recipe = small(data__config={"path": str(tmp_path / "books")}, model__path="./here")
    section, local = offer(recipe)
    assert local == ["data.config.path", "model.path"]
    assert str(tmp_path) not in str(section)
    mine = recipe_of("r", terms(recipe), [f"data.config.path={tmp_path}", "model.path=/models/a"])
    assert mine.data.config["path"] == str(tmp_path)


@pytest.mark.parametrize("place", ["/etc/passwd", "../x", "~/x", "file:///etc/passwd", ["a/b", "/etc"], "a/b/c"])
@pytest.mark.parametrize("key", ["data.config.path", "data.validation.path", "data.config.parts.0.path", "model.path"])
def test_a_run_may_not_choose_files_of_who_joins(place, key):
    known = terms(small())
    sections = copy.deepcopy(known.manifest)
    told = sections[SECTION]
    told["data"]["config"]["parts"] = [{}]
    *path, last = key.split(".")
    for part in path:
        told = told[int(part)] if part.isdigit() else told[part]
    told[last] = place
    with pytest.raises(ConfigError, match="names files of this machine") as refused:
        recipe_of("r", replace(known, manifest=sections))
    assert key in str(refused.value)


def test_code_from_elsewhere_runs_only_if_who_joins_says_so():
    recipe = small(model__config={"trust_remote_code": True})
    with pytest.raises(ConfigError, match="trust_remote_code=true"):
        recipe_of("r", terms(recipe))
    assert recipe_of("r", terms(recipe), ["model.config.trust_remote_code=true"]).model.config["trust_remote_code"]


def test_values_of_this_machine_win():
    found = recipe_of("r", terms(small()), ["micro_batch_size=3", "trainer.accelerator=cpu"])
    assert (found.trainer.micro_batch_size, found.trainer.accelerator) == (3, "cpu")


def test_values_that_the_first_node_fixes_are_left_to_it():
    recipe = small()
    found = recipe_of("r", terms(recipe, unset=("total_steps", "global_batch_size")))
    assert found.run.total_steps == resolve({"name": "r"}).run.total_steps


@pytest.mark.parametrize("sections", [None, {}, {"model": {"name": "hf"}}])
def test_a_run_without_a_recipe_is_refused(sections):
    with pytest.raises(ConfigError, match="created without a recipe"):
        recipe_of("r", Terms(small().run.coordinator, (), sections))


@pytest.mark.parametrize(
    ("section", "value"),
    [("optimizer", {}), ("optimizer", {"schedule": 1}), ("data", 3), (SECTION, []), (SECTION, {"data": 1}),
     (SECTION, {"data": {"config": 1}}), (SECTION, {"trainer": []}), ("distro", {"k": "many"}), ("run", 7)],
)  # fmt: skip
def test_a_damaged_manifest_is_refused(section, value):
    known = terms(small())
    with pytest.raises(ConfigError, match="the recipe of run 'r'"):
        recipe_of("r", replace(known, manifest={**known.manifest, section: value}))
