"""What ``psyche run create`` and ``psyche run update`` ask of a coordinator: a recipe's run, or bare keys."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from psyche_lightning.cli.console import say
from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.owner import Creation

if TYPE_CHECKING:
    from psyche_lightning.recipe import Recipe


def wanted(run_id: str, arguments: list[str], twin: bool, *, everybody: bool = True, by_link: bool = False) -> Creation:
    """Returns the run that the arguments of ``create`` and ``update`` describe."""
    recipe, overrides = split(arguments)
    if recipe is None and twin:
        raise ConfigError("--twin is an option of a recipe; also name the recipe")
    values = _bare(run_id, overrides) if recipe is None else _from_recipe(recipe, overrides, twin)
    return Creation(**values, everybody=everybody, by_link=by_link)


def split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The recipe, if the first argument names one, and the overrides."""
    recipe = arguments[0] if arguments and "=" not in arguments[0] else None
    overrides = arguments[recipe is not None :]
    for text in overrides:
        if "=" not in text:
            raise ConfigError(f"{text!r} does not have the form key=value; the recipe comes first, right after the run")
    return recipe, overrides


def _from_recipe(name: str, overrides: list[str], twin: bool) -> dict[str, Any]:
    """The parameters of a run with a recipe, which fixes all of them."""
    from psyche_lightning.protocol.manifest import START
    from psyche_lightning.recipe import load_recipe
    from psyche_lightning.recipe.joining import SECTION as JOIN
    from psyche_lightning.recipe.joining import offer
    from psyche_lightning.recipe.manifest import manifest, start_section

    recipe = load_recipe(name, overrides, twin=twin)
    sections = manifest(recipe)
    if recipe.checkpoint.resume is not None:
        from psyche_lightning.checkpoints.folder import newest

        found = newest(recipe.checkpoint.resume)
        sections[START] = start_section(found.manifest)
        say(f"resuming after step {found.manifest.metadata.step}, from {found}")
    del sections["data"]  # only a node has the samples and can describe them, so the first node fixes this section
    sections[JOIN], local = offer(recipe)
    for key in local:
        say(f"{key} names files of this machine, so who joins with the link alone has to give it: {key}=PATH")
    return {
        "config": asdict(recipe.run.coordinator),
        "manifest": sections,
        "seed": recipe.run.seed,
        "max_seq_len": recipe.data.seq_len,
        "recipe": recipe,
    }


def _bare(run_id: str, overrides: list[str]) -> dict[str, Any]:
    """The parameters of a run without a recipe; the first node fixes the missing ones."""
    from psyche_lightning.recipe import resolve
    from psyche_lightning.recipe.loading import parse_override
    from psyche_lightning.recipe.manifest import manifest

    given: dict[str, dict[str, Any]] = {"run": {}, "distro": {}}
    for text in overrides:
        key, value = parse_override(text)
        section, _, name = key.partition(".")
        if section not in given:
            raise ConfigError(
                f"{text.partition('=')[0]!r} belongs to a recipe; name the recipe before it: "
                f"`psyche run create RUN RECIPE {text}`"
            )
        given[section][name] = value
    if "global_batch_size_start" in given["run"]:
        given["run"].setdefault("global_batch_size_end", given["run"]["global_batch_size_start"])
    recipe: Recipe = resolve({"name": run_id, **given}, source=f"run {run_id}")
    config = asdict(recipe.run.coordinator)
    sections = manifest(recipe)
    return {
        "config": {name: config[name] for name in given["run"] if name in config},
        "manifest": {
            **({"run": sections["run"]} if given["run"].keys() & sections["run"].keys() else {}),
            **({"distro": sections["distro"]} if given["distro"] else {}),
        },
        "seed": given["run"].get("seed"),
    }
