"""Text of others: names, addresses and reasons that peers and servers chose, before anybody sees it.

A terminal obeys control characters: they move its cursor, change its title and hide lines. Half of a surrogate pair
cannot be printed at all, and directional marks show a name in another order than it has.
"""

from __future__ import annotations

import re

_HARMFUL = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_ANY = re.compile(f"[{_HARMFUL}]")
_WITHIN_LINES = re.compile(f"(?![\n\t])[{_HARMFUL}]")


def plain(text: str, *, lines: bool = False) -> str:
    """The text with an escape in place of each character that a terminal would obey.

    Args:
        text: from anybody.
        lines: whether newlines and tabs stay, for text that has lines of its own.
    """
    return (_WITHIN_LINES if lines else _ANY).sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_plain(text: str) -> bool:
    """Whether :func:`plain` leaves the text as it is."""
    return _ANY.search(text) is None
