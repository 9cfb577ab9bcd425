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
from psyche_lightning.lightning.ranks import RankGradients, local_part
from psyche_lightning.lightning.session import Session
from psyche_lightning.lightning.supported import check_streamed
from psyche_lightning.lightning.weights import WEIGHT, ShareLoss, loss_of, shifts
from psyche_lightning.lightning.world import World
from psyche_lightning.node.participant import RoundWork

STREAMED_ERROR = 1e-6
"""From this relative error of a micro-batch's weight on, its gradient cannot be streamed."""


class Training:
    """The part of a fit in which this node is a member of the run: it trains its share of each round.

    Args:
        trainer: the Trainer that trains.
        step: the module with its optimizer.
        loaders: training loaders, newest last; Trainer may ask for more of them later.
        entry: the values of the run that it joins.
        world: the ranks of the node; None for a node with one device.

    Attributes:
        step: as given.
        session: the node's membership, which begins with its ``start``.

    Raises:
        ConfigError: there is not exactly one train dataloader.
        PsycheError: the node's folder is unusable.
    """

    def __init__(
        self,
        trainer: Trainer,
        step: TakenStep,
        loaders: Sequence[RoundLoader],
        entry: Entry,
        world: World | None = None,
    ) -> None:
        self.step = step
        # Gradients of ranks that have the whole model are averaged here; those of shards are summed as they come.
        self._company = None if world is None else RankGradients(world, step)
        self._sharded = step.distro.ranks is not None
        self._ranks = None if self._sharded else self._company
        self._trainer = trainer
        self._loaders = loaders
        self._shifted = shifts(trainer.lightning_module)
        # Of the current share: its mean loss and the weight of that, whether anything of it has a loss and a weight,
        # its samples, the error if some of these are unavailable, the loss of its last step, and the gradients of all
        # micro-batches but one of that step, to which Trainer adds those of that one.
        self._loss, self._weight = math.nan, 0.0
        self._trained = False
        self._samples = 0
        self._lost: DataError | None = None
        self._last: tuple[ShareLoss, int] | None = None
        self._carried: Sequence[torch.Tensor | None] = ()
        if len(CombinedLoader(trainer.train_dataloader).flattened) != 1 or not loaders:
            raise ConfigError("the strategy 'psyche' trains with exactly one train dataloader")
        clip = None
        if trainer.gradient_clip_val:
            algorithm = str(trainer.gradient_clip_algorithm or "norm").rpartition(".")[2].lower()
            clip = (algorithm, float(trainer.gradient_clip_val))
            check_streamed("gradient_clip_val clips all gradients before a step", step.distro.holding)
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
            world=world,
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

    def agreed(self, error: DataError | None) -> DataError | None:
        """The error for which the node declines a round whose first samples were loaded: of any of its ranks."""
        return error if self._company is None else self._company.agreed(error)

    def stop_if_finished(self) -> bool:
        """Tell Trainer to stop when the run is over; returns whether it is."""
        finished = self.session.finished is not None or self.session.left
        done = self._trainer.global_step
        if finished and done < (_last_step(self._trainer) or math.inf):
            # Not should_stop, for which Trainer validates once more, and not before its minimum of epochs and steps.
            self._trainer.fit_loop.epoch_loop.max_steps = done
        return finished

    # --- a share ----------------------------------------------------------------------------------------------------

    def start_share(self) -> None:
        """Called before Trainer's closure, which trains the share."""
        self.step.reset()
        if self.step.distro.ranks is not None:
            self.step.distro.ranks.reshard(self.step.module)
        if self._ranks is not None:
            self._ranks.declined = False
        self._carried, self._lost, self._trained, self._loss, self._weight = (), None, False, math.nan, 0.0
        self._last, self._samples = None, 0

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
        mean = self._begin(0, sum(share.sizes))
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
        last = self._part(mean, output, batch, size)
        if loss_of(output) is None and output is not None:
            return output  # for Trainer to refuse
        self._join(mean)
        self._last = mean, share.steps[-1]
        if self._ranks is None:
            self._add_loss(mean)
        if mean.value is None and self._ranks is None:
            return None
        if mean.value is None:  # the other ranks may have something, so this one goes on with them
            return torch.full((), math.nan, requires_grad=True)
        if others is None and not early and not self._sharded:
            return output
        if others is not None or (self._sharded and share.steps.count(share.steps[-1]) > 1):
            # Trainer zeroes the gradients before it runs backward on the result; restore_gradients restores these.
            self._carried = [parameter.grad for parameter in self.step.parameters]
            self._correct(mean)
        if last is None:  # a leaf, so that there is something to run backward
            last = torch.zeros_like(mean.value, requires_grad=True)
        whole = (last if others is None else last + others) * mean.correction
        if early or self._sharded:
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
            return self._begin(step, sum(size for size, its in sizes if its == step))

        mean, number, micro = begin(share.steps[0]), 0, batch
        micros = itertools.chain([batch], map(self._transferred, share.rest))
        for number, micro in enumerate(one_ahead(micros)):
            if number + 1 == len(share.sizes):
                break
            self._backward(mean, micro, share.sizes[number], train)
            following = share.steps[number + 1]
            if following != share.steps[number]:
                self._join(mean)
                if mean.value is not None:
                    self._correct(mean)
                if self._settled(mean, share.steps[number]):
                    self._sum_whole()
                    before_step(self._trainer, self.step.optimizer)
                    self.step.step_locally()
                    self.step.optimizer.zero_grad()
                mean = begin(following)
        return mean, micro, share.sizes[number]

    def _backward(self, mean: ShareLoss, micro: Any, samples: int, train: Callable[[Any], Any]) -> None:
        """Run a micro-batch forward and backward, and add its loss to the mean."""
        weigh(self._trainer, micro)
        part = self._part(mean, train(micro), micro, samples)
        if part is not None:
            self._trainer.strategy.backward(part, self.step.optimizer)

    def _begin(self, step: int, samples: int) -> ShareLoss:
        """The loss of a step, of which this rank has so many samples."""
        return ShareLoss(self._loader.share.wholes[step] if self._sharded else samples, self._shifted, self._sharded)

    def _part(self, mean: ShareLoss, output: Any, batch: Any, samples: int) -> torch.Tensor | None:
        """Add a micro-batch to a mean; what to run backward, with shards also if it adds nothing.

        Raises:
            ConfigError: ranks that share a model cannot run backward together, since there is no loss.
        """
        if not self._sharded:
            return mean.part(output, batch, samples)
        loss = loss_of(output)
        if loss is None:
            raise ConfigError(
                "training_step returned no loss, but the ranks of a node with inner='fsdp' run each micro-batch "
                f"backward together. Return a loss, and 0 as {WEIGHT!r} for a micro-batch that should not count"
            )
        part = mean.part(output, batch, samples)
        return loss * 0 if part is None else part

    def _join(self, mean: ShareLoss) -> None:
        """With shards, make a step's loss and weight those of all ranks, before the step's last backward."""
        if self._sharded and self._company is not None:
            mean.add_others(*self._company.totals(mean))

    def _sum_whole(self) -> None:
        """With shards, add up the gradients of the parameters that every rank has as a whole."""
        if self._sharded and self._company is not None:
            self._company.sum_whole()

    def _correct(self, mean: ShareLoss) -> None:
        """Make the gradients so far those of the mean."""
        if self.step.distro.holding.gradients == "streamed" and abs(mean.correction - 1) > STREAMED_ERROR:
            raise ConfigError(
                "gradients='streamed' (trainer.gradients) adds the gradient of each micro-batch to delta before it is "
                "known how many labels of the whole share are trained, and here not all of them are, or training_step "
                f"says another {WEIGHT!r} for each. Choose trainer.gradients=kept, or a micro-batch that holds the "
                "whole share (trainer.micro_batch_size, batch_size of the DataLoader)."
            )
        gradients = [local_part(parameter.grad) for parameter in self.step.parameters if parameter.grad is not None]
        if gradients and mean.correction != 1:
            multiply_each(gradients, mean.correction)

    def _add_loss(self, mean: ShareLoss) -> None:
        """Add the mean of a step to that of the share."""
        if mean.value is not None:
            self._add(float(mean.value * mean.correction), mean.weight)

    def _add(self, loss: float, added: float) -> None:
        weight = self._weight + added
        self._loss = loss if not self._trained else self._loss + (loss - self._loss) * added / weight
        self._trained, self._weight = True, weight

    def _settled(self, mean: ShareLoss, step: int) -> bool:
        """Add a step's mean to that of the share, over all ranks of the node; the gradients become those of that.

        Args:
            mean: this rank's, whose gradients lie in the parameters.
            step: of the share.

        Returns:
            Whether anything of the step was trained.
        """
        if self._ranks is None:
            self._add_loss(mean)
            return mean.value is not None
        if self._ranks.declined:
            return False
        share = self._loader.share
        idle = mean.value is None or step in share.idle
        weight = 0.0 if idle or mean.value is None else mean.weight
        loss = 0.0 if idle or mean.value is None else float(mean.value * mean.correction)
        sizes = zip(share.sizes, share.steps, strict=True)
        samples = 0 if step in share.idle else sum(size for size, its in sizes if its == step)
        found = self._ranks.average(weight, loss, samples, self._lost)
        if found is None:
            self._lost = self._lost or DataError("the samples of another rank of this node were unavailable", ids=())
            return False
        whole, loss, samples = found
        self._samples += samples
        if whole:
            self._add(loss, whole)
        return whole > 0

    def settle(self, result: Any) -> Any:
        """Called after Trainer's closure: the gradients of the share's last step become those of all ranks.

        Args:
            result: the closure's.

        Returns:
            The same.
        """
        self._sum_whole()
        if self._ranks is not None:
            assert self._last is not None  # since train_share
            self._settled(*self._last)
        return result

    def _transferred(self, batch: Any) -> Any:
        """Move a batch to the node's device, with the hooks that Trainer calls for batches that it fetches."""
        strategy = self._trainer.strategy
        batch = strategy.precision_plugin.convert_input(batch)
        batch = before_transfer(self._trainer.lightning_module, batch)
        return strategy.batch_to_device(batch, dataloader_idx=0)

    def restore_gradients(self) -> None:
        """Called before a backward: restore the gradients of the other micro-batches, so that it adds to them."""
        carried, self._carried = self._carried, ()
        for parameter, gradient in zip(self.step.parameters, carried, strict=False):
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
            samples = sum(share.wholes) if self._sharded else share.samples if self._ranks is None else self._samples
            return self.session.submit(share.work, self._loss, samples)
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
