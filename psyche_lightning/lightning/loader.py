"""Feeds the user's DataLoader one round at a time.

A DataLoader asks its sampler for up to two batches per worker in advance. It would thus wait for rounds that start only
after the current one is trained. So the user supplies the data set, the collate function and the workers, and the run
supplies the sampler: for each round, the loader knows all batches of this node's share before it asks for the first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler

from psyche_lightning.data.order import DataOrder
from psyche_lightning.errors import ConfigError, DataError, counted
from psyche_lightning.lightning.internals import seed_workers
from psyche_lightning.node.participant import RoundWork

WITHOUT_A_BATCH = (
    "optimizer.step() needs a batch of the run: iterate over the loader that fabric.setup_dataloaders returned, and "
    "make one step for each batch"
)
SHOWN = "use a DataLoader over a map-style data set, with batch_size and shuffle"


@dataclass
class Share:
    """This node's part of a round, as micro-batches.

    Attributes:
        work: the round.
        sizes: samples of each micro-batch; shorter once one turns out to be left out.
        rest: the micro-batches after the first, loaded on demand.
        steps: which step of the node each micro-batch belongs to, from 0 on; as long as ``sizes``.
        wholes: samples of each step on all ranks of the node.
        idle: steps of which the other ranks of the node train all samples. This rank trains one of them along, so that
            it goes through the same motions, and its result does not count.
    """

    work: RoundWork
    sizes: list[int]
    rest: Iterator[Any]
    steps: list[int]
    wholes: list[int]
    idle: frozenset[int] = frozenset()

    @property
    def samples(self) -> int:
        """Samples in this rank's part of the share."""
        return sum(size for size, step in zip(self.sizes, self.steps, strict=True) if step not in self.idle)


def one_ahead(batches: Iterator[Any]) -> Iterator[Any]:
    """Fetch each batch before the one that precedes it is used, so that its user knows what follows."""
    for batch in batches:
        for following in batches:
            yield batch
            batch = following
        yield batch


def _given(batches: Iterator[Any], sizes: list[int], steps: list[int], ranks: int, alike: bool) -> Iterator[Any]:
    """Leave out the micro-batches for which the collate function returns None, with their sizes and steps.

    If it does so for all of them, the last one stays, for Trainer to skip as it skips a batch that is None.

    Raises:
        ConfigError: nothing of a step is left, and the node has other ranks, which cannot skip it as well.
    """
    given = 0
    for batch in batches:
        if batch is None and ranks > 1 and (alike or steps.count(steps[given]) == 1):
            raise ConfigError(
                "the collate function returned None for all samples of a rank's step, but the ranks of a node make "
                "each step together. Return a batch, and let training_step return None for it, or set devices=1."
            )
        if batch is None and len(sizes) > 1:
            del sizes[given], steps[given]
        else:
            given += 1
            yield batch


def _fail(work: RoundWork, error: DataError) -> None:
    raise error


