"""``psyche coordinator`` and ``psyche run`` as a user types them, against a coordinator process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from psyche_lightning.cli import main
from psyche_lightning.cli.console import stdout
from psyche_lightning.cli.run_picture import picture
from psyche_lightning.protocol.requests import Join

CODE = "import sys; from psyche_lightning.cli import main; sys.exit(main())"


def start(directory, *options):
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "coordinator", "--port", "0", "--dir", str(directory), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    line = process.stdout.readline()
    found = re.search(r"http://\S+", line)
    assert found, line + process.stdout.read()
    return process, found[0]


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    process, url = start(tmp_path_factory.mktemp("coordinator"))
    yield url
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert "Traceback" not in process.stdout.read()
    process.stdout.close()


@pytest.fixture
def psyche(coordinator, capsys, monkeypatch):
    """Run a command line; its exit code and what it printed."""
    monkeypatch.setenv("PSYCHE_COORDINATOR", coordinator)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def status(psyche, run):
    code, text = psyche("run", "status", run, "--json")
    assert code == 0
    return json.loads(text)


def test_bare_keys_without_a_recipe(psyche, coordinator):
    code, text = psyche("run", "create", "bare", "init_min_clients=2", "run.max_round_train_time=7.5")
    assert code == 0
    (link,) = re.findall(rf"on each node: PSYCHE_COORDINATOR='({coordinator}#bare:[\w-]{{43}}:[\w-]{{22}})'", text)
    assert psyche("run", "link", "bare") == (0, f"{link}\n")
    found = status(psyche, "bare")
    config = found["config"]
    assert (config["init_min_clients"], config["max_round_train_time"]) == (2, 7.5)
    # What was not said is left to the first node, down to the manifest.
    assert (config["total_steps"], config["global_batch_size_start"], found["manifest_digest"]) == (None, None, None)


def test_runs_that_can_be_joined_are_listed_with_what_they_ask_for(psyche, coordinator, tmp_path):
    for name, *options in (["by-link"], ["other"], ["everyone", "--open"], ["few", "--invited"], ["shut", "--paused"]):
        assert psyche("run", "create", f"j-{name}", *options, "init_min_clients=3")[0] == 0
    link = psyche("run", "link", "j-by-link")[1].strip()
    (tmp_path / "link").write_text(f"{link}\n")
    code, text = psyche("run", "list", f"@{tmp_path / 'link'}", "--json")
    assert code == 0
    found = {row["run_id"]: row for row in json.loads(text) if row["run_id"].startswith("j-")}
    assert {name: row["needs"] for name, row in found.items()} == {
        "j-by-link": "this link", "j-everyone": "nothing", "j-other": "its own link", "j-few": "an invitation",
    }  # fmt: skip
    assert (found["j-other"]["wants"], found["j-other"]["clients"]) == (3, 0)
    code, text = psyche("run", "list", link)
    assert code == 0
    assert "j-by-link" in text.split("j-other")[0]
    assert "j-shut" not in text
    assert "j-shut" in psyche("run", "list")[1]


def test_a_link_in_a_file_that_is_not_there_is_explained(psyche, tmp_path):
    code, text = psyche("run", "list", f"@{tmp_path / 'none'}")
    assert code == 1
    assert "No such file" in text
    (tmp_path / "two").write_text("one\ntwo\n")
    code, text = psyche("join", f"@{tmp_path / 'two'}")
    assert code == 1
    assert "one line" in text


def test_who_joins_needs_nothing_but_the_link(psyche, coordinator):
    code, text = psyche("run", "create", "linked", "demo", "--twin", "k=20")
    assert code == 0
    (link,) = re.findall(r"on each node: psyche join '(.+)'", text)
    code, shown = psyche("join", link, "micro_batch_size=3", "--dry-run")
    assert code == 0
    assert re.search(r"distro\.k\s+│ 20", shown)
    assert re.search(r"data\.config\.path\s+│ stdlib", shown)
    assert re.search(r"trainer\.micro_batch_size\s+│ 3", shown)
    for arguments, problem in (
        ((link, "wrong=1"), "Unknown key 'wrong'"),
        ((link[:-3],), "damaged"),
        ((coordinator,), "not the link of a run"),
        ((coordinator, "--run", "nowhere"), "no run 'nowhere'"),
    ):
        code, text = psyche("join", *arguments, "--dry-run")
        assert code == 1
        assert problem in text


def test_who_creates_a_run_hears_what_the_link_lacks(psyche, tmp_path):
    code, text = psyche("run", "create", "books", "demo", "--twin", f"data.config.path={tmp_path}")
    assert code == 0
    assert "data.config.path names files of this machine" in text
    (link,) = re.findall(r"on each node: psyche join '(.+)'", text)
    assert psyche("join", link, f"data.config.path={tmp_path}", "--dry-run")[0] == 0


def test_a_run_of_a_program_is_not_joined_by_its_link_alone(psyche, coordinator):
    assert psyche("run", "create", "program", "init_min_clients=1")[0] == 0
    code, text = psyche("join", coordinator, "--run", "program")
    assert code == 1
    assert "created without a recipe" in text


@pytest.mark.parametrize("given", [{"seed": 4}, {"digest_every": 3}, {"keep_bytes": 10**9}, {"shares": "equal"}])
def test_what_nodes_share_is_fixed_by_the_creator(psyche, coordinator, given):
    from psyche_lightning.server.admin import CoordinatorAdmin

    [(name, value)] = given.items()
    run = name.replace("_", "-")
    assert psyche("run", "create", run, f"{name}={value}")[0] == 0
    manifest = CoordinatorAdmin(coordinator).manifest(status(psyche, run)["manifest_digest"])
    defaults = {
        "overlap": False,
        "seed": 0,
        "digest_every": 10,
        "keep_bytes": 0,
        "cold_start_warmup_steps": 0,
        "shares": "speed",
    }
    assert manifest == {"run": {**defaults, **given}}


def test_the_status_says_which_k_and_local_steps_hold_and_what_comes_next(psyche):
    planned = "distro.schedule=[{from_step: 0, k: 96}, {from_step: 200, k: 6, local_steps: 8}]"
    assert psyche("run", "create", "scheduled", "local_steps=1", planned)[0] == 0
    assert "k 96, 1 local step; from step 200 on k 6, 8 local steps\n" in psyche("run", "status", "scheduled")[1]
    assert psyche("run", "create", "constant", "k=4")[0] == 0
    assert "k 4\n" in psyche("run", "status", "constant")[1]


def test_overlap_and_compression_are_fixed_by_the_creator(psyche, coordinator):
    from psyche_lightning.server.admin import CoordinatorAdmin

    assert psyche("run", "create", "fixed", "overlap=true", "k=2", "global_batch_size_start=6")[0] == 0
    found = status(psyche, "fixed")
    manifest = CoordinatorAdmin(coordinator).manifest(found["manifest_digest"])
    assert manifest["run"]["overlap"] is True
    assert manifest["distro"]["k"] == 2
    assert set(manifest) == {"run", "distro"}
    assert found["config"]["global_batch_size_end"] == 6


def test_a_recipe_fixes_everything_but_the_data(psyche, coordinator):
    from psyche_lightning.recipe import load_recipe
    from psyche_lightning.server.admin import CoordinatorAdmin

    assert psyche("run", "create", "full", "demo", "init_min_clients=3", "--twin")[0] == 0
    found = status(psyche, "full")
    recipe = load_recipe("demo", twin=True)
    assert found["config"]["init_min_clients"] == 3
    assert found["total_steps"] == recipe.run.total_steps
    manifest = CoordinatorAdmin(coordinator).manifest(found["manifest_digest"])
    assert set(manifest) == {"run", "distro", "model", "optimizer", "join"}  # the last one is compared with nothing


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["int_min_clients=2"], "Did you mean 'run.init_min_clients'"),
        (["init_min_clients=many"], "an integer was expected"),
        (["init_min_clients=0"], "init_min_clients is 0"),
        (["lr=3"], "name the recipe before it"),
        (["init_min_clients=[2"], "not YAML"),
        (["init_min_clients=2", "demo"], "the recipe comes first"),
        (["nosuchrecipe"], "There is no recipe"),
        (["--twin"], "name the recipe"),
    ],
)
def test_wrong_settings_are_explained(psyche, arguments, text):
    code, shown = psyche("run", "create", "wrong", *arguments)
    assert code == 1
    assert text in shown
    assert "Traceback" not in shown
    assert psyche("run", "status", "wrong")[0] == 1


def test_list_status_pause_resume(psyche):
    assert psyche("run", "create", "one", "total_steps=5", "global_batch_size_start=1")[0] == 0
    assert psyche("run", "create", "one", "total_steps=6", "global_batch_size_start=1")[0] == 1
    code, text = psyche("run", "list")
    assert code == 0
    assert re.search(r"one\s+│ waiting for members\s+│ 0\s+│ 0/5", text)
    assert "one" in [row["run_id"] for row in json.loads(psyche("run", "list", "--json")[1])]
    assert psyche("run", "pause", "one")[1] == "run one is paused\n"
    code, text = psyche("run", "status", "one")
    assert "one: paused, epoch 0, 0 of 5 steps trained" in text
    assert "the run is paused" in text
    assert psyche("run", "resume", "one")[0] == 0
    code, text = psyche("run", "resume", "one")
    assert (code, "only a paused run resumes" in text) == (1, True)


def test_unknown_run(psyche):
    psyche("run", "create", "known")
    code, text = psyche("run", "status", "unknown")
    assert code == 1
    assert "known" in text.split("its runs are:")[1]


def test_no_coordinator(psyche, monkeypatch):
    from psyche_lightning.server import admin

    monkeypatch.setattr(admin, "wait_exponential", lambda **_: admin.wait_random(0, 0))  # the tries, without the waits
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("PSYCHE_COORDINATOR", f"http://127.0.0.1:{port}")
    code, text = psyche("run", "list")
    assert code == 1
    assert f"cannot reach the coordinator at http://127.0.0.1:{port}" in text
    assert "Tried 5 times" in text
    monkeypatch.delenv("PSYCHE_COORDINATOR")
    code, text = psyche("run", "list")
    assert (code, "--coordinator URL" in text) == (1, True)


def test_the_port_is_taken_and_the_directory_unusable(psyche, coordinator, tmp_path):
    code, text = psyche("coordinator", "--port", coordinator.rpartition(":")[2], "--dir", str(tmp_path / "a"))
    assert (code, "cannot listen on" in text) == (1, True)
    (tmp_path / "file").write_text("")
    code, text = psyche("coordinator", "--port", "0", "--dir", str(tmp_path / "file"))
    assert (code, "cannot open the coordinator's store" in text) == (1, True)


@pytest.fixture
def private(tmp_path, monkeypatch, psyche):
    """A coordinator of its own, which the commands do not find by themselves: its note lies elsewhere."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    process, url = start(tmp_path / "runs")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PSYCHE_COORDINATOR", url)
    yield tmp_path / "runs" / "owner.token", process
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    process.stdout.close()


