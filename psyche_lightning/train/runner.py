"""``psyche train``: trains a recipe, as one node of a run or alone."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch.utils.data import DataLoader

from psyche_lightning.checkpoints.dtypes import cast
from psyche_lightning.checkpoints.writer import FOLDER
from psyche_lightning.errors import CheckpointError, ConfigError, UnfinishedError, counted
from psyche_lightning.hookspecs import DataProvider
from psyche_lightning.json_text import json_text
from psyche_lightning.lightning.callback import CoordinatorCallback
from psyche_lightning.lightning.entry import ALONE_RUN, terms_of
from psyche_lightning.lightning.session import Session, node_key
from psyche_lightning.lightning.strategy import PsycheStrategy
from psyche_lightning.logs import speaking
from psyche_lightning.node.download import Transfer
from psyche_lightning.node.store import explained, write_all
from psyche_lightning.plugins import load_plugins
from psyche_lightning.protocol.limits import check_run_id
from psyche_lightning.protocol.manifest import START
from psyche_lightning.recipe.adapter import adapted
from psyche_lightning.recipe.config import Recipe, TrainerSection
from psyche_lightning.recipe.estimate import parameter_dtype
from psyche_lightning.recipe.manifest import manifest
from psyche_lightning.recipe.positions import check_positions
from psyche_lightning.recipe.text_config import text_config
from psyche_lightning.train.advice import say_missing_lines
from psyche_lightning.train.bars import Bars
from psyche_lightning.train.computing import apply_choices, compiling
from psyche_lightning.train.evals import Evals
from psyche_lightning.train.labels import check_labels
from psyche_lightning.train.loggers import make_loggers
from psyche_lightning.train.module import CausalModule, ProviderDataset
from psyche_lightning.train.objective import check_objective
from psyche_lightning.train.packing import check_packing
from psyche_lightning.train.saving import Checkpoints, begin, saved_dtype, say_changes
from psyche_lightning.train.slowed import Slowed
from psyche_lightning.train.stopping import Interrupt
from psyche_lightning.train.tasks import load_tasks
from psyche_lightning.train.validation import validation_samples
from psyche_lightning.train.vocabulary import settle_vocabulary
from psyche_lightning.wire.identity import short

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
RESULT = "result.json"


def train_recipe(
    recipe: Recipe,
    *,
    coordinator_url: str | None = None,
    run_id: str | None = None,
    directory: str | os.PathLike[str] | None = None,
    metrics_port: int | None = None,
) -> dict[str, Any]:
    """Train a recipe to the end of its run.

    The node's folder gets ``metrics.jsonl`` (a row for each step with ``step``, ``loss``, ``lr``,
    ``tokens_per_second``, ``bytes_up`` and ``bytes_down``, ``seconds`` since it began and the part of them it
    ``waited`` for others, and every ``log_every`` steps ``gradient_norm``, ``momentum_norm`` and ``agreement``; rows
    with ``step`` and ``validation_loss``; rows with ``step`` and what :mod:`~psyche_lightning.train.evals` found, as
    ``eval/TASK/METRIC``), ``result.json``, and ``checkpoints`` with a folder in Hugging Face format
    for each; ``checkpoint`` links to the newest.

    Args:
        recipe: the recipe.
        coordinator_url: the run's coordinator; None to train alone.
        run_id: the run; by default the recipe's name.
        directory: the node's folder; by default ``node.directory`` of the recipe, else ``psyche-RUN``.
        metrics_port: a port of this machine on which Prometheus reads the figures; None for none.

    Returns:
        The content of ``result.json``: ``id`` and ``digest`` (hex), ``steps``, ``rounds`` (in which this node had a
        share) and ``empty_rounds`` (to which it contributed nothing), ``loss`` (in nats per trained token; ``train``
        and ``validation``, each ``[first, last]``), ``socket_bytes_up``, ``socket_bytes_down``, ``payload_bytes_up``
        (of payloads that peers fetched from this node) and ``payload_bytes_computed`` (a round: one payload to each
        peer), and with tasks to evaluate ``evals`` (see :attr:`~psyche_lightning.train.evals.Evals.figures`).

    Raises:
        UnfinishedError: the run ended without this node, which leaves no result then.
        PsycheError: any error that a user can fix.
    """
    _quiet()
    run = run_id or recipe.name
    check_run_id(run)  # it may come from somebody else, and names the node's folder
    folder = Path(directory or recipe.node.directory or f"psyche-{run}")
    who = (ALONE_RUN, "-") if coordinator_url is None else (run, short(node_key(folder).public))
    with speaking(*who):
        return _train(recipe, coordinator_url, run, folder, metrics_port)


def _train(
    recipe: Recipe, coordinator_url: str | None, run: str, folder: Path, metrics_port: int | None
) -> dict[str, Any]:
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
    tasks = load_tasks(recipe.evals)  # first of all, as a wrong name is soon found
    plugins = load_plugins()
    terms = None if coordinator_url is None else terms_of(coordinator_url, run)
    beginning = begin(recipe, None if terms is None else terms.manifest or {})
    provider: DataProvider = plugins.data_providers()[recipe.data.name](recipe.data.options, seed=recipe.run.seed)
    torch.manual_seed(recipe.run.seed)  # all nodes build the same parameters, so none downloads them
    model = plugins.models()[recipe.model.name](dict(beginning.options))
    # Lightning's own bf16-true would round buffers as well, such as rotary frequencies.
    rounded = recipe.trainer.precision == "bf16-true"
    model = cast(model, parameter_dtype(recipe)).train()
    apply_choices(model, recipe.trainer)
    check_parameters(model)
    check_positions(model, provider.seq_len)
    fresh = "path" not in beginning.options or beginning.options.get("fresh") is True
    settle_vocabulary(model, provider, fresh=fresh, given=beginning.options)
    with _as_in_training(model, recipe.trainer):
        check_data(model, provider, recipe.trainer.micro_batch_size)
        check_objective(model, provider.vocab_size, provider.seq_len)
    if recipe.model.adapter:
        if "vocab_size" in recipe.model.config:
            raise ConfigError(
                "model.config.vocab_size resizes the embeddings, which an adapter (model.adapter) does not save. "
                "Remove one of them, or save the resized model in a folder first and name that as model.path."
            )
        model = adapted(model, recipe.model.adapter, recipe.model.path, beginning.adapter)
    sections = manifest(recipe, getattr(provider, "fingerprint", None))
    say_changes(beginning, sections)
    if beginning.section is not None:
        sections[START] = dict(beginning.section)
    module = CausalModule(model, recipe.optimizer, recipe.schedule)
    say_missing_lines(module, recipe)
    options = recipe.options(
        coordinator_url, run, folder, sections, start=beginning.start, tokens_per_sample=provider.seq_len
    )
    steps = recipe.run.total_steps
    if terms is not None and "total_steps" in terms.unset:
        options = replace(options, total_steps=steps)
    elif terms is not None:
        steps = terms.config.total_steps
    strategy, slowdown = PsycheStrategy(**vars(options)), recipe.trainer.slowdown
    diary = _Diary(recipe, provider, folder, strategy, steps)
    if tasks:
        diary.evals = Evals(tasks, recipe.evals.every, model, provider.tokenizer, diary.evaluated)
    diary.checkpoints = Checkpoints(recipe, run, folder, provider.tokenizer, sections, saved_dtype(recipe, beginning))
    trainer = Trainer(
        strategy=strategy,
        accelerator=recipe.trainer.accelerator,
        devices=1,
        precision="32-true" if rounded else recipe.trainer.precision,
        max_steps=steps if terms is None else -1,  # a run's steps are its coordinator's, also when its owner adds some
        max_epochs=-1,
        gradient_clip_val=recipe.optimizer.clip_grad_norm,
        callbacks=[CoordinatorCallback(log_every=0), diary, *([Slowed(slowdown)] if slowdown > 1 else [])],
        logger=make_loggers(recipe.trainer.logger, folder, run, metrics_port),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    for one in trainer.loggers:
        one.log_hyperparams(sections)
    # In a run the others go on, so there a node leaves at once.
    alone = coordinator_url is None
    interruptible = diary.interrupt.deferred(lambda: diary.trained > 0) if alone else contextlib.nullcontext()
    loader: DataLoader[Any] = DataLoader(ProviderDataset(provider), batch_size=recipe.trainer.micro_batch_size)
    try:
        with compiling(model, recipe.trainer), interruptible:
            trainer.fit(module, loader)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # which Trainer replaces by exit code 1
            raise KeyboardInterrupt from end
        raise
    return diary.result


class _Diary(Callback):
    """Shows progress, and writes a training's output: metrics, checkpoints and the result.

    Attributes:
        result: the content of ``result.json``, at the end.
        checkpoints: writes the checkpoints; set before training.
        trained: rounds so far.
        interrupt: whether Ctrl-C was pressed.
        evals: evaluates the recipe's tasks; None without any.
    """

    checkpoints: Checkpoints
    evals: Evals | None = None

    def __init__(
        self, recipe: Recipe, provider: DataProvider, folder: Path, strategy: PsycheStrategy, steps: int
    ) -> None:
        self.result: dict[str, Any] = {}
        self._recipe = recipe
        self._provider = provider
        self._folder = folder
        self._samples = validation_samples(recipe, provider)
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
        self._trainer = trainer
        self._bars.start()  # before the node joins and downloads parameters
        self._started = time.monotonic()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (self._folder / RESULT).unlink(missing_ok=True)  # of an earlier training: this node has joined again

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._losses:  # the parameters are now the run's
            self._validate(trainer, pl_module)
        if not self.trained and self.evals is not None:
            self.evals.begin(self._session)
        self._session.observe(trainer.global_step + 1, self._logs)
        work = self._session.work
        assert work is not None  # since the loader took it
        torch.manual_seed(share_seed(self._recipe.run.seed, work.step, work.batch))
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
            self._validate(trainer, pl_module)
        assert isinstance(pl_module, CausalModule)
        self.checkpoints.after_round(session, pl_module.model)
        if self.evals is not None:
            self.evals.after_round(session, pl_module.model)
        if session.alone and (self.interrupt.waits or trainer.received_sigterm):
            self._leave_off(step, pl_module.model)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._session.finished is None:
            raise UnfinishedError(f"training ended after step {trainer.global_step}, before the run: nothing is saved")
        session = self._session
        if session.alone and not self._losses:
            raise UnfinishedError(
                "no round had a usable gradient, so nothing was trained and nothing is saved; the warnings above say "
                "why. Lower optimizer.lr, or look at the data."
            )
        if not self._validation or self._validation[-1][0] != trainer.global_step:
            self._validate(trainer, pl_module)
        assert isinstance(pl_module, CausalModule)
        finish = self.checkpoints.at_the_end(session, pl_module.model)
        up, down = session.traffic.total
        validation = [loss for _, loss in self._validation]
        self.result = {
            "id": session.identity.hex(),
            "digest": session.digest().hex(),
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
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
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

    def _validate(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._samples:
            return
        assert isinstance(module, CausalModule)
        loss = module.evaluate(self._samples, self._recipe.trainer.micro_batch_size)
        self._validation.append((trainer.global_step, loss))
        self._write(trainer, trainer.global_step, validation_loss=loss)
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


def _as_in_training(model: torch.nn.Module, trainer: TrainerSection) -> torch.autocast:
    """Moves the model to the device where Lightning will train it; some kernels of attention run only there."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or trainer.accelerator == "cpu":
        device = torch.device("cpu")
    model.to(device)
    half = torch.bfloat16 if trainer.precision.startswith("bf16") else torch.float16
    return torch.autocast(device.type, half, enabled=trainer.precision.endswith("-mixed"))


