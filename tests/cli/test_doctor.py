from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning.cli import main
from psyche_lightning.distro import DisTrO, LocalSteps, payload
from psyche_lightning.doctor import connectivity, link, machine, prediction
from psyche_lightning.doctor.finding import Verdict, duration, size, speed
from psyche_lightning.doctor.round_time import MESSAGE, WIRE, Conditions, needed_rate, predict
from psyche_lightning.doctor.speed import measure, sample_flops
from psyche_lightning.errors import ConfigError, CoordinatorError, TransportError
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.estimate import estimate
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.server.clock import Look, combine, read_clock
from psyche_lightning.server.server import CoordinatorServer
from psyche_lightning.server.store import MemoryStore
from psyche_lightning.testing.peers import Node
from psyche_lightning.transports.tcp import TcpTransport
from psyche_lightning.wire.identity import Identity

PROGRAM = [sys.executable, "-c", "import sys; from psyche_lightning.cli import main; sys.exit(main())"]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PSYCHE_") and name != "PSYCHE_PLUGINS"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def examine(*arguments: str) -> tuple[int, dict[str, Any]]:
    code = main(["doctor", *arguments, "--json", "doctor.json"])
    return code, json.loads(Path("doctor.json").read_text())


def row(figures: dict[str, Any], area: str, name: str) -> dict[str, str]:
    (found,) = [one for one in figures["findings"] if (one["area"], one["name"]) == (area, name)]
    return found


# -- the formula ------------------------------------------------------------------------------------------------------

LAN = Conditions(
    nodes=4, samples=32, seq_len=100, sample_seconds=0.1, encode_seconds=0.05, apply_seconds=0.15, payload=10_000_000,
    overlap=False, upload=100e6, download=200e6, round_trip=0.01, coordinator_trip=0.02,
    write_seconds=0.001,
)  # fmt: skip
TRAFFIC = 3 * (10_000_000 + MESSAGE + 32 * 4)


def test_without_overlap_everything_adds_up() -> None:
    found = predict(LAN)
    assert LAN.traffic == TRAFFIC
    upload, download = WIRE * TRAFFIC / 100e6, WIRE * TRAFFIC / 200e6
    assert found.parts == pytest.approx(
        {
            "compute": 0.8,
            "slowest": 0,
            "distro": 0.2,
            "upload": upload,
            "download": download,
            "disk": 0.007,
            "latency": 0.035,
        }
    )
    assert found.round_seconds == pytest.approx(0.8 + 0.2 + upload + 0.042)
    assert found.tokens_per_second == pytest.approx(3200 / found.round_seconds)
    assert found.utilization == pytest.approx(0.8 / found.round_seconds)
    assert found.limit == "compute"


def test_with_overlap_the_longer_counts() -> None:
    quick = predict(replace(LAN, overlap=True))
    assert quick.round_seconds == pytest.approx(0.8 + 0.2 + 0.007)
    assert quick.limit == "compute"
    slow = predict(replace(LAN, overlap=True, upload=10e6))
    assert slow.round_seconds == pytest.approx(WIRE * TRAFFIC / 10e6 + 0.007)
    assert slow.limit == "upload"
    far = predict(replace(LAN, overlap=True, round_trip=2.0))  # two rounds are under way at a time
    assert far.round_seconds == pytest.approx((0.8 + 0.2 + WIRE * TRAFFIC / 100e6 + 3.02) / 2 + 0.007)
    assert far.limit == "latency"


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        ({"upload": 5e6}, "upload"),
        ({"download": 5e6}, "download"),
        ({"coordinator_trip": 4.0}, "latency"),
        ({"apply_seconds": 3.0}, "distro"),
        ({"write_seconds": 0.5}, "disk"),
        ({"slowest_seconds": 9.0}, "slowest"),
        ({"slowest_seconds": 0.5}, "compute"),  # a quicker one holds up nobody
    ],
)
@pytest.mark.parametrize("overlap", [False, True])
def test_what_takes_longest_is_the_limit(change: dict[str, float], limit: str, overlap: bool) -> None:
    assert predict(replace(LAN, overlap=overlap, **change)).limit == limit


