"""A recipe's checkpoints: saves them at the right steps, and resumes a run from one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from psyche_lightning.checkpoints.address import open_storage
from psyche_lightning.checkpoints.folder import ADAPTER, cache_folder, complete_checkpoints, fetch_newest, local_model
from psyche_lightning.checkpoints.manifest import Metadata
from psyche_lightning.checkpoints.model import tokenizer_files
from psyche_lightning.checkpoints.writer import Writer
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.session import Session
from psyche_lightning.lightning.standing import Standing
from psyche_lightning.protocol.manifest import MAX_SHOWN, START, brief, differences, manifest_digest
from psyche_lightning.recipe.config import ModelSection, Recipe
from psyche_lightning.recipe.manifest import start_section
from psyche_lightning.text import plain
from psyche_lightning.train.card import Facts, card
from psyche_lightning.train.together import COPY

logger = logging.getLogger(__name__)

PREFIX = "model."
"""Prefix of a recipe's parameter names: its LightningModule holds the model under this name."""
_KEPT = ("trust_remote_code", "gradient_checkpointing")
"""Keys of ``model.config`` that a checkpoint's own configuration lacks."""


class Checkpoints:
    """Saves the checkpoints of one node.

    Args:
        recipe: says how often and where.
        run: the run's name.
        folder: the node's folder.
        tokenizer: the tokenizer to save with each checkpoint; None for none.
        sections: the run's manifest; each checkpoint records its digest.

    Raises:
        PsycheError: the folder or address is not writable.
    """

    def __init__(
        self,
        recipe: Recipe,
        run: str,
        folder: Path,
        tokenizer: Any,
        sections: Mapping[str, Any],
    ) -> None:
        section = recipe.checkpoint
        storage = None if section.to is None else open_storage(section.to)
        if storage is not None:
            storage.prepare()
        self._writer = Writer(folder, storage, keep=section.keep, extra=tokenizer_files(tokenizer))
        self._recipe = recipe
        self._every = section.every
        self._writers = section.writers
        self._run = run
        self._settings = without_start(sections)
        self._saved: int | None = None

    def after_round(self, session: Session, model: torch.nn.Module) -> None:
        """Start to save a checkpoint if one is due.

        Raises:
            CheckpointError: an earlier one could not be written to the node's folder.
        """
        self._writer.check()
        standing = session.standing if self._every else None
        if standing is None:
            return
        if self._saved is None:  # a node that joins midway does not start with a checkpoint
            self._saved = max(0, standing.step - 1)
        if standing.step // self._every <= self._saved // self._every:
            return
        # A node that missed that round saves a later step. No node waits for it then, so it has no rank.
        rank = self._rank(standing, session) if standing.step % self._every == 0 else None
        if self._save(session, model, standing, rank):
            self._saved = standing.step

    def at_the_end(self, session: Session, model: torch.nn.Module) -> Callable[[], None]:
        """Start to save the last checkpoint; the returned function waits for it, and raises PsycheError on failure."""
        state = session.state
        assert state is not None  # the run is over
        standing = session.standing or Standing(state.checkpoint.step, state.epoch, state.epoch_start_data_index, ())
        if self._saved != standing.step or standing.step % self._every:  # otherwise it is in progress
            rank = self._rank(standing, session)
            self._save(session, model, standing, rank, last=True)
        return lambda: self._writer.finish(standing.step)

    def _save(
        self, session: Session, model: torch.nn.Module, standing: Standing, rank: int | None, *, last: bool = False
    ) -> bool:
        metadata, known = self._metadata(standing), facts(session, model, standing.step)
        return self._writer.save(
            lambda: session.on_shards(COPY),
            metadata,
            rank,
            card=lambda digest: card(self._recipe, metadata, digest, known),
            last=last,
        )

    def _rank(self, standing: Standing, session: Session) -> int | None:
        rank = standing.rank(session.signer)
        return rank if rank is not None and rank < self._writers else None

    def _metadata(self, standing: Standing) -> Metadata:
        recipe = manifest_digest(self._settings).hex()
        return Metadata(self._run, standing.step, standing.epoch, standing.data_index, recipe, self._settings)


def facts(session: Session, model: torch.nn.Module, step: int) -> Facts:
    """What a node knows of its run after that step."""
    state = session.state
    return Facts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        nodes=len(state.clients) + len(state.exited_clients) if state else 1,
        payload=round(session.mean_payload(max(1, step))),
    )


def without_start(sections: Mapping[str, Any]) -> dict[str, Any]:
    """A run's manifest without the section ``start``: what the run trains, wherever it began."""
    return {name: section for name, section in sections.items() if name != START}


