from __future__ import annotations

import json

import pytest

from psyche_lightning.errors import ManifestMismatchError
from psyche_lightning.protocol.manifest import merge
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.manifest import manifest


def test_it_is_plain_json_with_the_resolved_schedule() -> None:
    sections = manifest(load_recipe("demo", ["run.total_steps=33"]), fingerprint="abc")
    assert json.loads(json.dumps(sections)) == sections
    assert set(sections) == {"run", "distro", "model", "data", "optimizer"}
    assert sections["optimizer"]["schedule"]["total_steps"] == 33
    assert sections["data"]["fingerprint"] == "abc"


@pytest.mark.parametrize(
    "override",
    [
        "micro_batch_size=3",
        "accelerator=gpu",
        "precision=bf16-mixed",
        "threads=2",
        "node.directory=/elsewhere",
        "transport=memory",
        "patience=60",
        "data.config.path=/other/place",
        "model.path=/some/folder",
        "name=other",
        "max_round_train_time=99",
        "init_min_clients=2",
    ],
)
def test_what_nodes_may_choose_for_themselves_is_not_in_it(override: str) -> None:
    assert manifest(load_recipe("demo", [override])) == manifest(load_recipe("demo"))


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("overlap=true", "run.overlap"),
        ("seed=9", "run.seed"),
        ("digest_every=3", "run.digest_every"),
        ("keep_bytes=1000000", "run.keep_bytes"),
        ("cold_start_warmup_steps=2", "run.cold_start_warmup_steps"),
        ("k=3", "distro.k"),
        ("lookahead=true", "distro.lookahead"),
        ("model.config.hidden_size=64", "model.config.hidden_size"),
        ("dtype=bfloat16", "model.dtype"),
        ("seq_len=32", "data.seq_len"),
        ("data.config.max_bytes=5000", "data.config.max_bytes"),
        ("lr=1e-4", "optimizer.schedule.base_lr"),
        ("warmup_steps=3", "optimizer.schedule.warmup_steps"),
        ("run.total_steps=50", "optimizer.schedule.total_steps"),
        ("clip_grad_norm=2", "optimizer.clip_grad_norm"),
        ("weight_decay=0.5", "optimizer.weight_decay"),
    ],
)
def test_a_node_that_differs_is_refused_with_the_field(override: str, field: str) -> None:
    run, node = manifest(load_recipe("demo")), manifest(load_recipe("demo", ["lr=3e-4", override]))
    run["optimizer"]["schedule"] |= {"base_lr": 3e-4}
    with pytest.raises(ManifestMismatchError) as error:
        merge(run, node)
    assert [name for name, _, _ in error.value.differences] == [field]