def test_everybody_waits_for_the_slowest() -> None:
    found = predict(replace(LAN, slowest_seconds=2.05))
    assert found.parts["slowest"] == pytest.approx(2.0 - 0.8)
    assert found.round_seconds == pytest.approx(predict(LAN).round_seconds + 1.2)


def test_a_node_alone_waits_for_nobody() -> None:
    found = predict(replace(LAN, nodes=1))
    assert found.round_seconds == pytest.approx(3.2 + 0.2)
    assert predict(replace(LAN, upload=math.inf, download=math.inf)).parts["upload"] == 0


def test_local_steps_are_computing_and_no_more_than_a_share_has_samples() -> None:
    eight = replace(LAN, local_steps=8, step_seconds=0.02)
    found, plain = predict(eight), predict(LAN)
    assert found.parts["steps"] == pytest.approx(0.16)
    assert found.round_seconds == pytest.approx(plain.round_seconds + 0.16)
    assert found.utilization == pytest.approx((0.8 + 0.16) / found.round_seconds)
    assert needed_rate(eight) < needed_rate(LAN)
    assert predict(replace(eight, local_steps=100)).parts["steps"] == pytest.approx(0.16), "a share has 8 samples"
    slow = replace(eight, step_seconds=9.0)
    assert {predict(replace(slow, overlap=overlap)).limit for overlap in (False, True)} == {"steps"}
    assert predict(replace(eight, slowest_seconds=0.05 + 0.96)).parts["slowest"] == 0


def test_shares_are_whole_samples() -> None:
    assert predict(replace(LAN, samples=33)).parts["compute"] == pytest.approx(0.9)


def test_a_slower_part_never_makes_a_round_faster() -> None:
    rng = random.Random(5)
    for _ in range(300):
        given = replace(
            LAN, overlap=rng.random() < 0.5, sample_seconds=rng.uniform(1e-4, 1), upload=10 ** rng.uniform(4, 9),
            download=10 ** rng.uniform(4, 9), round_trip=rng.uniform(0, 1), nodes=rng.randint(2, 64),
        )  # fmt: skip
        base = predict(given).round_seconds
        for change in (
            {"sample_seconds": 2 * given.sample_seconds}, {"upload": given.upload / 2}, {"apply_seconds": 1.0},
            {"write_seconds": 0.1},
            {"download": given.download / 2}, {"round_trip": 2 * given.round_trip}, {"payload": 2 * given.payload},
        ):  # fmt: skip
            assert predict(replace(given, **change)).round_seconds >= base
        assert 0 < predict(given).utilization < 1


def test_the_needed_rate_is_where_transfer_takes_as_long_as_computing() -> None:
    rate = needed_rate(LAN)
    found = predict(replace(LAN, upload=rate, download=rate))
    assert found.parts["upload"] == pytest.approx(found.parts["compute"])
    assert needed_rate(replace(LAN, own_samples=0)) == pytest.approx(8 * rate), "no share, as it is too slow for one"


def test_numbers_for_people() -> None:
    assert [duration(seconds) for seconds in (0.00031, 0.0999, 1.5, 59, 150, 9000, 400000)] == [
        "0.31 ms", "99.9 ms", "1.5 s", "59 s", "2.5 min", "2.5 h", "4.63 days",
    ]  # fmt: skip
    assert size(5140) == "5.14 kB"
    assert speed(2.5e6) == "2.5 MB/s (20 Mbit/s)"


# -- the machine and the recipe ---------------------------------------------------------------------------------------


def test_without_a_recipe_only_the_machine_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    code, figures = examine()
    assert code == 0
    assert {one["area"] for one in figures["findings"]} == {"machine"}
    names = {one["name"] for one in figures["findings"]}
    assert names >= {"python", "torch", "threads", "memory", "disk", "open files", "clock", "plugins"}
    assert figures["prediction"] is None
    printed = capsys.readouterr().out
    assert "no problems" in printed
    assert torch.__version__ in printed


