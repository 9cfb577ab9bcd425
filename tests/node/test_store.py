from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche_lightning import system
from psyche_lightning.errors import PsycheError, StoreError
from psyche_lightning.node.journal import MAGIC, Journal, MemoryJournal
from psyche_lightning.node.ledger import read_ledger
from psyche_lightning.node.store import BlobStore, DirectoryBlobStore, MemoryBlobStore
from psyche_lightning.wire.canonical import sha256


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    return MemoryBlobStore() if request.param == "memory" else DirectoryBlobStore(tmp_path / "blobs")


def test_blobs_come_back_by_their_hash(store: BlobStore) -> None:
    for data in (b"", b"a", os.urandom(100_000)):
        digest = store.put(data, durable=bool(len(data) % 2))
        assert digest == sha256(data)
        assert store.get(digest) == data
        assert store.has(digest)
        assert store.size(digest) == len(data)
        assert store.put(data) == digest
    absent = sha256(b"never stored")
    assert store.get(absent) is None
    assert not store.has(absent)
    assert store.size(absent) is None
    store.delete(absent)
    store.delete(digest)
    assert store.get(digest) is None
    assert store.put(data) == digest
    assert store.get(digest) == data


def test_threads_share_a_store(store: BlobStore) -> None:
    failures: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            for i in range(30):
                data = b"%d" % (i if worker % 2 else i + 1000 * worker)
                digest = store.put(data, durable=False)
                assert store.get(digest) == data
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_blobs_survive_the_process_and_leftovers_go(tmp_path: Path) -> None:
    digest = DirectoryBlobStore(tmp_path).put(b"kept")
    (tmp_path / "tmp" / "1-1").write_bytes(b"half written")
    again = DirectoryBlobStore(tmp_path)
    assert again.get(digest) == b"kept"
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("damage", [b"", b"kepT", b"kept and more"])
def test_a_corrupt_blob_counts_as_absent_and_can_be_stored_again(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store = DirectoryBlobStore(tmp_path)
    digest = store.put(b"kept")
    file = tmp_path / digest.hex()[:2] / digest.hex()
    file.write_bytes(damage)
    assert store.get(digest) is None
    assert not file.exists()
    assert f"the blob {digest.hex()[:12]} in {tmp_path} is damaged and removed" in caplog.text
    assert store.put(b"kept") == digest
    assert store.get(digest) == b"kept"


def _limited(tmp_path: Path, code: str) -> str:
    """Run code in a process that may write files of at most 64 KiB: writing more fails as on a full disk."""
    head = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "from psyche_lightning.node.journal import *\n"
        "from psyche_lightning.node.store import *\n"
        "from psyche_lightning.errors import StoreError\n"
        f"path = {str(tmp_path)!r}\n"
    )
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_is_explained_and_leaves_nothing_behind(tmp_path: Path) -> None:
    text = _limited(
        tmp_path,
        "store = DirectoryBlobStore(path)\n"
        "small = store.put(b'small')\n"
        "try:\n    store.put(bytes(100_000))\nexcept StoreError as error:\n    print(error)\n"
        "assert store.get(small) == b'small'\n",
    )
    assert str(tmp_path) in text
    assert "File too large" in text
    assert "choose" in text
    assert not list((tmp_path / "tmp").iterdir())


def test_a_journal_goes_on_after_a_full_disk(tmp_path: Path) -> None:
    _limited(
        tmp_path,
        "journal = Journal(path + '/journal')\n"
        "journal.append('a', b'1')\n"
        "try:\n    journal.append('b', b'x' * 100_000)\nexcept StoreError as error:\n    print(error)\n"
        "else:\n    raise SystemExit('no error')\n"
        "assert journal.load() == {'a': b'1'}\n"
        "journal.append('c', b'3')\n",
    )
    assert Journal(tmp_path / "journal").load() == {"a": b"1", "c": b"3"}


def test_a_ledger_has_whole_lines_only_after_a_full_disk(tmp_path: Path) -> None:
    text = _limited(
        tmp_path,
        "from psyche_lightning.node.agreement import DecidedRound\n"
        "from psyche_lightning.node.ledger import Ledger\n"
        "from psyche_lightning.protocol.state import Round\n"
        "ledger = Ledger(path + '/ledger.jsonl')\n"
        "small, large = (DecidedRound(0, Round(), (bytes(32),) * nodes, (), (), b'') for nodes in (1, 1000))\n"
        "ledger.append('run', [small])\n"
        "try:\n    ledger.append('run', [large])\nexcept StoreError as error:\n    print(error)\n"
        "ledger.append('run', [small])\n",
    )
    assert f"cannot write to the ledger {tmp_path / 'ledger.jsonl'}: File too large" in text
    assert len(list(read_ledger(tmp_path / "ledger.jsonl"))) == 2


