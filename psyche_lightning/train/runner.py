"""``psyche train``: trains a recipe, as one node of a run or alone."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import signal
import warnings
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, LambdaCallback
from torch.utils.data import DataLoader

from psyche_lightning import system
from psyche_lightning.checkpoints.building import BUILDING
from psyche_lightning.checkpoints.deferred import Values, built, outlined
from psyche_lightning.checkpoints.model import ModelCopy
from psyche_lightning.errors import CheckpointError, ConfigError, counted
from psyche_lightning.hookspecs import DataProvider
from psyche_lightning.lightning.callback import CoordinatorCallback
from psyche_lightning.lightning.device import rank_here
from psyche_lightning.lightning.entry import ALONE_RUN, terms_of
from psyche_lightning.lightning.session import node_key
from psyche_lightning.lightning.strategy import PsycheStrategy
from psyche_lightning.logs import speaking
from psyche_lightning.plugins import load_plugins
from psyche_lightning.protocol.limits import check_run_id
from psyche_lightning.protocol.manifest import START
from psyche_lightning.recipe.adapter import adapted
from psyche_lightning.recipe.config import Recipe, TrainerSection
from psyche_lightning.recipe.estimate import parameter_dtype, saved_dtype
from psyche_lightning.recipe.manifest import manifest
from psyche_lightning.recipe.positions import check_positions
from psyche_lightning.recipe.text_config import text_config
from psyche_lightning.train.advice import say_missing_lines
from psyche_lightning.train.computing import apply_choices, check_accelerator, compiling
from psyche_lightning.train.diary import Diary
from psyche_lightning.train.evals import Evals
from psyche_lightning.train.loggers import make_loggers
from psyche_lightning.train.module import CausalModule, ProviderDataset
from psyche_lightning.train.objective import check_objective
from psyche_lightning.train.packing import check_packing
from psyche_lightning.train.prompts import Prompts
from psyche_lightning.train.saving import PREFIX, Checkpoints, begin, say_changes, say_saved
from psyche_lightning.train.slowed import Slowed
from psyche_lightning.train.tasks import load_tasks
from psyche_lightning.train.together import CONTINUE, COPY, VALIDATE, Together
from psyche_lightning.train.traces import traced
from psyche_lightning.train.validation import validation_samples
from psyche_lightning.train.vocabulary import settle_vocabulary
from psyche_lightning.wire.identity import short


def train_recipe(
    recipe: Recipe,
    *,
    coordinator_url: str | None = None,
    run_id: str | None = None,
    directory: str | os.PathLike[str] | None = None,
    metrics_port: int | None = None,
    metrics_host: str = "127.0.0.1",
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
        metrics_port: the port on which Prometheus reads the figures; None for none.
        metrics_host: the address of this machine to which that port belongs; others read it only if they reach this.

    Returns:
        The content of ``result.json``, or nothing on the ranks other than 0 of a node with several devices: ``id``
        and ``digest`` (hex), ``steps``, ``rounds`` (in which this node had a share) and ``empty_rounds`` (to which it
        contributed nothing), ``loss`` (in nats per trained token; ``train`` and ``validation``, each ``[first,
        last]``), ``socket_bytes_up``, ``socket_bytes_down``, ``payload_bytes_up`` (of payloads that peers fetched
        from this node) and ``payload_bytes_computed`` (a round: one payload to each peer), and with tasks to evaluate
        ``evals`` (see :attr:`~psyche_lightning.train.evals.Evals.figures`).

    Raises:
        UnfinishedError: the run ended without this node, which leaves no result then.
        PsycheError: any error that a user can fix.
    """
    _quiet()
    run = run_id or recipe.name
    check_run_id(run)  # it may come from somebody else, and names the node's folder
    folder = Path(directory or recipe.node.directory or f"psyche-{run}")
    rank = rank_here(recipe.trainer.devices)
    who = (ALONE_RUN, "-") if coordinator_url is None else (run, short(node_key(folder).public) if not rank else "-")
    with speaking(*who), traced():
        return _train(recipe, coordinator_url, run, folder, metrics_port, metrics_host, rank)