class RoundLoader:
    """Yields the first micro-batch of each round's share; :attr:`share` has the others.

    If shares are not split into micro-batches, it yields one batch for each of their steps instead.

    Args:
        loader: the user's.
        global_batch: samples of a round of the whole run.
        seed: the run's.
        rounds: called for each iteration; yields the rounds of one pass over the data.
        split: whether a share is split into micro-batches of the user's ``batch_size``.
        decline: called with the round and the error when the first samples of a round are unavailable; the next round
            follows.
        upcoming: the data ids ``(start, stop)`` that may follow the current round; None if unknown. A data set's
            method ``prefetch(indices)``, if it has one, is called for a whole share when it begins, and for these ids.
        steps: called with a round's step of the run; returns the steps that a node makes with its share.
        rank: which part of each step is loaded, from 0.
        ranks: parts of a step: the ranks of the node.
        alike: whether all ranks have equally many micro-batches, which each of them has before the first is trained.
            One that a rank lacks has the size 0, and a sample of the step.
        agreed: called with the error, if there was one, when the first samples of a round were loaded; returns the
            one for which the ranks of the node decline the round.

    Attributes:
        order: maps data ids to samples.

    Raises:
        ConfigError: the run cannot feed the loader.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        global_batch: int,
        seed: int,
        rounds: Callable[[], Iterator[RoundWork]],
        split: bool = True,
        decline: Callable[[RoundWork, DataError], object] = _fail,
        upcoming: Callable[[], tuple[int, int] | None] = lambda: None,
        steps: Callable[[int], int] = lambda step: 1,
        rank: int = 0,
        ranks: int = 1,
        alike: bool = False,
        agreed: Callable[[DataError | None], DataError | None] = lambda error: error,
    ) -> None:
        batch_size = check_loader(loader)
        seed_workers(loader)
        self._share: Share | None = None
        self.order = DataOrder(len(loader.dataset), isinstance(loader.sampler, RandomSampler), seed)  # type: ignore[arg-type]
        self.global_batch = global_batch
        self._most = batch_size if split else None
        self._steps = steps
        self._rank, self._ranks = rank, ranks
        self._alike = alike
        self._agreed = agreed
        if global_batch < ranks:
            raise ConfigError(
                f"a round of the run has {counted(global_batch, 'sample')} and this node {ranks} ranks to train them; "
                "use fewer devices, or a larger global batch"
            )
        self._rounds = rounds
        self._decline = decline
        self._upcoming = upcoming
        self._loader = loader
        # Worker processes have copies of the data set, which this call would not reach.
        self._ahead = getattr(loader.dataset, "prefetch", None) if loader.num_workers == 0 else None
        self._plan: list[list[int]] = []
        self._inner: DataLoader[Any] | None = None
        self._lasting: Iterator[Any] | None = None

    def __reduce__(self) -> tuple[Callable[[DataLoader[Any]], DataLoader[Any]], tuple[DataLoader[Any]]]:
        """A copy is the user's loader, since only one process can have this node's rounds."""
        return _same, (self._loader,)

    @property
    def dataset(self) -> Any:
        """The user's data set."""
        return self._loader.dataset

    @property
    def batch_size(self) -> int | None:
        """The user's."""
        return self._loader.batch_size

    def __len__(self) -> int:
        """Rounds of one pass of the whole run over the data."""
        return -(-self.order.length // self.global_batch)

    def __iter__(self) -> Iterator[Any]:
        for work in self._rounds():
            self._share = share = self.load(work)
            batches = one_ahead(share.rest) if self._most is None else itertools.islice(share.rest, 1)
            failure: DataError | None = None
            first: list[Any] = []
            try:
                # The ranks of a node decline a round together, so they look at all that comes without a step between.
                first += batches if self._most is None and self._ranks > 1 else itertools.islice(batches, 1)
                if self._alike:
                    share.rest = iter(list(share.rest))
            except DataError as error:
                failure = error
            if (failure := self._agreed(failure)) is not None:
                self._decline(work, failure)
                continue
            try:
                yield from first
                yield from batches
            except DataError as error:
                self._decline(work, error)

    @property
    def share(self) -> Share:
        """The share whose first micro-batch was yielded last.

        Raises:
            ConfigError: none was yielded yet.
        """
        if self._share is None:
            raise ConfigError(WITHOUT_A_BATCH)
        return self._share

    def load(self, work: RoundWork) -> Share:
        """Start to load the round's share, split into steps, and these into micro-batches, of nearly equal size."""
        indices = [i for ids in work.batch for i in self.order.indices(*ids)]
        whole = _parts(indices, min(self._steps(work.step), len(indices)))
        ours = [_parts(some, self._ranks)[self._rank] for some in whole]
        idle = frozenset(number for number, some in enumerate(ours) if not some)
        steps = []
        for some, its in zip(ours, whole, strict=True):
            longest = -(-len(its) // self._ranks) if self._alike else len(some) or 1
            steps.append(_parts(some or its[:1], 1 if self._most is None else -(-longest // self._most)))
        lacking = [not part or (self._alike and step in idle) for step, parts in enumerate(steps) for part in parts]
        self._plan[:] = [part or its[:1] for parts, its in zip(steps, whole, strict=True) for part in parts]
        if self._ahead is not None:
            self._ahead(indices)
            if (upcoming := self._upcoming()) is not None:
                self._ahead(self.order.indices(*upcoming))
        sizes = [0 if lacks else len(batch) for batch, lacks in zip(self._plan, lacking, strict=True)]
        owners = [number for number, step in enumerate(steps) for _ in step]
        given = _given(self._batches(), sizes, owners, self._ranks, self._alike)
        return Share(work, sizes, given, owners, [len(its) for its in whole], idle)

    def _batches(self) -> Iterator[Any]:
        """The batches of the plan."""
        if self._inner is None:
            self._inner = self._build()
        if self._loader.num_workers:
            return iter(self._inner)
        # An iterator costs as much as a small batch. One without workers asks for nothing in advance: it lasts.
        if self._lasting is None:
            self._lasting = iter(self._inner)
        return itertools.islice(self._lasting, len(self._plan))

    def close(self) -> None:
        """Stop the worker processes."""
        self._share, self._inner, self._lasting = None, None, None

    def _build(self) -> DataLoader[Any]:
        user = self._loader
        return DataLoader(
            user.dataset,
            batch_sampler=self._plan if user.num_workers else _Queue(self._plan),
            num_workers=user.num_workers,
            collate_fn=user.collate_fn,
            pin_memory=user.pin_memory,
            timeout=user.timeout,
            worker_init_fn=user.worker_init_fn,
            multiprocessing_context=user.multiprocessing_context,
            generator=user.generator,
            prefetch_factor=user.prefetch_factor,
            persistent_workers=user.num_workers > 0,  # otherwise each round restarts the workers
        )


class _Queue:
    """A batch sampler that takes batches out of a list, which may be filled again; never ask it for one too many."""

    def __init__(self, plan: list[list[int]]) -> None:
        self._plan = plan

    def __iter__(self) -> Iterator[list[int]]:
        while True:
            yield self._plan.pop(0)


def _parts(indices: list[int], count: int) -> list[list[int]]:
    """Parts of nearly equal size, in order."""
    cuts = [len(indices) * part // count for part in range(count + 1)]
    return [indices[a:b] for a, b in itertools.pairwise(cuts)]


def _same(loader: DataLoader[Any]) -> DataLoader[Any]:
    return loader


def check_loader(loader: object) -> int:
    """Refuse a loader that rounds cannot feed; returns its ``batch_size``.

    Raises:
        ConfigError: the loader is unsuitable; the text names a fix.
    """
    if not isinstance(loader, DataLoader):
        raise ConfigError(f"the train dataloader is a {type(loader).__name__}, not a torch DataLoader; {SHOWN}")
    if isinstance(loader.dataset, IterableDataset):
        raise ConfigError(
            f"the data set {type(loader.dataset).__name__} is an IterableDataset, but a run divides samples by number "
            f"among its nodes; {SHOWN}"
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ConfigError(f"{type(loader).__name__} has its own iterator, which the run cannot feed; {SHOWN}")
    if loader.batch_size is None:
        raise ConfigError(
            f"the train dataloader has no batch_size (a batch_sampler, or batch_size=None), but the run decides which "
            f"samples make a batch; {SHOWN}"
        )
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    )
    if not plain:
        raise ConfigError(
            f"the train dataloader has the sampler {type(sampler).__name__}, but the run decides which node trains "
            f"which samples; {SHOWN}"
        )
    if not len(loader.dataset):  # type: ignore[arg-type]
        raise ConfigError("the train data set is empty")
    return loader.batch_size
