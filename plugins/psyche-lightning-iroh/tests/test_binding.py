from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import iroh
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psyche_lightning_iroh import binding

Builder: Any = iroh.iroh_ffi._UniffiRustBufferBuilder
SLOW = Builder.write if Builder.write is not binding.fast_write else None


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Builder, "write", Builder.write)
    binding.use_fast_copy.cache_clear()
    yield
    binding.use_fast_copy.cache_clear()


def slow_write(builder: Any, value: Any) -> None:
    """What the binding of iroh 1.2.0 does."""
    with builder._reserve(len(value)):
        for i, byte in enumerate(bytes(value)):
            builder.rbuf.data[builder.rbuf.len + i] = byte


def content(parts: list[Any], write: Any) -> bytes:
    builder = Builder()
    try:
        for part in parts:
            write(builder, part)
        return bytes(builder.rbuf.data[: builder.rbuf.len])
    finally:
        builder.discard()


@given(st.lists(st.binary(max_size=3000), max_size=8))
def test_the_fast_copy_writes_the_same_bytes(parts: list[bytes]) -> None:
    assert content(list(parts), binding.fast_write) == content(list(parts), slow_write) == b"".join(parts)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_the_fast_copy_accepts_every_type_of_bytes(kind: Any) -> None:
    assert content([kind(b"abc"), kind(b"")], binding.fast_write) == b"abc"


def test_the_fast_copy_is_in_use() -> None:
    Builder.write = slow_write
    assert binding.use_fast_copy()
    assert Builder.write is binding.fast_write
    assert binding.use_fast_copy()


class Backwards(Builder):  # type: ignore[misc]
    """A binding that writes something else."""

    def write(self, value: Any) -> None:
        slow_write(self, bytes(value)[::-1])


class Stranger:
    """A binding that is made differently."""

    def write(self, value: Any) -> None:
        """Write."""

    def discard(self) -> None:
        """Free."""


@pytest.mark.parametrize("other", [Backwards, Stranger, None])
def test_a_binding_that_works_differently_is_left_alone(
    other: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = getattr(other, "write", None)
    with contextlib.suppress(AttributeError):
        monkeypatch.setattr(iroh.iroh_ffi, "_UniffiRustBufferBuilder", other)
    assert not binding.use_fast_copy()
    assert getattr(other, "write", None) is before
    assert "iroh copies bytes slowly" in caplog.text
