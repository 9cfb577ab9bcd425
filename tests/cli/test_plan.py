from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from psyche_lightning.cli import main
from psyche_lightning.cli.plan import parse_link, parse_memory, parse_trip, shell_lines
from psyche_lightning.doctor import plan
from psyche_lightning.doctor.prediction import Network
from psyche_lightning.doctor.round_time import MESSAGE, predict
from psyche_lightning.doctor.speed import TrainingSpeed
from psyche_lightning.errors import ConfigError
from psyche_lightning.recipe import Recipe, load_recipe
from psyche_lightning.recipe.estimate import estimate, meta_model

HOURS = 48
SPEED = TrainingSpeed(0.02, 0.004, 0.01, 8, 12, "made up", 0.006)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PSYCHE_") and name != "PSYCHE_PLUGINS"]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


Plan = Callable[..., list[plan.Option]]


@pytest.fixture(scope="module")
def options() -> Plan:
    """Predicts all settings of the demo with fixed times."""
    base = load_recipe("demo")
    model = meta_model(base)

    def make(nodes: int = 4, mbit: float = 20, *, memory: int | None = None, hours: float = HOURS) -> list[plan.Option]:
        network = Network(mbit * 1e6 / 8, mbit * 1e6 / 8, 0.1, 0.1)
        made = []
        for setting in plan.SETTINGS:
            values = {**setting.values(base), **plan.batch(base, nodes, setting.steps)}
            recipe = load_recipe("demo", plan.overrides(base, values))
            size = estimate(recipe, model)
            speed = SPEED if setting.local_steps else replace(SPEED, step_seconds=0.0)
            made.append(
                plan.option(
                    setting, recipe, size, speed, network, nodes=nodes, seconds=3600 * hours, memory=memory,
                    write_seconds=0.001,
                )
            )  # fmt: skip
        return made

    return make


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# -- what is predicted and chosen -------------------------------------------------------------------------------------


def test_a_slower_link_never_gives_more(options: Plan) -> None:
    links = [0.05, 0.2, 1, 5, 20, 100, 1000]
    found = [options(mbit=mbit) for mbit in links]
    for setting in range(len(plan.SETTINGS)):
        speeds = [one[setting].prediction.tokens_per_second for one in found]
        assert speeds == sorted(speeds)
        shares = [one[setting].prediction.utilization for one in found]
        assert shares == sorted(shares)
    chosen = [plan.choose(one) for one in found]
    speeds = [one.prediction.tokens_per_second for one in chosen if one is not None]
    assert len(speeds) == len(links)
    for less, more in itertools.pairwise(speeds):
        assert plan.ALIKE * less <= more, "a lower loss may cost so much"


def test_more_nodes_never_give_less_in_all(options: Plan) -> None:
    found = [options(nodes) for nodes in (1, 2, 3, 4, 5, 7, 8, 16, 33)]
    for setting in range(len(plan.SETTINGS)):  # with three nodes, a share of a step is a micro-batch
        speeds = [one[setting].prediction.tokens_per_second for one in found[2:]]
        assert speeds == sorted(speeds)
        assert all(one[setting].given.share == one[setting].setting.steps * 8 for one in found[2:])
    chosen = [plan.choose(one) for one in found]
    speeds = [one.prediction.tokens_per_second for one in chosen if one is not None]
    assert len(speeds) == len(found)
    assert speeds == sorted(speeds)
    fewer = [one[0].fewer for one in found]
    assert fewer[0] is None
    assert all(some is not None and some > 1 for some in fewer[1:])


def test_the_most_tokens_of_what_is_near_an_all_reduce_are_chosen(options: Plan) -> None:
    for mbit in (0.05, 1, 20, 1000):
        some = options(mbit=mbit)
        chosen = plan.choose(some)
        assert chosen is not None
        assert chosen.setting.gap is not None
        assert chosen.setting.gap <= plan.NEAR
        able = [one for one in some if one.setting.proposed]
        most = max(one.prediction.tokens_per_second for one in able)
        assert chosen.prediction.tokens_per_second >= plan.ALIKE * most
        for one in able:
            if one.prediction.tokens_per_second >= plan.ALIKE * most:
                assert one.setting.gap is not None
                assert one.setting.gap >= chosen.setting.gap
    assert (chosen := plan.choose(options(mbit=1))) is not None
    assert chosen.setting.local_steps == 8, "few bytes and few round trips"