def test_a_recipe_is_trained_a_little_and_predicted() -> None:
    code, figures = examine("demo", "--twin", "--nodes", "3", "--upload", "20", "--download", "50", "--latency", "4000")
    assert code == 0
    found, speed = figures["prediction"], figures["speed"]
    assert speed["steps"] >= 2
    assert speed["micro_batch"] == 2  # a third of four samples, rounded up
    assert found["parts"]["compute"] == pytest.approx(2 * speed["sample_seconds"])
    assert found["tokens_per_second"] == pytest.approx(4 * 64 / found["round_seconds"])
    assert found["parts"]["latency"] == pytest.approx(4 * 2.5)
    payload = estimate(load_recipe("demo", twin=True)).payload
    assert found["parts"]["upload"] == pytest.approx(WIRE * 2 * (payload + MESSAGE + 96) * 8 / 20e6)
    assert found["limit"] == "latency"
    assert "limit is latency" in row(figures, "prediction", "utilization")["value"]
    assert row(figures, "recipe", "memory")["verdict"] == "ok"


def test_a_link_that_nobody_measured_is_said_to_be_unknown() -> None:
    code, figures = examine("demo", "--twin", "--nodes", "2")
    assert code == 0
    found = row(figures, "prediction", "link")
    assert found["verdict"] == "not measured"
    assert "--listen" in found["advice"]
    assert figures["prediction"]["parts"]["upload"] == 0


def test_the_nodes_own_limits_bound_the_link() -> None:
    _, figures = examine(
        "demo", "--twin", "--nodes", "2", "--upload", "80", "--download", "80", "node.transport_options.upload=1e5"
    )
    parts = figures["prediction"]["parts"]
    assert parts["upload"] == pytest.approx(100 * parts["download"])


def test_a_model_that_does_not_fit_is_computed_and_is_a_problem() -> None:
    recipe = load_recipe("consilience-40b")
    assert 62e9 < sum(estimate(recipe).memory.values()) < 63e9, "on each of eight devices"
    found = estimate(load_recipe("consilience-40b", ["trainer.devices=1"]))
    small = load_recipe("demo", ["threads=1"])
    size = replace(estimate(small), memory={"parameters": 1 << 60}, stored=1 << 60)
    rows = machine.needs(small, size, Path(), 3, torch.device("cpu"))
    assert [one.verdict for one in rows] == [Verdict.PROBLEM, Verdict.PROBLEM, Verdict.OK]
    assert sum(found.memory.values()) > 390e9
    speed = measure(small, estimate(small), torch.device("cpu"), nodes=3, share=8, fits=False, seconds=1)
    assert speed.steps == 0
    assert "does not fit" in speed.how
    assert speed.sample_seconds > 0


def test_slow_steps_are_tried_with_one_sample_and_then_computed() -> None:
    recipe = load_recipe("demo", ["threads=1"])
    told: list[float] = []
    speed = measure(
        recipe, estimate(recipe), torch.device("cpu"), nodes=3, share=8, fits=True, seconds=1e-6,
        progress=lambda what, done: told.append(done),
    )  # fmt: skip
    assert speed.steps == 0
    assert "takes longer" in speed.how
    assert told == sorted(told)
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_of_real_votes_are_timed_and_those_of_others_are_read(
    fits: bool, local: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[tuple[DisTrO, list[bytes]]] = []
    read: list[bytes] = []
    kind = LocalSteps if local else DisTrO
    apply, decode = kind.apply, payload.codec.decode_each
    monkeypatch.setattr(
        kind, "apply", lambda self, some, rates: (applied.append((self, some)), apply(self, some, rates))
    )
    monkeypatch.setattr(payload.codec, "decode_each", lambda made, *rest: (read.extend(made), decode(made, *rest))[1])
    steps = ["local_steps=2", "decay=0.9", "schedule.warmup_steps=100", "total_steps=200"] if local else []
    recipe = load_recipe("demo", [f"optimizer.name={name}", *steps], twin=True)
    speed = measure(recipe, estimate(recipe), torch.device("cpu"), nodes=3, share=4, fits=fits, seconds=4)
    assert speed.steps >= 2 * fits
    assert speed.micro_batch == (2 if local else 4)
    assert (speed.step_seconds > 0) == local
    distro, (theirs, same, mine) = applied[0]
    assert theirs == same
    assert distro.abstention() not in (theirs, mine)
    assert theirs in read
    if fits:
        assert any(group["muon"] for group in distro.param_groups) == (name == "muon" and not local)


def test_steps_that_a_share_is_too_small_for_are_a_warning() -> None:
    _, figures = examine("demo", "--twin", "--nodes", "2", "distro.local_steps=3")
    found = row(figures, "prediction", "local steps")
    assert found["verdict"] == "warning"
    assert "global_batch_size_end=6" in found["advice"]
    assert found["value"].startswith("2 of 3 ")


def test_operations_are_counted_on_the_meta_device() -> None:
    recipe = load_recipe("demo")
    found = estimate(recipe)
    rule = 6 * found.trainable * recipe.data.seq_len
    assert 0.5 * rule < sample_flops(recipe, found) < 2 * rule


def test_a_device_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "devices", lambda: ["cpu"])
    device, found = machine.choose_device(load_recipe("demo", ["accelerator=cuda"]))
    assert (device.type, found.verdict) == ("cpu", Verdict.PROBLEM)
    assert machine.choose_device(load_recipe("demo"))[1].verdict is Verdict.OK


