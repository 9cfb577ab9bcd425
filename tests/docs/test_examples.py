"""The code of the documentation: it compiles, and what is marked so runs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import Plugins


def run(arguments: list[str], folder: Path, **environment: str) -> str:
    """Run a program as a reader would; returns what it printed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PSYCHE_")}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_every_python_block_compiles(pages: list[Any]) -> None:
    for page in pages:
        for block in page.blocks:
            if block.language == "python":
                compile(textwrap.dedent(block.text), block.place, "exec")


def test_blocks_marked_as_runnable_run(pages: list[Any], tmp_path: Path) -> None:
    blocks = [block for page in pages for block in page.blocks if "runnable" in block.words]
    pages_of = {block.place.partition(":")[0] for block in blocks}
    names = ("data", "fine-tuning", "lightning", "solana-localnet", "tutorial")
    assert pages_of == {f"docs/{name}.md" for name in names}
    for number, block in enumerate(blocks):
        (tmp_path / f"block_{number}.py").write_text(block.text)
    # One process, as most of the time goes into imports.
    calls = [f"runpy.run_path('block_{number}.py', run_name='__main__'); print('ran')" for number in range(len(blocks))]
    output = run(["-c", "\n".join(["import runpy", *calls])], tmp_path)
    assert output.count("ran\n") == len(blocks)


def test_the_plugin_of_the_page_loads_through_the_host(example: Path) -> None:
    plugins = Plugins(only=["psyche-lightning-sums"])
    assert plugins.failures == []
    found = plugins.data_providers().registrations["sums"]
    assert (found.plugin, found.distribution, found.version) == ("sums", "psyche-lightning-sums", "1.0")
    data = found.offer({"seq_len": 32, "largest": 9}, seed=1)
    assert data.seq_len == 32
    first, second = data.samples(0, 2)
    assert first["input_ids"].tolist() == data.samples(len(data), len(data) + 1)[0]["input_ids"].tolist()
    assert first["input_ids"].shape == second["labels"].shape == (32,)
    assert first["input_ids"].tolist() != second["input_ids"].tolist()
    line = bytes(first["input_ids"].tolist()).decode().splitlines()[0]
    left, _, right = line.partition("=")
    assert sum(map(int, left.split("+"))) == int(right)
    with pytest.raises(ConfigError, match=r"no option 'larges'\. Did you mean 'largest'"):
        found.offer({"seq_len": 32, "larges": 9}, seed=1)


def test_its_commands_and_its_recipe_work_as_the_page_says(example: Path) -> None:
    psyche = ["-m", "psyche_lightning"]
    path = os.pathsep.join([str(example), *filter(None, [os.environ.get("PYTHONPATH")])])
    assert "sums" in run([*psyche, "plugins"], example, PYTHONPATH=path)
    lines = run([*psyche, "sums", "--count", "5"], example, PYTHONPATH=path).splitlines()
    assert len(lines) == 5
    assert all("=" in line for line in lines)
    output = run([*psyche, "train", "sums.yaml"], example, PYTHONPATH=path)
    assert "4 steps, digest" in output
    assert (example / "psyche-sums" / "checkpoint" / "config.json").exists()


def test_the_conformance_kits_run_as_the_page_says(example: Path) -> None:
    files = [f"tests/test_{name}.py" for name in ("contract", "model", "coordinator")]
    assert all((example / file).exists() for file in files)
    output = run(["-m", "pytest", "-q", "-p", "no:pytest_anchorpy", "-p", "no:cacheprovider", *files], example)
    assert " passed" in output
    assert "failed" not in output


def test_the_kit_for_networks_runs_as_the_page_says(example: Path) -> None:
    few = "only_others or source_that_dies or makes_no_sense or half_a_message or crowd"  # of each kind of help one
    options = ["-q", "-p", "no:pytest_anchorpy", "-p", "no:cacheprovider"]
    output = run(["-m", "pytest", *options, "-k", few, "tests/test_network.py"], example)
    assert " passed" in output
    assert "failed" not in output


def test_a_kit_s_assertion_that_fails_tells_the_values(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "from psyche_lightning.testing.transport import TransportContract\n"
        "from psyche_lightning.transports.memory import MemoryTransport\n"
        "class Backwards(MemoryTransport):\n"
        "    async def fetch(self, *arguments, **options):\n"
        "        return (await super().fetch(*arguments, **options))[::-1]\n"
        "class TestMine(TransportContract):\n"
        "    def make_transport(self):\n"
        "        return Backwards()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:pytest_anchorpy", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", "one_provider_that_has_it_serves", str(tmp_path)],
        capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout
    assert "assert b'bolb' == b'blob'" in done.stdout