def test_changing_a_run_needs_the_token_of_the_first_start(private, psyche, tmp_path, monkeypatch):
    token, _ = private
    code, text = psyche("run", "create", "r")
    assert (code, "PSYCHE_COORDINATOR_TOKEN_FILE" in text) == (1, True)
    assert psyche("run", "create", "r", "--token-file", str(token))[0] == 0
    (tmp_path / "wrong").write_text("another")
    (tmp_path / "wrong").chmod(0o600)
    for command in (["pause", "r"], ["authorize", "r", "everybody"], ["revoke", "r", "everybody"], ["close", "r"]):
        for given in ([], ["--token-file", str(tmp_path / "wrong")]):
            code, text = psyche("run", *command, *given)
            assert (code, "the token of this coordinator's owner" in text) == (1, True)
    assert status(psyche, "r")["phase"] == "waiting_for_members"  # reading is free
    monkeypatch.setenv("PSYCHE_COORDINATOR_TOKEN_FILE", str(token))
    assert psyche("run", "pause", "r")[0] == 0
    monkeypatch.delenv("PSYCHE_COORDINATOR_TOKEN_FILE")
    monkeypatch.setenv("PSYCHE_COORDINATOR_TOKEN", token.read_text().strip())
    assert psyche("run", "resume", "r")[0] == 0


