"""Callbacks that ship with Lightning: each sees the run's parameters and works, or is refused before anything runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from support.fit import Fit, StopAt

from psyche_lightning import CoordinatorCallback, PsycheStrategy
from psyche_lightning.errors import ConfigError
from psyche_lightning.server.admin import CoordinatorAdmin

Make = Callable[..., Any]


class Moments(Callback):
    """The parameters that callbacks see, and the step and the epoch at which they see them."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, int, bytes]] = {}

    def note(self, moment: str, trainer: Trainer, module: LightningModule) -> None:
        values = b"".join(parameter.detach().numpy().tobytes() for parameter in module.parameters())
        self.seen.setdefault(moment, (trainer.global_step, trainer.current_epoch, values))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("fit", trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("sanity check", trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("train", trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.note("epoch", trainer, pl_module)


def fit_all(*fits: Fit) -> None:
    for fit in fits:
        error = fit.wait()
        if error is not None:
            raise error


def test_callbacks_see_the_parameters_of_the_run_from_the_beginning(
    classifier: Make, loader: Make, trainer: Make, create_run: Make, parameter_bytes: Make
) -> None:
    """An average of them ends equal too."""
    url, run = create_run(init_min_clients=2, total_steps=8)
    moments = [Moments(), Moments()]
    modules = [classifier(), classifier()]
    first = parameter_bytes(modules[0]), parameter_bytes(modules[1])
    fits = [
        Fit(
            trainer(strategy=PsycheStrategy(url, run), callbacks=[one, EMAWeightAveraging(decay=0.5)]),
            module,
            loader(),
            loader(),
        )
        for one, module in zip(moments, modules, strict=True)
    ]
    fit_all(*fits)
    assert moments[0].seen == moments[1].seen
    assert moments[0].seen.keys() == {"fit", "sanity check", "train", "epoch"}
    assert {value for _, _, value in moments[0].seen.values()} <= set(first)
    assert len({value for _, _, value in moments[0].seen.values()}) == 1
    assert parameter_bytes(modules[0]) == parameter_bytes(modules[1])


def test_who_comes_late_begins_with_the_step_and_the_epoch_of_the_run(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    start = {"start": {"step": 7, "data_index": 56}}
    url, run = create_run(start, total_steps=9, global_batch_size_start=8)

    class Scheduled(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Rate(Moments):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_fit_start(trainer, pl_module)
            self.rate = trainer.optimizers[0].param_groups[0]["lr"]

    moments = Rate()
    trainer(strategy=PsycheStrategy(url, run, manifest=start), callbacks=[moments]).fit(Scheduled(), loader())
    assert {(step, epoch) for step, epoch, _ in moments.seen.values()} == {(7, 1)}, "six rounds are a pass"
    assert moments.rate == pytest.approx(0.01 / 8)


# --- searches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [False, True])
def test_a_learning_rate_is_found_before_the_node_joins(
    others: bool, classifier: Make, loader: Make, trainer: Make, create_run: Make, parameter_bytes: Make
) -> None:
    url, run = create_run(total_steps=5) if others else (None, None)

    class Membership(LearningRateFinder):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            before = parameter_bytes(pl_module)
            super().on_fit_start(trainer, pl_module)
            assert parameter_bytes(pl_module) == before
            if others:
                status = CoordinatorAdmin(url).status(run)
                self.members = len(status["pending"]), status["step"]

    finder, stop, module = Membership(num_training_steps=30, max_lr=0.5), StopAt(100), classifier()
    fit = trainer(strategy=PsycheStrategy(url, run), max_steps=5, callbacks=[stop, finder], max_epochs=-1)
    fit.fit(module, loader(batch_size=4))
    assert finder.optimal_lr is not None
    assert len(finder.optimal_lr.results["lr"]) == 30
    assert module.lr == finder.optimal_lr.suggestion() != 0.01
    assert fit.optimizers[0].param_groups[0]["lr"] == module.lr
    assert stop.seen == [1, 2, 3, 4, 5]
    if others:
        assert finder.members == (0, 1)
        assert fit.strategy.session.entry.run_id == run


def test_a_tuner_joins_no_run(classifier: Make, loader: Make, trainer: Make, create_run: Make) -> None:
    url, run = create_run()

    class Sized(classifier):  # type: ignore[misc]
        batch_size = 2

        def train_dataloader(self) -> Any:
            return loader(batch_size=self.batch_size)

        val_dataloader = train_dataloader

    fit, module = trainer(strategy=PsycheStrategy(url, run), max_steps=60), Sized()
    found = Tuner(fit).lr_find(module, num_training=20)
    assert found is not None
    assert module.lr == found.suggestion()
    size = Tuner(fit).scale_batch_size(module, max_trials=3, steps_per_trial=2)
    assert size == module.batch_size == 8
    assert not [event for event in CoordinatorAdmin(url).status(run)["events"] if event["kind"] in ("joined", "left")]
    assert fit.strategy.session is None


@pytest.mark.parametrize("others", [False, True])
def test_a_batch_size_is_found_before_joining(
    others: bool, classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    url, run = create_run(global_batch_size_start=12) if others else (None, None)
    sizes: list[int] = []

    class Sized(classifier):  # type: ignore[misc]
        batch_size = 2

        def train_dataloader(self) -> Any:
            return loader(batch_size=self.batch_size)

        val_dataloader = train_dataloader

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            sizes.append(len(batch[0]))
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            return loss

    finder = BatchSizeFinder(max_trials=3, steps_per_trial=2)
    fit = trainer(strategy=PsycheStrategy(url, run), max_epochs=1, callbacks=[finder])
    fit.fit(Sized(), None)
    assert sizes[:6] == [2, 2, 4, 4, 8, 8]
    assert sizes[6:] == ([6] * 8 if others else [8] * 6), "the run's rounds of twelve are two micro-batches"
    assert fit.global_step == (4 if others else 6)


# --- refusals ---------------------------------------------------------------------------------------------------------


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])


class Milestones(LearningRateFinder):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lr_find(trainer, pl_module)


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (Unfreeze(), "Unfreeze adds parameters to the optimizer.*learning rate at 0 until then"),
        (StochasticWeightAveraging(0.1), "a pass over the data for BatchNorm's statistics.*Use EMAWeightAveraging"),
        (ModelPruning("l1_unstructured", amount=0.5), "ModelPruning changes the module's parameters.*after the run"),
        (Milestones(), "Milestones searches at the start of epochs.*use LearningRateFinder itself"),
    ],
)
def test_a_callback_that_a_run_cannot_have(
    callback: Callback, words: str, classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    url, run = create_run()
    moments = Moments()
    fit = trainer(strategy=PsycheStrategy(url, run), max_epochs=2, callbacks=[moments, callback])
    with pytest.raises(ConfigError, match=words):
        fit.fit(classifier(norm=True), loader())
    assert not moments.seen


def test_parameters_that_begin_later_rest_at_the_rate_zero(
    classifier: Make, loader: Make, trainer: Make, parameter_bytes: Make
) -> None:
    """What the error of BaseFinetuning advises."""

    class Later(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            groups = [{"params": self.net[2].parameters()}, {"params": self.net[0].parameters()}]
            optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)
            later = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: float(epoch >= 2)])
            return [optimizer], [later]

    class Rests(Callback):
        def __init__(self) -> None:
            self.seen: list[bytes] = []

        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.seen.append(parameter_bytes(pl_module.net[0]))

    rests, module = Rests(), Later()
    before = parameter_bytes(module.net[0])
    trainer(max_epochs=3, callbacks=[rests]).fit(module, loader())
    assert rests.seen[:2] == [before, before]
    assert rests.seen[2] != before


@pytest.mark.parametrize("how", ["unfreeze", "add"])
def test_parameters_that_join_during_training_are_refused(
    how: str, classifier: Make, loader: Make, trainer: Make
) -> None:
    class Changing(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            self.net[0].requires_grad_(False)
            return torch.optim.SGD(self.parameters() if how == "unfreeze" else self.net[2].parameters(), lr=0.1)

        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1 and how == "unfreeze":
                self.net[0].requires_grad_(True)
            elif self.current_epoch == 1:
                self.trainer.optimizers[0].add_param_group({"params": list(self.net[0].parameters())})

    fit = trainer(max_epochs=2)
    with pytest.raises(ConfigError, match="added, removed, frozen or unfrozen during training"):
        fit.fit(Changing(), loader())
    assert fit.global_step == 6


def test_weights_are_averaged_where_no_pass_for_batch_norm_is_needed(
    classifier: Make, loader: Make, trainer: Make, create_run: Make, parameter_bytes: Make
) -> None:
    url, run = create_run(init_min_clients=2)
    modules = [classifier(), classifier()]
    fits = [
        Fit(
            trainer(strategy=PsycheStrategy(url, run), max_epochs=3, callbacks=[StochasticWeightAveraging(0.01, 1)]),
            module,
            loader(),
        )
        for module in modules
    ]
    fit_all(*fits)
    assert parameter_bytes(modules[0]) == parameter_bytes(modules[1])


# --- checkpoints in a run with others ---------------------------------------------------------------------------------


class Cycle:
    """A schedule that ends with an error when it is stepped too far."""

    def configure_optimizers(self: Any) -> Any:
        optimizer = super().configure_optimizers()  # type: ignore[misc]
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class Rates(Callback):
    """The learning rate of each step."""

    def __init__(self) -> None:
        self.of: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.of[trainer.global_step + 1] = trainer.optimizers[0].param_groups[0]["lr"]


def test_a_node_alone_may_lower_its_rate_by_its_own_metric(classifier: Make, loader: Make, trainer: Make) -> None:
    class Plateau(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=100.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    rates = Rates()
    trainer(max_epochs=4, callbacks=[rates]).fit(Plateau(), loader(), loader())
    assert [rates.of[step] for step in (1, 7, 13, 19)] == pytest.approx([0.01, 0.001, 1e-4, 1e-5])


def test_a_module_may_be_validated_first_and_built_by_hooks(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    class Built(classifier):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.extra: torch.nn.Module | None = None

        def setup(self, stage: str) -> None:
            self.scale = 2.0

        def configure_model(self) -> None:
            self.extra = self.extra or torch.nn.Linear(2, 2)

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.extra(self.net(batch[0])) * self.scale, batch[1])

    url, run = create_run(total_steps=4)
    fit, module = trainer(strategy=PsycheStrategy(url, run)), Built()
    (before,) = fit.validate(module, loader(), verbose=False)
    weight = module.extra.weight.detach().clone()
    fit.fit(module, loader())
    (after,) = fit.validate(module, loader(), verbose=False)
    assert fit.global_step == 4
    assert after["val_loss"] < before["val_loss"]
    assert not torch.equal(weight, module.extra.weight)


def test_a_schedule_may_ask_for_the_number_of_steps(classifier: Make, loader: Make, trainer: Make) -> None:
    rates = Rates()

    class Cycled(Cycle, classifier):  # type: ignore[misc]
        pass

    fit = trainer(max_epochs=2, accumulate_grad_batches=2, callbacks=[rates])
    fit.fit(Cycled(), loader())
    assert fit.global_step == len(rates.of) == 6
    assert fit.lr_scheduler_configs[0].scheduler.total_steps == 6


def test_who_comes_back_with_a_checkpoint_goes_on_at_the_step_of_the_run(
    classifier: Make, loader: Make, trainer: Make, create_run: Make, tmp_path: Path, parameter_bytes: Make
) -> None:
    """Its schedule, too."""

    class Cycled(Cycle, classifier):  # type: ignore[misc]
        pass

    url, run = create_run(total_steps=12, init_min_clients=1, min_clients=1)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    first = trainer(
        strategy=PsycheStrategy(url, run, directory=tmp_path / "node"),
        max_steps=12,
        callbacks=[saving, StopAt(5)],
        enable_checkpointing=True,
        min_epochs=0,
    )
    first.fit(Cycled(), loader())
    assert first.global_step == 5
    rates = Rates()
    again = trainer(strategy=PsycheStrategy(url, run, directory=tmp_path / "node"), max_steps=12, callbacks=[rates])
    again.fit(Cycled(), loader(), ckpt_path=tmp_path / "step=2.ckpt")
    assert again.global_step == 12
    assert max(rates.of) == 12
    assert 6 <= min(rates.of) <= 7
    alone = Rates()
    trainer(max_steps=12, callbacks=[alone]).fit(Cycled(), loader())
    assert rates.of == {step: pytest.approx(alone.of[step]) for step in rates.of}


def test_a_checkpoint_of_a_later_step_than_the_run_s_is_refused(
    classifier: Make, loader: Make, trainer: Make, create_run: Make, tmp_path: Path
) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trainer(max_steps=4, callbacks=[saving], enable_checkpointing=True).fit(classifier(), loader())
    url, run = create_run()
    moments = Moments()
    fit = trainer(strategy=PsycheStrategy(url, run), max_steps=9, callbacks=[moments])
    with pytest.raises(ConfigError, match=f"checkpoint of step 4, but run '{run}' is at step [01].*without ckpt_path"):
        fit.fit(classifier(), loader(), ckpt_path=tmp_path / "step=4.ckpt")
    assert not moments.seen
    assert fit.global_step == 0


# --- as with the default strategy -------------------------------------------------------------------------------------


def test_a_strategy_takes_a_module_that_has_no_trainer(classifier: Make) -> None:
    strategy, module = PsycheStrategy(), classifier()
    strategy.connect(module)
    assert strategy.lightning_module is module


def test_a_trainer_can_be_copied_after_its_fit(classifier: Make, loader: Make, trainer: Make) -> None:
    fit = trainer(max_epochs=1)
    fit.fit(classifier(), loader())
    copied = copy.deepcopy(fit)
    assert copied.global_step == 6
    copied.fit_loop.max_epochs = 2
    copied.fit(classifier(), loader())
    assert (copied.global_step, fit.global_step) == (12, 6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_trains_nothing_moves_nothing(
    accumulate: int, classifier: Make, loader: Make, trainer: Make, parameter_bytes: Make
) -> None:
    class Idle(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor | None:
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            return loss if batch_idx == 1 else None

    class Seen(Callback):
        def __init__(self) -> None:
            self.values: list[bytes] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *of: Any) -> None:
            self.values.append(parameter_bytes(pl_module))

    seen, module = Seen(), Idle()
    before = parameter_bytes(module)
    fit = trainer(max_epochs=1, callbacks=[seen], accumulate_grad_batches=accumulate)
    fit.fit(module, loader())
    assert fit.global_step == len(seen.values) == 6 // accumulate
    assert seen.values[0] == before
    assert seen.values[1] != before
    assert set(seen.values[1:]) == {seen.values[1]}


class Skipping(Callback):
    """Counts epochs as the test of a strategy sees them."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, int]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append((trainer.current_epoch, trainer.global_step))


@pytest.mark.parametrize("at", [0, 2, 9])
@pytest.mark.parametrize("strategy", ["auto", "psyche"])
def test_a_module_may_skip_the_rest_of_an_epoch(
    strategy: str, at: int, classifier: Make, loader: Make, trainer: Make
) -> None:
    seen: list[torch.Tensor] = []

    class Skips(classifier):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == at else None

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append(batch[0])
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            return loss

    skipping = Skipping()
    fit = trainer(strategy=strategy, max_epochs=3, callbacks=[skipping])
    fit.fit(Skips(), loader())
    each = min(at, 6)
    assert skipping.epochs == [(0, each), (1, 2 * each), (2, 3 * each)]
    assert fit.fit_loop.batch_idx == min(at, 5)
    assert fit.global_step == len(seen) == 3 * each


def test_the_rest_of_an_epoch_of_a_run_with_others_cannot_be_skipped(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    class Skips(classifier):  # type: ignore[misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 2 else None

    fit = trainer(strategy=PsycheStrategy(*create_run()), max_epochs=1)
    with pytest.raises(ConfigError, match=r"on_train_batch_start returned -1.*Return None"):
        fit.fit(Skips(), loader())
    assert fit.global_step == 2


def test_a_second_fit_alone_may_have_other_data(classifier: Make, loader: Make, trainer: Make) -> None:
    skipping = Skipping()
    fit = trainer(max_epochs=2, callbacks=[skipping])
    fit.fit(classifier(), loader(batch_size=16))
    fit.fit_loop.max_epochs = 4
    fit.fit(classifier(), loader(batch_size=8))
    assert skipping.epochs == [(0, 3), (1, 6), (2, 12), (3, 18)]


def test_the_callback_of_the_run_comes_after_searches_and_before_all_others(
    classifier: Make, loader: Make, trainer: Make
) -> None:
    ours, finder, moments = CoordinatorCallback(), LearningRateFinder(num_training_steps=12), Moments()
    fit = trainer(max_steps=2, callbacks=[moments, ours, finder])
    fit.fit(classifier(), loader())
    assert fit.callbacks[:3] == [finder, ours, moments]


def test_a_backbone_is_refused_like_any_fine_tuning(classifier: Make, loader: Make, trainer: Make) -> None:
    class Backbone(classifier):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = self.net[0]

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    with pytest.raises(ConfigError, match="BackboneFinetuning adds parameters"):
        trainer(max_epochs=1, callbacks=[BackboneFinetuning()]).fit(Backbone(), loader())