def test_a_folder_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StoreError, match=r"taken.*choose another folder"):
        DirectoryBlobStore(tmp_path / "taken")
    with pytest.raises(StoreError, match=r"taken.*choose another folder"):
        Journal(tmp_path / "taken" / "journal")


def test_an_unwritable_folder_is_explained(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    text = _limited(
        tmp_path,
        "import os\n"
        "if os.geteuid() == 0:\n    os.setuid(65534)  # root may write everywhere\n"
        "for kind in (DirectoryBlobStore, Journal):\n"
        "    try:\n        kind(path + '/inside')\n    except StoreError as error:\n        print(error)\n",
    )
    assert text.count("Make it writable for this user") == 2


@pytest.mark.parametrize("moves", [True, False])
def test_the_newest_value_of_a_key_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: bool) -> None:
    monkeypatch.setattr(system, "MOVES_OPEN_FILES", moves)
    for journal in (MemoryJournal(), Journal(tmp_path / "deep" / "journal")):
        journal.append("round 1", b"first")
        journal.append("round 2", b"")
        journal.append("round 1", b"second")
        journal.append("größer", b"x" * 5000)
        expected = {"round 1": b"second", "round 2": b"", "größer": b"x" * 5000}
        assert journal.load() == expected
        journal.retain({"round 2", "größer", "unknown"})
        journal.append("round 3", b"3")
        assert journal.load() == {"round 2": b"", "größer": b"x" * 5000, "round 3": b"3"}
        journal.close()
        journal.close()
    again = Journal(tmp_path / "deep" / "journal")
    assert again.load() == {"round 2": b"", "größer": b"x" * 5000, "round 3": b"3"}
    again.close()
    with pytest.raises(StoreError, match="closed"):
        again.append("late", b"")


def test_a_torn_end_loses_only_the_last_record(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append("a", b"1")
    complete = path.stat().st_size
    journal.append("b", bytes(range(40)))
    journal.close()
    whole = path.read_bytes()
    for cut in range(complete, len(whole)):
        for tail in (b"", bytes(len(whole) - cut)):  # cut short, or grown without its bytes
            if whole[cut:] == tail:
                continue
            path.write_bytes(whole[:cut] + tail)
            journal = Journal(path)
            assert journal.load() == {"a": b"1"}
            journal.append("c", b"3")
            journal.close()
            with contextlib.closing(Journal(path)) as journal:
                assert journal.load() == {"a": b"1", "c": b"3"}
    for cut in range(len(MAGIC)):
        path.write_bytes(MAGIC[:cut])
        with contextlib.closing(Journal(path)) as journal:
            assert journal.load() == {}


def test_damage_in_the_middle_is_never_taken_for_a_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    for i in range(3):
        journal.append(f"key {i}", b"value %d" % i)
    journal.close()
    whole = path.read_bytes()
    last = len(whole) - (len(whole) - len(MAGIC)) // 3
    for position in range(last):
        damaged = bytearray(whole)
        damaged[position] ^= 0x81
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"damaged at byte|not a journal"):
            Journal(path)
        assert path.read_bytes() == damaged


def test_a_record_carries_the_blobs_that_it_names(tmp_path: Path) -> None:
    one, two, three = os.urandom(3000), b"", os.urandom(50)
    journal = Journal(tmp_path / "journal")
    journal.append("old", b"1", {sha256(one): one})
    journal.append("new", b"2", {sha256(two): two, sha256(three): three})
    assert list(journal.blobs()) == [one, two, three]
    journal.append("plain", b"3")
    journal.close()
    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        assert journal.load() == {"old": b"1", "new": b"2", "plain": b"3"}
        assert list(journal.blobs()) == [one, two, three]
        journal.retain({"new"}, {sha256(one), sha256(three), sha256(b"elsewhere")})
        assert list(journal.blobs()) == [one, three]
        journal.append("newest", b"4", {sha256(two): two})
    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        assert journal.load() == {"new": b"2", "newest": b"4"}
        assert list(journal.blobs()) == [one, three, two]
        assert [journal.carries(sha256(blob)) for blob in (one, two, b"elsewhere")] == [True, True, False]


