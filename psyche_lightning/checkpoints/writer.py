"""Saves checkpoints in the background: first into the node's own folder, then at the address that nodes share."""

from __future__ import annotations

import contextvars
import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from psyche_lightning import system
from psyche_lightning.checkpoints.address import Storage, open_storage
from psyche_lightning.checkpoints.folder import fetch_newest, prune
from psyche_lightning.checkpoints.manifest import MAX_SIZE, NAME, Manifest, Metadata, describe, folder_name
from psyche_lightning.checkpoints.model import ModelCopy
from psyche_lightning.errors import CheckpointError, PsycheError

FOLDER = "checkpoints"
"""The folder of checkpoints in a node's folder."""
NEWEST = "checkpoint"
"""The link to the newest checkpoint in a node's folder."""
CARD = "README.md"
"""The model card, which the Hub shows."""
PAUSES = (2.0, 10.0, 60.0)
"""Seconds between attempts to write to an address."""
TAKEOVER = 300.0
"""Seconds without a change at an address after which the next writer replaces the one before it."""
LOOKS = 30
"""How often a waiting writer looks in that time."""

logger = logging.getLogger(__name__)


class Writer:
    """Writes the checkpoints of one node.

    Training waits only for the copy of the parameters. One thread writes the node's own folder, another one the
    address. A checkpoint is skipped while an earlier one is being written, so there is never more than one copy.

    The round decides which nodes write to the address, and all nodes know it (``rank``). The first writes at once.
    Another one waits until the manifest of the one before it is there, or nothing has changed for a while.

    Args:
        folder: the node's folder; gets ``checkpoints/step-...`` and ``checkpoint``, a link to the newest.
        storage: the address that nodes share, or None.
        keep: number of checkpoints to keep, in the folder and at the address.
        extra: further files of each checkpoint, by name, such as the tokenizer's.
        pauses: see :data:`PAUSES`.
        takeover: see :data:`TAKEOVER`.
        sleep: waits for a number of seconds.

    Raises:
        CheckpointError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        storage: Storage | None,
        *,
        keep: int,
        extra: dict[str, bytes],
        pauses: tuple[float, ...] = PAUSES,
        takeover: float = TAKEOVER,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._node = folder
        self._own = folder / FOLDER
        self._home = open_storage(str(self._own))
        self._storage = storage
        self._keep = keep
        self._extra = extra
        self._pauses = pauses
        self._takeover = takeover
        self._sleep = sleep
        self._saver = Worker("psyche-checkpoint")
        self._uploader = Worker("psyche-upload")
        self._uploading: set[int] = set()
        self._errors: dict[int, PsycheError] = {}
        self._unsaved: CheckpointError | None = None
        try:
            for left in self._own.glob("*.new") if self._own.is_dir() else ():
                shutil.rmtree(left, ignore_errors=True)
            self._own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write to {self._own}: {error.strerror}") from error

    # --- called by the training thread ------------------------------------------------------------------------------

    def save(
        self,
        copy: Callable[[], ModelCopy],
        metadata: Metadata,
        rank: int | None,
        *,
        card: Callable[[str], str] | None = None,
        last: bool = False,
    ) -> bool:
        """Write a checkpoint in the background.

        Args:
            copy: makes the copy; called at once, if at all.
            metadata: which state of which run it holds.
            rank: this node's position among those that write to the address; None if it does not write there.
            card: gives the text of its README.md for its digest in hex; None for none.
            last: whether it is the last one; it then waits for the one before it instead of being skipped.

        Returns:
            Whether it is written; false while an earlier one is being written.

        Raises:
            CheckpointError: see :meth:`check`.
        """
        self.check()
        if last:
            self._saver.wait()
        elif self._saver.busy:
            logger.warning("the checkpoint of step %d is skipped: an earlier one is still being written", metadata.step)
            return False
        made = copy()
        if made.copied:
            self._saver.start(lambda: self._save(made, metadata, rank, card))
        else:  # this model can only be written as it is now
            self._save(made, metadata, rank, card)
        return True

    def check(self) -> None:
        """Look whether every checkpoint so far is in the node's folder.

        An address that cannot be written only fails in :meth:`finish`: it may be away for a while, and other nodes
        write there as well.

        Raises:
            CheckpointError: one could not be written, because the disk is full for example.
        """
        if self._unsaved is not None:
            raise self._unsaved

    def finish(self, step: int) -> None:
        """Wait until everything is written.

        Raises:
            PsycheError: the checkpoint of ``step`` could not be written to the node's folder or to the address.
        """
        self._saver.wait()
        self._uploader.wait()
        if step in self._errors:
            raise self._errors[step]

    # --- the background -----------------------------------------------------------------------------------------------

    def _save(self, made: ModelCopy, metadata: Metadata, rank: int | None, card: Callable[[str], str] | None) -> None:
        target = self._own / folder_name(metadata.step)
        fresh = target.with_name(f"{target.name}.new")
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            made.save(fresh)
            for name, data in self._extra.items():
                (fresh / name).write_bytes(data)
            digest = made.digest()
            if card is not None:
                (fresh / CARD).write_text(card(digest.hex()), encoding="utf-8")
            manifest = describe(fresh, metadata, digest)
            (fresh / NAME).write_text(manifest.text(), encoding="utf-8")
            for path in (*fresh.iterdir(), fresh):
                system.sync(path)
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
            system.sync(self._own)
            system.lead(self._node / NEWEST, target)
            logger.info("wrote the checkpoint of step %d to %s", metadata.step, target)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            reason = error.strerror or str(error)
            self._unsaved = CheckpointError(f"cannot write the checkpoint {target}: {reason}; is the disk full?")
            self._note(metadata.step, self._unsaved)
            return
        except Exception as error:  # save_pretrained of a user's model may raise anything
            shutil.rmtree(fresh, ignore_errors=True)
            self._unsaved = CheckpointError(f"cannot write the checkpoint {target}: {error!r}")
            self._note(metadata.step, self._unsaved)
            return
        if self._storage is not None and rank is not None:
            storage = self._storage
            self._uploading.add(metadata.step)
            dropped = self._uploader.start(lambda: self._upload(storage, target, manifest, rank), metadata.step)
            if dropped is not None:
                self._uploading.discard(dropped)
                logger.warning(
                    "the checkpoint of step %d is not written to %s: a newer one replaced it first", dropped, storage
                )
        try:
            prune(self._home, self._keep, frozenset(self._uploading))
        except CheckpointError as error:
            logger.warning("%s", error)

    def _upload(self, storage: Storage, folder: Path, manifest: Manifest, rank: int) -> None:
        step = manifest.metadata.step
        try:
            for pause in (*self._pauses, None):
                try:
                    if not self._is_there(storage, manifest, rank):
                        storage.upload(folder, folder.name)
                        logger.info("wrote the checkpoint of step %d to %s", step, storage.name(folder.name))
                    prune(storage, self._keep)
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

    def _is_there(self, storage: Storage, manifest: Manifest, rank: int) -> bool:
        """Whether another node has written this checkpoint; gives earlier writers their time."""
        name = folder_name(manifest.metadata.step)
        seen: dict[str, int | None] = {}
        idle = 0.0
        while True:
            if _digest(storage, name) == manifest.digest:
                return True
            now = storage.entries(name)
            idle = 0.0 if now != seen else idle
            seen = now
            if idle >= rank * self._takeover:
                if rank:
                    logger.info("writing %s, because the node before this one did not", storage.name(name))
                return False
            self._sleep(self._takeover / LOOKS)
            idle += self._takeover / LOOKS

    def _note(self, step: int, error: PsycheError) -> None:
        self._errors[step] = error
        logger.error("%s", error)


def _digest(storage: Storage, name: str) -> str | None:
    """Digest of the parameters of a complete checkpoint; None if it is incomplete."""
    data = storage.read(f"{name}/{NAME}", MAX_SIZE)
    try:
        return None if data is None else Manifest.parse(data, name).digest
    except CheckpointError:  # its writer replaces it
        return None


class Worker:
    """One thread that works off one task after another; of the waiting tasks it does only the newest.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._working = False
        self._next: tuple[Callable[[], None], int] | None = None

    @property
    def busy(self) -> bool:
        """Whether a task is running."""
        with self._changed:
            return self._working

    def start(self, work: Callable[[], None], number: int = 0) -> int | None:
        """Do ``work`` soon. Returns the number of the waiting task that it replaces, if any."""
        with self._changed:
            dropped = None if self._next is None else self._next[1]
            self._next = work, number
            if not self._working:
                self._working = True
                # A daemon: a stopping node does not wait for a slow address.
                run = contextvars.copy_context().run  # so its log lines name this node
                threading.Thread(target=run, args=(self._run,), name=self._name, daemon=True).start()
            return dropped

    def wait(self) -> None:
        """Wait until all tasks are done."""
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
            del work  # frees its tensors before a waiting thread goes on and may end Python


def copy_newest(source: str, target: str, cache: Path) -> str:
    """Copy the newest usable checkpoint of one address to another. Returns its new address.

    Raises:
        PsycheError: there is none, or the address cannot be written.
    """
    storage = open_storage(target)
    storage.prepare()
    found, folder = fetch_newest(source, cache)
    name = folder_name(found.manifest.metadata.step)
    storage.upload(folder, name)
    return storage.name(name)
