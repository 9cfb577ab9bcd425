"""Audits of ledgers that real node cores wrote in a simulated run, as they are and tampered with."""

from __future__ import annotations

import base64
import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.cli import main
from psyche_lightning.errors import PsycheError
from psyche_lightning.node.audit import _Cover, audit, audit_files
from psyche_lightning.simulation.scenario import Scenario
from psyche_lightning.simulation.simulator import Simulation

Rows = list[dict[str, Any]]
STEPS = 40


@pytest.fixture(scope="module")
def written() -> list[Rows]:
    """The ledgers of the four nodes of a run of several epochs, in which payloads were lost."""
    simulation = Simulation(Scenario(6, 4, True, STEPS, 0.1, 0.5, 0.0, 0, 0, 0, 0, 0, 150.0, payload_loss=0.1))
    simulation.run()
    return [node.ledger for node in simulation.nodes]


@pytest.fixture
def rows(written: list[Rows]) -> Rows:
    return copy.deepcopy([row for ledger in written for row in ledger])


def of(rows: Rows, step: int) -> Rows:
    """The rows of a step, in all ledgers."""
    return [row for row in rows if row["step"] == step]


def test_the_books_of_a_run_show_each_data_id_once(rows: Rows) -> None:
    ledger = audit(rows)
    assert ledger.problems == []
    assert (ledger.rounds, ledger.last_step) == (STEPS, STEPS)
    trained = [number for line in ledger.lines for number in range(line.start, line.stop)]
    left = [number for interval in ledger.untrained for number in range(*interval)]
    assert sorted(trained + left) == list(range(STEPS * 8))
    assert any(line.again for line in ledger.lines)
    assert max(row["epoch"] for row in rows) > 0


def test_nobody_needs_all_books(written: list[Rows]) -> None:
    halves = [row for ledger in (written[0][:12], written[1][8:]) for row in ledger]
    assert audit(halves).lines == audit(written[2]).lines


def test_shares_by_weight_are_audited_too() -> None:
    simulation = Simulation(Scenario(5, 4, True, STEPS, 0.0, 0.1, 0.0, 0, 0, 0, 0, 0, 150.0, speeds=True))
    simulation.run()
    rows = copy.deepcopy([row for node in simulation.nodes for row in node.ledger])
    weighed = [row for row in rows if "weights" in row]
    step = weighed[0]["step"]
    assert audit(rows).problems == []
    assert min(weighed[0]["weights"]) < 128
    for row in of(rows, step):
        row["weights"] = row["weights"][::-1]
    assert "was not assigned" in audit(rows).problems[0]
    for row in of(rows, step):
        row["weights"] = [0] * 4
    with pytest.raises(PsycheError, match="one of 1 to 256 for each of its clients"):
        audit(rows)


def test_a_round_whose_weights_came_to_the_same_shares_is_one_round() -> None:
    """As when a coordinator is restored from a copy, and measures a little differently."""
    simulation = Simulation(Scenario(5, 4, True, STEPS, 0.0, 0.1, 0.0, 0, 0, 0, 0, 0, 150.0, speeds=True))
    simulation.run()
    rows = copy.deepcopy([row for node in simulation.nodes for row in node.ledger])
    before = audit(rows)
    one, *_ = of(rows, next(row["step"] for row in rows if len(set(row.get("weights", ()))) == 4))
    weights = one["weights"]
    one["weights"] = [weight - (weight > 64) for weight in weights]
    assert audit(rows) == before
    one["weights"] = [1] * len(weights)
    assert f"two ledgers differ about round {one['height']} of epoch {one['epoch']}" in audit(rows).problems
    one["weights"], one["batch_size"] = weights, one["batch_size"] + 1
    assert f"two ledgers differ about round {one['height']} of epoch {one['epoch']}" in audit(rows).problems


def forget(rows: Rows) -> None:
    rows[:] = [row for row in rows if row["step"] not in (5, 6)]


def shift(rows: Rows) -> None:
    for row in of(rows, 4):
        row["data_index"] += 1


def rewrite(rows: Rows) -> None:
    for row in of(rows, 4):
        raw = bytearray(base64.b64decode(row["results"][0]))
        raw[-1] ^= 1
        row["results"][0] = base64.b64encode(raw).decode()


def move(rows: Rows) -> None:
    [result, *_] = of(rows, 3)[0]["results"]
    for row in of(rows, 4):
        row["results"].append(result)


def repeat(rows: Rows) -> None:
    for row in of(rows, 4):
        row["results"].append(row["results"][0])


def hide(rows: Rows) -> None:
    for row in of(rows, 4):
        del row["results"][0]


def invent(rows: Rows) -> None:
    for row in of(rows, 2):
        row["again"] = [[0, 1]]


