"""Finds a recipe's YAML file, overrides its keys, and resolves both into a typed :class:`Recipe`."""

from __future__ import annotations

import copy
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from psyche_lightning.errors import ConfigError, nearest
from psyche_lightning.protocol.limits import check_config, check_run_id
from psyche_lightning.recipe.config import Range, Recipe

TWIN = "twin"


def recipe_folders() -> list[Path]:
    """The folders in which recipes are found by name: ``./recipes``, then the installed ones."""
    return [Path("recipes"), Path(str(resources.files("psyche_lightning.recipes")))]


def find_recipe(recipe: str) -> Path:
    """The file of a recipe: a path, or the name of a file in one of :func:`recipe_folders`.

    Raises:
        ConfigError: the recipe does not exist; the text lists the known names.
    """
    if Path(recipe).is_file():
        return Path(recipe)
    if recipe == Path(recipe).name:
        for folder in recipe_folders():
            if (folder / f"{recipe.removesuffix('.yaml')}.yaml").is_file():
                return folder / f"{recipe.removesuffix('.yaml')}.yaml"
    names = sorted({path.stem for folder in recipe_folders() for path in folder.glob("*.yaml")})
    raise ConfigError(
        f"There is no recipe {recipe!r}: it is neither a file nor a known name.{nearest(Path(recipe).stem, names)} "
        f"Names: {', '.join(names) or 'none'}."
    )


def load_recipe(recipe: str | Path, overrides: Sequence[str] = (), *, twin: bool = False) -> Recipe:
    """Read a recipe and resolve it.

    Args:
        recipe: a path, or the name of a recipe; a ``.toml`` file is one of Psyche's run configurations.
        overrides: ``key=value`` with dotted keys. A key may be shortened to its end if only one key of the recipe ends
            like it: ``init_min_clients=2`` means ``run.init_min_clients=2``. Values are YAML; the last one wins.
        twin: whether to apply the recipe's ``twin`` section, its CPU-sized form, before the overrides.

    Raises:
        ConfigError: the recipe does not exist or is not YAML, a key is unknown (the text names the nearest one and the
            choices), a value has a wrong type or is out of bounds, or values contradict each other.
    """
    path = find_recipe(str(recipe))
    values = _read(path)
    small = values.pop(TWIN, None)
    if twin:
        if not isinstance(small, dict):
            raise ConfigError(f"{path} has no section {TWIN!r}, the recipe's CPU-sized form.")
        _merge(values, small)
    values.setdefault("name", path.stem)
    return resolve_with(values, overrides, source=str(path))


def resolve_with(values: dict[str, Any], overrides: Sequence[str], *, source: str) -> Recipe:
    """:func:`resolve` after overrides, which are changed in ``values``.

    Args:
        values: sections by name.
        overrides: as for :func:`load_recipe`.
        source: the origin that messages name.

    Raises:
        ConfigError: see :func:`load_recipe`.
    """
    file = copy.deepcopy(values)
    parsed = [(text, *parse_override(text)) for text in overrides]
    for _, key, value in parsed:
        node = values
        *sections, leaf = key.split(".")
        for section in sections:
            if not isinstance(node.get(section), dict):
                node[section] = {}
            node = node[section]
        node[leaf] = value
    try:
        return resolve(values, source=source)
    except ConfigError as error:
        if not parsed:
            raise
        resolve(file, source=source)  # what is wrong in the file itself comes first
        reason = str(error).removeprefix(f"{source}: ")
        culprits = [text for text, key, _ in parsed if key in reason] or [text for text, *_ in parsed]
        blamed = f"The override{'s' * (len(culprits) > 1)} {' '.join(culprits)} of {source}"
        raise ConfigError(f"{blamed}: {reason}") from None


