"""How a Trainer's part in a run ends: with the run's last parameters, or with an error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from psyche_lightning import PsycheStrategy
from psyche_lightning.errors import PsycheError, UnfinishedError
from psyche_lightning.server.admin import CoordinatorAdmin

Make = Callable[..., Any]
PATIENCE = 120.0


class Fit:
    """A fit in a thread of its own.

    Attributes:
        trainer: fits.
        module: is trained.
        error: with which it ended.
    """

    def __init__(self, trainer: Any, module: Any, loader: Any) -> None:
        self.trainer, self.module = trainer, module
        self.error: BaseException | None = None
        self._before = [parameter.detach().clone() for parameter in module.parameters()]
        self._loader = loader
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.trainer.fit(self.module, self._loader)
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


def test_a_run_that_ends_without_parameters_fails_on_every_node(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    """Its owner says that it is over, while nodes wait for members."""
    start = {"start": {"step": 5, "data_index": 0}}
    url, run = create_run(start, init_min_clients=3, total_steps=9, global_batch_size_start=8)
    fits = [Fit(trainer(strategy=PsycheStrategy(url, run, manifest=start)), classifier(), loader()) for _ in range(2)]
    admin = CoordinatorAdmin(url)
    until(lambda: len(admin.status(run)["pending"]) == 2)
    admin.pause(run)
    admin.command(run, "update", config={"total_steps": 5})
    admin.resume(run)
    for fit in fits:
        assert isinstance(fit.wait(), UnfinishedError)
        assert "the run is finished; no parameters were agreed" in str(fit.error)
        assert fit.untouched


def test_a_run_that_its_owner_removes_fails_on_every_node(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    url, run = create_run(init_min_clients=2)
    fit = Fit(trainer(strategy=PsycheStrategy(url, run), max_steps=4), classifier(), loader())
    admin = CoordinatorAdmin(url)
    until(lambda: len(admin.status(run)["pending"]) == 1)
    admin.pause(run)
    admin.command(run, "close")
    assert isinstance(fit.wait(), PsycheError)
    assert run in str(fit.error)
    assert fit.untouched