@dataclass(frozen=True)
class Beginning:
    """A node's first state.

    Attributes:
        options: the options for the model's factory.
        section: the section ``start`` of the run's manifest; None for a run from step 1.
        adapter: the folder of an adapter to train further; None for a new one, or without one.
        resumed: the checkpoint from which the run resumes; None for a run from step 1.
    """

    options: Mapping[str, Any]
    section: Mapping[str, Any] | None = None
    adapter: Path | None = None
    resumed: Metadata | None = None

    @property
    def start(self) -> tuple[int, int] | None:
        """Steps already trained, and the first data id that follows; None for a run from step 1."""
        return None if self.section is None else (self.section["step"], self.section["data_index"])


def say_saved(recipe: Recipe, dtype: torch.dtype | None) -> None:
    """Say so if checkpoints are not saved in the dtype of training, because the first one is not."""
    if dtype is not None and recipe.checkpoint.save_dtype is None and recipe.model.dtype == "float32":
        text = "the parameters come from a checkpoint in %s and are trained in float32; checkpoints are saved in %s"
        logger.info(f"{text} (checkpoint.save_dtype)", *[str(dtype).removeprefix("torch.")] * 2)


def begin(recipe: Recipe, fixed: Mapping[str, Any] | None) -> Beginning:
    """Find a node's first parameters; copies those at an address to this machine.

    Args:
        recipe: the node's recipe.
        fixed: the manifest of the node's run; None for a run of this process alone.

    Raises:
        PsycheError: the address has no usable checkpoint, or the run begins with another one.
    """
    address = recipe.checkpoint.resume
    if address is None:
        return Beginning(_model(recipe).options)
    begun = None if fixed is None else fixed.get(START)
    if fixed is not None and begun is None:
        raise ConfigError(
            "the run begins with step 1, but this node's checkpoint.resume names a checkpoint to resume from. Create "
            f"it with `psyche run create RUN RECIPE checkpoint.resume={address}`, or take only the parameters with "
            f"model.path={address}."
        )
    step = None if begun is None else int(begun["step"])
    there = [] if step is None else complete_checkpoints(open_storage(address))
    if step is not None and all(one.manifest.metadata.step != step for one in there):
        text = "the run began with the checkpoint of step %d, which is no longer at %s; this node takes the newest one"
        logger.info(text, step, address)
        step = None
    found, folder = fetch_newest(address, cache_folder(), step)
    metadata = found.manifest.metadata
    if step is not None and begun is not None and begun["digest"] != found.manifest.digest:
        raise ConfigError(f"{found} is not the checkpoint of step {step} that the run was created from.")
    if begun is None and metadata.step >= recipe.run.total_steps:
        raise ConfigError(
            f"{found} has {metadata.step} steps already, and run.total_steps is {recipe.run.total_steps}; raise it."
        )
    logger.info("resuming after step %d of run %r, from %s", metadata.step, metadata.run, found)
    section = begun or start_section(found.manifest)
    if recipe.model.adapter:
        if not (folder / ADAPTER).is_file():
            raise ConfigError(f"{found} is a whole model and no adapter; name it with model.path={address}.")
        return Beginning(_model(recipe).options, section, folder, metadata)
    kept = {name: recipe.model.config[name] for name in _KEPT if name in recipe.model.config}
    return Beginning({**kept, "path": str(folder)}, section, resumed=metadata)


def _model(recipe: Recipe) -> ModelSection:
    """The recipe's model; one at an address is copied to this machine."""
    path = recipe.model.path
    return recipe.model if path is None else replace(recipe.model, path=local_model(path))


def say_changes(beginning: Beginning, sections: Mapping[str, Any]) -> None:
    """Warn of each value with which a run resumes that is not the checkpoint's: another rate, other data, ...

    Args:
        beginning: see :func:`begin`.
        sections: the run's manifest.
    """
    resumed, settings = beginning.resumed, without_start(sections)
    if resumed is None or resumed.recipe == manifest_digest(settings).hex():
        return
    if not resumed.settings:
        logger.warning("the run resumes with other values than its checkpoint was trained with, which it does not name")
        return
    found = [
        (plain(field.removeprefix(".")), there, here)
        for field, there, here in differences(dict(resumed.settings), settings, "")
    ]
    for name, there, here in found[:MAX_SHOWN]:
        logger.warning("the run resumes with another %s: %s, was %s in the checkpoint", name, brief(here), brief(there))
    if len(found) > MAX_SHOWN:
        logger.warning("... and with %d other values that differ", len(found) - MAX_SHOWN)
    if any(name.startswith("data.") for name, _, _ in found):
        text = "the data index %d counts samples of the former data: some may be trained twice, or never"
        logger.warning(text, resumed.data_index)