def test_a_folder_is_written_to_and_one_that_cannot_be_is_a_problem(tmp_path: Path) -> None:
    seconds = machine.write_seconds(tmp_path / "not" / "yet")
    assert seconds is not None
    assert seconds > 0
    assert not list(tmp_path.iterdir())
    assert machine.write_finding(seconds).name == "disk writes"
    (tmp_path / "file").touch()
    assert machine.write_seconds(tmp_path / "file") is None
    assert machine.write_finding(None).verdict is Verdict.PROBLEM


def test_few_open_files_are_a_problem() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        found = [machine.open_files("recipe", nodes) for nodes in (2, 40, 64)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [one.verdict for one in found] == [Verdict.OK, Verdict.WARNING, Verdict.PROBLEM]
    assert "ulimit -n" in found[2].advice


def test_problems_are_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "devices", lambda: ["cpu"])
    code, figures = examine("demo", "--twin", "accelerator=gpu")
    assert code == 1
    assert row(figures, "recipe", "device")["verdict"] == "problem"
    assert "1 problem," in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], "no recipe 'nothing'"),
        (["lr=1"], "belongs to a recipe"),
        (["demo", "twin"], "key=value"),
        (["--twin"], "name the recipe"),
        (["--run", "r"], "--coordinator"),
        (["--nodes", "3"], "name a recipe"),
        (["--peer", "tcp://127.0.0.1:1"], "not an invitation"),
        (["--peer", "tcp://127.0.0.1:1#12"], "not an invitation"),
        (["--listen", "--peer", "x"], "--listen is for the other machine"),
        (["--listen", "node.transport=pigeon"], "pigeon"),
        (["--listen", "node.transport_options.prot=1"], "prot"),
        (["--listen", "node.transport_options.host=0.0.0.0"], "advertise"),
        (["--coordinator", "nowhere"], "not a coordinator's URL"),
        (["--json", "no/where.json"], "does not exist"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 1
    assert text in capsys.readouterr().err


# -- clocks -----------------------------------------------------------------------------------------------------------


def test_several_looks_at_a_clock_of_whole_seconds_are_better_than_one() -> None:
    rng = random.Random(3)
    for _ in range(200):
        offset, start = rng.uniform(-900, 900), rng.uniform(1e9, 2e9)
        looks = []
        for number in range(8):
            sent = start + 0.13 * number
            between, received = sent + rng.uniform(0, 0.02), sent + 0.02
            looks.append(Look(sent, received, math.floor(between + offset)))
        reading = combine(looks)
        assert abs(reading.offset - offset) <= reading.uncertainty + 1e-6
        assert reading.uncertainty < 0.1
        assert combine(looks[:1]).uncertainty > 0.5


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[str]:
    server = CoordinatorServer(MemoryStore())
    try:
        yield await server.start("127.0.0.1", 0)
    finally:
        await server.stop()


async def elsewhere(work: Callable[[], Any]) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, work)


def test_the_clock_of_a_real_coordinator_is_read() -> None:
    async def scene() -> None:
        async with serving() as url:
            reading = await elsewhere(lambda: read_clock(url))
            assert abs(reading.offset) <= reading.uncertainty + 0.05
            assert reading.seen == "127.0.0.1"
            late = await elsewhere(lambda: read_clock(url, clock=lambda: time.time() - 100))
            assert late.offset == pytest.approx(100, abs=late.uncertainty + 0.05)
            found = connectivity.clock_finding("run", "the coordinator", late.offset, late.uncertainty)
            assert found.verdict is Verdict.WARNING
            assert "behind the coordinator" in found.value

    asyncio.run(scene())


