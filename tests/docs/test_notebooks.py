"""The notebooks run from the first cell to the last, and show what they say."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.slow
def test_two_nodes_in_one_process_end_with_one_model() -> None:
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "two-nodes.ipynb", 4)
    shown = printed(notebook)
    NotebookClient(notebook, timeout=300).execute()
    now = printed(notebook)
    for line in ("{0: 60, 1: 60} steps", "equal: True", "a gradient: 495,616 bytes", "the run: finished after step 60"):
        assert line in shown
        assert line in now