def share_seed(seed: int, step: int, batch: Sequence[tuple[int, int]]) -> int:
    """The seed of what is random in a node's share of a round, such as dropout.

    So a node that comes back trains its share as one that was never away, and nodes differ as their samples do.

    Args:
        seed: the run's.
        step: the round's.
        batch: the data ids of the share, each ``(start, stop)``.

    Returns:
        A whole number of 63 bits.
    """
    text = f"{seed} {step} {list(batch)}"
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1


def check_parameters(model: torch.nn.Module) -> None:
    """Refuse parameters that are not finite: nothing can be trained from them.

    Raises:
        CheckpointError: some are not.
    """
    bad = [name for name, value in model.named_parameters() if not bool(torch.isfinite(value).all())]
    if bad:
        raise CheckpointError(
            f"the model begins with values that are not finite, in {counted(len(bad), 'parameter')} such as "
            f"{bad[0]!r}. Load another checkpoint (checkpoint.resume or model.path)."
        )


def check_data(model: torch.nn.Module, provider: DataProvider, micro_batch_size: int = 2) -> None:
    """Refuse data that does not fit the model; reads one sample.

    Args:
        model: the model, on the device where it trains.
        provider: the data.
        micro_batch_size: samples of a batch.

    Raises:
        ConfigError: the vocabulary is too large for the model, or the data has positions that it does not take, or
            with which it does not keep texts apart.
        DataError: the sample is unavailable.
    """
    size = getattr(text_config(model), "vocab_size", None)
    if isinstance(size, int) and size < provider.vocab_size:
        raise ConfigError(
            f"the data has {provider.vocab_size} token ids and the model has {size}; set "
            f"model.config.vocab_size={provider.vocab_size} or more"
        )
    if "position_ids" in provider.samples(0, 1)[0]:
        taken = inspect.signature(model.forward).parameters.values()
        if not any(one.name == "position_ids" or one.kind is one.VAR_KEYWORD for one in taken):
            raise ConfigError(
                f"the data has position_ids, which {type(model).__name__} does not take; train another model, or make "
                "the data without them (each sample one text)"
            )
        check_packing(model, provider, micro_batch_size)


def _quiet() -> None:
    """Keep hints that Lightning gives to users of Trainer out of the command's output."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    with contextlib.suppress(ImportError):
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # type: ignore[no-untyped-call]