def test_a_record_with_blobs_is_whole_or_torn(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with contextlib.closing(Journal(path)) as journal:
        journal.append("a", b"1")
        complete = path.stat().st_size
        journal.append("b", b"2", {sha256(blob): blob for blob in (os.urandom(20), os.urandom(9))})
    whole = path.read_bytes()
    size = len(whole) - complete
    torn = [whole[:cut] + tail for cut in range(complete, len(whole), 3) for tail in (b"", bytes(len(whole) - cut))]
    # Where a first page was not written and a later one was, zeros stand in front.
    torn += [whole[:complete] + bytes(gap) + whole[complete + gap :] for gap in range(16, size, 9)]
    for data in torn:
        path.write_bytes(data)
        with contextlib.closing(Journal(path)) as journal:
            assert journal.load() == {"a": b"1"}
            assert not list(journal.blobs())
            journal.append("c", b"3")
        with contextlib.closing(Journal(path)) as journal:
            assert journal.load() == {"a": b"1", "c": b"3"}


def test_a_damaged_blob_in_the_middle_is_absent_and_other_damage_is_refused(tmp_path: Path) -> None:
    path, one, two = tmp_path / "journal", os.urandom(30), os.urandom(20)
    with contextlib.closing(Journal(path)) as journal:
        journal.append("a", b"1", {sha256(one): one, sha256(two): two})
        journal.append("b", b"2")
    whole = path.read_bytes()
    end = whole.index(two) + len(two)
    for position in range(len(MAGIC), end):
        damaged = bytearray(whole)
        damaged[position] ^= 0x81
        path.write_bytes(damaged)
        if position < whole.index(one):
            with pytest.raises(StoreError, match="damaged at byte"):
                Journal(path)
            continue
        with contextlib.closing(Journal(path)) as journal:
            assert journal.load() == {"a": b"1", "b": b"2"}
            assert list(journal.blobs()) == [two if position < whole.index(two) else one]
    path.write_bytes(whole[: len(MAGIC)] + bytes(16) + whole[len(MAGIC) + 16 :])
    with pytest.raises(StoreError, match="damaged at byte"):  # zeros in front of a whole record are no torn end
        Journal(path)


def test_a_torn_file_of_an_earlier_process_is_written_again(tmp_path: Path) -> None:
    digest = DirectoryBlobStore(tmp_path).put(b"kept", durable=False)
    (tmp_path / digest.hex()[:2] / digest.hex()).write_bytes(bytes(4))
    store = DirectoryBlobStore(tmp_path)
    assert store.put(b"kept", durable=False) == digest
    assert store.get(digest) == b"kept"


@settings(max_examples=60)
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_files_load_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, magic: bool
) -> None:
    path = tmp_path_factory.mktemp("journal") / "file"
    path.write_bytes((MAGIC if magic else b"") + data)
    with contextlib.suppress(PsycheError):
        Journal(path).close()


@pytest.mark.parametrize("moves", [True, False])
def test_a_journal_that_cannot_be_replaced_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: bool
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(system, "MOVES_OPEN_FILES", moves)
    journal = Journal(tmp_path / "journal")
    journal.append("a", b"1")
    journal.append("b", b"2")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(StoreError, match="rewrite the journal"):
            journal.retain({"a"})
    journal.append("c", b"3")
    journal.close()
    with contextlib.closing(Journal(tmp_path / "journal")) as again:
        assert again.load() == {"a": b"1", "b": b"2", "c": b"3"}
    assert [path.name for path in tmp_path.iterdir()] == ["journal"]


@pytest.mark.parametrize("moves", [True, False])
def test_a_second_process_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: bool) -> None:
    monkeypatch.setattr(system, "MOVES_OPEN_FILES", moves)
    journal = Journal(tmp_path / "journal")
    journal.append("a", b"1")
    journal.retain({"a"})  # the new file is claimed as well
    code = f"from psyche_lightning.node.journal import Journal; Journal({str(tmp_path / 'journal')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert "another process uses the journal" in done.stderr
    journal.close()
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_promises_survive_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from psyche_lightning.node.journal import Journal\n"
        "from psyche_lightning.node.store import DirectoryBlobStore\n"
        f"path = {str(tmp_path)!r}\n"
        "digest = DirectoryBlobStore(path + '/blobs').put(b'payload')\n"
        "Journal(path + '/journal').append('batch', digest)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == -9
    digest = Journal(tmp_path / "journal").load()["batch"]
    assert DirectoryBlobStore(tmp_path / "blobs").get(digest) == b"payload"
