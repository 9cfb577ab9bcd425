"""What a node's journal names survives a power cut, though most of its files are not synced."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from psyche_lightning.node.events import Fetch, Promise
from psyche_lightning.node.journal import SMALL, Journal
from psyche_lightning.node.participant import RoundWork, result_of
from psyche_lightning.node.runtime import Runtime
from psyche_lightning.node.store import DirectoryBlobStore
from psyche_lightning.protocol.messages import seal
from psyche_lightning.wire.canonical import sha256


class Disk(DirectoryBlobStore):
    """A store that knows which of its files a power cut would tear."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.unsynced: set[bytes] = set()

    def put(self, data, durable=True):
        digest = super().put(data, durable)
        (self.unsynced.discard if durable else self.unsynced.add)(digest)
        return digest

    def cut_power(self):
        for digest in self.unsynced:
            file = self.path / digest.hex()[:2] / digest.hex()
            if file.exists():
                file.write_bytes(b"")


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path / "blobs")


class PowerCutError(Exception):
    pass


def at_step_six(trainee, work):
    if work.step == 6:
        raise PowerCutError


def named(promises, remembered):
    """The payloads of all results in what a journal holds."""
    lists = [envelope for stored in remembered.values() for envelope in stored]
    messages = [envelope.message for envelope in (*promises.values(), *lists)]
    return {message.payload for message in messages if hasattr(message, "payload")}


def test_every_payload_that_the_journal_names_is_there_after_a_power_cut(make_run, make_trainee, tmp_path, disk):
    run, path = make_run(3, 1000), tmp_path / "journal"
    with contextlib.closing(Journal(path)) as journal:
        trainee = make_trainee(0, run, journal=journal, store=disk, spoil=at_step_six)
        with pytest.raises(PowerCutError):
            run.go(trainee, but=[make_trainee(1, run), make_trainee(2, run)])
    assert len(disk.unsynced) > 12  # nothing that the journal carries was synced once more
    disk.cut_power()
    store = DirectoryBlobStore(disk.path)
    with contextlib.closing(Journal(path)) as journal:
        runtime = make_trainee(0, run, journal=journal, store=store).participant._runtime
        runtime._scope = run.host.state.scope
        promises, remembered, lost = runtime._kept()
        payloads = named(promises, remembered)
        assert len(payloads) > 12
        assert not lost
        assert all(store.get(payload) is not None for payload in payloads)


@pytest.mark.parametrize("late", [False, True])
def test_a_payload_that_comes_after_its_announcement_was_stored_is_durable(
    make_run, make_trainee, tmp_path, disk, late
):
    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        trainee = make_trainee(0, make_run(1, 2), journal=journal, store=disk)
        runtime: Runtime = trainee.participant._runtime
        (weight, bias) = trainee.module.parameters()
        weight.grad, bias.grad = weight.detach().clone(), bias.detach().clone()
        data = trainee.optimizer.encode(1)
        assert len(data) <= SMALL
        work = RoundWork(epoch=0, height=0, step=1, batch=((0, 2),))
        result = result_of(work, sha256(data), len(data), bytes(32), nonce=0, lrs=(0,), loss=1.0, tokens=2)
        envelope = seal(trainee.identity, "test", result)
        if not late:
            disk.put(data, durable=False)
        runtime._carry_out(Promise("result/0/0", envelope))
        assert journal.carries(sha256(data)) != late
        disk.put(data, durable=False)  # as a fetch does
        asyncio.run(runtime._fetch(Fetch(sha256(data), len(data), 1, ())))
        assert (sha256(data) in disk.unsynced) != late


def test_large_payloads_are_synced_as_files_and_not_carried(make_run, make_trainee, tmp_path, disk, monkeypatch):
    for module in ("runtime", "participant"):
        monkeypatch.setattr(f"psyche_lightning.node.{module}.SMALL", 8)
    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        run = make_run(2, 1000)
        trainee = make_trainee(0, run, journal=journal, store=disk, spoil=at_step_six)
        with pytest.raises(PowerCutError):
            run.go(trainee, but=[make_trainee(1, run)])
        assert not list(journal.blobs())
    assert not disk.unsynced


def test_a_finished_run_leaves_no_payloads_in_the_journal(make_run, make_trainee, tmp_path, disk):
    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        run = make_run(2, 4)
        run.go(make_trainee(0, run, journal=journal, store=disk), make_trainee(1, run))
        assert journal.load()
        assert not list(journal.blobs())
