"""What ``psyche train`` writes: lines of the log, whole in a file, above the bars on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.wire.identity import Identity, short

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d (INFO   |WARNING) (\S+) ([0-9a-f]{8}) (.+)")
STEPS = 8
TRAIN = [sys.executable, "-m", "psyche_lightning", "train", "demo", "--twin", f"total_steps={STEPS}", "log_every=2"]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def environment(**more: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE")
    }
    return {**kept, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **more}


def test_in_a_file_each_record_is_one_line_with_time_level_run_and_node(
    create_run: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    url, run = create_run(warmup_time=600, max_round_train_time=600, round_witness_time=600)  # none is over
    folder = tmp_path / ("long" * 40)  # of which messages tell that no console would leave in one line
    output = tmp_path / "output"
    with output.open("w") as file:
        done = subprocess.run(
            [*TRAIN, f"node.directory={folder}", "init_min_clients=1", "--coordinator", url, "--run", run],
            stdout=file,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")
    lines = output.read_text().splitlines()
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    texts = [match[4] for match in found if match]
    node = short(Identity.load_or_create(folder / "node.key").public)
    assert {(match[2], match[3]) for match in found if match} == {(run, node)}
    assert any(str(folder) in text for text in texts)
    for beginning in (
        "DisTrO replaces the step of ",
        f"joined the run as {node}, peers reach it at tcp://127.0.0.1:",
        f"epoch 0 has 1 node: {node}",
        f"step 2/{STEPS}  loss ",
        f"wrote the checkpoint of step {STEPS} to {folder}",
        f"{STEPS} steps, digest ",
        "leaves the run: the run is finished",
    ):
        assert [text.startswith(beginning) for text in texts].count(True) == 1, (beginning, texts)
    assert texts[-1] == "leaves the run: the run is finished"


def on_a_terminal(folder: Path, **streams: Any) -> str:
    """What a terminal of 100 columns shows when the streams that are not named lead to it."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    command = [*TRAIN, f"node.directory={folder}"]
    with subprocess.Popen(
        command, stdin=end, **{"stdout": end, "stderr": end, **streams}, env=environment(TERM="xterm")
    ) as child:
        os.close(end)
        shown = b""
        while True:
            try:
                shown += os.read(terminal, 1 << 16)
            except OSError:  # the end of the last process that writes to it
                break
        os.close(terminal)
        assert child.wait(240) == 0, shown
    return ESCAPES.sub("", shown.decode())


def test_on_a_terminal_lines_stand_above_the_bars(tmp_path: Path) -> None:
    lines = on_a_terminal(tmp_path / "node").splitlines()
    assert any(f"{STEPS}/{STEPS}" in line for line in lines)
    (wrote,) = (line for line in lines if "wrote the checkpoint" in line)
    assert re.search(r"T\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d INFO    alone \w{8} wrote the checkpoint", wrote)
    assert not any("step 2/" in line for line in lines), "the bar shows it"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_bars_take_no_lines_that_go_to_a_file(tmp_path: Path, stream: str) -> None:
    with (tmp_path / "file").open("w") as file:
        shown = on_a_terminal(tmp_path / "node", **{stream: file})
    lines = (tmp_path / "file").read_text().splitlines()
    if stream == "stderr":
        assert lines == []
        assert "wrote the checkpoint" in shown
    else:
        assert shown == ""
        assert f"step 2/{STEPS}" in "\n".join(lines)