def differ(rows: Rows) -> None:
    of(rows, 2)[0]["seed"] += 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (forget, r"no ledger has the rounds of steps 5 to 6"),
        (shift, r"step 4 begins at data id 25 instead of 24"),
        (rewrite, r"round 3 of epoch 0 has a result that is not genuine"),
        (move, r"round 3 of epoch 0 has a result of \w+ that was not assigned"),
        (repeat, r"round 3 of epoch 0 has a result of \w+ that was not assigned"),
        (hide, r"trained \[.*\] again; \[.*\] was due"),
        (invent, r"round 1 of epoch 0 trained \[\[0, 1\]\] again; \[\] was due"),
        (differ, r"two ledgers differ about round 1 of epoch 0"),
    ],
)
def test_what_was_tampered_with_is_named(rows: Rows, change: Callable[[Rows], None], problem: str) -> None:
    change(rows)
    problems = audit(rows).problems
    assert any(re.search(problem, text) for text in problems), problems


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda rows: rows[0].pop("seed"), "not a row of a ledger: KeyError"),
        (lambda rows: rows[0].update(nodes=[7]), "not a row of a ledger: TypeError"),
        (lambda rows: rows[0].update(run="other"), "the ledgers are of several runs, such as"),
    ],
)
def test_what_is_no_ledger_is_refused(rows: Rows, change: Callable[[Rows], None], error: str) -> None:
    change(rows)
    with pytest.raises(PsycheError, match=error):
        audit(rows)


def fruitless(*steps: int, epoch: int = 0, again: dict[int, list[int]] | None = None) -> Rows:
    """Rounds of 8 ids in which nobody gave a result."""
    common = {"run": "run", "epoch": epoch, "seed": 1, "batch_size": 8, "nodes": ["ab" * 32], "results": []}
    return [
        {
            **common,
            "height": height,
            "step": step,
            "data_index": 8 * (step - 1),
            "again": [again[step]] if again and step in again else [],
        }
        for height, step in enumerate(steps)
    ]


def test_rounds_that_the_owner_undid_do_not_count() -> None:
    ledger = audit(fruitless(1, 2, 3) + fruitless(2, 3, 4, epoch=1, again={4: [0, 7]}))
    assert (ledger.rounds, ledger.undone, ledger.last_step) == (4, 2, 4)
    assert ledger.problems == []


def test_more_than_the_last_rounds_can_take_is_overdue() -> None:
    again = {4: [0, 7], 5: [8, 15], 6: [16, 23], 7: [0, 7]}  # in round 7, round 4's own ids are due, too
    ledger = audit(fruitless(*range(1, 8), again=again))
    assert ledger.overdue == [(24, 32)]
    assert ledger.untrained == [(0, 56)]
    assert ledger.problems == ["8 ids of earlier rounds were not trained in time, such as 24"]


def test_the_command_shows_the_books_of_several_folders(
    written: list[Rows], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, ledger in enumerate(written[:2]):
        (tmp_path / str(number)).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in ledger)
        (tmp_path / str(number) / "ledger.jsonl").write_text(lines)
    folders = [str(tmp_path / "0"), str(tmp_path / "1")]
    assert main(["run", "ledger", *folders, "--check"]) == 0
    assert f"{STEPS} rounds up to step {STEPS}, from 2 ledgers" in " ".join(capsys.readouterr().out.split())
    assert main(["run", "ledger", *folders, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["complete"]
    assert told["ids_trained"] + sum(end - start + 1 for start, end in told["not_trained"]) == STEPS * 8


def test_the_command_fails_where_the_ledger_is_not_complete(
    written: list[Rows], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(row) + "\n" for row in written[0] if row["step"] != 5]
    (tmp_path / "ledger.jsonl").write_text("".join(lines))
    assert main(["run", "ledger", str(tmp_path), "--check"]) == 1
    assert "no ledger has the rounds of steps 5 to 5" in " ".join(capsys.readouterr().err.split())


def test_ledger_files_of_any_size_are_audited_as_their_rows_are(written: list[Rows], tmp_path: Path) -> None:
    ledgers = []
    for number, rows in enumerate(written[:3]):
        ledgers.append(tmp_path / str(number) / "ledger.jsonl")
        ledgers[-1].parent.mkdir()
        ledgers[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = audit(row for rows in written[:3] for row in rows)
    assert audit_files(ledgers) == whole
    newest = audit_files(ledgers, newest=5)
    assert newest.lines == whole.lines[-5:]
    assert (newest.ids, newest.ids_again, newest.trained) == (whole.ids, whole.ids_again, len(whole.lines))
    # A coordinator that was restored from a copy has some rounds again.
    ledgers[0].write_text("".join(json.dumps(row) + "\n" for row in (*written[0][5:], *written[0][:8])))
    assert audit_files(ledgers) == whole
    assert audit_files(ledgers, lambda row: False).run == ""


def test_ids_that_are_missing_or_trained_twice_are_named() -> None:
    cover = _Cover(3)
    for interval in ((8, 10), (3, 5), (5, 8)):
        cover.add(*interval)
    assert cover.faults() == []
    cover.add(12, 13)
    assert cover.faults() == ["of the data ids, 10 to 11 are missing"]
    twice = _Cover(0)
    twice.add(0, 4)
    twice.add(2, 3)
    assert twice.faults() == ["of the data ids, 2 appears twice"]
