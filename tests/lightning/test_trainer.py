"""What a Trainer user expects, in a run of one process."""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, default_collate

from psyche_lightning import CoordinatorCallback, MuonAdamW, PsycheStrategy
from psyche_lightning.data.order import DataOrder
from psyche_lightning.distro import DisTrO, DistroConfig

Make = Callable[..., Any]


class Watch(Callback):
    """Notes what callbacks see."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rates: list[float] = []
        self.seen: list[bytes] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.steps.append(trainer.global_step)
        self.seen.append(b"".join(p.detach().numpy().tobytes() for p in module.parameters()))


def by_hand(module: Any, dataset: Any, *, steps: int, batch: int, shuffle: bool, **config: Any) -> list[bytes]:
    """The parameters after each step of a plain loop with DisTrO."""
    optimizer = DisTrO(module.named_parameters(), lr=module.lr, weight_decay=0.1, config=DistroConfig(**config))
    order, seen = DataOrder(len(dataset), shuffle, 0), []
    for step in range(steps):
        indices = order.indices(step * batch, (step + 1) * batch)

        def closure(indices: list[int] = indices) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = module.loss(
                [torch.stack(part) for part in zip(*(dataset[i] for i in indices), strict=True)]
            )
            loss.backward()
            return loss

        optimizer.step(closure)
        seen.append(b"".join(p.detach().numpy().tobytes() for p in module.parameters()))
    return seen


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_run_of_one_is_a_plain_loop_with_distro_to_the_bit(
    classifier: Make, loader: Make, trainer: Make, lookahead: bool
) -> None:
    module, watch = classifier(), Watch()
    twin = classifier()
    twin.load_state_dict(module.state_dict())
    strategy = PsycheStrategy(k=4, lookahead=lookahead)
    trainer(strategy=strategy, max_steps=9, callbacks=[watch]).fit(module, loader(shuffle=True))
    expected = by_hand(twin, loader().dataset, steps=9, batch=8, shuffle=True, k=4, lookahead=lookahead)
    assert watch.steps == list(range(1, 10))
    assert watch.seen == expected


def test_accumulated_batches_are_one_round_with_the_mean_gradient(
    classifier: Make, loader: Make, trainer: Make
) -> None:
    class Largest(Callback):
        most = 0

        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
            self.most = max(self.most, len(batch[0]))

    module, largest, watch = classifier(), Largest(), Watch()
    twin = classifier()
    twin.load_state_dict(module.state_dict())
    fit = trainer(max_epochs=2, accumulate_grad_batches=3, callbacks=[largest, watch])
    fit.fit(module, loader())
    assert fit.global_step == 4, "48 samples, 24 a round, two passes"
    assert largest.most == 8
    assert fit.accumulate_grad_batches == 3
    expected = by_hand(twin, loader().dataset, steps=4, batch=24, shuffle=False)
    ours, theirs = (torch.frombuffer(bytearray(b), dtype=torch.float32) for b in (watch.seen[0], expected[0]))
    # Gradients of micro-batches are summed in another order, so that a vote of nearly equal strength may differ.
    assert ((ours - theirs).abs() > 1e-6).float().mean() < 0.05


def test_micro_batches_have_the_gradient_and_the_loss_of_the_whole_share(
    classifier: Make, loader: Make, trainer: Make
) -> None:
    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
            self.gradients = [p.grad.clone() for p in module.parameters()]

        def on_train_batch_end(
            self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.loss = outputs["loss"]

    module, notes = classifier(), Gradients()
    strategy = PsycheStrategy(global_batch_size=11)
    twin = classifier()
    twin.load_state_dict(module.state_dict())
    trainer(strategy=strategy, max_steps=1, callbacks=[notes]).fit(module, loader(batch_size=4))
    x, y = loader().dataset[:11]
    loss = twin.loss([x, y])
    loss.backward()
    torch.testing.assert_close(notes.loss, loss.detach())
    torch.testing.assert_close(notes.gradients, [p.grad for p in twin.parameters()])


def test_samples_that_the_collate_function_leaves_out_add_nothing(
    classifier: Make, loader: Make, trainer: Make, parameter_bytes: Make
) -> None:
    """A round of nothing else moves nothing, as a batch that is None does with the default strategy."""
    collated: list[int] = []

    def collate(items: list[Any]) -> Any:
        collated.append(len(items))
        return None if len(collated) in (1, 2, 3, 5) else default_collate(items)

    class Notes(Callback):
        seen: list[bytes] = []  # noqa: RUF012 - one fit

        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
            self.gradients = [p.grad.clone() for p in module.parameters()]

        def on_train_batch_end(
            self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            self.seen.append(parameter_bytes(module))
            self.outputs = outputs

    module, twin, notes = classifier(), classifier(), Notes()
    twin.load_state_dict(module.state_dict())
    before = parameter_bytes(module)
    fit = trainer(strategy=PsycheStrategy(global_batch_size=12), max_steps=2, callbacks=[notes])
    fit.fit(module, loader(batch_size=4, collate_fn=collate))
    assert collated == [4] * 6
    assert notes.seen[0] == before
    assert notes.seen[1] != before
    loss = twin.loss(loader().dataset[[12, 13, 14, 15, 20, 21, 22, 23]])
    loss.backward()
    torch.testing.assert_close(notes.outputs["loss"], loss.detach())
    torch.testing.assert_close(notes.gradients, [p.grad for p in twin.parameters()])


def test_max_epochs_counts_passes_over_the_data(classifier: Make, loader: Make, trainer: Make) -> None:
    fit = trainer(max_epochs=2)
    fit.fit(classifier(), loader(batch_size=10, num_workers=0))
    assert (fit.current_epoch, fit.global_step) == (2, 10), "five rounds of ten samples hold 48"


def test_max_steps_ends_the_run_and_leaves_no_thread(classifier: Make, loader: Make, trainer: Make) -> None:
    before = set(threading.enumerate())
    fit = trainer(max_steps=7)
    fit.fit(classifier(), loader())
    assert fit.global_step == 7
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()


def test_an_exception_of_the_module_ends_the_run_cleanly(classifier: Make, loader: Make, trainer: Make) -> None:
    class Broken(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 2:
                raise ZeroDivisionError("as a user's module may")
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            return loss

    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError):
        trainer(max_steps=7).fit(Broken(), loader())
    assert {thread.name for thread in set(threading.enumerate()) - before} == set()


def test_logged_values_reach_callbacks_and_the_csv_logger(
    classifier: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path)
    callback = CoordinatorCallback(log_every=2)
    fit = trainer(max_steps=6, logger=logger, log_every_n_steps=1, callbacks=[callback])
    fit.fit(classifier(), loader(), loader())
    assert {"loss", "loss_epoch", "val_loss", "psyche/clients"} <= fit.callback_metrics.keys()
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["loss_step"]] == [0, 1, 2, 3, 4, 5]
    assert {row["psyche/clients"] for row in rows if int(row["step"]) >= 2 and row["loss_step"]} == {"1.0"}
    assert fit.callbacks.count(callback) == 1


def test_the_callback_is_added_once(classifier: Make, loader: Make, trainer: Make) -> None:
    fit = trainer(max_steps=2)
    fit.fit(classifier(), loader())
    fit.fit_loop.epoch_loop.max_steps = 4
    fit.fit(classifier(), loader())
    assert fit.global_step == 4
    assert sum(isinstance(callback, CoordinatorCallback) for callback in fit.callbacks) == 1


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, MuonAdamW])
def test_checkpoints_hold_published_parameters_and_a_run_goes_on_from_them(
    classifier: Make, loader: Make, trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Make
) -> None:
    def configured(module: Any) -> Any:
        return optimizer(module if optimizer is MuonAdamW else module.parameters(), lr=0.01)

    monkeypatch.setattr(type(classifier()), "configure_optimizers", configured)

    def make(steps: int, folder: str) -> Any:
        saving = ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_top_k=-1, filename="{step}")
        return trainer(max_steps=steps, callbacks=[saving, Watch()], enable_checkpointing=True)

    module = classifier()
    start = {name: value.clone() for name, value in module.state_dict().items()}
    whole = make(9, "whole")
    whole.fit(module, loader(shuffle=True))
    saved = torch.load(tmp_path / "whole" / "step=6.ckpt", weights_only=True)
    seen = next(callback for callback in whole.callbacks if isinstance(callback, Watch)).seen
    assert b"".join(value.numpy().tobytes() for value in saved["state_dict"].values()) == seen[5]
    assert saved["global_step"] == 6

    again = classifier()
    again.load_state_dict(start)
    resumed = make(9, "resumed")
    resumed.fit(again, loader(shuffle=True), ckpt_path=tmp_path / "whole" / "step=6.ckpt")
    assert next(callback for callback in resumed.callbacks if isinstance(callback, Watch)).steps == [7, 8, 9]
    assert next(callback for callback in resumed.callbacks if isinstance(callback, Watch)).seen == seen[6:]


def test_early_stopping_ends_the_node(classifier: Make, loader: Make, trainer: Make) -> None:
    stop = EarlyStopping("val_loss", patience=1, min_delta=100.0)
    fit = trainer(max_epochs=50, callbacks=[stop])
    fit.fit(classifier(), loader(), loader())
    assert fit.current_epoch < 5
    assert stop.stopped_epoch > 0


def test_the_progress_bar_counts_rounds(classifier: Make, loader: Make, trainer: Make) -> None:
    bar = TQDMProgressBar(refresh_rate=1)
    fit = trainer(max_epochs=1, callbacks=[bar], enable_progress_bar=True)
    fit.fit(classifier(), loader())
    assert (bar.train_progress_bar.n, bar.train_progress_bar.total) == (6, 6)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_applies_to_the_gradient_of_the_whole_round(
    classifier: Make, loader: Make, trainer: Make, algorithm: str
) -> None:
    limit = 1e-3
    norms: list[float] = []

    class Clipped(classifier):  # type: ignore[misc]
        def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
            super().configure_gradient_clipping(optimizer, **options)
            gradients = torch.cat([p.grad.flatten() for p in self.parameters()])
            norms.append(float(gradients.norm() if algorithm == "norm" else gradients.abs().max()))

    options = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": 2}
    trainer(max_steps=2, **options).fit(Clipped(), loader())
    assert norms == pytest.approx([limit, limit], rel=1e-3)


def test_bf16_true_has_parameters_in_bfloat16_that_move(classifier: Make, loader: Make, trainer: Make) -> None:
    module = classifier(lr=1e-4)
    before = [parameter.detach().bfloat16() for parameter in module.parameters()]
    trainer(max_steps=40, precision="bf16-true").fit(module, loader())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert not all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_bf16_mixed_computes_in_bfloat16_and_steps_in_float32(classifier: Make, loader: Make, trainer: Make) -> None:
    kinds: set[torch.dtype] = set()

    class Noting(classifier):  # type: ignore[misc]
        def loss(self, batch: Any) -> torch.Tensor:
            kinds.add(self.net(batch[0]).dtype)
            loss: torch.Tensor = super().loss(batch)
            return loss

    module = Noting()
    fit = trainer(max_steps=3, precision="bf16-mixed", accumulate_grad_batches=2)
    fit.fit(module, loader())
    assert fit.global_step == 3
    assert kinds == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())


def test_workers_load_each_sample_once_a_pass(classifier: Make, loader: Make, trainer: Make) -> None:
    seen: list[torch.Tensor] = []

    class Noting(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append(batch[0])
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            return loss

    fit = trainer(max_epochs=2)
    fit.fit(Noting(), loader(num_workers=2, shuffle=True, batch_size=12))
    assert fit.global_step == 8
    data = loader().dataset.tensors[0]
    passes = [torch.cat(seen[:4]), torch.cat(seen[4:])]
    for one in passes:
        assert sorted(one.tolist()) == sorted(data.tolist())
    assert not torch.equal(*passes)


def test_schedulers_of_the_user_s_optimizer_set_the_learning_rate(
    classifier: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    class Scheduled(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    watch = Watch()
    monitor = LearningRateMonitor()
    fit = trainer(max_steps=4, callbacks=[watch, monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    module = Scheduled(lr=0.5)
    fit.fit(module, loader())
    assert watch.rates == pytest.approx([0.5, 0.5 / 2, 0.5 / 3, 0.5 / 4])
    values = [torch.frombuffer(bytearray(raw), dtype=torch.float32) for raw in watch.seen]
    for before, after, lr in zip(values, values[1:], watch.rates[1:], strict=False):
        moved = (after - before * (1 - lr * 0.1)).abs()
        assert float(moved.max()) == pytest.approx(lr, rel=1e-4)


def test_parameter_groups_keep_their_rates_and_what_is_frozen_stays(
    classifier: Make, loader: Make, trainer: Make, parameter_bytes: Callable[[torch.nn.Module], bytes]
) -> None:
    class Grouped(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            self.net[0].requires_grad_(False)
            groups = [{"params": self.net[2].weight, "lr": 0.0}, {"params": self.net[2].bias, "weight_decay": 0.0}]
            return torch.optim.Adam(groups, lr=0.25)

    module = Grouped()
    before = {name: value.clone() for name, value in module.named_parameters()}
    trainer(max_steps=1).fit(module, loader())
    after = dict(module.named_parameters())
    assert torch.equal(after["net.2.weight"], before["net.2.weight"])
    assert torch.equal(after["net.0.weight"], before["net.0.weight"])
    step = (after["net.2.bias"] - before["net.2.bias"]).detach().abs()
    assert set(step.round(decimals=4).tolist()) <= {0.0, 0.25}
    assert step.any()


def test_a_batch_without_a_finite_gradient_leaves_the_parameters_to_weight_decay(
    classifier: Make, loader: Make, trainer: Make, caplog: pytest.LogCaptureFixture
) -> None:
    class Diverging(classifier):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(batch, batch_idx)
            return loss * float("inf") if batch_idx == 1 else loss

    watch = Watch()
    fit = trainer(max_steps=3, callbacks=[watch])
    fit.fit(Diverging(), loader())
    assert fit.global_step == 3
    first, second = (torch.frombuffer(bytearray(raw), dtype=torch.float32) for raw in watch.seen[:2])
    torch.testing.assert_close(second, first * (1 - 0.01 * 0.1))
    assert "norm" in caplog.text


def test_validating_and_testing_need_no_run(
    classifier: Make, loader: Make, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSYCHE_COORDINATOR", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("PSYCHE_RUN", "none")

    class Predicting(classifier):  # type: ignore[misc]
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", self.loss(batch))

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            out: torch.Tensor = self.net(batch[0])
            return out

    fit, module = trainer(), Predicting()
    assert "val_loss" in fit.validate(module, loader(), verbose=False)[0]
    assert "test_loss" in fit.test(module, loader(), verbose=False)[0]
    assert len(fit.predict(module, loader())) == 6


def test_validation_after_each_pass_sees_the_published_parameters(
    classifier: Make, loader: Make, trainer: Make, parameter_bytes: Callable[[torch.nn.Module], bytes]
) -> None:
    validated: list[bytes] = []

    class Noting(classifier):  # type: ignore[misc]
        def on_validation_start(self) -> None:
            validated.append(parameter_bytes(self))

    watch = Watch()
    strategy = PsycheStrategy(lookahead=True)
    trainer(strategy=strategy, max_epochs=2, num_sanity_val_steps=0, callbacks=[watch]).fit(
        Noting(), loader(), DataLoader(loader().dataset, batch_size=16)
    )
    assert validated == [watch.seen[5], watch.seen[11]]


def test_a_run_of_one_goes_on_past_the_epochs_of_its_coordinator(
    classifier: Make, loader: Make, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psyche_lightning.lightning.session.ALONE_EPOCH", 5)
    watch = Watch()
    fit = trainer(max_steps=18, callbacks=[watch])
    fit.fit(classifier(), loader())
    assert watch.steps == list(range(1, 19))
