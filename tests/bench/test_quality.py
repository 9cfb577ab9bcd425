"""Loss against bytes: `psyche bench quality`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from psyche_lightning.bench.quality.comparison import Case, Results, Row, compare
from psyche_lightning.bench.quality.methods import DEFAULT, LONG, AllReduce, DiLoCo, Local, Method, Votes, method
from psyche_lightning.bench.quality.picture import frontier
from psyche_lightning.bench.quality.training import Outcome, Task, Training, all_reduced, build_model, train
from psyche_lightning.cli import main
from psyche_lightning.errors import ConfigError

TASK = Task(nodes=2, steps=3, batch=1)
PARAMETERS = sum(parameter.numel() for parameter in build_model("small", 0).parameters())


@pytest.mark.parametrize(
    "text",
    [
        "allreduce:inner=muon",
        "diloco:h=2",
        "diloco:h=2,inner=muon",
        "demo",
        "distro:muon=true,overlap=true",
        "local:h=3",
    ],
)
def test_every_method_learns_and_counts_its_bytes(text: str) -> None:
    chosen = method(text)
    outcome = train(Training(Task(nodes=2, steps=12, batch=2), chosen, 4e-3, 0))
    assert 0 < outcome.loss < 5.3  # log 256 is 5.5
    rounds = math.ceil(12 / chosen.steps)
    if isinstance(chosen, (AllReduce, DiLoCo)):
        assert outcome.sent == rounds * 4 * PARAMETERS
    else:
        assert outcome.sent < 12 * PARAMETERS / 10


@pytest.mark.parametrize("text", ["distro:k=32,overlap=true", "local:h=1,k=64"])
def test_a_schedule_sends_the_bytes_of_its_parts(text: str) -> None:
    def sent(more: str = "") -> float:
        return train(Training(Task(nodes=2, steps=3, batch=1), method(text + more), 4e-3, 0)).sent

    assert sent(",then=4,since=2") == (sent() + 2 * sent(",k=4")) / 3


def test_equal_trainings_have_equal_outcomes() -> None:
    training = Training(TASK, Votes(muon=True), 2e-3, 1)
    assert train(training).loss == train(training).loss


def test_of_diloco_with_one_node_and_whole_outer_steps_the_own_steps_remain() -> None:
    task = Task(nodes=1, steps=4, batch=2)
    apart = train(Training(task, DiLoCo(h=2, outer_rate=1.0, momentum=0.0), 2e-3, 0))
    together = train(Training(task, AllReduce(), 2e-3, 0))
    assert apart.loss == pytest.approx(together.loss, abs=1e-5)


def test_a_newcomer_has_nothing_of_the_node_whose_place_it_takes() -> None:
    def loss(**options: int) -> float:
        return train(Training(Task(nodes=2, steps=12, batch=1), Local(h=2, **options), 4e-3, 0)).loss

    never = loss()
    assert loss(join_every=12) == never  # the last step is made before a newcomer could make one
    assert len({never, loss(join_every=10), loss(join_every=4)}) == 3


def test_methods_are_typed_as_they_are_written() -> None:
    for text in (*DEFAULT, *LONG):
        assert method(str(method(text))) == method(text)
    scheduled = "distro:k=96,chunk=64,decay=0.95,muon=false,overlap=false,then=6,since=24"
    assert str(method(scheduled)) == scheduled
    assert method(scheduled).setting == "k=96 and 6 from round 24 on, 64x64"
    assert str(Votes(k=8, muon=True)) == "distro:k=8,chunk=64,decay=0.95,muon=true,overlap=false"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("dilico", "begins with one of allreduce, diloco, demo, distro, local"),
        ("distro:kay=8", "unknown field 'kay'; 'distro' has k, chunk, decay, muon, overlap"),
        ("distro:k=eight", "k is 'eight'; a number was expected"),
        ("distro:muon=yes", "muon is 'yes'; choose true or false"),
        ("allreduce:inner=sgd", "inner is 'sgd'; choose adamw or muon"),
        ("demo:k=5000", r"distro\.k is 5000"),
        ("distro:then=6", "then and since belong together"),
        ("local:then=500,since=3", r"distro\.schedule\.0\.k is 500"),
        ("local:join_every=-1", "join_every is -1; choose a whole number, 0 for never"),
        ("diloco:h=0", "h is 0; choose a whole number from 1 on"),
    ],
)
def test_what_is_typed_wrong_is_named(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        method(text)


def search(losses: Mapping[float, float], seeds: int = 1, rates: tuple[float, ...] = ()) -> list[tuple[float, int]]:
    """Rates and seeds of the trainings of a case, in their order, where the loss is a function of the rate."""
    case, known, order = Case(TASK, AllReduce(), seeds, rates), {}, []
    while missing := case.missing(known):
        for one in missing:
            known[one] = Outcome(losses.get(one.rate, math.nan), 1.0, 1.0)
            order.append((one.rate, one.seed))
    return order


def test_the_search_ends_where_both_neighbours_are_worse() -> None:
    rising = {2e-3: 3.0, 4e-3: 2.0, 8e-3: 1.0, 1.6e-2: 0.5, 3.2e-2: 0.7}
    assert search(rising) == [(2e-3, 0), (4e-3, 0), (8e-3, 0), (1.6e-2, 0), (3.2e-2, 0)]
    assert search({2e-3: 3.0, 4e-3: 2.0, 8e-3: 2.5}, seeds=3)[3:] == [(4e-3, 1), (4e-3, 2)]
    falling = {rate: rate for rate in (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)}
    assert search(falling)[-1] == (2.5e-4, 0)
    assert search(falling, rates=(4e-3, 8e-3)) == [(4e-3, 0), (8e-3, 0)]
    assert search({2e-3: 3.0}) == [(2e-3, 0), (4e-3, 0), (8e-3, 0), (1e-3, 0)]  # the others diverged


def test_a_killed_comparison_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.jsonl"
    one, other = Training(TASK, AllReduce(), 2e-3, 0), Training(TASK, AllReduce(), 4e-3, 0)
    first = Results(file)
    assert not first.recall(one)
    first.add(one, Outcome(2.5, 1000.0, 3.0))
    first.add(other, Outcome(math.nan, 1000.0, 3.0))
    file.write_text(file.read_text()[:-9])  # killed while it wrote the second line
    second = Results(file)
    assert second.recall(one)
    assert second.known[one] == Outcome(2.5, 1000.0, 3.0)
    assert not second.recall(other)
    second.add(other, Outcome(math.nan, 1000.0, 3.0))
    third = Results(file)
    assert third.recall(other)
    assert math.isnan(third.known[other].loss)
    for changed in (Training(TASK, Votes(), 2e-3, 0), Training(Task(nodes=3), AllReduce(), 2e-3, 0)):
        assert not third.recall(changed)
    ((_, row),) = compare([Case(TASK, AllReduce(), 1, (2e-3, 4e-3))], third)
    assert (row.rate, row.loss) == (2e-3, 2.5)
    monkeypatch.setattr(torch, "__version__", "0.1")
    from psyche_lightning.bench.quality import training

    training._surroundings.cache_clear()
    assert not Results(file).recall(one)
    training._surroundings.cache_clear()


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    for text in ('{"loss": 1}\n{"loss": 2}\n', "notes", '{"training": 5}\n'):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"line 1 of .*results\.jsonl is no result of psyche bench quality"):
            Results(file)


def row(sent: float, loss: float, chosen: Method | None = None) -> Row:
    return Row(TASK, chosen or Votes(), 1e-3, loss, 0.0, sent)


def test_nothing_beats_what_is_on_the_frontier() -> None:
    rows = [row(100, 2.0), row(10, 3.0), row(50, 3.5), row(10, 3.2), row(200, 2.0), row(1000, 1.0)]
    assert [(one.sent, one.loss) for one in frontier(rows)] == [(10, 3.0), (100, 2.0), (1000, 1.0)]
    assert row(100, 2.0).ratio == all_reduced(TASK) / 100 == 3 * 4 * PARAMETERS / 100


def test_the_command_compares_and_goes_on(tmp_path: Path) -> None:
    file, picture, results = tmp_path / "j", tmp_path / "p.png", tmp_path / "r.jsonl"
    arguments = ["--steps", "12", "--steps", "16", "--nodes", "2", "--batch", "1", "--seeds", "2", "--rate", "2e-3"]
    arguments += ["--method", "allreduce", "--method", "distro:k=8", "--results", str(results)]
    assert main(["bench", "quality", *arguments, "--json", str(file), "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(file.read_text())["rows"]
    assert [(one["family"], one["setting"], one["steps"]) for one in rows] == [
        ("AdamW, all-reduce", "", 12),
        ("DisTrO", "k=8, 64x64", 12),
        ("AdamW, all-reduce", "", 16),
        ("DisTrO", "k=8, 64x64", 16),
    ]
    assert all(0 < one["loss"] < 6 for one in rows)
    assert [one["ratio"] > 100 for one in rows] == [False, True, False, True]
    lines = results.read_text()
    assert lines.count("\n") == 8
    assert main(["bench", "quality", *arguments, "--json", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again").read_text() == file.read_text()
    assert results.read_text() == lines


def test_the_long_one_needs_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "quality", "--long"]) == 1
    assert "--results FILE" in capsys.readouterr().err