def test_a_server_without_a_clock_and_a_dead_one_are_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(CoordinatorError, match="cannot reach"):
        read_clock(url)
    found, reading = connectivity.coordinator(url)
    assert reading is None
    assert [one.verdict for one in found] == [Verdict.PROBLEM]
    found, reading = connectivity.coordinator("embedded:")
    assert [one.verdict for one in found] == [Verdict.UNKNOWN]


# -- a run ------------------------------------------------------------------------------------------------------------


def test_participants_are_dialled_and_their_refusal_counts_as_an_answer() -> None:
    async def scene() -> None:
        known = Node(TcpTransport(), Identity.generate())
        other = Identity.generate()
        with socket.create_server(("127.0.0.1", 0)) as free:
            dead = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        await known.start()
        try:
            addresses = {known.key: known.address, Identity.generate().public: dead, other.public: known.address}
            told: list[float] = []
            found = await connectivity.reach(
                TcpTransport, known.run_id, addresses, lambda what, done: told.append(done)
            )
        finally:
            await known.transport.stop()
        assert [one.there for one in found] == [True, False, False]
        rows = [connectivity.peer_finding(one) for one in found]
        assert [one.verdict for one in rows] == [Verdict.OK, Verdict.WARNING, Verdict.WARNING]
        assert "answers within" in rows[0].value
        assert "refused" in rows[1].value
        assert "another node answers at this address" in rows[2].value
        assert told[-1] == 1.0

    asyncio.run(scene())


def test_a_run_is_looked_at_with_its_coordinator(capsys: pytest.CaptureFixture[str]) -> None:
    async def scene() -> None:
        async with serving() as url:
            created = ["run", "create", "mine", "demo", "--twin", "init_min_clients=3", "--coordinator", url]
            assert await elsewhere(lambda: main(created)) == 0
            code, figures = await elsewhere(lambda: examine("demo", "--twin", "--coordinator", url, "--run", "mine"))
            assert code == 0
            assert "waiting for members, 0 nodes" in row(figures, "run", "mine")["value"]
            assert row(figures, "run", "clock")["verdict"] == "ok"
            assert row(figures, "run", "own address")["verdict"] == "ok"  # the coordinator is here as well
            assert figures["coordinator"]["answer_seconds"] > 0
            assert figures["prediction"]["parts"]["latency"] > 0
            assert "3 nodes like this one" in row(figures, "prediction", "speed")["value"]
            code, figures = await elsewhere(lambda: examine("--coordinator", url, "--run", "other"))
            assert code == 1
            assert "mine" in row(figures, "run", "run")["value"]

    asyncio.run(scene())


def test_a_join_link_brings_the_run_and_its_recipe(tmp_path: Path) -> None:
    async def scene() -> None:
        async with serving() as url:
            for name, *recipe in (("linked", "demo", "--twin"), ("bare",)):
                created = ["run", "create", name, *recipe, "init_min_clients=5", "--coordinator", url]
                assert await elsewhere(partial(main, created)) == 0
            (tmp_path / "link").write_text(str(await elsewhere(partial(CoordinatorAdmin(url).link, "linked"))))
            code, figures = await elsewhere(partial(examine, f"@{tmp_path / 'link'}", "trainer.micro_batch_size=1"))
            assert code == 0
            assert "waiting for members, 0 nodes" in row(figures, "run", "linked")["value"]
            assert "5 nodes like this one" in row(figures, "prediction", "speed")["value"]
            code, figures = await elsewhere(partial(examine, url, "--run", "bare"))
            assert code == 0
            assert row(figures, "run", "recipe")["verdict"] == "not measured"
            code, figures = await elsewhere(partial(examine, url, "--run", "none"))
            assert code == 1
            assert "bare" in row(figures, "run", "run")["value"]

    asyncio.run(scene())


