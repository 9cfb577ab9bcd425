from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from psyche_lightning.coordinator.host import RunHost
from psyche_lightning.coordinator.metrics import Metrics
from psyche_lightning.errors import CoordinatorError, PsycheError
from psyche_lightning.protocol.codec import to_json
from psyche_lightning.protocol.requests import Join
from psyche_lightning.protocol.state import CoordinatorConfig, Phase, Round
from psyche_lightning.server.live import LiveRun
from psyche_lightning.server.local import LocalCoordinator
from psyche_lightning.server.store import FILE, SqliteStore
from psyche_lightning.wire.canonical import sha256
from psyche_lightning.wire.identity import Identity

CONFIG = CoordinatorConfig(total_steps=12)


def test_what_is_read_back_is_what_was_saved_at_every_change(tmp_path, walk, run):
    store = SqliteStore(tmp_path)
    host = RunHost("r", CONFIG, seed=1, manifest={"model": {"layers": [1, 2]}})
    host.begin(5.0)
    store.create(host, {"run_id": "r"})
    checked = []

    class Checking:
        def save(self, host):
            store.save(host)
            # Another connection sees what is committed, as a process after a crash would.
            store.close()
            store.__init__(tmp_path)
            (again,) = store.load()
            assert again.dump() == host.dump()
            checked.append(host.state.nonce)

    identity = Identity.generate()
    live = LiveRun(host, iter(range(6, 10**6)).__next__, Checking())

    async def alone():
        client = LocalCoordinator(host, identity)
        client._run = live
        return await walk(client, manifest={"data": {"seed": 3}})

    assert run(alone()).phase is Phase.FINISHED
    assert len(checked) > 14
    assert host.rounds[-1].height == 12  # 12 rounds that trained, and one to name the parameters
    assert store.created("r") == {"run_id": "r"}
    store.close()


def test_rounds_of_an_earlier_epoch_are_dropped(tmp_path, walk, run):
    store = SqliteStore(tmp_path)
    config = CoordinatorConfig(total_steps=100, epoch_time=130.0, cooldown_time=20, warmup_time=20)
    host = RunHost("r", config, seed=1)
    store.create(host, {})
    # Each reading of the clock is a second, so an epoch ends by time after some rounds.
    live = LiveRun(host, iter(range(1, 10**6)).__next__, store)
    identity = Identity.generate()

    async def alone():
        client = LocalCoordinator(host, identity)
        client._run = live
        return await walk(client, until=lambda state: state.epoch == 1 and state.phase.active)

    run(alone())
    (again,) = store.load()
    # The time of a tick that changed nothing is not stored.
    assert {**again.dump(), "now": 0} == {**host.dump(), "now": 0}
    assert again.rounds_epoch == 1
    assert again.rounds[0].height == 0
    store.close()


def test_rounds_that_the_owner_undid_are_dropped(tmp_path, run, walk):
    store = SqliteStore(tmp_path)
    host = RunHost("r", CONFIG, seed=1)
    store.create(host, {})
    live = LiveRun(host, iter(range(1, 10**6)).__next__, store)

    async def alone():
        client = LocalCoordinator(host, Identity.generate())
        client._run = live
        return await walk(client, until=lambda state: state.step > 3)

    run(alone())
    live.act(lambda host, now: host.pause(now))
    while not host.state.phase.halted:
        live.tick()
    assert host.rounds
    live.act(lambda host, now: host.restart_from(bytes(32), 2, now))
    (again,) = store.load()
    assert again.dump() == host.dump()
    assert (again.rounds, again.state.step) == ([], 3)
    store.close()


def test_figures_of_draining_rounds_in_an_older_store_are_dropped(tmp_path):
    store = SqliteStore(tmp_path)
    host = RunHost("r", CONFIG, seed=1)
    store.create(host, {})
    steps = [1, 2, 0, 0, 3, 4, 0, 0]
    rows = [to_json(Metrics(0, height, step, 1.0, 1, 1)) for height, step in enumerate(steps)]
    store._append("r", "metric", 7, rows, 2000)
    for _ in range(2):  # the second time there is nothing left to do
        (again,) = store.load()
        assert (
            [row.step for row in again.history.metrics.since(0)]
            == [row.step for row in again.history.metrics.since(7)]
            == [1, 2, 3, 4]
        )
        assert again.history.metrics.count == 11
        store.save(again)
    assert store._entries("r", "metric")[0] == 7
    assert [row["step"] for row in store._entries("r", "metric")[1]] == [1, 2, 3, 4]
    store.close()


