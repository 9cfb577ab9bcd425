"""How a node holds numbers, with Trainer and Fabric: results do not change, or a refusal says why not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, Trainer

from psyche_lightning import PsycheStrategy
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.fabric import PsycheFabricStrategy

Make = Callable[..., Any]


def fitted(
    trainer: Make, module: Any, loader: Any, steps: int, checkpoint: Path | None = None, **options: Any
) -> Trainer:
    strategy = PsycheStrategy(chunk=8, k=4, decay=0.9, **options)
    made = trainer(strategy=strategy, max_steps=steps, precision="bf16-true")
    made.fit(module, loader, ckpt_path=checkpoint, weights_only=False)
    return made  # type: ignore[no-any-return]


def digest(trainer: Trainer) -> bytes:
    strategy: Any = trainer.strategy
    return bytes(strategy.session.digest())


@pytest.mark.parametrize(
    ("samples", "options"),
    [
        (None, {"masters": "split"}),
        (None, {"masters": "split", "gradients": "streamed"}),
        (24, {"masters": "split"}),  # three micro-batches
    ],
)
def test_training_in_bfloat16_is_the_same_to_the_bit(
    classifier: Make, trainer: Make, loader: Make, samples: int | None, options: dict[str, Any]
) -> None:
    digests = set()
    for holding in ({}, options):
        torch.manual_seed(0)
        fit = fitted(trainer, classifier(), loader(), 5, global_batch_size=samples, **holding)
        assert fit.global_step == 5
        digests.add(digest(fit))
    assert len(digests) == 1


def test_several_streamed_micro_batches_train(classifier: Make, trainer: Make, loader: Make) -> None:
    module = classifier()
    before = [one.detach().clone() for one in module.parameters()]
    fit = fitted(trainer, module, loader(), 3, global_batch_size=24, gradients="streamed", delta="int8")
    assert fit.global_step == 3
    assert not any(map(torch.equal, before, [one.float() for one in module.parameters()]))


@pytest.mark.parametrize("after", ["float32", "split"])
def test_a_checkpoint_resumes_exactly_in_either_form(
    classifier: Make, trainer: Make, loader: Make, tmp_path: Path, after: str
) -> None:
    class Saving(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "three.ckpt")

    options: dict[str, Any] = {"masters": "split", "delta": "bfloat16", "gradients": "streamed"}
    torch.manual_seed(0)
    whole = fitted(partial(trainer, callbacks=[Saving()]), classifier(), loader(), 6, **options)
    path = tmp_path / "three.ckpt"
    rest = fitted(trainer, classifier(), loader(), 6, path, **{**options, "masters": after})
    assert rest.global_step == 6
    assert digest(rest) == digest(whole)


def test_what_needs_all_gradients_is_refused(classifier: Make, trainer: Make, loader: Make) -> None:
    streamed = PsycheStrategy(gradients="streamed")
    with pytest.raises(ConfigError, match="gradient_clip_val clips all gradients"):
        trainer(strategy=streamed, max_steps=1, gradient_clip_val=1.0).fit(classifier(), loader())
    fabric = Fabric(strategy=PsycheFabricStrategy(gradients="streamed"), accelerator="cpu")
    module = classifier()
    module, optimizer = fabric.setup(module, module.configure_optimizers())
    with pytest.raises(ConfigError, match=r"fabric\.clip_gradients clips all gradients"):
        fabric.clip_gradients(module, optimizer, max_norm=1.0)


def test_weights_that_are_known_too_late_are_refused(classifier: Make, trainer: Make, loader: Make) -> None:
    class Weighted(classifier):  # type: ignore[misc, valid-type]
        """Says that each micro-batch weighs more than the one before."""

        seen = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.seen += 1
            return {"loss": self.loss(batch), "weight": float(self.seen)}

    with pytest.raises(ConfigError, match="before it is known how many labels"):
        fitted(trainer, Weighted(), loader(), 1, global_batch_size=24, gradients="streamed")
    fitted(trainer, Weighted(), loader(), 1, global_batch_size=8, gradients="streamed")  # one micro-batch