def test_a_run_names_what_its_nodes_report() -> None:
    recipe = load_recipe("demo")
    keys = [Identity.generate().public for _ in range(3)]
    rows = [
        {"key": key.hex()[:8], "signer": key.hex(), "status": "healthy", "tokens_per_second": rate}
        for key, rate in zip(keys, (100.0, 400.0, None), strict=True)
    ]
    gone = {"key": "x", "signer": keys[0].hex(), "status": "dropped", "tokens_per_second": 1.0}
    status = {
        "clients": [*rows[:2], gone],
        "pending": rows[2:],
        "config": {"global_batch_size_end": 30, "init_min_clients": 2},
    }
    shape = prediction.run_shape(recipe, status, None)
    assert (shape.nodes, shape.samples, shape.share) == (3, 30, 10)
    assert shape.rates == {keys[0].hex()[:8]: 100.0, keys[1].hex()[:8]: 400.0}
    net = prediction.Network(1e6, 1e6, 0.1, 0.1)
    speed = prediction.TrainingSpeed(0.01, 0.001, 0.001, 8, 3, "measured")
    given = prediction.conditions(load_recipe("demo", ["shares=equal"]), shape, net, speed, 5000)
    assert given.slowest_seconds == pytest.approx(10 * 128 / 100)
    found, rows_ = prediction.findings(given, net, speed, shape)
    assert found.limit == "slowest"
    assert keys[0].hex()[:8] in rows_[-1].value
    assert rows_[-1].verdict is Verdict.WARNING
    # By speed, where this device does 12,800 tokens a second and nobody counts as more than 16 times slower.
    given = prediction.conditions(recipe, replace(shape, samples=36), net, speed, 5000)
    assert (given.share, given.slowest_seconds) == (32, pytest.approx(2 * 128 / 100))
    similar = replace(shape, rates=dict.fromkeys(shape.rates, 12_000.0))
    assert prediction.conditions(recipe, similar, net, speed, 5000).share == 10
    unknown = replace(shape, nodes=4)
    assert prediction.conditions(recipe, unknown, net, speed, 5000).share == 8


@pytest.mark.parametrize(
    ("address", "far", "verdict"),
    [
        ("tcp://127.0.0.1:4000", False, Verdict.OK),
        ("tcp://127.0.0.1:4000", True, Verdict.WARNING),
        ("iroh://[::1]:4000", True, Verdict.WARNING),
        ("tcp://192.168.1.4:4000", True, Verdict.UNKNOWN),
        ("tcp://home.example:4000", True, Verdict.UNKNOWN),
    ],
)
def test_whether_the_own_address_can_be_reached(address: str, far: bool, verdict: Verdict) -> None:
    assert connectivity.address_finding(address, far=far).verdict is verdict


def test_which_coordinators_are_on_other_machines() -> None:
    assert not any(map(connectivity.is_far, ["http://127.0.0.1:80", "http://localhost:1", "http://[::1]:80"]))
    assert all(map(connectivity.is_far, ["http://10.0.0.7:80", "https://runs.example", "http://[fe80::1]:80"]))


# -- a link -----------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def listening(
    make: Callable[[], TcpTransport] = TcpTransport, make_back: Callable[[], TcpTransport] = TcpTransport
) -> AsyncIterator[link.Invitation]:
    stop, invited = asyncio.Event(), asyncio.get_running_loop().create_future()
    task = asyncio.ensure_future(link.listen(make, make_back, invited.set_result, stop))
    try:
        yield await asyncio.wait_for(invited, 60)
    finally:
        stop.set()
        await asyncio.wait_for(task, 60)


def test_two_doctors_measure_their_link() -> None:
    async def scene() -> None:
        async with listening() as invitation:
            told: list[tuple[str, float]] = []
            found = await link.call(
                TcpTransport,
                link.Invitation.parse(str(invitation)),
                most_bytes=2_000_000,
                seconds=5,
                progress=lambda what, done: told.append((what, done)),
            )
        assert found.path == "direct"
        assert found.called_back == "direct"
        assert found.upload is not None
        assert found.download is not None
        assert 0 < found.round_trip < 5
        assert abs(found.clock_offset) <= found.clock_uncertainty + 0.05
        rows = connectivity.link_findings(found)
        assert {one.verdict for one in rows} == {Verdict.OK}
        assert {what for what, _ in told} == {"connecting", "latency", "download", "upload", "dialling back"}

    asyncio.run(scene())


