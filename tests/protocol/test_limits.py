from __future__ import annotations

import math
from dataclasses import replace

import pytest

from psyche_lightning.errors import ConfigError
from psyche_lightning.protocol.limits import PSYCHE_LIMITS, Limits, check_config, check_run_id
from psyche_lightning.protocol.state import CoordinatorConfig

# Each entry breaks one rule, in the order in which they are checked.
BROKEN: list[tuple[str, dict[str, float]]] = [
    ("epoch_time", {"epoch_time": 0.0}),
    ("warmup_time", {"warmup_time": 3600.0}),
    ("max_round_train_time", {"max_round_train_time": 0.0}),
    ("round_witness_time", {"round_witness_time": 0.0}),
    ("min_clients", {"min_clients": 0}),
    ("init_min_clients", {"init_min_clients": 0}),
    ("global_batch_size_start", {"global_batch_size_start": 0}),
    ("global_batch_size_end", {"global_batch_size_end": 0}),
    ("total_steps", {"total_steps": 0}),
    ("witness_nodes", {"witness_nodes": 2}),
    ("cooldown_time", {"cooldown_time": 0.0}),
    ("waiting_for_members_extra_time", {"waiting_for_members_extra_time": 0.0}),
    ("global_batch_size_warmup_tokens", {"global_batch_size_warmup_tokens": -1}),
    ("verification_percent", {"verification_percent": 1}),
]


def test_the_defaults_are_acceptable() -> None:
    check_config(CoordinatorConfig())
    check_config(CoordinatorConfig(), PSYCHE_LIMITS)


@pytest.mark.parametrize("first", range(len(BROKEN)))
def test_the_first_broken_rule_is_named(first: int) -> None:
    values: dict[str, float] = {}
    for _, broken in BROKEN[first:]:
        values.update(broken)
    with pytest.raises(ConfigError, match=rf"^{BROKEN[first][0]} is "):
        check_config(CoordinatorConfig(**values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("warmup_time", {"warmup_time": 0.0}),
        ("warmup_time", {"warmup_time": -1.0}),
        ("warmup_time", {"warmup_time": math.nan}),
        ("epoch_time", {"epoch_time": math.nan}),
        ("epoch_time", {"epoch_time": math.inf}),
        ("max_round_train_time", {"max_round_train_time": 3600.0}),
        ("init_min_clients", {"init_min_clients": 1025}),
        ("global_batch_size_end", {"global_batch_size_start": 3, "global_batch_size_end": 2}),
        ("cooldown_time", {"cooldown_time": math.inf}),
        ("global_batch_size_warmup_tokens", {"global_batch_size_warmup_tokens": 2**64}),
    ],
)
def test_other_values_out_of_range(field: str, values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"^{field} is "):
        check_config(CoordinatorConfig(**values))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        {"init_min_clients": 257},
        {"global_batch_size_end": 65536},
        {"min_clients": 40, "init_min_clients": 40, "witness_nodes": 33},
        {"waiting_for_members_extra_time": 256.0},
        {"warmup_time": 0.5},
    ],
)
def test_the_limits_of_psyches_layout_are_not_the_machines(values: dict[str, float]) -> None:
    config = CoordinatorConfig(**values)  # type: ignore[arg-type]
    check_config(config)
    with pytest.raises(ConfigError, match=f"^{list(values)[-1]} is "):
        check_config(config, PSYCHE_LIMITS)


def test_limits_can_be_chosen() -> None:
    config = replace(CoordinatorConfig(), init_min_clients=5)
    with pytest.raises(ConfigError, match="at most 4"):
        check_config(config, Limits(clients=4))


@pytest.mark.parametrize("run_id", ["", "x" * 33, "ü", ".hidden", "..", "a b", "a/b", "a\n", "\x1b[2J", "[/red]"])
def test_a_name_that_could_be_something_else_is_no_run_id(run_id: str) -> None:
    with pytest.raises(ConfigError, match="1 to 32 letters"):
        check_run_id(run_id)


@pytest.mark.parametrize("run_id", ["x" * 32, "gpt2.small_v-2", "-", "_", "7"])
def test_run_ids(run_id: str) -> None:
    check_run_id(run_id)
