"""Ctrl-C during a training of one process alone: the round ends first, so that what was trained can be saved."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


class Interrupt:
    """Whether Ctrl-C was pressed.

    Attributes:
        waits: whether a Ctrl-C is waiting for the end of the round.
    """

    waits = False

    @contextmanager
    def deferred(self, worth: Callable[[], bool]) -> Iterator[None]:
        """Within the block, the first Ctrl-C only sets :attr:`waits`; a second one acts at once.

        Args:
            worth: whether there is something to save; without, a Ctrl-C acts at once.
        """
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
            yield  # somebody else decides what Ctrl-C does
            return

        def note(number: int, frame: object) -> None:
            if self.waits or not worth():
                raise KeyboardInterrupt
            self.waits = True
            logger.info("Ctrl-C: this round ends first, then a checkpoint is written; once more ends at once")

        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            if signal.getsignal(signal.SIGINT) is note:  # Trainer ignores Ctrl-C while it ends
                signal.signal(signal.SIGINT, before)