def test_the_token_is_in_its_file_and_nowhere_else(private, psyche):
    token, process = private
    secret = token.read_text().strip()
    assert len(secret) >= 43, "32 random bytes"
    assert token.stat().st_mode & 0o777 == 0o600
    told = process.stdout.readline()
    assert str(token) in told
    assert secret not in told, "standard output is no terminal here, and may be a log"
    assert secret not in psyche("run", "create", "r", "--token-file", str(token))[1]
    assert secret.encode() not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    assert "No such option" in psyche("coordinator", "--token", "x")[1]
    assert "No such option" in psyche("run", "pause", "r", "--token", "x")[1]


def test_a_terminal_shows_the_token_once(tmp_path, monkeypatch, capsys):
    from psyche_lightning.cli.coordinator import _tell_owner

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    _tell_owner(tmp_path / "owner.token", "s3cret", True)
    assert "s3cret" in capsys.readouterr().out
    _tell_owner(tmp_path / "owner.token", None, True)  # later starts find it in the file
    assert "s3cret" not in capsys.readouterr().out


def test_a_token_that_others_can_read_is_refused(psyche, tmp_path):
    (tmp_path / "token").write_text("s3cret")
    (tmp_path / "token").chmod(0o644)
    serve = ["coordinator", "--port", "0", "--dir", str(tmp_path / "runs")]
    for command in (["run", "create", "refused"], serve):
        code, text = psyche(*command, "--token-file", str(tmp_path / "token"))
        assert (code, "other users can read" in text) == (1, True)