def test_nothing_is_chosen_that_memory_or_time_has_no_room_for(options: Plan) -> None:
    some = options()
    smallest = min(one.needed for one in some if one.setting.proposed)
    assert plan.choose(options(memory=smallest - 1)) is None
    assert all(not one.fits for one in options(memory=smallest - 1) if one.setting.proposed)
    assert options(memory=smallest - 1)[0].as_json()["limit"] == "memory"
    chosen = plan.choose(options(mbit=1, memory=smallest))
    assert chosen is not None
    assert not chosen.setting.local_steps, "their copies do not fit"
    assert plan.choose(options(hours=1e-6)) is None


def test_tokens_and_bytes_are_those_of_whole_rounds(options: Plan) -> None:
    one = options()[0]
    assert one.prediction == predict(one.given)
    assert one.rounds == int(HOURS * 3600 / one.prediction.round_seconds)
    assert one.tokens == one.rounds * 32 * 128
    traffic = 3 * (estimate(one.recipe).payload + MESSAGE + 32 * 4)
    assert one.given.traffic == traffic
    assert one.sent == round(1.04 * traffic * one.rounds)
    assert one.fewer == pytest.approx(1.5 * 4 * one.estimate.trainable / traffic)


def test_a_step_keeps_the_recipe_s_samples_in_equal_shares_of_whole_micro_batches() -> None:
    demo = load_recipe("demo")
    assert plan.batch(demo, 3, 1) == {"run.global_batch_size_start": 24, "run.global_batch_size_end": 24}
    assert plan.batch(demo, 4, 1)["run.global_batch_size_end"] == 32
    assert plan.batch(demo, 2, 8)["run.global_batch_size_end"] == 2 * 12 * 8
    assert plan.batch(demo, 5, 1)["run.global_batch_size_end"] == 40
    local = load_recipe("demo", ["local_steps=4", "decay=0.9", "global_batch_size_end=192"])
    assert plan.batch(local, 2, 1)["run.global_batch_size_end"] == 48
    growing = load_recipe("tokens")
    assert plan.batch(growing, 4, 1) == {"run.global_batch_size_start": 128, "run.global_batch_size_end": 512}
    assert plan.batch(growing, 4, 8) == {"run.global_batch_size_start": 1024, "run.global_batch_size_end": 4096}


@pytest.mark.parametrize("name", ["demo", "mla-200m", "hf-llama", "tokens", "consilience-40b"])
def test_every_recipe_accepts_every_setting(name: str) -> None:
    base = load_recipe(name)
    for setting in plan.SETTINGS:
        values = {**setting.values(base), **plan.batch(base, 6, setting.steps)}
        made = load_recipe(name, plan.overrides(base, values))
        assert plan.own_setting(made) == setting
        assert made.run.global_batch_size_end % (6 * setting.steps) == 0


def test_a_recipe_with_everything_else_set_accepts_them_as_well() -> None:
    odd = [
        "distro.k_for={'*embed*': 2}", "lookahead=true", "removal=0.5", "float32_gradients=true", "optimizer.name=muon",
        "optimizer.muon_for={'*router*': false}", "scale=1.0", "distro.schedule=[{from_step: 5, k: 2}]",
    ]  # fmt: skip
    base = load_recipe("demo", odd)
    for setting in plan.SETTINGS:
        made = load_recipe("demo", [*odd, *plan.overrides(base, setting.values(base))])
        assert plan.own_setting(made) == setting
        assert not made.distro.schedule
        assert made.distro.float32_gradients == (not setting.local_steps)
        assert bool(made.optimizer.muon_for) == (setting.optimizer == "muon")
    assert plan.own_setting(base).loss is None


