"""Copies bytes quickly into iroh's library.

uniffi generates the Python binding of iroh 1.2.0, which copies a buffer to the library byte by byte in Python, at about
3 MB/s. :func:`use_fast_copy` replaces that one method by a ``memmove`` of the same bytes to the same place. It does so
only if the binding has the expected form, and the new method writes the same bytes as the old one. Otherwise it changes
nothing and logs a warning.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any

import iroh

_log = logging.getLogger(__name__)


@functools.cache
def use_fast_copy() -> bool:
    """Replace the slow copy, once in a process. Returns whether the fast one is in use."""
    try:
        builder = iroh.iroh_ffi._UniffiRustBufferBuilder
        check_same(builder)
    except Exception as error:
        _log.warning("iroh copies bytes slowly, at a few MB/s, because the fast copy does not fit it: %s", error)
        return False
    setattr(builder, "write", fast_write)  # noqa: B010 - it is a method of a class that is not ours
    return True


def fast_write(builder: Any, value: Any) -> None:
    """Append bytes to the buffer that ``builder`` fills; replaces ``_UniffiRustBufferBuilder.write``."""
    data = value if isinstance(value, bytes) else bytes(value)
    with builder._reserve(len(data)):
        if data:
            end = ctypes.cast(builder.rbuf.data, ctypes.c_void_p).value + builder.rbuf.len
            ctypes.memmove(end, data, len(data))


def check_same(builder: Any) -> None:
    """Check on small buffers that both methods write the same.

    Args:
        builder: the binding's class.

    Raises:
        Exception: they do not, or the class has another form.
    """
    parts: list[bytes | bytearray | memoryview] = [b"", b"x", bytes(range(256)), memoryview(bytes(5000)), bytearray(9)]
    written = []
    for write in (builder.write, fast_write):
        one = builder()
        try:
            for part in parts:
                write(one, part)
            written.append(bytes(one.rbuf.data[: one.rbuf.len]))
            if one.rbuf.len > one.rbuf.capacity:
                raise RuntimeError("the buffer is longer than its memory")
        finally:
            one.discard()
    if written[0] != b"".join(parts) or written[1] != written[0]:
        raise RuntimeError("the binding of this version of iroh works differently")