def test_a_run_is_changed_started_and_closed(psyche):
    assert psyche("run", "create", "owned", "total_steps=4", "global_batch_size_start=2", "--paused")[0] == 0
    code, text = psyche("run", "update", "owned", "total_steps=9")
    assert (code, status(psyche, "owned")["config"]["total_steps"]) == (0, 9)
    assert "9 steps" in text
    assert psyche("run", "update", "owned", "total_steps=0")[0] == 1
    assert "nothing to change" in psyche("run", "update", "owned")[1]
    assert "is open" in psyche("run", "start", "owned")[1]
    for command in (["update", "owned", "total_steps=5"], ["close", "owned"]):
        code, text = psyche("run", *command)
        assert code == 1
        assert "pause it" in text
    assert status(psyche, "owned")["config"]["total_steps"] == 9
    assert psyche("run", "pause", "owned")[0] == 0
    assert "is removed" in psyche("run", "close", "owned")[1]
    code, text = psyche("run", "status", "owned")
    assert code == 1
    assert "no run 'owned'" in text
    assert psyche("run", "create", "owned")[0] == 0  # the name is free again


def test_who_may_join(psyche, coordinator):
    from psyche_lightning.errors import CoordinatorError
    from psyche_lightning.server.client import HttpCoordinator
    from psyche_lightning.wire.identity import Identity

    one, two = (Identity(bytes([number] * 32)) for number in (1, 2))

    def join(identity):
        async def work():
            client = HttpCoordinator(coordinator, "club", identity)
            try:
                await client.request(Join("127.0.0.1:1", {"model": {"parameters": "x"}}))
            finally:
                await client.close()

        asyncio.run(work())

    made = ["total_steps=4", "global_batch_size_start=2"]
    assert psyche("run", "create", "club", *made, "--invited")[0] == 0
    with pytest.raises(CoordinatorError, match=f"psyche run authorize club {one.public.hex()}"):
        join(one)
    assert "may join" in psyche("run", "authorize", "club", one.public.hex())[1]
    join(one)
    assert psyche("run", "revoke", "club", one.public.hex())[0] == 0
    for identity in (one, two):
        with pytest.raises(CoordinatorError, match="may not join"):
            join(identity)
    assert "everybody may join" in psyche("run", "authorize", "club", "everybody")[1]
    join(two)
    assert "not a node key" in psyche("run", "authorize", "club", "xyz")[1]


