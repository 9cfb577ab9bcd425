"""What commands print into a pipe."""

from __future__ import annotations

import os
import subprocess
import sys

LINE = "word " * 60
PRINT = f"""
from rich.table import Table
from psyche_lightning.cli.console import stdout
table = Table("node", "digest", box=None)
table.add_row("0123abcd", "f" * 120)
stdout().print({LINE!r})
stdout().print(table)
"""


def printed(**environment: str) -> subprocess.Popen[bytes]:
    inherited = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    return subprocess.Popen([sys.executable, "-c", PRINT], stdout=subprocess.PIPE, env={**inherited, **environment})


def test_nothing_is_wrapped_or_cut_in_a_pipe() -> None:
    text = printed().communicate()[0].decode()
    assert LINE.strip() in text
    assert "f" * 120 in text
    assert "\x1b" not in text


def test_a_width_that_is_asked_for_is_kept() -> None:
    text = printed(COLUMNS="60").communicate()[0].decode()
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("f") == 120, "what does not fit into a cell is folded, not cut"
