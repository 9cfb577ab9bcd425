"""Each thing that a system may lack, with it and without it."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from psyche_lightning import system

CLAIM = "import sys; from psyche_lightning.system import claim; print(claim(open(sys.argv[1], 'r+b')))"
STOP = """
import asyncio, sys
from psyche_lightning.system import on_stop

async def main():
    stop = asyncio.Event()
    if sys.argv[1] == "without":
        def unknown(*_): raise NotImplementedError
        asyncio.get_running_loop().add_signal_handler = unknown
    on_stop(stop.set)
    print("ready", flush=True)
    await stop.wait()
    print("stopped")

asyncio.run(main())
"""


def test_a_file_is_claimed_by_one_process_and_free_when_it_closes(tmp_path: Path) -> None:
    def other() -> str:
        command = [sys.executable, "-c", CLAIM, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    path = tmp_path / "file"
    path.write_bytes(b"content")
    with path.open("r+b") as file:
        assert system.claim(file)
        assert file.read() == b"content"
        assert other() == "False"
    assert other() == "True"


def test_where_nothing_can_be_locked_nobody_is_kept_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with (tmp_path / "file").open("wb") as file:
        assert system.claim(file)


@pytest.mark.parametrize("name", ["O_DIRECTORY", ""])
def test_folders_are_synced_where_they_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    if name:
        monkeypatch.delattr(os, name)
    system.sync(tmp_path)
    assert len(synced) == (0 if name else 1)


@pytest.mark.parametrize("name", ["pread", ""])
def test_reading_leaves_the_place_of_writing_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name:
        monkeypatch.delattr(os, name)
    writing = threading.Lock()
    with (tmp_path / "file").open("w+b") as file:
        file.write(b"0123456789")
        file.flush()
        assert system.read_at(file, 3, 2, writing) == b"234"
        assert system.read_at(file, 5, 8, writing) == b"89"
        file.write(b"ab")
    assert (tmp_path / "file").read_bytes() == b"0123456789ab"
    assert not writing.locked()


@pytest.mark.parametrize("links", [True, False])
def test_a_name_leads_to_the_newest_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def not_permitted(*_: object, **__: object) -> None:
        raise OSError(1314, "A required privilege is not held by the client")

    if not links:
        monkeypatch.setattr(Path, "symlink_to", not_permitted)
    link = tmp_path / "newest"
    for number in range(3):
        folder = tmp_path / "all" / str(number)
        (folder / "inside").mkdir(parents=True)
        (folder / "inside" / "file").write_text(str(number))
        system.lead(link, folder)
        assert (link / "inside" / "file").read_text() == str(number)
        assert (link / "inside" / "file").samefile(folder / "inside" / "file")  # nothing is stored twice
    assert link.is_symlink() == links
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "newest"]
    assert (tmp_path / "all" / "0" / "inside" / "file").read_text() == "0"


def test_a_name_that_was_a_folder_becomes_a_link(tmp_path: Path) -> None:
    (tmp_path / "newest").mkdir()
    (tmp_path / "newest" / "old").touch()
    (tmp_path / "folder").mkdir()
    system.lead(tmp_path / "newest", tmp_path / "folder")
    assert (tmp_path / "newest").resolve() == tmp_path / "folder"


@pytest.mark.parametrize("handlers", ["with", "without"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_loop_hears_that_it_should_stop(handlers: str, number: int) -> None:
    command = [sys.executable, "-c", STOP, handlers]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.communicate(timeout=60)[0] == "stopped\n"
    assert process.returncode == 0


@pytest.mark.parametrize("name", ["killpg", ""])
def test_a_process_gets_a_signal_or_ends(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name:
        monkeypatch.delattr(os, name)
    script = "print('ready', flush=True); import time; time.sleep(60)"
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    system.send_signal(process, system.KILL)
    assert process.wait(60) == (-signal.SIGTERM if name else -signal.SIGKILL)
    system.send_signal(process, system.KILL)  # it is gone: nothing happens
    process.stdout.close()


def test_the_machine_is_described_as_far_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= system.cores() <= (os.cpu_count() or 1)
    memory, load = system.memory(), system.load()
    assert memory is not None
    assert memory > 1 << 28
    assert load is not None
    assert load >= 0
    soft, hard = system.open_files()
    assert soft is None or hard is None or 0 < soft <= hard
    for name in ("sched_getaffinity", "sysconf", "getloadavg"):
        monkeypatch.delattr(os, name)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert system.cores() == os.cpu_count()
    assert (system.memory(), system.load(), system.open_files()) == (None, None, (None, None))


KEEPS = """
import resource, sys
from psyche_lightning.system import keep_memory

def step():
    blocks = [bytearray(1 << 20) for _ in range(40)]
    for block in blocks:
        block[:] = b"x" * len(block)

if sys.argv[1] == "kept":
    assert keep_memory()
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_what_a_step_frees_stays_for_the_next_one() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", KEEPS, how]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < faults("given back") / 10


def test_without_glibc_memory_is_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not system.keep_memory()
