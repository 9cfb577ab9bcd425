"""An extension of griffe: makes Markdown of what Sphinx would read in a docstring.

``:class:`Name``` becomes a link where the reference has the name, a paragraph that ends with ``::`` introduces a block
of code, and double backticks are single ones.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data|exc):`(~?)([\w.]+)`")
CODE = re.compile(r"``([^`]+)``")
LITERAL = re.compile(r"^([ ]*)(.*)::\n\n((?:\1[ ]{4,}.*\n?|\n)+)", re.MULTILINE)


class Roles(griffe.Extension):
    """Rewrites all docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """See :class:`griffe.Extension`."""
        self._walk(pkg)

    def _walk(self, obj: griffe.Object) -> None:
        if obj.docstring:
            obj.docstring.value = rewrite(obj.docstring.value, obj)
        for member in obj.members.values():
            if not member.is_alias:
                self._walk(member)  # type: ignore[arg-type]


def rewrite(text: str, obj: griffe.Object) -> str:
    """The docstring ``text`` of ``obj`` as Markdown."""

    def link(match: re.Match[str]) -> str:
        path = match[2]
        shown = path.rpartition(".")[2] if match[1] else path.removeprefix("psyche_lightning.")
        first, _, rest = path.partition(".")
        with contextlib.suppress(griffe.NameResolutionError):
            path = ".".join(filter(None, [obj.resolve(first), rest]))
        return f'<autoref optional identifier="{path}"><code>{shown}</code></autoref>'

    def block(match: re.Match[str]) -> str:
        words = "For example" if match[2] == "Example" else match[2]
        code = textwrap.indent(f"```python\n{textwrap.dedent(match[3]).strip()}\n```", match[1])
        return f"{match[1]}{words}:\n\n{code}\n\n"

    return LITERAL.sub(block, CODE.sub(r"`\1`", ROLE.sub(link, text)))