def slow(recipe: Recipe, sample_seconds: float, hours: float) -> plan.Option:
    network = Network(1e6, 1e6, 0.1, 0.1)
    speed = replace(SPEED, sample_seconds=sample_seconds)
    return plan.option(
        plan.own_setting(recipe), recipe, estimate(recipe), speed, network, nodes=2, seconds=3600 * hours, memory=None,
        write_seconds=None,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["demo", "mla-200m", "tokens"])
@pytest.mark.parametrize("sample_seconds", [0.01, 30.0])
def test_the_run_lasts_for_the_time_and_rounds_for_the_nodes(name: str, sample_seconds: float) -> None:
    base = load_recipe(name)
    chosen = slow(base, sample_seconds, 2000)
    made = load_recipe(name, plan.overrides(base, plan.lasting(chosen)))
    assert made.run.total_steps == chosen.rounds
    assert made.run.max_round_train_time >= 2 * chosen.prediction.round_seconds
    assert made.run.epoch_time >= base.run.epoch_time
    ends = [recipe.schedule(recipe.run.total_steps) for recipe in (base, made)]
    assert ends[1] == pytest.approx(ends[0], rel=0.1)
    with pytest.raises(ConfigError, match="none fits into"):
        plan.lasting(slow(base, 30.0, 1e-4))