def resolve(values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Turn nested plain values into a typed recipe.

    Args:
        values: sections by name, as in a recipe's file without its ``twin``.
        source: the origin that messages name.

    Raises:
        ConfigError: see :func:`load_recipe`.
    """
    try:
        recipe = _typed(Recipe, dict(values), "")
        assert isinstance(recipe, Recipe)
        _check_together(recipe)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    return recipe


def resolve_key(key: str) -> str:
    """The full dotted key for the end of a key, such as ``run.min_clients`` for ``min_clients``.

    Raises:
        ConfigError: no key or several keys end like it.
    """
    keys = dict(_leaves(Recipe, ""))
    parts = key.split(".")
    for cut in range(len(parts), 0, -1):  # the rest is a key inside a free section such as model.config
        head, rest = ".".join(parts[:cut]), parts[cut:]
        found = [full for full, free in keys.items() if f".{full}".endswith(f".{head}") and (free or not rest)]
        if found:  # an outer key wins: total_steps is the run's, not the schedule's
            outer = min(full.count(".") for full in found)
            found = [full for full in found if full.count(".") == outer]
        if len(found) > 1:
            raise ConfigError(f"The key {key!r} could be any of {', '.join(found)}; write it in full.")
        if found:
            return ".".join([*found, *rest])
    section: type = Recipe
    prefix = ""
    for name in parts[:-1]:
        hint = typing.get_type_hints(section).get(name)
        if not is_dataclass(hint):
            break
        section, prefix = typing.cast(type, hint), f"{prefix}{name}."
    if is_dataclass(typing.get_type_hints(section).get(parts[-1])):
        raise ConfigError(f"{key!r} is a section; set one of its keys, such as {_some_key(key)}=value.")
    raise ConfigError(_unknown(key, section, prefix))


def _check_together(recipe: Recipe) -> None:
    """Check the rules that involve several keys."""
    recipe.schedule  # noqa: B018 - building it checks it
    check_run_id(recipe.name)
    check_config(recipe.run.coordinator)
    _check_streamed(recipe)
    run = recipe.run
    room = int((run.epoch_time - run.warmup_time) / run.max_round_train_time)
    if run.cold_start_warmup_steps > max(0, room):
        raise ConfigError(
            f"run.cold_start_warmup_steps is {run.cold_start_warmup_steps}; an epoch has room for {max(0, room)} "
            "rounds (epoch_time without warmup_time, by max_round_train_time), in which learning rates have to rise."
        )


def _check_streamed(recipe: Recipe) -> None:
    """Refuse streamed gradients together with what needs all of them at once."""
    whys = {
        "optimizer.clip_grad_norm clips by the norm of all of them": recipe.optimizer.clip_grad_norm is not None,
        "distro.local_steps needs them for the steps": recipe.distro.local_steps > 0,
        "optimizer.name=muon makes directions of whole ones": recipe.optimizer.name == "muon",
        "trainer.precision=16-mixed unscales all of them before a step": recipe.trainer.precision == "16-mixed",
    }
    why = next((text for text, so in whys.items() if so), None)
    if recipe.trainer.gradients == "streamed" and why is not None:
        raise ConfigError(
            f"trainer.gradients is 'streamed', which frees each gradient as it comes, but {why}. Choose "
            "trainer.gradients=kept, or change the other key."
        )


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".toml":
        from psyche_lightning.recipe.toml import read_toml

        return read_toml(path)
    from omegaconf import OmegaConf

    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # PyYAML, OmegaConf and the file system raise many types
        raise ConfigError(f"{path} is not a readable YAML file: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} does not contain sections; a recipe begins with keys such as 'model:' and 'run:'.")
    return typing.cast("dict[str, Any]", values)


def parse_override(text: str) -> tuple[str, Any]:
    """The full key and the value of one ``key=value``, such as ``("run.min_clients", 2)`` for ``min_clients=2``.

    Raises:
        ConfigError: the text has another form, the key is unknown or ambiguous, or the value is not YAML.
    """
    from omegaconf import OmegaConf

    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"The override {text!r} does not have the form key=value, such as run.total_steps=100.")
    try:
        parsed = OmegaConf.to_container(OmegaConf.create(f"value: {value}"))
    except Exception as error:  # PyYAML and OmegaConf raise many types
        raise ConfigError(f"The override {text!r} has a value that is not YAML: {value!r}.") from error
    assert isinstance(parsed, dict)
    return resolve_key(key.strip()), parsed["value"]


def _merge(values: dict[str, Any], other: Mapping[str, Any]) -> None:
    if other.get("name", values.get("name")) != values.get("name"):
        values.pop("config", None)  # the options of another plugin
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = value


def _leaves(section: type, prefix: str) -> Iterator[tuple[str, bool]]:
    """All dotted keys, and whether each may contain further keys."""
    for name, hint in typing.get_type_hints(section).items():
        if is_dataclass(hint):
            yield from _leaves(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", typing.get_origin(hint) is Mapping


def _some_key(section: str) -> str:
    return next(leaf for leaf, _ in _leaves(Recipe, "") if leaf.startswith(f"{section}."))


def _unknown(key: str, section: type, prefix: str) -> str:
    """The message about a key that ``section`` lacks: the nearest key, here or elsewhere, and the choices."""
    names = [item.name for item in fields(section)]
    leaves = [leaf for leaf, _ in _leaves(Recipe, "")]
    last = key.rpartition(".")[2]
    candidates = {
        **{leaf: leaf for leaf in leaves},
        **{leaf.rpartition(".")[2]: leaf for leaf in leaves},
        **{name: f"{prefix}{name}" for name in names},
    }
    close = difflib.get_close_matches(last, list(candidates), n=1) or difflib.get_close_matches(key, leaves, n=1)
    hint = f" Did you mean {candidates[close[0]]!r}?" if close else ""
    where = f"Keys of {prefix[:-1]!r}" if prefix else "Sections and keys"
    return f"Unknown key {key!r}.{hint} {where}: {', '.join(names)}."


def _typed(hint: Any, value: Any, key: str) -> Any:
    """Returns ``value`` as the type ``hint``.

    Raises:
        ConfigError: it has another type, is out of bounds, or has unknown keys.
    """
    if is_dataclass(hint):
        return _section(typing.cast(type, hint), value, key)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, Union):
        return None if value is None else _typed(arguments[0], value, key)
    if origin is Annotated:
        number = _typed(arguments[0], value, key)
        bounds: Range = arguments[1]
        if number not in bounds:
            raise ConfigError(f"{key} is {value!r}; it must be {bounds}.")
        return number
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in arguments):
            choices = [str(choice) for choice in arguments]
            hint = nearest(str(value), choices)
            raise ConfigError(f"{key} is {value!r}, which is not a choice.{hint} Choices: {', '.join(choices)}.")
        return value
    if origin is Mapping and isinstance(value, dict):
        return value
    if origin in (tuple, Sequence) and isinstance(value, list):
        return tuple(_typed(arguments[0], item, f"{key}.{place}") for place, item in enumerate(value))
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    expected = "a list such as [a, b]" if origin in (tuple, Sequence) else _KINDS.get(hint, "a section with keys")
    raise ConfigError(f"{key} is {value!r} ({_KINDS.get(type(value), type(value).__name__)}); {expected} was expected.")


def _section(section: type, values: Any, key: str) -> Any:
    if not isinstance(values, dict):
        raise ConfigError(f"{key} is {values!r}; a section with keys was expected.")
    prefix = f"{key}." if key else ""
    hints = typing.get_type_hints(section, include_extras=True)
    for name in values:
        if name not in hints:
            raise ConfigError(_unknown(f"{prefix}{name}", section, prefix))
    return section(**{name: _typed(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


# Types in the words of messages.
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    dict: "keys",
    list: "a list",
}
