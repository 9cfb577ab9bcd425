"""For whom a node says that it waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from support.core import KEYS, Scene, parameters

from psyche_lightning.node.agreement import EpochLog
from psyche_lightning.node.events import Train
from psyche_lightning.node.news import news
from psyche_lightning.node.notices import TooFewMembers
from psyche_lightning.node.waiting import describe
from psyche_lightning.protocol.requests import WarmupWitness
from psyche_lightning.protocol.state import Client, ClientStatus, CoordinatorConfig, Phase, RunState
from psyche_lightning.wire.identity import short


def names(*who: int) -> str:
    return ", ".join(short(KEYS[i]) for i in who)


def members() -> Scene:
    scene = Scene(4)
    scene.join(0, 1)
    return scene


def warm() -> Scene:
    scene = Scene(4)
    scene.warm()
    scene.ask(0, WarmupWitness(0, 0, parameters(0)))
    return scene


def paused() -> Scene:
    scene = members()
    scene.host.pause(scene.now)
    return scene


def training(overlap: bool = False) -> Scene:
    scene = Scene(4, settings={"overlap": overlap})
    scene.begin(but=(Train,))
    return scene


def some_results() -> Scene:
    scene = training()
    scene.hear(scene.result(1), scene.result(2))
    return scene


def all_results() -> Scene:
    scene = training()
    scene.hear(*[scene.result(i) for i in range(4)])
    scene.report(1)
    return scene


def reported() -> Scene:
    scene = all_results()
    scene.report(0)
    return scene


def disagreeing() -> Scene:
    scene = all_results()
    for i in (0, 2, 3):
        scene.report(i, scene.listed()[i:])
    return scene


def overlapping() -> Scene:
    scene = training(overlap=True)
    scene.hear(*[scene.result(i) for i in range(3)])
    scene.end_round()
    return scene


def later() -> Scene:
    scene = Scene(4)
    scene.begin()
    scene.play(3)
    return scene


def draining() -> Scene:
    scene = Scene(4, total_steps=1)
    scene.begin()
    scene.play()
    return scene


def without_holders() -> Scene:
    scene = Scene(4, total_steps=3, epoch_time=50.0)
    scene.begin()
    scene.now += 50.0
    scene.play(3)
    return scene


@pytest.mark.parametrize(
    ("make", "applied", "text"),
    [
        pytest.param(members, None, "epoch 0: waiting for 4 members", id="members"),
        pytest.param(paused, None, "the run is paused; waiting for `psyche run resume`", id="a paused run"),
        pytest.param(
            warm, None, f"epoch 0: waiting for {names(1, 2, 3)} to hold the parameters", id="those without parameters"
        ),
        pytest.param(
            draining, 1, "round 1: waiting for a quorum to name the parameters after step 1", id="the end of an epoch"
        ),
        pytest.param(training, None, "round 0: waiting for the epoch's parameters", id="the epoch's parameters"),
        pytest.param(later, 2, "round 3: catching up, applying round 2", id="itself"),
        pytest.param(
            later, 3, f"round 3: waiting for results of 3/4 batches, from {names(1, 2, 3)}", id="results, up to date"
        ),
        pytest.param(
            some_results, 0, f"round 0: waiting for results of 2/4 batches, from {names(0, 3)}", id="some results"
        ),
        pytest.param(
            all_results, 0, "round 0: waiting for the coordinator to take this node's report", id="the coordinator"
        ),
        pytest.param(
            disagreeing,
            0,
            "round 0: waiting for the witnesses to agree; they verified different results",
            id="one list",
        ),
        pytest.param(reported, 0, f"round 0: waiting for witnesses {names(2, 3)}", id="witnesses"),
        pytest.param(
            overlapping, 0, f"round 1: waiting for results of 1/4 batches, from {names(3)}", id="the round before"
        ),
        pytest.param(
            lambda: training(overlap=True), 0, f"round 0: waiting for witnesses {names(1, 2, 3)}", id="a first round"
        ),
    ],
)
def test_who_is_waited_for(make: Callable[[], Scene], applied: int | None, text: str) -> None:
    scene = make()
    assert describe(scene.state, scene.log, applied, scene.settings.delay, KEYS[0]).text == text


def test_only_who_is_a_witness_is_waited_for_as_one() -> None:
    scene = Scene(4, witness_nodes=2, min_clients=2)
    scene.begin(but=(Train,))
    scene.hear(*[scene.result(i) for i in range(4)])
    two = names(*scene.log.rounds[0].selection.witnesses())
    assert describe(scene.state, scene.log, 0, 1, b"").text == f"round 0: waiting for witnesses {two}"


def test_who_holds_the_parameters_is_waited_for_by_those_who_do_not() -> None:
    scene = without_holders()
    state, held = scene.state, scene.state.checkpoint
    assert (state.phase, held.step) == (Phase.WAITING_FOR_MEMBERS, 1)
    text = f"epoch 1: waiting for 4 members, and for a holder of the parameters {short(held.digest)} of step 1"
    assert describe(state, None, None, 1, KEYS[5]).text == text
    assert describe(state, None, None, 1, KEYS[0]).text == "epoch 1: waiting for 4 members"


def test_a_node_without_the_last_results_waits_for_another_member_of_their_epoch() -> None:
    scene = later()
    state = replace(scene.state, phase=Phase.WARMUP, epoch=scene.state.epoch + 1, warmup_witnesses=())
    text = "epoch 1: this node lacks results of round 2 of epoch 0; waiting for another member of that epoch"
    assert describe(state, scene.log, 2, 1, KEYS[0]).text == text
    outside = describe(state, scene.log, 2, 1, b"")
    assert outside.text == f"epoch 1: waiting for {names(0, 1, 2, 3)} to hold the parameters"
    assert outside.nodes == tuple(client.node for client in state.clients)


def test_without_a_state_or_a_log_the_coordinator_is_waited_for() -> None:
    assert describe(None, None, None, 1, KEYS[0]).text == "waiting for the coordinator's state"
    assert describe(RunState("run"), None, None, 1, KEYS[0]).text == "phase UNINITIALIZED: waiting for the coordinator"
    state = training().state
    assert describe(state, None, 0, 1, KEYS[0]).text == "phase ROUND_TRAIN: waiting for the coordinator"
    empty = EpochLog(0, b"", 1, 1)
    assert describe(state, empty, 0, 1, KEYS[0]).text == "phase ROUND_TRAIN: waiting for the coordinator"


def test_who_comes_during_an_epoch_waits_for_the_next_one() -> None:
    state = training().state
    state = replace(state, config=replace(state.config, epoch_time=5400.0))
    text = "epoch 0 trains without this node, which joins the next one; an epoch takes 1 h 30 min"
    assert describe(state, None, None, 1, bytes(32)).text == text
    gone = replace(state, exited_clients=state.clients[:1], clients=state.clients[1:])
    assert describe(gone, None, None, 1, KEYS[0]).text == "phase ROUND_TRAIN: waiting for the coordinator"


def test_a_warm_up_in_which_all_have_reported_waits_for_nobody() -> None:
    state = replace(warm().state, clients=())
    assert describe(state, None, None, 1, KEYS[0]).text == "epoch 0: waiting for nobody to hold the parameters"


def test_a_run_lacks_members_only_where_they_are_known_to_have_left() -> None:
    stay, gone = Client(b"a" * 32, b"a" * 32), Client(b"b" * 32, b"b" * 32, status=ClientStatus.WITHDRAWN)
    config = CoordinatorConfig(init_min_clients=3, min_clients=2)
    full = RunState("r", Phase.ROUND_TRAIN, config=config, clients=(stay, replace(stay, signer=b"c" * 32)))
    few = replace(full, phase=Phase.WAITING_FOR_MEMBERS, clients=(stay, gone))
    (notice,) = news(full, few, stay.signer)
    assert notice == TooFewMembers("r", 1, 3, 2)
    assert "it waits for 2 more members" in str(notice)
    assert "update r init_min_clients=1 min_clients=1" in str(notice)
    assert describe(few, None, None, 1, stay.node).text == "epoch 0: waits for 2 more members (has 1 of 3)"
    assert not list(news(few, few, stay.signer)), "it is said once"
    gathered = replace(few, gathered_at=1.0)
    assert not list(news(full, gathered, stay.signer)), "newcomers are enough"
    paused = replace(few, phase=Phase.PAUSED, clients=(gone, gone))
    resumed = replace(paused, phase=Phase.WAITING_FOR_MEMBERS)
    assert not [each for each in news(paused, resumed, stay.signer) if isinstance(each, TooFewMembers)]
    assert describe(resumed, None, None, 1, stay.node).text == "epoch 0: waiting for 3 members"
