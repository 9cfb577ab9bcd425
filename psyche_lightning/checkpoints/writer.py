"""Saving checkpoints in the background: first into the node's own folder, then to the address that nodes share."""

from __future__ import annotations

import contextvars
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from psyche_lightning.checkpoints.address import Place, open_place
from psyche_lightning.checkpoints.folder import fetch_newest, prune
from psyche_lightning.checkpoints.manifest import MAX_SIZE, NAME, Manifest, Moment, describe, folder_name
from psyche_lightning.checkpoints.model import ModelCopy
from psyche_lightning.errors import CheckpointError, PsycheError

FOLDER = "checkpoints"
"""In a node's folder: its checkpoints."""
NEWEST = "checkpoint"
"""In a node's folder: a link to the newest of them."""
PAUSES = (2.0, 10.0, 60.0)
"""Seconds between attempts to write to an address."""
TAKEOVER = 300.0
"""Seconds without anything new at an address after which the next writer takes the place of the one before."""
LOOKS = 30
"""How often a writer that waits looks there in that time."""

logger = logging.getLogger(__name__)


class Writer:
    """Writes the checkpoints of one node.

    Training waits for the copy of the parameters and nothing else: one thread writes the node's own folder, another
    the address. While one checkpoint is being written, the next is left out, so there is never more than one copy.

    Which node writes to the address follows from the round and is known to all (``rank``). The first does at once; a
    further one keeps its own until the manifest of the one before is there, or nothing new has come for a while.

    Args:
        folder: the node's; gets ``checkpoints/step-...`` and ``checkpoint``, a link to the newest.
        place: the address that nodes share; None for none.
        keep: newest checkpoints that stay, in the folder and at the address.
        extra: more files for each checkpoint, by name: those of the tokenizer.
        pauses: see :data:`PAUSES`.
        takeover: see :data:`TAKEOVER`.
        sleep: waits that many seconds.

    Raises:
        CheckpointError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        place: Place | None,
        *,
        keep: int,
        extra: dict[str, bytes],
        pauses: tuple[float, ...] = PAUSES,
        takeover: float = TAKEOVER,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._node = folder
        self._own = folder / FOLDER
        self._home = open_place(str(self._own))
        self._place = place
        self._keep = keep
        self._extra = extra
        self._pauses = pauses
        self._takeover = takeover
        self._sleep = sleep
        self._saver = Worker("psyche-checkpoint")
        self._uploader = Worker("psyche-upload")
        self._uploading: set[int] = set()
        self._errors: dict[int, PsycheError] = {}
        try:
            for left in self._own.glob("*.new") if self._own.is_dir() else ():
                shutil.rmtree(left, ignore_errors=True)
            self._own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self._own}: {error.strerror}") from error

    # --- called by the thread that trains ---------------------------------------------------------------------------

    def save(self, copy: Callable[[], ModelCopy], moment: Moment, rank: int | None, *, last: bool = False) -> bool:
        """Have a checkpoint written.

        Args:
            copy: makes the copy; called at once, if at all.
            moment: what it is of.
            rank: this node's place among those that write to the address; None when it does not.
            last: whether nothing comes after it: then it waits for the one before, and is not left out.

        Returns:
            Whether it is written; not when the one before is still being written.
        """
        if last:
            self._saver.wait()
        elif self._saver.busy:
            logger.warning("the checkpoint of step %d is left out: the one before is still being written", moment.step)
            return False
        made = copy()
        if made.copied:
            self._saver.start(lambda: self._save(made, moment, rank))
        else:  # this model can only be written as it is now
            self._save(made, moment, rank)
        return True

    def finish(self, step: int) -> None:
        """Wait until everything is written.

        Raises:
            PsycheError: the checkpoint of ``step`` could not be written to the node's folder, or to the address.
        """
        self._saver.wait()
        self._uploader.wait()
        if step in self._errors:
            raise self._errors[step]

    # --- the background -----------------------------------------------------------------------------------------------

    def _save(self, made: ModelCopy, moment: Moment, rank: int | None) -> None:
        target = self._own / folder_name(moment.step)
        fresh = target.with_name(f"{target.name}.new")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            made.save(fresh)
            for name, data in self._extra.items():
                (fresh / name).write_bytes(data)
            manifest = describe(fresh, moment, made.digest())
            (fresh / NAME).write_text(manifest.text(), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
            self._link(target)
            logger.info("wrote the checkpoint of step %d to %s", moment.step, target)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            problem = CheckpointError(f"cannot write the checkpoint {target}: {error.strerror}; is the disk full?")
            self._note(moment.step, problem)
            return
        except Exception as error:  # what save_pretrained of somebody's model raises
            self._note(moment.step, CheckpointError(f"cannot write the checkpoint {target}: {error!r}"))
            return
        if self._place is not None and rank is not None:
            place = self._place
            self._uploading.add(moment.step)
            dropped = self._uploader.start(lambda: self._upload(place, target, manifest, rank), moment.step)
            if dropped is not None:
                self._uploading.discard(dropped)
                logger.warning(
                    "the checkpoint of step %d is not written to %s: a newer one came before its turn", dropped, place
                )
        try:
            prune(self._home, self._keep, frozenset(self._uploading))
        except CheckpointError as error:
            logger.warning("%s", error)

    def _link(self, target: Path) -> None:
        """Let ``checkpoint`` lead to the newest one."""
        link, fresh = self._node / NEWEST, self._node / f"{NEWEST}.new"
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(Path(FOLDER, target.name), target_is_directory=True)
        os.replace(fresh, link)

    def _upload(self, place: Place, folder: Path, manifest: Manifest, rank: int) -> None:
        step = manifest.moment.step
        try:
            for pause in (*self._pauses, None):
                try:
                    if not self._is_there(place, manifest, rank):
                        place.upload(folder, folder.name)
                        logger.info("wrote the checkpoint of step %d to %s", step, place.name(folder.name))
                    prune(place, self._keep)
                    return
                except PsycheError as error:
                    if pause is None:
                        raise
                    logger.warning("%s; trying again in %g s", error, pause)
                    self._sleep(pause)
        except PsycheError as error:
            self._note(step, CheckpointError(f"{error}. The checkpoint of step {step} is in {folder}."))
        finally:
            self._uploading.discard(step)

    def _is_there(self, place: Place, manifest: Manifest, rank: int) -> bool:
        """Whether another node has written this checkpoint; those before this one get their time."""
        name = folder_name(manifest.moment.step)
        seen: dict[str, int | None] = {}
        idle = 0.0
        while True:
            if _digest(place, name) == manifest.digest:
                return True
            now = place.entries(name)
            idle = 0.0 if now != seen else idle
            seen = now
            if idle >= rank * self._takeover:
                if rank:
                    logger.info("writing %s, as the node before this one did not", place.name(name))
                return False
            self._sleep(self._takeover / LOOKS)
            idle += self._takeover / LOOKS

    def _note(self, step: int, error: PsycheError) -> None:
        self._errors[step] = error
        logger.error("%s", error)


def _digest(place: Place, name: str) -> str | None:
    """Of the parameters of a checkpoint that is complete; None of one that is not."""
    data = place.read(f"{name}/{NAME}", MAX_SIZE)
    try:
        return None if data is None else Manifest.parse(data, name).digest
    except CheckpointError:  # whoever writes it replaces it
        return None


class Worker:
    """One thread that does one thing after another; of those that wait only the newest is done.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._working = False
        self._next: tuple[Callable[[], None], int] | None = None

    @property
    def busy(self) -> bool:
        """Whether something is being done."""
        with self._changed:
            return self._working

    def start(self, work: Callable[[], None], number: int = 0) -> int | None:
        """Do ``work`` soon; returns the number of what is not done, because this takes its place."""
        with self._changed:
            dropped = None if self._next is None else self._next[1]
            self._next = work, number
            if not self._working:
                self._working = True
                # A daemon: a node that is told to stop does not wait for a slow address.
                run = contextvars.copy_context().run  # so that its log lines are those of this node
                threading.Thread(target=run, args=(self._run,), name=self._name, daemon=True).start()
            return dropped

    def wait(self) -> None:
        """Return when nothing is left to do."""
        with self._changed:
            self._changed.wait_for(lambda: not self._working)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._next is None:
                    self._working = False
                    self._changed.notify_all()
                    return
                work, self._next = self._next[0], None
            try:
                work()
            except BaseException:
                with self._changed:
                    self._working = False
                    self._changed.notify_all()
                raise
            del work  # with the tensors that it holds, before anyone who waits goes on and perhaps ends Python


def copy_newest(source: str, target: str, cache: Path) -> str:
    """Copy the newest usable checkpoint of one address to another; returns where it lies now.

    Raises:
        PsycheError: there is none, or the address cannot be written.
    """
    place = open_place(target)
    place.prepare()
    found, folder = fetch_newest(source, cache)
    name = folder_name(found.manifest.moment.step)
    place.upload(folder, name)
    return place.name(name)