def test_a_full_disk_stops_changes_and_is_not_announced(tmp_path):
    store = SqliteStore(tmp_path)
    host = RunHost("r", CONFIG, seed=1)
    host.begin(0.0)
    store.create(host, {})
    now = [1.0]
    live = LiveRun(host, lambda: now[0], store)
    announced = []
    live.subscribe(lambda: announced.append(live.state))
    before = live.state
    pages = store._database.execute("PRAGMA page_count").fetchone()[0]
    store._database.execute(f"PRAGMA max_page_count = {pages}")
    key, big = sha256(b"k"), {"model": {"name": "m" * 100_000}}
    for _ in range(2):  # and it stays refused, whatever is asked
        with pytest.raises(CoordinatorError, match="disk is full") as caught:
            live.act(lambda host, now: host.handle(key, Join("a", big), now))
        assert (caught.value.code, caught.value.retryable) == ("StoreFailed", True)
        assert live.state is before
        assert not announced
        assert live.wait_time() == 1.0
        assert "disk is full" in live.problem
        now[0] += 3600.0
    store._database.execute("PRAGMA max_page_count = 100000")
    live.tick()  # the keeper of time does this after a second
    assert announced[-1] is live.state is host.state
    assert live.problem is None
    now[0] += 2.0
    live.act(lambda host, now: host.history.note(host.state, now, "test", "time stood still"))
    assert host.history.events.since(0)[-1].time == 3.0
    (again,) = store.load()
    assert again.dump() == host.dump()
    store.close()


def test_one_process_at_a_time(tmp_path):
    store = SqliteStore(tmp_path)
    with pytest.raises(PsycheError, match="another coordinator uses it"):
        SqliteStore(tmp_path)
    store.close()
    SqliteStore(tmp_path).close()


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PsycheError, match=r"cannot open the coordinator's store .*file"):
        SqliteStore(tmp_path / "file" / "inside")


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"format": 1}'])
def test_a_damaged_store_is_named(tmp_path, text):
    store = SqliteStore(tmp_path)
    host = RunHost("r", CONFIG, seed=1)
    store.create(host, {})
    store.close()
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as database:
        database.execute("UPDATE run SET state = ?", (text,))
    store = SqliteStore(tmp_path)
    with pytest.raises(PsycheError, match="cannot be read"):
        store.load()
    store.close()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("UPDATE run SET state = replace(state, '\"step\": 1', '\"step\": 9')", "the state of run 'r' is damaged"),
        ("UPDATE manifest SET text = replace(text, 'true', 'false')", "the manifest of run 'r' is damaged"),
        ("UPDATE entry SET text = replace(text, '1', '2') WHERE kind = 'round'", "the round 0 of run 'r' is damaged"),
    ],
)
def test_a_changed_bit_is_noticed(tmp_path, change, what):
    store = SqliteStore(tmp_path)
    host = RunHost("r", CONFIG, seed=1, manifest={"model": {"tied": True}})
    host.rounds.append(Round(step=1))
    store.create(host, {})
    store.close()
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as database:
        assert database.execute(change).rowcount == 1
    store = SqliteStore(tmp_path)
    with pytest.raises(PsycheError, match=f"cannot be read: {what}"):
        store.load()
    store.close()


def test_events_that_are_damaged_are_left_out(tmp_path, caplog):
    store = SqliteStore(tmp_path)
    host = RunHost("r", CONFIG, seed=1)
    for number in range(4):
        host.history.note(host.state, float(number), "test", f"event {number}")
    store.create(host, {})
    store._database.execute("UPDATE entry SET text = replace(text, 'event 1', 'event 7') WHERE kind = 'event'")
    (again,) = store.load()
    assert [event.text for event in again.history.events.since(0)] == ["event 2", "event 3"]
    assert again.history.events.count == 4
    assert "the event 1 of run 'r' is damaged and left out" in caplog.text
    store.close()


def test_a_store_of_version_0_1_has_no_checksums(tmp_path):
    store = SqliteStore(tmp_path)
    host = RunHost("r", CONFIG, seed=1, manifest={"model": {}})
    host.history.note(host.state, 1.0, "test", "an event")
    store.create(host, {"run_id": "r"})
    for table, column in (("run", "state"), ("run", "created"), ("manifest", "text"), ("entry", "text")):
        store._database.execute(f"UPDATE {table} SET {column} = substr({column}, 9)")
    (again,) = store.load()
    assert again.dump() == host.dump()
    assert store.created("r") == {"run_id": "r"}
    store.close()


def test_a_file_that_is_no_database(tmp_path):
    (tmp_path / FILE).write_bytes(b"something else entirely" * 100)
    with pytest.raises(PsycheError, match="not a database"):
        SqliteStore(tmp_path)