def _train(
    recipe: Recipe,
    coordinator_url: str | None,
    run: str,
    folder: Path,
    metrics_port: int | None,
    metrics_host: str,
    rank: int,
) -> dict[str, Any]:
    check_accelerator(recipe.trainer)
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
        if recipe.trainer.devices > 1:  # Lightning's launcher and its children read it
            os.environ["OMP_NUM_THREADS"] = str(recipe.trainer.threads)
    system.keep_memory()
    divided = recipe.trainer.devices > 1 and recipe.trainer.inner == "fsdp"
    if divided and recipe.evals.tasks:
        raise ConfigError(
            "evals.tasks names tasks, which a node whose devices divide the model (trainer.inner=fsdp) does not "
            "evaluate yet. Leave them out (evals.tasks=[]), or choose trainer.inner=ddp."
        )
    tasks = load_tasks(recipe.evals)  # first of all, as a wrong name is soon found
    plugins = load_plugins()
    terms = None if coordinator_url is None else terms_of(coordinator_url, run)
    beginning = begin(recipe, None if terms is None else terms.manifest or {})
    provider: DataProvider = plugins.data_providers()[recipe.data.name](recipe.data.options, seed=recipe.run.seed)
    factory = plugins.models()[recipe.model.name]
    # Lightning's own bf16-true would round buffers as well, such as rotary frequencies.
    rounded = recipe.trainer.precision == "bf16-true"
    make = functools.partial(factory, dict(beginning.options))
    values: Values = {}
    with BUILDING:
        torch.manual_seed(recipe.run.seed)  # all nodes build the same parameters, so none downloads them
        if divided and not recipe.model.adapter:  # no rank holds the whole of it
            model, values = outlined(make, parameter_dtype(recipe))
        else:
            model = built(make, parameter_dtype(recipe))
    model.train()
    apply_choices(model, recipe.trainer)
    check_parameters(model)
    if divided:
        check_saving(model)
    check_positions(model, provider.seq_len)
    fresh = "path" not in beginning.options or beginning.options.get("fresh") is True
    settle_vocabulary(model, provider, fresh=fresh, given=beginning.options)

    def look(trainer: Trainer | None = None, pl_module: LightningModule | None = None) -> None:
        with _as_in_training(model, recipe.trainer):
            check_data(model, provider, recipe.trainer.micro_batch_size)
            check_objective(model, provider.vocab_size, provider.seq_len)

    if not values:
        look()
    if recipe.model.adapter:
        if "vocab_size" in recipe.model.config:
            raise ConfigError(
                "model.config.vocab_size resizes the embeddings, which an adapter (model.adapter) does not save. "
                "Remove one of them, or save the resized model in a folder first and name that as model.path."
            )
        model = adapted(model, recipe.model.adapter, recipe.model.path, beginning.adapter)
    sections = manifest(recipe, getattr(provider, "fingerprint", None))
    if not rank:
        say_changes(beginning, sections)
    if beginning.section is not None:
        sections[START] = dict(beginning.section)
    module = CausalModule(model, recipe.optimizer, recipe.schedule)
    if not rank:
        say_missing_lines(module, recipe)
    options = recipe.options(
        coordinator_url, run, folder, sections, start=beginning.start, tokens_per_sample=provider.seq_len
    )
    steps = recipe.run.total_steps
    if terms is not None and "total_steps" in terms.unset:
        options = replace(options, total_steps=steps)
    elif terms is not None:
        steps = terms.config.total_steps
    strategy, slowdown = PsycheStrategy(**vars(options), inner=recipe.trainer.inner), recipe.trainer.slowdown
    strategy.values = {PREFIX + name: value for name, value in values.items()}
    dtype = None if rank else saved_dtype(recipe, beginning.options)
    say_saved(recipe, dtype)
    held_out = validation_samples(recipe, provider) if divided or not rank else []
    works = {
        VALIDATE: lambda: module.evaluate(
            held_out, recipe.trainer.micro_batch_size, strategy.world if divided else None
        ),
        CONTINUE: lambda *ids: module.next_token(ids),
        COPY: lambda: ModelCopy(model, PREFIX, dtype, strategy.shards),
    }
    diary = None if rank else Diary(recipe, provider, folder, strategy, steps, held_out)
    if diary is not None:
        if tasks:
            diary.evals = Evals(tasks, recipe.evals.every, model, provider.tokenizer, diary.evaluated)
        if recipe.evals.prompts:
            diary.prompts = Prompts(recipe.evals.prompts, provider)
        diary.checkpoints = Checkpoints(recipe, run, folder, provider.tokenizer, sections)
    trainer = Trainer(
        strategy=strategy,
        accelerator=recipe.trainer.accelerator,
        devices=recipe.trainer.devices,
        precision="32-true" if rounded else recipe.trainer.precision,
        max_steps=steps if terms is None else -1,  # a run's steps are its coordinator's, also when its owner adds some
        max_epochs=-1,
        gradient_clip_val=recipe.optimizer.clip_grad_norm,
        callbacks=[
            CoordinatorCallback(log_every=0),
            *([] if diary is None else [diary]),
            *([LambdaCallback(on_train_start=look)] if values else []),  # it needs all ranks
            Together(strategy, works),
            _Chance(recipe.run.seed, strategy, rank),
            *([Slowed(slowdown)] if slowdown > 1 else []),
        ],
        logger=[] if rank else make_loggers(recipe.trainer.logger, folder, run, metrics_port, metrics_host),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    for one in trainer.loggers:
        one.log_hyperparams(sections)
    # In a run the others go on, so there a node leaves at once.
    alone = coordinator_url is None
    interruptible: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if diary is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all ranks; rank 0 tells the others
    elif alone:
        interruptible = diary.interrupt.deferred(lambda: diary.trained > 0)
    loader: DataLoader[Any] = DataLoader(ProviderDataset(provider), batch_size=recipe.trainer.micro_batch_size)
    try:
        with compiling(model, recipe.trainer), interruptible:
            trainer.fit(module, loader)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # which Trainer replaces by exit code 1
            raise KeyboardInterrupt from end
        raise
    return {} if diary is None else diary.result


class _Chance(Callback):
    """Makes what is random in a share follow from the share.

    Args:
        seed: the run's.
        strategy: knows the round.
        rank: of the node; each has chances of its own.
    """

    def __init__(self, seed: int, strategy: PsycheStrategy, rank: int) -> None:
        self._seed, self._strategy, self._rank = seed, strategy, rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        session = self._strategy.session
        assert session is not None  # while it trains
        assert session.work is not None  # since the loader took it
        torch.manual_seed(share_seed(self._seed, session.work.step, session.work.batch) ^ self._rank)


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
    """Refuse parameters that are not finite: nothing can be trained from them. Those on the meta device pass.

    Raises:
        CheckpointError: some are not.
    """
    bad = [
        name for name, value in model.named_parameters() if not value.is_meta and not bool(torch.isfinite(value).all())
    ]
    if bad:
        raise CheckpointError(
            f"the model begins with values that are not finite, in {counted(len(bad), 'parameter')} such as "
            f"{bad[0]!r}. Load another checkpoint (checkpoint.resume or model.path)."
        )


def check_saving(model: Any) -> None:
    """Refuse a model that saves only the tensors that it has, since each rank of a node has parts of them.

    Raises:
        ConfigError: its ``save_pretrained`` takes no others.
    """
    if "state_dict" not in inspect.signature(model.save_pretrained).parameters:
        raise ConfigError(
            f"trainer.inner is 'fsdp', but save_pretrained of {type(model).__name__} takes no state_dict, and so "
            "cannot save the whole model. Choose trainer.inner=ddp."
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
