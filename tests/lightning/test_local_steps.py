"""Several steps of the user's own optimizer in each round."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision as FabricPrecision
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from support.fit import Fit, StopAt

from psyche_lightning import PsycheStrategy
from psyche_lightning.data.order import DataOrder
from psyche_lightning.distro import DistroConfig, LocalSteps
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning import PsycheFabricStrategy
from psyche_lightning.lightning.optimizers import TakenStep

Make = Callable[..., Any]
OPTIONS: dict[str, Any] = {"chunk": 8, "k": 6, "decay": 0.9, "local_steps": 3, "scale": 1.5}


class Watch(Callback):
    """Notes steps, rates, losses, and the parameters after each round."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.seen: list[bytes] = []
        self.losses: list[float] = []
        self.before = 0

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.before += 1

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(trainer.global_step)
        self.losses.append(float(outputs["loss"]))
        self.seen.append(bytes_of(module))


def bytes_of(module: torch.nn.Module) -> bytes:
    return b"".join(parameter.detach().numpy().tobytes() for parameter in module.parameters())


def by_hand(module: Any, dataset: Any, rounds: int, batch: int, clip: float | None = None) -> Watch:
    """A plain loop of AdamW within LocalSteps."""
    own, watch = module.configure_optimizers(), Watch()
    if isinstance(own, dict):
        own = own["optimizer"]
    config = DistroConfig(**OPTIONS)
    shared = LocalSteps(module.named_parameters(), own.param_groups[0]["lr"], config, config.scale)
    order, ids = DataOrder(len(dataset), True, 0), itertools.count(0, batch)
    for _ in range(rounds):
        losses = []
        with shared.working():
            for _ in range(config.local_steps):
                first = next(ids)
                rows = [dataset[i] for i in order.indices(first, first + batch)]
                own.zero_grad()
                loss = module.loss([torch.stack(part) for part in zip(*rows, strict=True)])
                loss.backward()
                if clip:
                    torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
                own.step()
                losses.append(float(loss.detach()))
        shared.apply([shared.encode()], shared.lr_bits())
        watch.losses.append(sum(losses) / len(losses))
        watch.seen.append(bytes_of(module))
    return watch


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_round_is_one_step_of_trainer_and_a_plain_loop_of_the_own_optimizer_to_the_bit(
    classifier: Make, loader: Make, trainer: Make, clip: float | None
) -> None:
    module, twin, watch = classifier(), classifier(), Watch()
    twin.load_state_dict(module.state_dict())
    fit = trainer(strategy=PsycheStrategy(**OPTIONS), max_steps=5, callbacks=[watch], gradient_clip_val=clip)
    fit.fit(module, loader(shuffle=True))
    expected = by_hand(twin, loader().dataset, 5, 8, clip)
    assert watch.steps == [1, 2, 3, 4, 5]
    assert watch.seen == expected.seen
    assert watch.losses == pytest.approx(expected.losses, rel=1e-5)
    assert watch.before == 15, "on_before_optimizer_step comes before each of the optimizer's steps"
    assert fit.num_training_batches == 2, "48 samples are two rounds of three batches of eight"


def test_each_local_step_may_have_several_micro_batches(classifier: Make, loader: Make, trainer: Make) -> None:
    module, twin, watch = classifier(), classifier(), Watch()
    twin.load_state_dict(module.state_dict())
    fit = trainer(strategy=PsycheStrategy(**OPTIONS), max_steps=4, callbacks=[watch], accumulate_grad_batches=2)
    fit.fit(module, loader(shuffle=True, batch_size=4))
    expected = by_hand(twin, loader().dataset, 4, 8)
    found, wanted = (torch.frombuffer(bytearray(one.seen[-1]), dtype=torch.float32) for one in (watch, expected))
    assert torch.allclose(found, wanted, atol=1e-3)
    assert watch.losses == pytest.approx(expected.losses, rel=1e-3)


