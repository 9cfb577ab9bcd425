"""The LightningModule and the data set of a recipe."""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from psyche_lightning.errors import ConfigError
from psyche_lightning.hookspecs import DataProvider
from psyche_lightning.lightning.weights import IGNORED, trained
from psyche_lightning.lightning.world import World
from psyche_lightning.muon import MuonAdamW, hidden_matrices
from psyche_lightning.recipe.config import OptimizerSection
from psyche_lightning.recipe.schedule import Schedule

INPUTS = ("input_ids", "labels", "position_ids")
"""Sample keys passed to the model."""


def call_options(model: torch.nn.Module) -> dict[str, Any]:
    """The options of ``forward`` in training, besides the sample.

    With a cache, models of transformers do not notice that a position of 0 starts another text.
    """
    adapted: Any = getattr(model, "get_base_model", None)  # of peft
    takes = inspect.signature((model if adapted is None else adapted()).forward).parameters
    return {"use_cache": False} if "use_cache" in takes else {}


class CausalModule(LightningModule):
    """A causal language model with the recipe's optimizer; its learning rate is a pure function of the run's step.

    Args:
        model: see :class:`~psyche_lightning.hookspecs.ModelFactory`.
        optimizer: the recipe's section.
        schedule: the learning rate of each step, from 1.
    """

    shifts_labels = True

    def __init__(self, model: torch.nn.Module, optimizer: OptimizerSection, schedule: Schedule) -> None:
        super().__init__()
        self.model = model
        self._optimizer = optimizer
        self._schedule = schedule
        self._options = call_options(model)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor | None:
        """Mean loss in nats per trained token; None if none is trained.

        Args:
            batch: input_ids, labels and any position_ids, int64 [batch, seq_len].
            batch_idx: not used.
        """
        if not trained(batch["labels"], self.shifts_labels):
            return None
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        loss: torch.Tensor = self.model(**inputs, **self._options).loss
        return loss

    @torch.no_grad()
    def evaluate(
        self, samples: Sequence[dict[str, torch.Tensor]], batch_size: int, world: World | None = None
    ) -> float:
        """Mean cross-entropy over all trained tokens of the samples, in nats; NaN if they have none.

        Losses that a model adds for its training, such as that of a mixture's router, do not belong to it.

        Args:
            samples: as the data gives them.
            batch_size: samples of a forward pass.
            world: the ranks that divide the samples; all of them call it at once. None for this process alone.
        """
        rank, ranks = (0, 1) if world is None else (world.rank, world.size)
        training = self.training
        self.eval()
        kept = [sample for sample in samples if trained(sample["labels"][None], self.shifts_labels)]
        total, tokens = 0.0, 0
        for start in range(rank, len(kept) + rank, ranks * batch_size):
            part = kept[start : start + ranks * batch_size : ranks]
            shown = part or kept[:1]  # where nothing is left, the pass is made for the other ranks
            names = [name for name in INPUTS if name in shown[0] and name != "labels"]
            inputs = {name: torch.stack([sample[name] for sample in shown]).to(self.device) for name in names}
            with self.trainer.precision_plugin.forward_context():
                logits = self.model(**inputs, **self._options).logits
            for sample, row in zip(part, logits, strict=bool(part)):  # one at a time, as float32 takes much memory
                labels = sample["labels"][1:].to(row.device)
                total += float(cross_entropy(row[:-1].float(), labels, ignore_index=IGNORED, reduction="sum"))
                tokens += trained(labels, False)
        self.train(training)
        if world is not None:
            total, all_tokens = world.sum([total, tokens])
            tokens = int(all_tokens)
        return total / tokens if tokens else math.nan

    @torch.no_grad()
    def next_token(self, text: Sequence[int]) -> int:
        """The likeliest token after a text; nothing is compiled for it, as texts differ in length."""
        training = self.training
        self.eval()
        ids = torch.tensor([list(text)], device=self.device)
        forward: Any = self.model if isinstance(self.model, FSDPModule) else self.model.forward  # the former gathers it
        try:
            with self.trainer.precision_plugin.forward_context():
                logits: torch.Tensor = forward(input_ids=ids, **self._options).logits
        finally:
            self.train(training)
        return int(logits[0, -1].argmax())

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer with one group of trainable parameters for each factor on the learning rate.

        With ``optimizer.name=muon``, hidden matrices have groups of their own.

        Raises:
            ConfigError: a pattern of ``optimizer.lr_for`` or ``optimizer.muon_for`` matches no parameter, or Muon would
                train one that is no matrix.
        """
        section = self._optimizer
        base, factors = section.lr, section.lr_for
        hidden = hidden_matrices(self, section.muon_for) if section.name == "muon" else {}
        groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
        unused = set(factors)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                matching = [pattern for pattern in factors if fnmatch.fnmatchcase(name, pattern)]
                unused -= set(matching)
                factor = float(factors[matching[0]]) if matching else 1.0
                groups.setdefault((factor, hidden.get(name, False)), []).append(parameter)
        if unused:
            raise ConfigError(f"optimizer.lr_for has {min(unused)!r}, which matches no trainable parameter.")
        named = [{"params": group, "lr": base * factor, "muon": muon} for (factor, muon), group in groups.items()]
        optimizer: torch.optim.Optimizer
        if section.name == "muon":
            optimizer = MuonAdamW(named, base, section.weight_decay)
        else:
            optimizer = torch.optim.AdamW(named, base, (0.9, 0.95), weight_decay=section.weight_decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: self._schedule(done + 1) / base)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ProviderDataset(Dataset[dict[str, torch.Tensor]]):
    """A data provider's training samples by id.

    Args:
        provider: the data plugin's provider.
    """

    def __init__(self, provider: DataProvider) -> None:
        self._provider = provider

    def __len__(self) -> int:
        return len(self._provider)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self._provider.samples(index, index + 1)[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        """The samples of several ids; reads each stretch of consecutive ids at once."""
        return [sample for stretch in _stretches(indices) for sample in self._provider.samples(*stretch)]

    def prefetch(self, indices: list[int]) -> None:
        """Tell the provider to prefetch these ids, if it has a method for that."""
        ahead = getattr(self._provider, "prefetch", None)
        if ahead is not None:
            for stretch in _stretches(indices):
                ahead(*stretch)


def _stretches(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Stretches of consecutive ids, ``(start, stop)``."""
    start = 0
    for place in range(1, len(indices) + 1):
        if place == len(indices) or indices[place] != indices[place - 1] + 1:
            yield indices[start], indices[place - 1] + 1
            start = place
