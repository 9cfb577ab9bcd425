"""Fits of Trainer in threads of their own, as nodes of one run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

PATIENCE = 240.0
"""Seconds after which a wait is a hang, on a busy machine too; pytest's own timeout is later."""


class Fit:
    """A fit in a thread of its own.

    Attributes:
        trainer: fits.
        module: is trained.
        error: with which it ended.
    """

    def __init__(self, trainer: Any, module: Any, *loaders: Any) -> None:
        self.trainer, self.module = trainer, module
        self.error: BaseException | None = None
        self._before = [parameter.detach().clone() for parameter in module.parameters()]
        self._loaders = loaders
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.trainer.fit(self.module, *self._loaders)
        except BaseException as error:
            self.error = error

    def wait(self) -> BaseException | None:
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        return self.error

    @property
    def untouched(self) -> bool:
        """Whether nothing was trained and nothing counted."""
        now = list(self.module.parameters())
        same = all(before.equal(parameter) for before, parameter in zip(self._before, now, strict=True))
        return same and self.trainer.global_step == 0 and self.trainer.state.status == "interrupted"


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


class StopAt(Callback):
    """Stops the first fit at a step, as EarlyStopping does."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.seen: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(trainer.global_step)
        trainer.should_stop = trainer.global_step == self.step
