from __future__ import annotations

import logging
from dataclasses import FrozenInstanceError, fields
from typing import Any, get_type_hints

import pytest

from psyche_lightning.node.notices import Finished, Notice, Outcome
from psyche_lightning.protocol.state import ClientStatus

KEY = bytes(range(32))
VALUES: dict[Any, Any] = {
    bytes: KEY,
    tuple[bytes, ...]: (KEY, KEY[::-1]),
    str: "what a field says",
    int: 7654321,
    float: 7654321.0,
    bool: True,
    ClientStatus: ClientStatus.DROPPED,
    Outcome: Outcome.OTHER_PARAMETERS,
}
KINDS = Notice.__subclasses__()


def example(kind: type[Notice]) -> Notice:
    hints = get_type_hints(kind)
    return kind(**{field.name: VALUES[hints[field.name]] for field in fields(kind)})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_notice_is_a_value_with_a_text_and_a_level(kind: type[Notice]) -> None:
    notice = example(kind)
    assert str(notice).strip()
    assert notice.level in (logging.INFO, logging.WARNING)
    assert notice == example(kind)
    assert hash(notice) == hash(example(kind))
    with pytest.raises((FrozenInstanceError, AttributeError)):
        notice.other = 1  # type: ignore[attr-defined]


def test_how_a_run_ends_is_told_in_three_ways() -> None:
    assert len({str(Finished(outcome, KEY)) for outcome in Outcome}) == 3
