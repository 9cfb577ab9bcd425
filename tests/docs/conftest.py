from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
REPOSITORY = re.compile(
    r"https://(?:github\.com/psyche-lightning/psyche_lightning/blob"
    r"|raw\.githubusercontent\.com/psyche-lightning/psyche_lightning)/main/"
)
FENCE = re.compile(r"^```(\S*) *(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the words after it, and its text."""

    place: str
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def file(self) -> str:
        """The name under which a reader is to save it, or nothing."""
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), "")


@dataclass(frozen=True)
class Page:
    path: Path
    text: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def prose(self) -> str:
        """The text without its blocks."""
        return FENCE.sub("", self.text)

    @property
    def spans(self) -> list[str]:
        return re.findall(r"`([^`\n]+)`", self.prose)

    @property
    def links(self) -> list[str]:
        """What links and pictures lead to; files of this repository relative to the page, as in a checkout."""
        root = "../" * (len(self.path.relative_to(ROOT).parts) - 1)
        found = re.findall(r"\]\(([^)\s]+)\)|^\[[^\]\n]+\]: (\S+)$", self.prose, re.MULTILINE)
        return [REPOSITORY.sub(root, inline or reference) for inline, reference in found]

    def write_files(self, folder: Path) -> None:
        """Save what the page tells its reader to save."""
        for block in self.blocks:
            if block.file:
                (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
                (folder / block.file).write_text(block.text)


def read(path: Path) -> Page:
    text = path.read_text()
    page = Page(path, text)
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        page.blocks.append(Block(f"{page.name}:{line}", match[1], tuple(match[2].split()), match[3]))
    return page


@pytest.fixture(scope="session")
def pages() -> list[Page]:
    return [read(path) for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]]


@pytest.fixture(scope="session")
def page(pages: list[Page]) -> Callable[[str], Page]:
    return lambda name: next(page for page in pages if page.path == ROOT / "docs" / name)


@pytest.fixture
def example(page: Callable[[str], Page], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The plugin of docs/plugins.md, installed: its folder is on the path, with what pip would have written."""
    plugins = page("plugins.md")
    plugins.write_files(tmp_path)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    (tmp_path / "psyche_lightning_sums" / "__init__.py").touch()
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]["psyche_lightning"]
    lines = [f"{name} = {module}" for name, module in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[psyche_lightning]", *lines, ""]))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("psyche_lightning_sums")]:
        del sys.modules[name]