def test_a_limit_shows_and_bounds_the_time() -> None:
    async def scene() -> None:
        async with listening() as invitation:
            found = await link.call(lambda: TcpTransport(upload=400_000), invitation, most_bytes=30_000_000, seconds=2)
        assert found.upload is not None
        assert found.download is not None
        assert found.upload < 600_000 < found.download

    asyncio.run(scene())


def test_an_address_that_nobody_reaches_is_a_warning() -> None:
    async def scene() -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            dead = f"127.0.0.1:{free.getsockname()[1]}"
        async with listening() as invitation:
            made = iter([TcpTransport(advertise=dead)])
            found = await link.call(lambda: next(made), invitation, most_bytes=300_000, seconds=2)
        assert not found.called_back
        row = connectivity.link_findings(found)[-1]
        assert row.verdict is Verdict.WARNING
        assert dead in row.value

    link_seconds, link.BACK_SECONDS = link.BACK_SECONDS, 2.0
    try:
        asyncio.run(scene())
    finally:
        link.BACK_SECONDS = link_seconds


def test_a_listener_on_a_fixed_port_dials_back_from_another_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    async def scene(make_back: Callable[[], TcpTransport]) -> link.MeasuredLink:
        async with listening(lambda: TcpTransport(port=port), make_back) as invitation:
            return await link.call(TcpTransport, invitation, most_bytes=300_000, seconds=2)

    assert asyncio.run(scene(TcpTransport)).called_back == "direct"
    found = asyncio.run(scene(lambda: TcpTransport(port=port)))
    assert found.called_back is None
    assert "in use" in found.why_not
    last = connectivity.link_findings(found)[-1]
    assert last.verdict is Verdict.UNKNOWN  # nothing is wrong with the caller's address
    assert "of its own" in last.value


@pytest.mark.parametrize(("answer", "called_back"), [(["direct", ""], "direct"), (["", "no way", True, "more", 7], "")])
def test_a_doctor_of_another_release_says_less_or_more(
    monkeypatch: pytest.MonkeyPatch, answer: list[Any], called_back: str
) -> None:
    async def answers(self: Any, peer: bytes, *arguments: Any) -> list[Any]:
        return answer

    async def scene() -> link.MeasuredLink:
        async with listening() as invitation:
            return await link.call(TcpTransport, invitation, most_bytes=300_000, seconds=2)

    monkeypatch.setattr(link._Listener, "_call", answers)
    assert asyncio.run(scene()).called_back == called_back


def a_link(address: str, called_back: str | None) -> link.MeasuredLink:
    return link.MeasuredLink(address, "direct", 0.01, 1e6, 1e6, 0.0, 0.01, "tcp://192.168.1.5:4000", called_back)


@pytest.mark.parametrize(
    ("seen", "own", "links", "verdict", "says"),
    [
        ("", "", [], None, ""),
        ("127.0.0.1", "127.0.0.1", [], None, ""),  # on the coordinator's own machine
        ("203.0.113.7", "192.168.1.5", [], Verdict.UNKNOWN, "behind NAT"),
        ("203.0.113.7", "203.0.113.7", [], Verdict.UNKNOWN, "no NAT"),
        ("::ffff:203.0.113.7", "203.0.113.7", [], Verdict.UNKNOWN, "no NAT"),
        ("2001:db8::7", "192.168.1.5", [], None, ""),  # another family says nothing
        ("203.0.113.7", "192.168.1.5", [("tcp://198.51.100.1:1", "")], Verdict.WARNING, "do not reach it"),
        ("203.0.113.7", "192.168.1.5", [("tcp://peer.example:1", "direct")], Verdict.OK, "port is forwarded; open"),
        ("203.0.113.7", "203.0.113.7", [("tcp://peer.example:1", "direct")], Verdict.OK, "own address .*; open"),
        ("203.0.113.7", "192.168.1.5", [("tcp://192.168.1.9:1", "direct")], Verdict.UNKNOWN, "nobody outside"),
        ("", "", [("tcp://192.168.1.9:1", "direct"), ("tcp://peer.example:1", "")], Verdict.WARNING, "NAT or a"),
        ("", "", [("tcp://peer.example:1", None)], None, ""),  # the peer could not try
    ],
)  # fmt: skip
def test_what_is_known_of_nat(
    seen: str, own: str, links: list[tuple[str, str | None]], verdict: Verdict | None, says: str
) -> None:
    found = connectivity.nat_finding(seen, own, [a_link(*one) for one in links])
    assert (None if found is None else found.verdict) is verdict
    assert found is None or re.search(says, found.value)


