"""A node that goes on with its folder in another run of the same name takes nothing from the former one."""

from __future__ import annotations

import json

from psyche_lightning.cli import main
from psyche_lightning.errors import WireError
from psyche_lightning.node.journal import MemoryJournal
from psyche_lightning.protocol.messages import open_envelope
from psyche_lightning.simulation.scenario import Scenario
from psyche_lightning.simulation.simulator import Simulation
from psyche_lightning.wire.canonical import unpack


class Kept(MemoryJournal):
    """A journal that forgets nothing."""

    def retain(self, keys, blobs=()):
        pass


def opens(key, raw, scope):
    """Whether all envelopes of a record are of that incarnation."""
    try:
        for envelope in unpack(raw, max_size=1 << 16) if "/list/" in key else [raw]:
            open_envelope(envelope, scope)
    except WireError:
        return False
    return True


def test_a_promise_binds_within_one_incarnation(make_run, make_trainee):
    journal, runs, promised = Kept(), [], []
    for _ in range(2):
        run = make_run(1, 2)
        trainee = make_trainee(0, run, journal=journal)
        run.go(trainee)
        assert trainee.steps == [1, 2]
        runs.append(run.host.state.scope)
        promised.append({key: raw for key, raw in journal.load().items() if key.startswith(runs[-1])})
    assert journal.load() == {**promised[0], **promised[1]}
    for scope, promises in zip(runs, promised, strict=True):
        assert {key.removeprefix(scope) for key in promises} >= {"/result/0/0", "/result/0/1"}
        assert any("/list/" in key for key in promises)
        assert [opens(key, raw, scope) for key, raw in promises.items()] == [True] * len(promises)
    assert not any(opens(key, raw, runs[1]) for key, raw in promised[0].items())


def test_a_restarted_node_keeps_its_promises_within_the_run(make_run, make_trainee):
    run = make_run(1, 2)
    trainee = make_trainee(0, run, journal=Kept())
    run.go(trainee)
    again = make_trainee(0, run, journal=trainee.journal, store=trainee.store)
    assert again.participant._runtime._kept() == ({}, {}, set())  # it does not know the incarnation yet
    run.go(again)
    promises, remembered, lost = again.participant._runtime._kept()
    results = [promises[key].message for key in promises if key.startswith("result/")]
    assert lost == {result.payload for result in results}  # a finished run's are cleared away
    assert "result/0/1" in promises
    assert any(key.startswith("list/0/1/") for key in remembered)


def test_a_folder_of_two_runs_of_one_name_is_audited_one_by_one(tmp_path, capsys):
    simulation = Simulation(Scenario(3, 4, True, 8, 0.1, 0.5, 0.0, 0, 0, 0, 0, 0, 150.0))
    simulation.run()
    rows = simulation.nodes[0].ledger
    former = [{**row, "run": "sim#" + 32 * "0"} for row in rows]
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*former, *rows]))
    command = ["run", "ledger", str(tmp_path), "--check"]
    assert main([*command, "--run", simulation.scope]) == 0
    assert main([*command, "--run", former[0]["run"]]) == 1  # whose results were signed for the other one
    assert "not genuine" in capsys.readouterr().err
    for name in ([], ["--run", "sim"]):
        assert main([*command, *name]) == 1
        assert "the ledgers are of several runs" in " ".join(capsys.readouterr().err.split())
