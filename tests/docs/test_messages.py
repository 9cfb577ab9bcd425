"""The messages in docs/faq.md are those of the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GAP = "\0"


def texts(tree: ast.AST) -> Iterator[str]:
    """Every text in the code, with a gap for each value that is filled in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def code() -> list[str]:
    files = [*ROOT.glob("psyche_lightning/**/*.py"), *ROOT.glob("plugins/*/psyche_lightning_*/**/*.py")]
    return [text for file in files for text in texts(ast.parse(file.read_text()))]


def rows(text: str) -> list[str]:
    """The first cells of the tables that begin with a message."""
    return re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)


def test_every_message_is_in_the_code(page: Callable[[str], Any], code: list[str]) -> None:
    messages = rows(page("faq.md").text)
    assert len(messages) > 50
    unknown = []
    for message in messages:
        parts = [re.escape(part.strip()) for part in message.split("...") if part.strip()]
        pattern = re.compile(".*?".join(parts), re.DOTALL)
        if not any(pattern.search(text) for text in code):
            unknown.append(message)
    assert unknown == [], "no text of the code is like these"
