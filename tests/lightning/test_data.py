"""Data in a run: servers that die in mid-run, data that changes or does not fit, look-ahead and positions."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Dataset

from psyche_lightning.data.serve import FileServer
from psyche_lightning.errors import ConfigError, DataError, ManifestMismatchError
from psyche_lightning.lightning import session as sessions
from psyche_lightning.lightning.loader import RoundLoader
from psyche_lightning.node.participant import RoundWork
from psyche_lightning.recipe import load_recipe
from psyche_lightning.recipe.config import DataSection, OptimizerSection, Recipe
from psyche_lightning.server.admin import CoordinatorAdmin
from psyche_lightning.train.module import CausalModule, ProviderDataset
from psyche_lightning.train.runner import check_data, train_recipe

Make = Callable[..., Any]
SEQ_LEN = 32
# Nodes are threads of this process, and Lightning's bf16-true sets the whole process' default dtype.
PLAIN = ["run.overlap=false", "model.dtype=float32", "trainer.precision=32-true", "trainer.validate_every=0"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FileServer]:
    folder = tmp_path / "tokens"
    folder.mkdir()
    np.random.default_rng(0).integers(0, 256, SEQ_LEN * 200, dtype=np.uint16).tofile(folder / "a.bin")
    with FileServer(folder) as running:
        yield running


def recipe_of(server: FileServer, *overrides: str, **config: Any) -> Recipe:
    loaded = load_recipe("hf-llama", [*PLAIN, *overrides], twin=True)
    given = {"url": f"{server.url}/a.bin", "vocab_size": 256, "fetch": {"retry_seconds": 0.2}, **config}
    return replace(loaded, data=DataSection("tokens", given, SEQ_LEN))


class Outage(Callback):
    """Stops a server after one step, and starts it again when a node declined some rounds."""

    def __init__(self, server: FileServer, after: int, rounds: int) -> None:
        self.server = server
        self.after = after
        self.rounds = rounds
        self.lost = 0
        self.down = False

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        submit, decline = sessions.Session.submit, sessions.Session.decline
        lock = threading.Lock()

        def submitted(session: Any, work: RoundWork, *arguments: Any) -> bool:
            with lock:
                if work.step == self.after and not self.down and not self.lost:
                    self.down = True
                    self.server.stop()
            return submit(session, work, *arguments)

        def declined(session: Any, work: RoundWork, error: DataError) -> bool:
            applied = decline(session, work, error)
            with lock:
                self.lost += 1
                if self.lost >= self.rounds and self.down:
                    self.down = False
                    self.server.start()
            return applied

        monkeypatch.setattr(sessions.Session, "submit", submitted)
        monkeypatch.setattr(sessions.Session, "decline", declined)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("micro", [1, 4])
def test_a_server_that_dies_for_a_while_costs_its_rounds_and_no_more(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, micro: int
) -> None:
    """With micro-batches of one sample, some rounds lose their samples when training has begun."""
    outage = Outage(server, after=3, rounds=2)
    outage.watch(monkeypatch)
    with caplog.at_level(logging.WARNING, "psyche_lightning"):
        result = train_recipe(
            recipe_of(server, f"micro_batch_size={micro}", "total_steps=14"), directory=tmp_path / "n"
        )
    assert result["steps"] >= 14
    assert outage.lost >= 2
    warnings = [text for text in caplog.messages if "stay open" in text]
    assert len(warnings) == outage.lost
    assert "this node contributes nothing to it, and its data ids" in warnings[0]
    assert "no connection to 127.0.0.1" in warnings[0]
    trained = [row["step"] for row in rows(tmp_path / "n")]
    assert trained[:3] == [1, 2, 3]
    assert trained[-1] == result["steps"]
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path / "n"))


def test_two_nodes_go_on_while_one_has_no_samples(
    server: FileServer, tmp_path: Path, create_run: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One reads its own copy, the other the server, which dies: same samples, same run, same parameters."""
    url, run = create_run(init_min_clients=2, total_steps=12, global_batch_size_start=4, global_batch_size_end=4)
    outage = Outage(server, after=3, rounds=2)
    outage.watch(monkeypatch)
    remote = recipe_of(server, "total_steps=12")
    config = {"path": str(tmp_path / "tokens"), "vocab_size": 256}
    local = replace(remote, data=DataSection("tokens", config, SEQ_LEN))
    results: dict[int, dict[str, Any]] = {}

    def node(number: int, recipe: Recipe) -> None:
        results[number] = train_recipe(recipe, coordinator_url=url, run_id=run, directory=tmp_path / str(number))

    threads = [threading.Thread(target=node, args=pair, daemon=True) for pair in enumerate((local, remote))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert results[0]["digest"] == results[1]["digest"]
    assert outage.lost >= 2
    first, second = ({row["step"] for row in rows(tmp_path / str(number))} for number in (0, 1))
    assert first >= set(range(1, 13)), "the node that had its samples trained every round"
    assert len(second & set(range(1, 13))) == 12 - outage.lost
    assert CoordinatorAdmin(url).status(run)["phase"] == "finished"


def test_a_node_that_never_gets_samples_leaves(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "LOST_ROUNDS", 3)
    outage = Outage(server, after=2, rounds=1000)
    outage.watch(monkeypatch)
    try:
        with pytest.raises(
            DataError, match=r"leaves the run, because its samples were unavailable in 3 rounds in a row"
        ):
            train_recipe(recipe_of(server, "total_steps=30"), directory=tmp_path / "n")
        assert outage.lost == 2
    finally:
        server.start()


def test_data_that_changes_under_way_ends_the_node_s_part(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = sessions.Session.submit

    def submitted(session: Any, work: RoundWork, *arguments: Any) -> bool:
        if work.step == 3:
            np.zeros(SEQ_LEN * 300, np.uint16).tofile(tmp_path / "tokens" / "a.bin")
        return submit(session, work, *arguments)

    monkeypatch.setattr(sessions.Session, "submit", submitted)
    with pytest.raises(DataError, match=r"a.bin has changed: at the start it had 12800 bytes, now it has 19200"):
        train_recipe(recipe_of(server, "total_steps=30"), directory=tmp_path / "n")


def test_a_joiner_with_other_data_is_refused_with_the_field(
    server: FileServer, tmp_path: Path, create_run: Make
) -> None:
    url, run = create_run(init_min_clients=2, total_steps=2)
    other = tmp_path / "other"
    other.mkdir()
    np.random.default_rng(1).integers(0, 256, SEQ_LEN * 200, dtype=np.uint16).tofile(other / "a.bin")
    recipe = recipe_of(server)

    def first() -> None:
        train_recipe(recipe, coordinator_url=url, run_id=run, directory=tmp_path / "1")

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    admin = CoordinatorAdmin(url)
    while not admin.status(run)["pending"]:
        assert thread.is_alive()
        time.sleep(0.05)
    wrong = replace(recipe, data=DataSection("tokens", {"path": str(other), "vocab_size": 256}, SEQ_LEN))
    with pytest.raises(ManifestMismatchError, match=r"data\.fingerprint") as caught:
        train_recipe(wrong, coordinator_url=url, run_id=run, directory=tmp_path / "2")
    assert "12800 bytes" in str(caught.value)
    right = replace(recipe, data=DataSection("tokens", {"path": str(tmp_path / "tokens"), "vocab_size": 256}, SEQ_LEN))
    train_recipe(right, coordinator_url=url, run_id=run, directory=tmp_path / "3")
    thread.join(240)
    assert not thread.is_alive()


def test_a_model_too_small_for_the_tokens(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the data has 300 token ids and the model has 256"):
        train_recipe(recipe_of(server, vocab_size=300), directory=tmp_path / "n")


def test_tokens_of_another_tokenizer(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"token ids up to .*, but the vocabulary has 100: another tokenizer made the data"
    ):
        train_recipe(recipe_of(server, vocab_size=100), directory=tmp_path / "n")


def test_an_address_that_does_not_exist(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"b.bin does not exist"):
        train_recipe(recipe_of(server, url=f"{server.url}/b.bin"), directory=tmp_path / "n")


# --- positions ------------------------------------------------------------------------------------------------------


class Positioned:
    """Samples that hold two texts each."""

    vocab_size, seq_len, tokenizer = 64, 8, None

    def __len__(self) -> int:
        return 4

    def samples(self, start: int, stop: int) -> list[dict[str, torch.Tensor]]:
        ids = torch.arange(8)
        return [{"input_ids": ids + i, "labels": ids + i, "position_ids": ids % 4} for i in range(start, stop)]

    def validation(self) -> list[dict[str, torch.Tensor]]:
        return self.samples(0, 2)


def test_positions_reach_the_model() -> None:
    recipe = load_recipe("hf-llama", ["model.config.vocab_size=64"], twin=True)
    from psyche_lightning.plugins import load_plugins

    model = load_plugins().models()["hf"](recipe.model.options)
    check_data(model, Positioned())
    module = CausalModule(model, OptimizerSection(), recipe.schedule)
    batch = next(iter(DataLoader(ProviderDataset(Positioned()), batch_size=2)))
    packed = module.training_step(batch, 0)
    plain = module.training_step({name: batch[name] for name in ("input_ids", "labels")}, 0)
    alone = [
        model(input_ids=part, labels=part).logits for part in (batch["input_ids"][:, :4], batch["input_ids"][:, 4:])
    ]
    whole = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    assert torch.allclose(whole, torch.cat(alone, 1), atol=1e-5), "the texts do not see each other"
    assert packed.item() != plain.item()


def test_a_model_without_positions_is_refused() -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: Any, labels: Any = None) -> Any:
            return None

    with pytest.raises(ConfigError, match="has position_ids, which Plain does not take"):
        check_data(Plain(), Positioned())


# --- loaders of one's own -------------------------------------------------------------------------------------------


class Sometimes(Dataset[torch.Tensor]):
    """A user's data set some of whose samples are away."""

    def __init__(self, away: set[int]) -> None:
        self.away = away
        self.told: list[list[int]] = []

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self.away:
            raise DataError(f"sample {index} is away", ids=[index])
        return torch.full((6,), float(index))

    def prefetch(self, indices: list[int]) -> None:
        self.told.append(indices)


def works(*stretches: tuple[int, int]) -> Iterator[RoundWork]:
    return (RoundWork(0, height, height + 1, (pair,)) for height, pair in enumerate(stretches))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_passes_over_rounds_without_samples(workers: int) -> None:
    declined: list[tuple[RoundWork, DataError]] = []
    user = DataLoader(Sometimes({5}), batch_size=4, num_workers=workers)
    loader = RoundLoader(
        user, 8, 0, lambda: works((0, 4), (4, 8), (8, 12)), decline=lambda *told: declined.append(told)
    )
    try:
        assert [int(batch[0, 0]) for batch in loader] == [0, 8]
    finally:
        loader.close()
    [(work, error)] = declined
    assert work.batch == ((4, 8),)
    assert "sample 5 is away" in str(error)


def test_without_a_run_a_failure_is_one() -> None:
    loader = RoundLoader(DataLoader(Sometimes({5}), batch_size=4), 8, 0, lambda: works((4, 8)))
    with pytest.raises(DataError, match="sample 5 is away"):
        next(iter(loader))


def test_a_data_set_is_told_what_will_be_asked_for() -> None:
    data = Sometimes(set())
    loader = RoundLoader(DataLoader(data, batch_size=2), 8, 0, lambda: works((4, 8)), upcoming=lambda: (22, 26))
    next(iter(loader))
    assert data.told == [[4, 5, 6, 7], [22, 23, 0, 1]]
    workers = Sometimes(set())
    assert RoundLoader(DataLoader(workers, num_workers=1), 8, 0, lambda: works())._ahead is None


def test_a_loop_of_one_s_own_passes_over_them_too() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, strategy="psyche")
    model = torch.nn.Linear(6, 1)
    module, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    data = Sometimes({5, 6})
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=4))
    seen = []
    for batch in loader:
        seen.append(int(batch[0, 0]))
        fabric.backward(module(batch).mean())
        optimizer.step()
        optimizer.zero_grad()
    strategy: Any = fabric.strategy
    strategy.close()
    assert 4 not in seen
    assert seen[:2] == [0, 8]


def test_a_round_that_loses_samples_in_mid_training_is_declined(
    classifier: Make, trainer: Make, loader: Make, monkeypatch: pytest.MonkeyPatch, parameter_bytes: Make
) -> None:
    """Sample 13 is in the second micro-batch of the second round, the first of which is loaded by then."""
    plain = loader().dataset

    class Away(Dataset[Any]):
        def __len__(self) -> int:
            return len(plain)

        def __getitem__(self, index: int) -> Any:
            if index == 13:
                raise DataError("sample 13 is away")
            return plain[index]

    declined: list[int] = []
    decline = sessions.Session.decline
    after: list[bytes] = []

    def declining(session: Any, work: RoundWork, error: DataError) -> bool:
        declined.append(work.step)
        after.append(parameter_bytes(module))
        applied = decline(session, work, error)
        after.append(parameter_bytes(module))
        return applied

    monkeypatch.setattr(sessions.Session, "decline", declining)

    class Undecayed(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    module = Undecayed()
    fit = trainer(max_steps=4, accumulate_grad_batches=2)
    fit.fit(module, DataLoader(Away(), batch_size=4))
    assert declined == [2]
    assert fit.global_step == 4
    assert after[0] == after[1], "an abstention changes nothing"
