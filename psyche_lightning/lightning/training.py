"""Trains a node's share of each round, as Trainer's loop asks for it."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import CombinedLoader

from psyche_lightning.distro.internals import multiply_each
from psyche_lightning.errors import ConfigError, DataError, counted
from psyche_lightning.lightning.entry import Entry
from psyche_lightning.lightning.internals import before_step, before_transfer, wants_to_stop, weigh
from psyche_lightning.lightning.loader import RoundLoader, one_ahead
from psyche_lightning.lightning.manifest import sections
from psyche_lightning.lightning.optimizers import TakenStep
from psyche_lightning.lightning.progress import RunProgress
from psyche_lightning.lightning.session import Session
from psyche_lightning.lightning.weights import WEIGHT, ShareLoss, loss_of, shifts
from psyche_lightning.node.participant import RoundWork


class Training:
    """The part of a fit in which this node is a member of the run: it trains its share of each round.

    Args:
        trainer: the Trainer that trains.
        step: the module with its optimizer.
        loaders: training loaders, newest last; Trainer may ask for more of them later.
        entry: the values of the run that it joins.

    Attributes:
        step: as given.
        session: the node's membership, which begins with its ``start``.

    Raises:
        ConfigError: there is not exactly one train dataloader.
        PsycheError: the node's folder is unusable.
    """

    def __init__(self, trainer: Trainer, step: TakenStep, loaders: Sequence[RoundLoader], entry: Entry) -> None:
        self.step = step
        self._trainer = trainer
        self._loaders = loaders
        self._shifted = shifts(trainer.lightning_module)
        # Of the current share: its mean loss and the weight of that, whether anything of it has a loss and a weight,
        # the error if some of its samples are unavailable, and the gradients of all micro-batches but one of its last
        # step, to which Trainer adds those of that one.
        self._loss, self._weight = math.nan, 0.0
        self._trained = False
        self._lost: DataError | None = None
        self._carried: Sequence[torch.Tensor | None] = ()
        if len(CombinedLoader(trainer.train_dataloader).flattened) != 1 or not loaders:
            raise ConfigError("the strategy 'psyche' trains with exactly one train dataloader")
        clip = None
        if trainer.gradient_clip_val:
            algorithm = str(trainer.gradient_clip_algorithm or "norm").rpartition(".")[2].lower()
            clip = (algorithm, float(trainer.gradient_clip_val))
        alone = entry.options.coordinator is None
        self._progress = RunProgress(trainer, alone=alone)
        self._last_step = _last_step(trainer)
        self._joining: float | None = None if alone else time.monotonic()
        self.session = Session(
            entry,
            step,
            sections(step, self._loader.order, clip),
            global_batch=self._loader.global_batch,
            total_steps=self._last_step,
            done=trainer.global_step,
            stops=self._wants_to_stop,
        )

    @property
    def _loader(self) -> RoundLoader:
        """The loader that Trainer iterates."""
        return self._loaders[-1]

    def _wants_to_stop(self) -> bool:
        return wants_to_stop(self._trainer, 0.0 if self._joining is None else time.monotonic() - self._joining)

    # --- rounds -----------------------------------------------------------------------------------------------------

    def first_round(self, resumed: int) -> None:
        """Wait until this node has the run's parameters, and move Trainer to the run's step.

        Args:
            resumed: the step of the checkpoint that Trainer restores; 0 without one.

        Raises:
            ConfigError: the run has not come to the checkpoint's step, or is beyond Trainer's limits.
            PsycheError: as :meth:`Session.peek`.
        """
        state = self.session.state
        if state is not None and state.step <= resumed:
            raise ConfigError(
                f"ckpt_path names a checkpoint of step {resumed}, but run {state.run_id!r} is at step {state.step}: "
                "its nodes have one step, one schedule and one order of the data. To begin a run with the checkpoint's "
                "parameters, load them into the module (load_from_checkpoint) and fit without ckpt_path; to go on with "
                f"its step as well, let the run begin there: create it, and its nodes, with the manifest's section "
                f"{{'start': {{'step': {resumed}, 'data_index': ...}}}}."
            )
        work = self.session.peek()
        if work is not None:
            self._check_limits()
            self._progress.begin(work.step)
        self._joining = None

    def rounds(self) -> Iterator[RoundWork]:
        """The rounds of one Lightning epoch, as the loader asks for them.

        Raises:
            ConfigError: the run was beyond Trainer's limits before this node became a member.
        """
        fresh = True
        if (work := self.session.peek()) is not None:
            self._progress.start_epoch(work.step)
        while (work := self.session.peek()) is not None:
            self._check_limits()
            if not self._progress.enter(work.step, fresh):
                return
            self.session.take()
            yield work
            fresh = fresh and self.session.lost_rounds > 0
        state = self.session.state
        if self.session.finished is not None and state is not None:
            self._progress.end(state.step - 1)
        self.stop_if_finished()

    def _check_limits(self) -> None:
        last, state, self._last_step = self._last_step, self.session.state, None
        if last is not None and state is not None and state.start_step > last:
            raise ConfigError(
                f"run {state.run_id!r} was at step {state.start_step} when this node became a member, but this Trainer "
                f"ends after step {last} (max_steps={self._trainer.max_steps}, max_epochs={self._trainer.max_epochs}): "
                "nothing is left for it to train. Raise the limits, or set both to -1 to train to the end of the run."
            )

    def stop_if_finished(self) -> bool:
        """Tell Trainer to stop when the run is over; returns whether it is."""
        finished = self.session.finished is not None
        done = self._trainer.global_step
        if finished and done < (_last_step(self._trainer) or math.inf):
            # Not should_stop, for which Trainer validates once more, and not before its minimum of epochs and steps.
            self._trainer.fit_loop.epoch_loop.max_steps = done
        return finished

    # --- a share ----------------------------------------------------------------------------------------------------

    def start_share(self) -> None:
        """Called before Trainer's closure, which trains the share."""
        self.step.reset()
        self._carried, self._lost, self._trained, self._loss, self._weight = (), None, False, math.nan, 0.0

    def train_share(self, batch: Any, train: Callable[[Any], Any]) -> Any:
        """Train the round's share: this method runs all micro-batches but one; Trainer runs that one backward.

        With local steps, this method makes all of them but the last.

        Args:
            batch: the first micro-batch, which Trainer fetched.
            train: the module's ``training_step``.

        Returns:
            The module's output. Its loss has the value of the whole share's mean, and the gradient of the part that
            Trainer runs backward. None if no micro-batch adds anything (of the last step, with local steps).

        Raises:
            ConfigError: a weight in the module's output is wrong.
        """
        optimizer, share = self.step.optimizer, self._loader.share
        mean = ShareLoss(share.samples, self._shifted)
        if len(share.sizes) > 1:
            optimizer.zero_grad()
            try:
                if self.step.local is None:
                    for number, micro in enumerate(share.rest, 1):
                        self._backward(mean, self._transferred(micro), share.sizes[number], train)
                    size = share.sizes[0]
                else:
                    mean, batch, size = self._make_steps(batch, train)
            except DataError as error:  # Trainer still gets its loss; end_share then declines the round
                self._lost, size = error, share.sizes[0]
            weigh(self._trainer, batch)
        else:
            size = share.sizes[0]
        others, early = mean.value, self._trained
        output = train(batch)
        last = mean.part(output, batch, size)
        if loss_of(output) is None and output is not None:
            return output  # for Trainer to refuse
        self._add_loss(mean)
        if mean.value is None:
            return None
        if others is None and not early:
            return output
        if others is not None:
            # Trainer zeroes the gradients before it runs backward on the result; restore_gradients restores these.
            self._carried = [parameter.grad for parameter in self._parameters()]
            self._correct(mean)
        if last is None:  # a leaf, so that there is something to run backward
            last = torch.zeros_like(mean.value, requires_grad=True)
        whole = (last if others is None else last + others) * mean.correction
        if early:
            whole = whole + (self._loss - whole.detach())
        return {**output, "loss": whole} if isinstance(output, Mapping) else whole

    def _make_steps(self, batch: Any, train: Callable[[Any], Any]) -> tuple[ShareLoss, Any, int]:
        """Make all local steps but the last, and train what precedes the last one's last micro-batch.

        Returns:
            The last step's loss so far, and that micro-batch with its samples.
        """
        share = self._loader.share

        def begin(step: int) -> ShareLoss:
            sizes = zip(share.sizes, share.steps, strict=True)
            return ShareLoss(sum(size for size, its in sizes if its == step), self._shifted)

        mean, number, micro = begin(share.steps[0]), 0, batch
        micros = itertools.chain([batch], map(self._transferred, share.rest))
        for number, micro in enumerate(one_ahead(micros)):
            if number + 1 == len(share.sizes):
                break
            self._backward(mean, micro, share.sizes[number], train)
            following = share.steps[number + 1]
            if following != share.steps[number]:
                self._add_loss(mean)
                if mean.value is not None:
                    self._correct(mean)
                    before_step(self._trainer, self.step.optimizer)
                    self.step.step_locally()
                    self.step.optimizer.zero_grad()
                mean = begin(following)
        return mean, micro, share.sizes[number]

    def _backward(self, mean: ShareLoss, micro: Any, samples: int, train: Callable[[Any], Any]) -> None:
        """Run a micro-batch forward and backward, and add its loss to the mean."""
        weigh(self._trainer, micro)
        part = mean.part(train(micro), micro, samples)
        if part is not None:
            self._trainer.strategy.backward(part, self.step.optimizer)

    def _correct(self, mean: ShareLoss) -> None:
        """Make the gradients so far those of the mean."""
        gradients = [parameter.grad for parameter in self._parameters() if parameter.grad is not None]
        if gradients and mean.correction != 1:
            multiply_each(gradients, mean.correction)

    def _add_loss(self, mean: ShareLoss) -> None:
        """Add the mean of a step to that of the share."""
        if mean.value is not None:
            loss, weight = float(mean.value * mean.correction), self._weight + mean.weight
            self._loss = loss if not self._trained else self._loss + (loss - self._loss) * mean.weight / weight
            self._trained, self._weight = True, weight

    def _transferred(self, batch: Any) -> Any:
        """Move a batch to the node's device, with the hooks that Trainer calls for batches that it fetches."""
        strategy = self._trainer.strategy
        batch = strategy.precision_plugin.convert_input(batch)
        batch = before_transfer(self._trainer.lightning_module, batch)
        return strategy.batch_to_device(batch, dataloader_idx=0)

    def _parameters(self) -> Iterator[torch.nn.Parameter]:
        return (parameter for group in self.step.optimizer.param_groups for parameter in group["params"])

    def restore_gradients(self) -> None:
        """Called before a backward: restore the gradients of the other micro-batches, so that it adds to them."""
        carried, self._carried = self._carried, ()
        for parameter, gradient in zip(self._parameters(), carried, strict=False):
            parameter.grad = gradient

    def end_share(self) -> bool:
        """Give the share's update to the run.

        Returns:
            False when the training loop wanted to stop before the results were applied: the step must not count.

        Raises:
            DataError: the share's samples are lastingly unavailable.
            PsycheError: as :meth:`Session.peek`.
        """
        share = self._loader.share
        if self._lost is not None:
            return self.session.decline(share.work, self._lost)
        why = self._unusable()
        if why is None:
            return self.session.submit(share.work, self._loss, share.samples)
        # As with the default strategy, nothing moves if there was nothing to train.
        return self.session.abstain(share.work, why, still=not self._trained)

    def _unusable(self) -> str | None:
        """Why the gradients of the current share are of no use; None if they are."""
        if not self._trained:
            return f"none of its {counted(self._loader.share.samples, 'sample')} has a loss or a trained label"
        if math.isnan(self._loss):
            return (
                "its loss is not a number. If some micro-batches have nothing to train, let training_step return "
                f"None for them, or how much it trained as {WEIGHT!r}"
            )
        if self.step.broken is not None:
            return str(self.step.broken)
        return None if self.step.called else "the gradient scaler found gradients that are not finite"


def _last_step(trainer: Trainer) -> int | None:
    """The step at which ``max_steps`` or ``max_epochs`` ends Trainer; None when neither does."""
    limits = [trainer.max_steps] if trainer.max_steps > -1 else []
    if trainer.max_epochs is not None and trainer.max_epochs > -1:
        limits.append(trainer.max_epochs * int(trainer.num_training_batches))
    return min(limits, default=None)