def one_line(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "))


# -- the command ------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_the_doctor_and_the_overrides_can_be_pasted(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["demo", "--twin", "trainer.threads=1"]
    found = ask(
        capsys, *given, "--nodes", "3", "--link", "8M/4M", "--round-trip", "200ms", "--hours", "2", "--price", "2"
    )
    assert found["network"] == {"upload": 1e6, "download": 5e5, "round_trip": 0.2, "coordinator_trip": 0.2}
    assert found["speed"]["steps"] >= 2
    chosen = found["chosen"]
    words = shlex.split(chosen["command"])
    assert words[:5] == ["psyche", "train", *given]
    assert words[5:] == chosen["overrides"]
    made = load_recipe("demo", words[4:], twin=True)
    assert made.run.total_steps == chosen["rounds"]
    assert made.run.global_batch_size_end == chosen["global_batch_size"]
    assert (made.distro.k, made.distro.chunk) == (chosen["k"], chosen["chunk"])
    assert (made.distro.local_steps, made.optimizer.name) == (chosen["local_steps"], chosen["optimizer"])
    assert estimate(made).payload == chosen["payload"]
    assert sum(estimate(made).memory.values()) == chosen["memory"]
    assert found["chosen"]["dollars"] == pytest.approx(3 * 2 * chosen["bytes_sent_by_a_node"] / 1e9)
    doctor = ["--nodes", "3", "--upload", "8", "--download", "4", "--latency", "200", "--json", "doctor.json"]
    assert main(["doctor", "demo", "--twin", *words[4:], *doctor]) == 0
    theirs = json.loads(Path("doctor.json").read_text())["prediction"]
    for part in ("upload", "download", "latency"):
        assert theirs["parts"][part] == pytest.approx(chosen["parts"][part])
    assert theirs["parts"].keys() == chosen["parts"].keys()


def test_lines_are_whole_on_a_terminal_of_80_columns_and_in_pipes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [
        "plan",
        "demo",
        "--twin",
        "--tokens-per-second",
        "5000",
        "--nodes",
        "16",
        "--hours",
        "4800",
        "--link",
        "500k",
    ]
    monkeypatch.delenv("COLUMNS", raising=False)  # as where no terminal is
    assert main(given) == 0
    piped = capsys.readouterr().out
    assert "\x1b" not in piped
    assert re.search(r"^why .* the lowest \([+-]\d\.\d+ after .*\)\.$", piped, re.MULTILINE)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(given) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow
    for text in (piped, narrow):
        words = one_line(text[text.index("\npsyche train") :])
        load_recipe(words[2], words[4:], twin=True)
        assert "5,000 tokens/s of one node alone: given" in text
        assert "$" not in text
        assert "limit " in text
    assert main([*given, "--price", "0.1"]) == 0
    assert re.search(r"by\s+all: \$[\d,]+\.\d\d at \$0.1 a GB", capsys.readouterr().out)


def test_a_node_alone_and_a_model_without_hidden_matrices_have_plans(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, "demo", "--twin", "--nodes", "1", "--link", "1M", "--hours", "1", "--tokens-per-second", "900")
    assert found["chosen"]["bytes_sent_by_a_node"] == 0
    assert found["chosen"]["times_fewer_bytes"] is None
    assert found["chosen"]["dollars"] is None
    assert found["tokens_per_second_of_a_node"] == pytest.approx(900)
    muon = ["optimizer.name=muon", "optimizer.muon_for={'*': false}"]
    more = ["--nodes", "2", "--link", "1M", "--hours", "1", "--tokens-per-second", "900"]
    found = ask(capsys, "demo", "--twin", *muon, "precision=16-mixed", *more)
    assert {one["optimizer"] for one in found["settings"][1:]} == {"adamw"}
    assert [reason.partition(":")[0] for reason in found["left_out"]] == ["Muon", "Local steps"]


def test_a_model_that_does_not_fit_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "demo", "--twin", "--nodes", "2", "--link", "20M", "--hours", "1", "--memory", "100k"]
    assert main([*given, "--tokens-per-second", "1000"]) == 1
    assert "memory limits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"--nodes": "0"}, "--nodes is 0"),
        ({"--nodes": "-2"}, "--nodes is -2"),
        ({"--hours": "0"}, "--hours is 0"),
        ({"--hours": "nan"}, "--hours is nan"),
        ({"--hours": "inf"}, "--hours is inf"),
        ({"--link": "0"}, "too few for any run"),
        ({"--link": "0M"}, "too few for any run"),
        ({"--link": "20"}, "add a suffix"),
        ({"--link": "20Q"}, "suffixes k, M and G"),
        ({"--link": "20MB/s"}, "suffixes k, M and G"),
        ({"--link": "-20M"}, "suffixes k, M and G"),
        ({"--link": "20M/0k"}, "too few"),
        ({"--round-trip": "fast"}, "--round-trip 'fast' is no time"),
        ({"--tokens-per-second": "0"}, "--tokens-per-second is 0"),
        ({"--memory": "0G"}, "no amount of memory"),
        ({"--price": "-1"}, "--price is -1"),
        ({"recipe": "nothing"}, "no recipe 'nothing'"),
        ({"recipe": "dmeo"}, "Did you mean 'demo'?"),
    ],
)
def test_mistakes_are_explained(change: dict[str, str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--nodes": "4", "--link": "20M", "--hours": "48", **change}
    recipe = given.pop("recipe", "demo")
    assert (
        main(["plan", recipe, "--tokens-per-second", "1000", *(word for pair in given.items() for word in pair)]) == 1
    )
    assert text in capsys.readouterr().err


def test_what_must_be_given_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--nodes", "4", "--hours", "2"]) == 2
    assert "--link" in capsys.readouterr().err


def test_links_times_and_amounts_are_read() -> None:
    assert parse_link("20M") == (2.5e6, 2.5e6)
    assert parse_link("20M/1G") == (2.5e6, 125e6)
    assert parse_link("20Mbit/s/1.5Gbit/s") == (2.5e6, 187.5e6)
    assert parse_link("512k") == (64000, 64000)
    assert parse_link("20000000") == parse_link("20M")
    assert [parse_trip(text) for text in ("100", "100ms", "0.1s", "0")] == pytest.approx([0.1, 0.1, 0.1, 0])
    assert [parse_memory(text) for text in ("24G", "24GB", "500M")] == [24 * 10**9, 24 * 10**9, 5 * 10**8]


def test_a_command_of_several_lines_is_one_for_a_shell() -> None:
    words = ["psyche", "train", "a recipe.yaml", *(f"distro.k_for={{'*{number}*': 2}}" for number in range(9))]
    text = shell_lines(words)
    assert max(map(len, text.splitlines())) <= 80
    assert one_line(text) == words