def test_a_resumed_trainer_goes_on_to_the_bit(classifier: Make, loader: Make, trainer: Make, tmp_path: Path) -> None:
    def make(steps: int, folder: str) -> Any:
        saving = ModelCheckpoint(tmp_path / folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        strategy = PsycheStrategy(**OPTIONS)
        return trainer(strategy=strategy, max_steps=steps, callbacks=[saving, Watch()], enable_checkpointing=True)

    module = classifier()
    whole = make(5, "whole")
    whole.fit(module, loader(shuffle=True))
    seen = next(callback for callback in whole.callbacks if isinstance(callback, Watch)).seen
    resumed = make(5, "resumed")
    resumed.fit(classifier(), loader(shuffle=True), ckpt_path=tmp_path / "whole" / "step=2.ckpt")
    assert next(callback for callback in resumed.callbacks if isinstance(callback, Watch)).seen == seen[2:]


@pytest.mark.parametrize("step", [8, 9], ids=["between", "last"])
def test_a_trainer_that_ends_inside_a_round_goes_on_to_the_bit(
    classifier: Make, loader: Make, trainer: Make, tmp_path: Path, step: int
) -> None:
    class Breaks(Callback):
        def __init__(self) -> None:
            self.made = 0

        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
            self.made += 1
            if self.made == step:
                raise RuntimeError("in the middle of the third round")

    def fit(module: LightningModule, *callbacks: Callback, resumed: bool = False) -> list[bytes]:
        saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        watch = Watch()
        made = trainer(
            strategy=PsycheStrategy(**OPTIONS),
            max_steps=4,
            callbacks=[saving, watch, *callbacks],
            enable_checkpointing=True,
        )
        ends = pytest.raises(RuntimeError, match="in the middle") if callbacks else contextlib.nullcontext()
        with ends:
            made.fit(module, loader(shuffle=True), ckpt_path=tmp_path / "step=2.ckpt" if resumed else None)
        return watch.seen

    module = classifier()
    broken = copy.deepcopy(module)
    whole = fit(module)
    for file in tmp_path.iterdir():
        file.unlink()
    assert fit(broken, Breaks()) == whole[:2]
    assert bytes_of(broken) == whole[1], "of the round that ended nothing remains"
    assert fit(classifier(), resumed=True) == whole[2:]


@pytest.mark.parametrize("overlap", [False, True])
def test_two_nodes_end_with_the_same_bytes(
    classifier: Make, loader: Make, trainer: Make, create_run: Make, parameter_bytes: Make, overlap: bool
) -> None:
    url, run = create_run({"run": {"overlap": overlap}, "distro": OPTIONS}, init_min_clients=2, total_steps=6)
    modules = [classifier(), classifier()]
    strategies = [PsycheStrategy(url, run), PsycheStrategy(url, run)]
    fits = [
        Fit(trainer(strategy=strategy, gradient_clip_val=1.0), module, loader())
        for strategy, module in zip(strategies, modules, strict=True)
    ]
    before = parameter_bytes(modules[0])
    assert [fit.wait() for fit in fits] == [None, None]
    assert [fit.trainer.global_step for fit in fits] == [6, 6]
    assert parameter_bytes(modules[0]) == parameter_bytes(modules[1]) != before
    for strategy in strategies:
        assert strategy.session is not None
        assert strategy.session.entry.distro.local_steps == 3
        assert strategy.session.empty_rounds == 0
        assert strategy.session.samples == 24, "each node's share is three batches of its DataLoader"


def test_who_comes_back_has_the_state_of_its_own_optimizer(
    classifier: Make, loader: Make, trainer: Make, create_run: Make, tmp_path: Path
) -> None:
    url, run = create_run({"distro": OPTIONS}, total_steps=9, init_min_clients=1, min_clients=1)

    def fit(*callbacks: Callback) -> Any:
        strategy = PsycheStrategy(url, run, directory=tmp_path / "node")
        made = trainer(strategy=strategy, max_steps=9, callbacks=list(callbacks), min_epochs=0)
        made.fit(classifier(), loader())
        return made

    class First(Callback):
        step = math.nan

        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
            if math.isnan(self.step):
                self.step = max((float(state["step"]) for state in optimizer.state.values()), default=0.0)

    begins, again = First(), First()
    fit(begins, StopAt(4))
    last = fit(again)
    assert last.global_step == 9
    assert (begins.step, again.step) == (0, 12), "four rounds of three steps"


def test_schedulers_follow_the_rounds_and_the_rate_stays_within_one(
    classifier: Make, loader: Make, trainer: Make
) -> None:
    rates = []

    class Scheduled(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    trainer(strategy=PsycheStrategy(**OPTIONS), max_steps=3).fit(Scheduled(), loader())
    assert rates == pytest.approx([0.01] * 3 + [0.005] * 3 + [0.01 / 3] * 3)


def test_gradients_that_are_not_finite_cost_the_round_and_not_the_optimizer_s_state(
    classifier: Make, loader: Make, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class Bad(classifier):  # type: ignore[misc]
        batches = 0

        def on_after_backward(self) -> None:
            self.batches += 1
            if self.batches == 5:
                self.net[0].weight.grad.fill_(math.inf)

    module, watch = Bad(), Watch()
    fit = trainer(strategy=PsycheStrategy(**OPTIONS), max_steps=4, callbacks=[watch])
    with caplog.at_level(logging.WARNING):
        fit.fit(module, loader())
    assert "gradient of 'net.0.weight'" in caplog.text
    assert watch.steps == [1, 2, 3, 4]
    assert watch.seen[0] == watch.seen[1] != watch.seen[2]
    state = fit.optimizers[0].state[module.net[0].weight]
    assert state["step"] == 3 * 3 + 1
    assert torch.isfinite(state["exp_avg"]).all()


def test_a_loop_of_one_s_own_makes_every_step_itself(loader: Make, classifier: Make) -> None:
    module, twin = classifier(), classifier()
    twin.load_state_dict(module.state_dict())
    strategy = PsycheFabricStrategy(**OPTIONS)
    fabric = Fabric(strategy=strategy, accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(module.net, torch.optim.AdamW(module.net.parameters(), lr=0.01, weight_decay=0.1))
    batches, seen = 0, []
    try:
        data = fabric.setup_dataloaders(loader(shuffle=True))
        for x, y in itertools.chain(data, data):
            assert len(x) == 8
            optimizer.zero_grad()
            fabric.backward(torch.nn.functional.cross_entropy(model(x), y))
            optimizer.step()
            batches += 1
            seen.append(bytes_of(module))
    finally:
        strategy.close()
    assert batches == 12
    assert seen[2::3] == by_hand(twin, loader().dataset, 4, 8).seen


def test_what_cannot_make_local_steps_is_refused(classifier: Make, loader: Make, trainer: Make) -> None:
    class Searching(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    with pytest.raises(ConfigError, match=r"LBFGS .*AdamW or MuonAdamW"):
        trainer(strategy=PsycheStrategy(**OPTIONS), max_steps=1).fit(Searching(), loader())
    scaled = r'"16-mixed" scales gradients .*set local_steps to 0'
    half = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))  # on a CPU, Trainer has it as a plugin only
    with pytest.raises(ConfigError, match=scaled):
        trainer(strategy=PsycheStrategy(**OPTIONS), max_steps=1, plugins=[half]).fit(classifier(), loader())
    own = FabricPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fabric, module = Fabric(strategy=PsycheFabricStrategy(**OPTIONS), accelerator="cpu", plugins=[own]), classifier()
    with pytest.raises(ConfigError, match=scaled):
        fabric.setup(module.net, torch.optim.AdamW(module.net.parameters(), lr=0.01))
    for option, value in (("lookahead", True), ("removal", 0.5), ("float32_gradients", True)):
        with pytest.raises(ConfigError, match=f"distro.{option} is {value}, but local steps"):
            PsycheStrategy(**{**OPTIONS, option: value})
    with pytest.raises(ConfigError, match="belongs to local steps"):
        PsycheStrategy(scale=2.0)


def test_the_scale_of_rates_after_a_pause_holds_for_the_own_steps(classifier: Make) -> None:
    module = classifier()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    step = TakenStep(optimizer, module, DistroConfig(**OPTIONS))
    step.factor = 0.25
    weight = module.net[0].weight
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    with step.working():
        step()
        assert torch.allclose(before - weight, torch.tensor(0.25))
    assert torch.equal(weight, before)
    assert optimizer.param_groups[0]["lr"] == 1.0
