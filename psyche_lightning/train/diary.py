"""What a training by a recipe shows and writes: progress, metrics, checkpoints and the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console

from psyche_lightning.checkpoints.writer import FOLDER
from psyche_lightning.errors import ConfigError, UnfinishedError
from psyche_lightning.hookspecs import DataProvider
from psyche_lightning.json_text import json_text
from psyche_lightning.lightning.session import Session
from psyche_lightning.lightning.strategy import PsycheStrategy
from psyche_lightning.node.download import Transfer
from psyche_lightning.node.files import explained, write_all
from psyche_lightning.recipe.config import Recipe
from psyche_lightning.train.bars import Bars
from psyche_lightning.train.evals import Evals
from psyche_lightning.train.labels import check_labels
from psyche_lightning.train.module import CausalModule
from psyche_lightning.train.prompts import Prompts
from psyche_lightning.train.saving import Checkpoints
from psyche_lightning.train.stopping import Interrupt
from psyche_lightning.train.together import DIGEST, VALIDATE

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
RESULT = "result.json"


class Diary(Callback):
    """Shows progress, and writes a training's output: metrics, checkpoints and the result.

    Attributes:
        result: the content of ``result.json``, at the end.
        checkpoints: writes the checkpoints; set before training.
        trained: rounds so far.
        interrupt: whether Ctrl-C was pressed.
        evals: evaluates the recipe's tasks; None without any.
        prompts: continues the recipe's texts; None without any.
    """

    checkpoints: Checkpoints
    evals: Evals | None = None
    prompts: Prompts | None = None

    def __init__(
        self,
        recipe: Recipe,
        provider: DataProvider,
        folder: Path,
        strategy: PsycheStrategy,
        steps: int,
        samples: list[dict[str, torch.Tensor]],
    ) -> None:
        self.result: dict[str, Any] = {}
        self._recipe = recipe
        self._provider = provider
        self._folder = folder
        self._samples = samples
        check_labels(provider, self._samples)
        self._losses: list[float] = []
        self._validation: list[tuple[int, float]] = []
        self._started = self._began = 0.0
        self.trained = 0
        self._console = Console()
        self._strategy = strategy
        self._steps = steps
        self.interrupt = Interrupt()
        self._bars = Bars(self._console, recipe.name, steps, self._transfer)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics = (folder / METRICS).open("ab", buffering=0)  # unbuffered: closing it cannot fail later
        except OSError as error:
            raise ConfigError(
                f"cannot write to the node's folder {folder}: {error.strerror}; choose another with node.directory=DIR"
            ) from error

    # --- hooks ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show the bars before the node joins and downloads parameters."""
        self._trainer = trainer
        self._bars.start()
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the result of an earlier training: this node has joined again."""
        (self._folder / RESULT).unlink(missing_ok=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first round, validate the run's parameters and begin what works in waits."""
        if not self._losses:  # the parameters are now the run's
            self._validate(trainer)
        if not self.trained and self.evals is not None:
            self.evals.begin(self._session)
        if not self.trained and self.prompts is not None:
            self.prompts.begin(self._session)
        self._session.observe(trainer.global_step + 1, self._logs)
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a round's figures; validate and save where the recipe says so."""
        session, step = self._session, trainer.global_step
        seconds = max(time.monotonic() - self._began, 1e-6)
        up, down = session.traffic.total
        self.trained += 1
        rate = session.samples * self._provider.seq_len / seconds
        lr, loss = self._recipe.schedule(step) * session.rate_factor, session.loss
        if session.samples:  # 0 if they were unavailable
            self._losses.append(loss)
            self._write(
                trainer, step, loss=loss, lr=lr, tokens_per_second=round(rate, 1), bytes_up=up, bytes_down=down,
                seconds=round(time.monotonic() - self._started, 3), waited=round(session.waited, 3),
                **session.step_figures(),
            )  # fmt: skip
        figures = f"loss {session.loss:.3f}  {rate:,.0f} tokens/s"
        self._bars.advance(step, figures)
        if self._logs(step) and not self._console.is_terminal:
            of = f"step {step}/{self._steps}"
            logger.info("%s  %s  up %s down %s bytes", of, figures, f"{up:,}", f"{down:,}")
        every = self._recipe.trainer.validate_every
        if every and self._validation and step // every > self._validation[-1][0] // every:
            self._validate(trainer)
        assert isinstance(pl_module, CausalModule)
        self.checkpoints.after_round(session, pl_module.model)
        if self.evals is not None:
            self.evals.after_round(session, pl_module.model)
        if self.prompts is not None:
            self.prompts.after_round(step)
        if session.alone and (self.interrupt.waits or trainer.received_sigterm):
            self._leave_off(step, pl_module.model)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate, save and write the result.

        Raises:
            UnfinishedError: nothing was trained, or training ended before the run.
        """
        if self._session.finished is None:
            raise UnfinishedError(f"training ended after step {trainer.global_step}, before the run: nothing is saved")
        session = self._session
        if self.prompts is not None:
            self.prompts.at_the_end(session)
        if session.alone and not self._losses:
            raise UnfinishedError(
                "no round had a usable gradient, so nothing was trained and nothing is saved; the warnings above say "
                "why. Lower optimizer.lr, or look at the data."
            )
        if not self._validation or self._validation[-1][0] != trainer.global_step:
            self._validate(trainer)
        assert isinstance(pl_module, CausalModule)
        finish = self.checkpoints.at_the_end(session, pl_module.model)
        up, down = session.traffic.total
        validation = [loss for _, loss in self._validation]
        self.result = {
            "id": session.identity.hex(),
            "digest": session.on_shards(DIGEST).hex(),
            "steps": trainer.global_step,
            "rounds": session.rounds,
            "empty_rounds": session.empty_rounds,
            "loss": {"train": _ends(self._losses), "validation": _ends(validation)},
            "socket_bytes_up": up,
            "socket_bytes_down": down,
            "payload_bytes_up": session.traffic.payloads_up,
            "payload_bytes_computed": round(session.payload_bytes / max(1, self.trained)),
        }
        self._bars.stop()
        finish()
        self._replace(self._folder / RESULT, json_text(self.result, 1) + "\n")
        if self.evals is not None:
            self.evals.at_the_end(session, pl_module.model, trainer.global_step)
            self.result["evals"] = self.evals.figures
            self._replace(self._folder / RESULT, json_text(self.result, 1) + "\n")
        logger.info("%d steps, digest %s, in %s/", trainer.global_step, self.result["digest"][:16], self._folder)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close what is open."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close what is open."""
        self._close()

    def _transfer(self) -> Transfer | None:
        """The download of parameters in progress; None if there is none."""
        session = self._strategy.session
        return session.transfer if session else None

    @property
    def _session(self) -> Session:
        """The node's membership, while it trains."""
        assert self._strategy.session is not None
        return self._strategy.session

    def _leave_off(self, step: int, model: torch.nn.Module) -> None:
        """Save a training of this process alone that ends before its run; in a run, the others go on.

        Raises:
            KeyboardInterrupt: after a Ctrl-C; Trainer itself ends training after SIGTERM.
        """
        self.checkpoints.at_the_end(self._session, model)()
        text = "stopped after step %d of %d; to go on from there, add checkpoint.resume=%s to the command"
        logger.info(text, step, self._steps, self._folder / FOLDER)
        if self.interrupt.waits:
            raise KeyboardInterrupt

    # --- helpers ----------------------------------------------------------------------------------------------------

    def evaluated(self, step: int, figures: Mapping[str, float]) -> None:
        """Write the figures of an evaluation of the parameters of a step."""
        self._write(self._trainer, step, **figures)

    def _close(self) -> None:
        self._bars.stop()
        self._metrics.close()

    def _validate(self, trainer: Trainer) -> None:
        if not self._samples:
            return
        loss = self._session.on_shards(VALIDATE)
        self._validation.append((trainer.global_step, loss))
        self._write(trainer, trainer.global_step, validation_loss=loss)
        self._session.measured(trainer.global_step, {"validation_loss": loss})
        if not self._console.is_terminal:
            logger.info("step %d  validation loss %.4f", trainer.global_step, loss)

    def _logs(self, step: int) -> bool:
        return step % self._recipe.trainer.log_every == 0

    def _write(self, trainer: Trainer, step: int, **figures: float) -> None:
        with explained("write to", self._folder / METRICS):
            write_all(self._metrics, (json_text({"step": step, **figures}) + "\n").encode())
        for one in trainer.loggers:
            one.log_metrics(figures, step)

    def _replace(self, path: Path, text: str) -> None:
        fresh = path.with_name(path.name + ".new")
        with explained("write", path):
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(path)


def _ends(values: list[float]) -> list[float]:
    return [values[0], values[-1]] if values else []