@pytest.mark.parametrize("name", [".hidden", "a/b", "x" * 33, "[/red]", "ü"])
def test_a_name_that_is_none_is_refused_by_owner_and_node(psyche, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for command in (["run", "create", name], ["train", "demo", "--twin", "--run", name]):
        code, text = psyche(*command)
        assert code == 1
        assert "is no name of a run; it has 1 to 32 letters" in text
    assert not list(tmp_path.iterdir())


def test_a_kick_needs_a_key(psyche):
    assert psyche("run", "create", "kicking")[0] == 0
    code, text = psyche("run", "kick", "kicking", "everybody")
    assert (code, "no node whose key begins with 'everybody'; its nodes: none yet" in " ".join(text.split())) == (
        1,
        True,
    )
    code, text = psyche("run", "kick", "kicking", "ab" * 32)
    assert (code, "is removed from run kicking" in text) == (0, True)
    assert status(psyche, "kicking")["revoked"] == ["ab" * 32]
    assert psyche("run", "authorize", "kicking", "ab" * 32)[0] == 0
    assert status(psyche, "kicking")["revoked"] == []


def test_a_run_goes_back_to_the_parameters_that_its_owner_names(psyche):
    assert psyche("run", "create", "back", "init_min_clients=2")[0] == 0
    assert "waiting for 2 more members" in psyche("run", "status", "back")[1]
    waits = "waiting for a holder of abababab, step 0, and 1 more member"
    code, text = psyche("run", "restart-from", "back", "ab" * 32, "0")
    assert (code, text) == (0, f"run back goes on from the parameters abababab of step 0: {waits}\n")
    assert waits in psyche("run", "status", "back")[1]
    found = status(psyche, "back")
    assert (found["waits_for"], found["checkpoint"]) == (waits, {"step": 0, "digest": "ab" * 32})
    for digest, step, reason in (("abab", "0", "expected 64 hexadecimal digits"), ("ab" * 32, "1", "at most 0 steps")):
        code, text = psyche("run", "restart-from", "back", digest, step)
        assert (code, reason in text) == (1, True), text


def test_points_are_counted_and_not_paid(psyche):
    assert psyche("run", "create", "unpaid")[0] == 0
    assert "nobody has earned" in psyche("run", "points", "unpaid")[1]
    assert psyche("run", "points", "unpaid", "--json")[1].strip() == "[]"
    code, text = psyche("run", "claim", "unpaid")
    assert code == 1
    assert "does not pay" in text


def test_status_wants_a_run_or_a_file(psyche, tmp_path):
    assert "--account-file" in psyche("run", "status")[1]
    (tmp_path / "junk").write_bytes(b"junk")
    for name in ("junk", "missing"):
        code, text = psyche("run", "status", "--account-file", str(tmp_path / name))
        assert code == 1
        assert name in text


def test_watch_ends_with_the_run(psyche, monkeypatch):
    from psyche_lightning.server.admin import ServerRun

    assert psyche("run", "create", "seen")[0] == 0
    looks = []
    plain = ServerRun.status

    def ends_at_the_third_look(self):
        looks.append(1)
        return {**plain(self), "phase": "finished" if len(looks) == 3 else "warmup"}

    monkeypatch.setattr(ServerRun, "status", ends_at_the_third_look)
    code, text = psyche("run", "watch", "seen", "--every", "0.1")
    assert (code, len(looks)) == (0, 3)
    assert "run seen, epoch 0: finished" in text


def test_a_status_fits_eighty_columns_with_whole_addresses(psyche, coordinator, monkeypatch):
    """Of a real status, with nodes as a large run has them."""
    psyche("run", "create", "wide", "init_min_clients=2")
    found = status(psyche, "wide")
    address = "tcp://203.0.113.254:40463"
    node = {
        "key": "bb0b4882", "signer": "bb" * 32, "status": "withdrawn", "address": address, "step": 123_456,
        "loss": 2.3456, "tokens_per_second": 123_456.7, "share": 0.25, "bytes_up": 123_456_789_012,
        "bytes_down": 123_456_789_012,
    }  # fmt: skip
    monkeypatch.setenv("COLUMNS", "80")
    console = stdout()
    with console.capture() as captured:
        console.print(
            picture({**found, "clients": [{**node, "region": "eu-\x1bwest"}, {**node, "region": None}, node]})
        )
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(address in line for line in lines) == 3
    assert "regions: eu-\\x1bwest 1" in lines
    assert sum("withdrawn 123456 2.3456  123,457   25% 123 GB 123 GB" in line for line in lines) == 3
