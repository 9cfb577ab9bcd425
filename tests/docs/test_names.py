"""Names in the documentation are real, and what has a name is documented."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from psyche_lightning import hookspecs
from psyche_lightning.plugins import KINDS
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.recipe.loading import resolve
from psyche_lightning.recipe.options import RunOptions
from psyche_lightning.testing.coordinators import CoordinatorContract
from psyche_lightning.testing.data import DataContract, OutageContract
from psyche_lightning.testing.models import ModelContract
from psyche_lightning.testing.network import NetworkTransportContract
from psyche_lightning.testing.transport import TransportContract

ROOT = Path(__file__).parents[2]
PathOf = Callable[[str], Any]


def slug(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def keys_of(section: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(section)
    for item in fields(section):
        if is_dataclass(hints[item.name]):
            yield from keys_of(hints[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item.default


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def test_the_page_of_plugins_states_every_rule_of_the_conformance_kits() -> None:
    section = (ROOT / "docs" / "plugins.md").read_text().partition("### What the kits check\n")[2]
    section = re.split(r"\n##+ ", section)[0]
    for contract in (
        TransportContract, NetworkTransportContract, ModelContract, DataContract, OutageContract, CoordinatorContract
    ):  # fmt: skip
        listed = re.split(r"\n\*\*", section.partition(f"(`{contract.__name__}`)")[2])[0]
        rules = [words(rule) for rule in re.findall(r"^- (.*(?:\n  .*)*)", listed, re.MULTILINE)]
        assert rules == [words(name[len("test_") :]) for name in vars(contract) if name.startswith("test_")]


def test_every_link_leads_somewhere(pages: list[Any]) -> None:
    for page in pages:
        for target in page.links:
            if target.startswith("https://"):
                continue
            path, _, anchor = target.partition("#")
            file = (page.path.parent / path).resolve() if path else page.path
            assert file.exists(), f"{page.name} links to {target}, which is not there"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                assert anchor in map(slug, headings), f"{page.name} links to {target}, which has no such heading"


def test_every_page_is_reachable_from_the_readme(pages: list[Any]) -> None:
    unseen = {page.path: page for page in pages}
    pending = [pages[0].path]
    while pending:
        page = unseen.pop(pending.pop(), None)
        for target in page.links if page else []:
            pending.append((page.path.parent / target.partition("#")[0]).resolve())
    assert [page.name for page in unseen.values()] == []


def test_every_hook_is_documented_and_every_documented_hook_exists(page: PathOf) -> None:
    text = page("plugins.md").text
    table = re.findall(r"^\| `(register_\w+)` \| `(\w+\(.*?\))`", text, re.MULTILINE)
    assert [name for name, _ in table] == list(KINDS)
    for name, call in table:
        assert call in (getattr(hookspecs, name).__doc__ or "")


def test_hooks_elsewhere_exist(pages: list[Any]) -> None:
    for page in pages:
        assert set(re.findall(r"\bregister_[a-z_]+\b", page.text)) <= {*KINDS, "register_*"}, page.name


def test_environment_variables_are_real(pages: list[Any]) -> None:
    packages = [ROOT / "psyche_lightning", *(ROOT / "plugins").glob("*/psyche_lightning_*")]
    sources = "\n".join(path.read_text() for package in packages for path in package.rglob("*.py"))
    for page in pages:
        for name in set(re.findall(r"\bPSYCHE_[A-Z_]+\b", page.text)):
            assert re.search(rf"\b{name}\b", sources), f"{page.name} names {name}"


def test_the_files_of_a_node_are_real(page: PathOf) -> None:
    table = page("cleaning-up.md").text.partition("In a node's folder:")[2].partition("\n\nWhile")[0]
    names = [
        name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(.*?)/?`", row)
    ]
    assert len(names) >= 14
    sources = "\n".join(path.read_text() for path in (ROOT / "psyche_lightning").rglob("*.py"))
    for name in names:
        assert f'"{name}"' in sources, name


def test_modules_and_their_attributes_are_real(pages: list[Any]) -> None:
    import importlib
    import importlib.util

    for page in pages:
        for span in page.spans:
            if re.fullmatch(r"psyche_lightning(\.\w+)+", span):
                module, _, name = span.rpartition(".")
                parent = importlib.import_module(module)
                is_module = hasattr(parent, "__path__") and importlib.util.find_spec(span) is not None
                assert is_module or hasattr(parent, name), f"{page.name} names {span}"


def test_paths_in_this_repository_are_real(pages: list[Any]) -> None:
    for page in pages:
        for path in re.findall(r"`((?:psyche_lightning|tests|plugins|recipes|\.ci)/[\w./-]*)`", page.text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_table_of_recipe_keys_is_complete_and_its_defaults_are_true(page: PathOf) -> None:
    rows = re.findall(r"^\| `([a-z_]+\.[a-z0-9_.]+)` \|([^|]*)\|", page("recipes.md").text, re.MULTILINE)
    given = dict(rows)
    real = dict(keys_of(Recipe))
    del real["name"]
    assert set(given) == set(real)
    defaults = resolve({"name": "x"})
    for key, cell in given.items():
        text = cell.strip()
        value: Any = defaults
        for part in key.split("."):
            value = getattr(value, part)
        if text and text[0] != "`" and text != "the run's":
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            assert text == shown or (isinstance(value, (int, float)) and float(text) == value), f"{key} is {value}"


def test_the_table_of_strategy_options_is_complete(page: PathOf) -> None:
    table = page("lightning.md").text.partition("## Options")[2].partition("\n## ")[0]
    names = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    options = [*(item.name for item in fields(RunOptions)), "inner", "save_distributed_checkpoint"]
    assert sorted(re.findall(r"`(\w+)`", " ".join(names))) == sorted(options)


def test_the_events_and_effects_of_the_core_are_all_there(page: PathOf) -> None:
    from psyche_lightning.node import events
    from psyche_lightning.protocol.requests import REQUESTS, Evaluated, GetTerms, Request, Withdraw

    section = page("architecture.md").text.partition("## The node core")[2].partition("\n## ")[0]
    named = set(re.findall(r"`([A-Z]\w+)`", section)) - {"NodeCore"}
    others = (GetTerms, Withdraw, Evaluated)  # the runtime and the training thread ask these
    asked = {kind.__name__ for kind in REQUESTS.values() if kind not in others}
    kinds = (*events.Event.__args__, *(kind for kind in events.Effect.__args__ if get_origin(kind) is not Request))
    real = {kind.__name__ for kind in kinds} | asked  # type: ignore[attr-defined]
    assert named == real


def test_the_readme_has_exactly_the_two_set_up_commands(pages: list[Any]) -> None:
    lines = [line for block in pages[0].blocks for line in block.text.splitlines() if "pip install" in line]
    assert lines == ["pip install -r requirements.txt && psyche demo", "pip install -r requirements.txt && pytest"]


def test_readmes_also_read_well_where_their_package_is_offered(pages: list[Any]) -> None:
    for page in pages:
        if page.path.name == "README.md":
            assert "](" not in re.sub(r"\]\(https://", "", page.prose), f"{page.name} has a relative link"
            labels = {label.lower() for label in re.findall(r"^\[([^\]\n]+)\]: https://", page.prose, re.MULTILINE)}
            used = re.findall(r"(?<=\]\[)[^\]\n]+(?=\])|(?<=\[)[^\]\n]+(?=\](?![:(\[]))", page.prose)
            assert {label.lower() for label in used} == labels, page.name


def test_the_pictures_are_pictures(pages: list[Any]) -> None:
    names = [link for link in pages[0].links if link.startswith("docs/images/")]
    assert len(names) == pages[0].prose.count("![") > 0
    for name in names:
        head = (ROOT / name).read_bytes()[:200]
        marks = {".png": head[1:4] == b"PNG", ".webp": head[8:12] == b"WEBP", ".svg": b"<svg" in head}
        assert marks[Path(name).suffix], name