def test_the_address_behind_a_proxy_is_not_taken_for_the_callers() -> None:
    async def scene() -> None:
        async with serving() as url:
            request = urllib.request.Request(f"{url}/v1/runs", headers={"X-Forwarded-For": "203.0.113.9"})
            answer = await elsewhere(lambda: urllib.request.urlopen(request, timeout=10))
            with answer:
                assert answer.headers["X-Psyche-Seen"] == ""

    asyncio.run(scene())
    assert connectivity.way_out("http://127.0.0.1:80") == "127.0.0.1"
    assert connectivity.way_out("http://no-such-name.invalid") == ""


def test_only_an_invited_doctor_gets_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "CONNECT_SECONDS", 1.0)

    async def scene() -> None:
        async with listening() as invitation:
            stranger = link.Invitation(invitation.address, link.new_secret())
            with pytest.raises(TransportError, match="cannot reach the other doctor"):
                await link.call(TcpTransport, stranger, most_bytes=1000, seconds=1)

    asyncio.run(scene())


def test_requests_that_a_caller_may_not_make_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with listening() as invitation:
            transport = TcpTransport()
            caller = link._Caller(transport, invitation.identity("listener").public)
            context = link.TransportContext(
                invitation.identity("caller"), invitation.run_id, caller.hear, lambda digest: None
            )
            await transport.start(context)
            try:
                transport.set_peers({caller.peer: invitation.address})
                assert (await link._connected(transport, caller.peer, 10)).connected
                for wrong in (
                    ["give", 2**60], ["give", -1], ["give", "a lot"], ["take", 5, 5, 5], ["give"], ["leave"],
                ):  # fmt: skip
                    with pytest.raises(TransportError, match="did not answer"):
                        await caller.ask(*wrong, kinds=(bytes,), seconds=0.2)
                assert await caller.ask("ping", kinds=(int,))
                with pytest.raises(TransportError, match="sent a malformed answer"):
                    await caller.ask("ping", kinds=(bytes, bytes))
                assert await caller.ask("ping", "of a later release", kinds=(int,))
            finally:
                await transport.stop()

    asyncio.run(scene())


def test_invitations_are_written_and_read() -> None:
    one = link.Invitation("tcp://10.0.0.7:4000", link.new_secret())
    assert link.Invitation.parse(f" {one}\n") == one
    assert one.scheme == "tcp"
    keys = {role: one.identity(role).public for role in ("listener", "caller", "second")}
    assert len(set(keys.values())) == 3
    assert keys["caller"] < keys["listener"]
    with pytest.raises(ConfigError, match="--listen"):
        link.Invitation.parse("tcp://10.0.0.7:4000")


@contextlib.contextmanager
def doctor_process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*PROGRAM, "doctor", "--listen", *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        found = re.search(r"--peer '(\S+)'", "".join(lines))
        assert found, lines
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def test_listening_processes_and_a_calling_one(capsys: pytest.CaptureFixture[str]) -> None:
    with doctor_process() as (process, invitation), doctor_process("node.transport_options.upload=400000") as (_, slow):
        code, figures = examine(
            "demo", "--twin", "--nodes", "3", "--peer", invitation, "--peer", slow, "--megabytes", "1"
        )
        assert code == 0
        first, second = figures["links"]
        assert first["path"] == "direct"
        assert first["address"] == invitation.partition("#")[0]
        assert row(figures, "link 2", "peer")["value"].startswith(slow.partition("#")[0])
        parts = figures["prediction"]["parts"]
        traffic = parts["upload"] * min(first["upload"], second["upload"])
        assert parts["download"] == pytest.approx(traffic / second["download"]), "the slowest of the links"
        assert parts["latency"] == pytest.approx(2.5 * max(first["round_trip"], second["round_trip"]))
        assert row(figures, "prediction", "link")["verdict"] in ("ok", "warning")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    code, figures = 0, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(link, "CONNECT_SECONDS", 1.0)
        code, figures = examine("--peer", invitation)
    assert code == 1
    assert row(figures, "link", "peer")["verdict"] == "problem"
