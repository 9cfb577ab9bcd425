"""Backups of a coordinator, and folders that are restored from them."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import stat
from contextlib import closing

import pytest

from psyche_lightning.cli import main
from psyche_lightning.errors import ConfigError, CoordinatorError
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.backup import keep, look_into, restore
from psyche_lightning.server.client import HttpCoordinator
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import FILE, KEY_FILE, VERSION, SqliteStore
from psyche_lightning.server.token import FILE as TOKEN_FILE
from psyche_lightning.wire.identity import Identity

TOKEN = "the token of the owner of this coordinator"


@pytest.fixture
def backup(tmp_path, run, walk, quick):
    """A backup that was made in the middle of a run, and the run as it was then."""
    path = tmp_path / "backups" / "coordinator.backup"

    async def train():
        store = SqliteStore(tmp_path / "first")
        server = CoordinatorServer(store, token=TOKEN, wall=lambda: 1234.5)
        admin = CoordinatorAdmin(await server.start("127.0.0.1", 0), token=TOKEN)
        settings = {**quick, "init_min_clients": 1, "total_steps": 500, "global_batch_size_start": 1}
        await asyncio.to_thread(admin.create, "r", settings)
        client = HttpCoordinator(admin.url, "r", Identity.generate())
        await walk(client, until=lambda state: state.step > 5)
        data = await asyncio.to_thread(admin.backup)
        await client.close()
        await server.stop()
        (host,) = store.load()
        store.close()
        return data, host, server.key

    data, host, key = run(train())
    found = keep(data, path)
    assert (found.made, found.key, [run.state.run_id for run in found.runs]) == (1234.5, key, ["r"])
    return path, host


def test_a_folder_restored_from_a_backup_is_the_coordinator(tmp_path, backup, run, walk):
    path, before = backup
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    found = restore(path, tmp_path / "second")
    secret = (tmp_path / "first" / KEY_FILE).read_bytes()
    assert (tmp_path / "second" / KEY_FILE).read_bytes() == secret
    assert (tmp_path / "second" / TOKEN_FILE).read_text().strip() == TOKEN
    assert secret[:32] not in (tmp_path / "second" / FILE).read_bytes()  # it lies in its own file alone
    assert all(stat.S_IMODE((tmp_path / "second" / name).stat().st_mode) == 0o600 for name in (KEY_FILE, TOKEN_FILE))
    (again,) = found.runs
    for name in ("manifest", "seed", "sealed"):
        assert again.dump()[name] == before.dump()[name]
    assert again.state.incarnation == before.state.incarnation
    assert 5 < again.state.step <= before.state.step

    async def go_on():
        store = SqliteStore(tmp_path / "second")
        server = CoordinatorServer(store, token=TOKEN)
        url = await server.start("127.0.0.1", 0)
        client = HttpCoordinator(url, "r", Identity.generate())
        try:
            await asyncio.to_thread(CoordinatorAdmin(url, token=TOKEN).command, "r", "pause")
            return await walk(client, until=lambda state: state.pending_pause or state.phase.halted)
        finally:
            await client.close()
            await server.stop()
            store.close()

    assert run(go_on()).incarnation == again.state.incarnation


def test_what_is_there_is_not_restored_over(tmp_path, backup, capsys):
    path, _ = backup
    for name in (FILE, KEY_FILE, TOKEN_FILE):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).touch()
        assert main(["coordinator", "restore", str(path), "--dir", str(folder)]) == 1
        assert f"already has a coordinator's {name}" in capsys.readouterr().err
        assert [each.name for each in folder.iterdir()] == [name]
    assert main(["coordinator", "restore", str(path), "--dir", str(tmp_path / "new")]) == 0
    assert "1 run of 1970-01-01" in capsys.readouterr().out


def test_what_is_no_whole_backup_is_refused(tmp_path, backup):
    path, _ = backup
    whole = path.read_bytes()
    for wrong in (b"", b"psyche", whole[: len(whole) // 2], whole[:8192] + bytes(4096) + whole[12288:]):
        with pytest.raises(CoordinatorError, match=r"is no whole backup of a coordinator|cannot be read"):
            keep(wrong, path)
        assert path.read_bytes() == whole
    with pytest.raises(CoordinatorError, match="is no whole backup of a coordinator"):
        look_into(tmp_path / "first" / FILE)
    with pytest.raises(CoordinatorError, match="cannot read the backup"):
        look_into(tmp_path / "nothing")


def test_a_newer_store_is_left_alone_and_says_what_to_do(tmp_path, backup):
    path, _ = backup
    with closing(sqlite3.connect(path)) as copy:
        copy.execute(f"PRAGMA user_version={VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(CoordinatorError, match=rf"newer psyche_lightning: it has version {VERSION + 1}.*restore"):
        look_into(path)
    assert path.read_bytes() == before


def test_a_run_in_another_format_says_which_version_reads_it(tmp_path, backup):
    path, _ = backup
    with closing(sqlite3.connect(path)) as copy:
        (text,) = copy.execute("SELECT state FROM run").fetchone()
        changed = {**json.loads(text[8:]), "format": 99}
        copy.execute("UPDATE run SET state = ?", (json.dumps(changed),))
        copy.commit()
    with pytest.raises(CoordinatorError, match="a newer psyche_lightning stored a run in format 99"):
        look_into(path)


def test_a_store_of_before_versions_is_read(tmp_path, backup):
    with closing(sqlite3.connect(tmp_path / "first" / FILE)) as store:
        store.execute("PRAGMA user_version=0")
    store = SqliteStore(tmp_path / "first")
    assert [host.state.run_id for host in store.load()] == ["r"]
    store.close()


def test_only_the_owner_gets_a_backup(served, run):
    async def ask():
        async with served(token=TOKEN) as (_, url):
            for token, code in (("a token of somebody else's", "Unauthorized"), (TOKEN, "NoBackup")):
                with pytest.raises(CoordinatorError) as refused:
                    await asyncio.to_thread(CoordinatorAdmin(url, token=token).backup)
                assert refused.value.code == code

    run(ask())
    with pytest.raises(ConfigError, match="does not encrypt, and a backup has the coordinator's key"):
        CoordinatorAdmin("http://192.0.2.7:8080", token=TOKEN).backup()
