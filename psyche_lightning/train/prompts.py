"""Texts that a node writes while it waits for others: it continues the recipe's beginnings, one after another."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence

from lightning.pytorch.utilities.seed import isolate_rng

from psyche_lightning.data.tokenizer import prompt_ids
from psyche_lightning.errors import ConfigError
from psyche_lightning.hookspecs import DataProvider
from psyche_lightning.lightning.session import Session
from psyche_lightning.node.spare import COMPARED
from psyche_lightning.protocol.requests import MAX_TOKENS
from psyche_lightning.text import plain
from psyche_lightning.train.tasks import saved_tokenizer
from psyche_lightning.train.together import CONTINUE

logger = logging.getLogger(__name__)

MOST = 256
"""Tokens that are added to a text, as in Psyche; fewer if the text ends before, or a sample's length is reached."""


class Prompts:
    """Adds the likeliest token to a text, again and again (:class:`~psyche_lightning.node.spare.SpareWork`).

    The parameters are those of the moment, so a text of many tokens is of several steps. A whole text goes into the
    log, and each token into the node's next report.

    Args:
        prompts: the beginnings of the texts.
        provider: has the tokenizer, and the length of a sample.

    Raises:
        ConfigError: the data has no tokenizer, or a beginning is as long as a sample.
    """

    def __init__(self, prompts: Sequence[str], provider: DataProvider) -> None:
        self._tokenizer = saved_tokenizer(provider.tokenizer)
        end = getattr(provider, "end_of_text", None)
        self._end = self._tokenizer.eos_token_id if end is None else end
        self._prompts = [(text, prompt_ids(self._tokenizer, text)) for text in prompts]
        self._longest = provider.seq_len
        for text, ids in self._prompts:
            if not 0 < len(ids) < self._longest:
                raise ConfigError(
                    f"evals.prompts has {text[:40]!r} of {len(ids)} tokens; between 1 and data.seq_len - 1, "
                    f"{self._longest - 1}, are expected."
                )
        self._seconds: deque[float] = deque(maxlen=COMPARED)
        self._place = self._step = self._left = 0
        self._added: list[int] = []
        self._session: Session | None = None

    def begin(self, session: Session) -> None:
        """Use the waits of a session from now on; tries out a token.

        Raises:
            ConfigError: the model cannot continue a text.
        """
        self._session = session
        self._place = session.identity[-1] % len(self._prompts)  # nodes begin with different ones
        try:
            self._next()
        except Exception as error:  # a model's own code raises many types
            raise ConfigError(f"the model cannot continue the texts of evals.prompts: {error}") from error
        session.spare.give(self)

    def after_round(self, step: int) -> None:
        """Allow as many further tokens as a report holds; the parameters are now those of this step."""
        self._step, self._left = step, MAX_TOKENS

    def at_the_end(self, session: Session) -> None:
        """Write nothing more."""
        session.spare.withdraw(self)

    # --- spare work -------------------------------------------------------------------------------------------------

    def estimate(self) -> float | None:
        """The longest of the latest times of a token; None if this round has had its tokens."""
        return max(self._seconds) if self._left else None

    def work(self) -> None:
        """Add a token; a model that fails writes no more, and training goes on."""
        assert self._session is not None
        self._left -= 1
        try:
            token = self._next()
        except Exception as error:
            logger.warning("texts are continued no further: %s", error)
            self._session.spare.withdraw(self)
            return
        self._session.wrote(self._place, token)
        self._added.append(token)
        text, ids = self._prompts[self._place]
        if token == self._end or len(self._added) == MOST or len(ids) + len(self._added) == self._longest:
            added = self._tokenizer.decode(self._added, skip_special_tokens=True)
            logger.info('step %d  after "%s" follows "%s"', self._step, plain(text), plain(added))
            self._added, self._place = [], (self._place + 1) % len(self._prompts)

    def _next(self) -> int:
        assert self._session is not None
        began = time.monotonic()
        with isolate_rng():
            token: int = self._session.on_shards(CONTINUE, *self._prompts[self._place][1], *self._added)
        self._seconds.append(time.monotonic() - began)
        return token
