"""k and the number of local steps change at given steps of the run."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from support.fit import Fit, StopAt

from psyche_lightning import PsycheStrategy
from psyche_lightning.data.order import DataOrder
from psyche_lightning.distro import DisTrO, DistroConfig
from psyche_lightning.errors import ConfigError, ManifestMismatchError
from psyche_lightning.lightning import PsycheFabricStrategy

Make = Callable[..., Any]
VOTES: dict[str, Any] = {"chunk": 8, "decay": 0.9, "schedule": [{"from_step": 0, "k": 9}, {"from_step": 4, "k": 2}]}
LOCAL: dict[str, Any] = {
    "chunk": 8,
    "decay": 0.9,
    "local_steps": 1,
    "scale": 1.5,
    "schedule": [{"from_step": 0, "k": 9}, {"from_step": 4, "k": 2, "local_steps": 3}],
}
FORMS = pytest.mark.parametrize("options", [VOTES, LOCAL], ids=["votes", "local"])


class Watch(Callback):
    """Notes the parameters after each round, and the optimizer's steps in it."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.made: list[int] = []
        self.before = 0

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.before += 1

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(bytes_of(module))
        self.made.append(self.before)
        self.before = 0


def bytes_of(module: torch.nn.Module) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in module.parameters())


def test_trainer_sends_what_a_plain_loop_sends_to_the_bit(classifier: Make, loader: Make, trainer: Make) -> None:
    module, twin, watch = classifier(), classifier(), Watch()
    twin.load_state_dict(module.state_dict())
    trainer(strategy=PsycheStrategy(**VOTES), max_steps=6, callbacks=[watch]).fit(module, loader(shuffle=True))
    dataset, order, seen = loader().dataset, DataOrder(48, True, 0), []
    distro = DisTrO(twin.named_parameters(), 0.01, 0.1, DistroConfig(**VOTES))
    for step in range(1, 7):
        rows = [dataset[i] for i in order.indices(8 * step - 8, 8 * step)]
        distro.zero_grad()
        twin.loss([torch.stack(part) for part in zip(*rows, strict=True)]).backward()
        distro.apply([distro.encode(step)], distro.lr_bits(), step)
        seen.append(bytes_of(twin))
    assert watch.seen == seen


@FORMS
@pytest.mark.parametrize("resumed", [2, 3, 4])
def test_a_trainer_resumed_at_the_change_goes_on_to_the_bit(
    classifier: Make, loader: Make, trainer: Make, tmp_path: Path, options: dict[str, Any], resumed: int
) -> None:
    def make() -> tuple[Any, Watch]:
        saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        watch = Watch()
        strategy = PsycheStrategy(**options)
        fit = trainer(strategy=strategy, max_steps=6, callbacks=[saving, watch], enable_checkpointing=True)
        return fit, watch

    whole, expected = make()
    whole.fit(classifier(), loader(shuffle=True))
    again, watch = make()
    again.fit(classifier(), loader(shuffle=True), ckpt_path=tmp_path / "saved" / f"step={resumed}.ckpt")
    assert watch.seen == expected.seen[resumed:]
    assert expected.made == ([1, 1, 1, 3, 3, 3] if options is LOCAL else [1] * 6)


@FORMS
@pytest.mark.parametrize("overlap", [False, True])
def test_two_nodes_end_with_the_same_bytes(
    classifier: Make,
    loader: Make,
    trainer: Make,
    create_run: Make,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    overlap: bool,
) -> None:
    url, run = create_run({"run": {"overlap": overlap}, "distro": options}, init_min_clients=2, total_steps=6)
    modules = [classifier(), classifier()]
    strategies = [PsycheStrategy(url, run), PsycheStrategy(url, run, **options)]
    with caplog.at_level(logging.INFO):
        fits = [
            Fit(trainer(strategy=strategy), module, loader())
            for strategy, module in zip(strategies, modules, strict=True)
        ]
        before = bytes_of(modules[0])
        assert [fit.wait() for fit in fits] == [None, None]
    assert [fit.trainer.global_step for fit in fits] == [6, 6]
    assert bytes_of(modules[0]) == bytes_of(modules[1]) != before
    for strategy in strategies:
        assert strategy.session is not None
        assert strategy.session.empty_rounds == 0
        dense, sparse = strategy.session._step.distro.payload_sizes
        assert strategy.session.payload_bytes == 3 * dense + 3 * sparse
        assert strategy.session.mean_payload(6) == (dense + sparse) / 2
        assert 3 * dense < strategy.session.traffic.payloads_up <= 3 * dense + 3 * sparse
    assert "from step 4 on " in caplog.text
    assert f"2 of each chunk, {sparse:,} bytes" in caplog.text


@FORMS
def test_whoever_comes_back_after_the_change_goes_on_with_the_k_of_then(
    classifier: Make, loader: Make, trainer: Make, create_run: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    url, run = create_run({"distro": options}, init_min_clients=1, min_clients=1, total_steps=7)
    sent = []
    for callbacks in ([StopAt(3)], []):
        strategy = PsycheStrategy(url, run, directory=tmp_path)
        fit = trainer(strategy=strategy, max_steps=7, callbacks=callbacks, min_epochs=0)
        fit.fit(classifier(), loader())
        assert strategy.session is not None
        distro = strategy.session._step.distro
        sent.append({len(payload) for payload in distro._sent})
    assert fit.global_step == 7
    assert sent == [{distro.payload_size(1)}, {distro.payload_size(7)}]
    assert distro.nonce >= 6, "what was not sent before the change is not lost"


def test_a_node_with_another_schedule_is_refused(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    url, run = create_run({"distro": VOTES}, init_min_clients=2)
    other = [{"from_step": 0, "k": 9}, {"from_step": 5, "k": 2}]
    with pytest.raises(ManifestMismatchError, match=r"distro\.schedule\.1\.from_step: the run has 4, this node has 5"):
        trainer(strategy=PsycheStrategy(url, run, schedule=other, chunk=8)).fit(classifier(), loader())
    with pytest.raises(ManifestMismatchError, match=r"distro\.schedule: the run has \[.*, this node has \[\]"):
        trainer(strategy=PsycheStrategy(url, run, schedule=[])).fit(classifier(), loader())


@pytest.mark.parametrize("strategy", [PsycheStrategy, PsycheFabricStrategy])
def test_a_wrong_schedule_is_refused_at_once(strategy: Any) -> None:
    with pytest.raises(ConfigError, match=r"distro\.schedule\.0\.local_steps is 2, but distro\.local_steps is 0"):
        strategy(schedule=[{"from_step": 0, "local_steps": 2}])


def test_a_loop_of_one_s_own_gets_one_batch_for_each_step(classifier: Make, loader: Make) -> None:
    strategy = PsycheFabricStrategy(**LOCAL)
    fabric, module, sizes = Fabric(strategy=strategy, accelerator="cpu", devices=1), classifier(), []
    model, optimizer = fabric.setup(module.net, torch.optim.AdamW(module.net.parameters(), lr=0.01))
    try:
        data = fabric.setup_dataloaders(loader(shuffle=True))
        for x, y in itertools.islice(itertools.chain(data, data, data), 3 + 3 * 3):
            sizes.append(len(x))
            optimizer.zero_grad()
            fabric.backward(torch.nn.functional.cross_entropy(model(x), y))
            optimizer.step()
    finally:
        strategy.close()
    assert sizes == [24] * 3 + [8] * 9, "a share has as many samples as the rounds with most steps need"
