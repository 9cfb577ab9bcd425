"""Types of the programs' arguments and accounts, each with its borsh form, its form in a C struct, and its IDL.

One description serves the instructions (borsh), the coordinator account (``repr(C)``) and the IDL; the bytes are in
docs/solana-account.md. Values have the form of a TOML run configuration: a struct is a dict, a variant without a body
is its name, a variant with one is ``{name: body}``, and an empty option is None or omitted.

The decoders are strict: a value has one encoding, sizes are checked before reading, and only zeros follow the end of
a fixed string.
"""

# ruff: noqa: D102 - the methods are described where Type declares them

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from psyche_lightning.errors import ConfigError, WireError


class Reader:
    """Reads borsh values from ``data`` in order."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    @property
    def left(self) -> int:
        """The number of unread bytes."""
        return len(self.data) - self.place

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes.

        Raises:
            WireError: fewer are left.
        """
        if size > self.left:
            raise WireError(f"{size} bytes were expected at place {self.place} and {self.left} are left")
        self.place += size
        return self.data[self.place - size : self.place]

    def end(self) -> None:
        """Check that everything was read.

        Raises:
            WireError: bytes are left.
        """
        if self.left:
            raise WireError(f"{self.left} bytes follow the value")


class Type(ABC):
    """A type. ``size`` and ``align`` describe its C form; size 0 means it has none."""

    size = 0
    align = 1

    @abstractmethod
    def write(self, value: Any) -> bytes:
        """The borsh form of ``value``.

        Raises:
            ConfigError: the value is not of this type.
        """

    @abstractmethod
    def read(self, reader: Reader) -> Any:
        """Read a value in borsh.

        Raises:
            WireError: the bytes are not a canonical form.
        """

    @abstractmethod
    def idl(self) -> Any:
        """The type in a legacy Anchor IDL."""

    def pack(self, value: Any) -> bytes:
        """The C form of ``value``, ``size`` bytes; for most types it is the borsh form."""
        return self.write(value)

    def unpack(self, data: bytes) -> Any:
        """Read the C form."""
        return self.read(Reader(data[: self.size]))

    def decode(self, data: bytes) -> Any:
        """Read ``data``, exactly one value in borsh.

        Raises:
            WireError: it is something else.
        """
        reader = Reader(data)
        value = self.read(reader)
        reader.end()
        return value


class Number(Type):
    """An integer or a float, little-endian; borsh has no NaN."""

    def __init__(self, name: str, form: str) -> None:
        self.name, self.form = name, "<" + form
        self.size = self.align = struct.calcsize(self.form)
        self.floating = form in "fd"

    def write(self, value: Any) -> bytes:
        if isinstance(value, bool) or not isinstance(value, (int, float) if self.floating else int):
            raise ConfigError(f"{value!r} was given for a {self.name}")
        if math.isnan(value):
            raise ConfigError("NaN was given for a number")
        try:
            return struct.pack(self.form, value)
        except (struct.error, OverflowError) as error:
            raise ConfigError(f"{value!r} does not fit into a {self.name}") from error

    def read(self, reader: Reader) -> Any:
        value = struct.unpack(self.form, reader.take(self.size))[0]
        if self.floating and math.isnan(value):
            raise WireError("a number is NaN")
        return value

    def idl(self) -> Any:
        return self.name


U8, U16, U32, U64 = Number("u8", "B"), Number("u16", "H"), Number("u32", "I"), Number("u64", "Q")
I32, I64 = Number("i32", "i"), Number("i64", "q")
F32, F64 = Number("f32", "f"), Number("f64", "d")


class Boolean(Type):
    """One byte, 0 or 1."""

    size = 1

    def write(self, value: Any) -> bytes:
        if not isinstance(value, bool):
            raise ConfigError(f"{value!r} was given for a boolean; it is true or false")
        return bytes([value])

    def read(self, reader: Reader) -> Any:
        value = reader.take(1)[0]
        if value > 1:
            raise WireError(f"a boolean is {value}; it must be 0 or 1")
        return value == 1

    def idl(self) -> Any:
        return "bool"


BOOL = Boolean()


class Raw(Type):
    """A fixed number of raw bytes; also accepts a list of numbers."""

    def __init__(self, size: int) -> None:
        self.size = size

    def write(self, value: Any) -> bytes:
        try:
            data = b"" if isinstance(value, (str, int)) else bytes(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{value!r} was given for {self.size} bytes") from error
        if len(data) != self.size:
            raise ConfigError(f"{self.size} bytes were expected, and {value!r} was given")
        return data

    def read(self, reader: Reader) -> Any:
        return reader.take(self.size)

    def idl(self) -> Any:
        return {"array": ["u8", self.size]}


class Pubkey(Raw):
    """A Solana address, 32 bytes."""

    def __init__(self) -> None:
        super().__init__(32)

    def idl(self) -> Any:
        return "publicKey"


PUBKEY = Pubkey()


class Fixed(Raw):
    """A string of at most ``size`` bytes, padded with zeros.

    Bytes outside UTF-8 become surrogates, so that reading and writing gives the same bytes.
    """

    def write(self, value: Any) -> bytes:
        if not isinstance(value, str):
            raise ConfigError(f"{value!r} was given for a text")
        data = value.encode("utf-8", "surrogateescape")
        if len(data) > self.size or 0 in data:
            raise ConfigError(
                f"{value[:80]!r} has {len(data)} bytes; at most {self.size} without a zero among them fit"
            )
        return data.ljust(self.size, b"\0")

    def read(self, reader: Reader) -> Any:
        data = reader.take(self.size)
        text = data.rstrip(b"\0")
        if 0 in text:
            raise WireError("a fixed string goes on after its end")
        return text.decode("utf-8", "surrogateescape")


class String(Type):
    """A u32 length and UTF-8 of that length, at most ``limit``."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def write(self, value: Any) -> bytes:
        if not isinstance(value, str):
            raise ConfigError(f"{value!r} was given for a text")
        data = value.encode("utf-8", "surrogatepass")
        if len(data) > self.limit:
            raise ConfigError(f"{value[:80]!r} has {len(data)} bytes; at most {self.limit} fit")
        return struct.pack("<I", len(data)) + data

    def read(self, reader: Reader) -> Any:
        size = U32.read(reader)
        if size > self.limit:
            raise WireError(f"a string of {size} bytes; at most {self.limit} are taken")
        try:
            return reader.take(size).decode()
        except UnicodeDecodeError as error:
            raise WireError("a string is not UTF-8") from error

    def idl(self) -> Any:
        return "string"


class Vector(Type):
    """A u32 count and its items."""

    def __init__(self, item: Type) -> None:
        self.item = item

    def write(self, value: Any) -> bytes:
        return struct.pack("<I", len(value)) + b"".join(map(self.item.write, value))

    def read(self, reader: Reader) -> Any:
        count = U32.read(reader)
        if count > reader.left:
            raise WireError(f"{count} items were announced and {reader.left} bytes are left")
        return [self.item.read(reader) for _ in range(count)]

    def idl(self) -> Any:
        return "bytes" if self.item is U8 else {"vec": self.item.idl()}


class Array(Type):
    """A fixed array."""

    def __init__(self, item: Type, count: int) -> None:
        self.item, self.count = item, count
        self.size, self.align = item.size * count, item.align

    def write(self, value: Any) -> bytes:
        if len(value) != self.count:
            raise ConfigError(f"{self.count} values were expected, and {value!r} was given")
        return b"".join(map(self.item.write, value))

    def read(self, reader: Reader) -> Any:
        if isinstance(self.item, Number) and not self.item.floating:
            return list(struct.unpack(f"<{self.count}{self.item.form[1:]}", reader.take(self.size)))
        return [self.item.read(reader) for _ in range(self.count)]

    def idl(self) -> Any:
        return {"array": [self.item.idl(), self.count]}


class FixedVector(Type):
    """Psyche's ``FixedVec``: ``count`` items, all of them written, then the number of used ones as u64."""

    def __init__(self, name: str, item: Type, count: int, empty: Any) -> None:
        self.name, self.item, self.count, self.empty = name, item, count, empty

    def write(self, value: Any) -> bytes:
        if len(value) > self.count:
            raise ConfigError(f"{len(value)} values were given; there is room for {self.count}")
        items = [*value, *[self.empty] * (self.count - len(value))]
        return b"".join(map(self.item.write, items)) + struct.pack("<Q", len(value))

    def read(self, reader: Reader) -> Any:
        items = [self.item.read(reader) for _ in range(self.count)]
        used = U64.read(reader)
        if used > self.count:
            raise WireError(f"{used} items are used of {self.count}")
        return items[:used]

    def idl(self) -> Any:
        return {"defined": self.name}


class Option(Type):
    """A value or none; ``tag`` is the width of the tag in the C form."""

    def __init__(self, item: Type, tag: int = 1) -> None:
        self.item, self.tag = item, tag
        self.size, self.align = tag + item.size, max(tag, item.align)

    def write(self, value: Any) -> bytes:
        return b"\0" if value is None else b"\1" + self.item.write(value)

    def read(self, reader: Reader) -> Any:
        return self.item.read(reader) if BOOL.read(reader) else None

    def pack(self, value: Any) -> bytes:
        if value is None:
            return bytes(self.size)
        return (1).to_bytes(self.tag, "little") + self.item.pack(value)

    def unpack(self, data: bytes) -> Any:
        tag = int.from_bytes(data[: self.tag], "little")
        if tag > 1:
            raise WireError(f"the tag of an option is {tag}; it must be 0 or 1")
        return self.item.unpack(data[self.tag :]) if tag else None

    def idl(self) -> Any:
        return {"option": self.item.idl()}


def _up(place: int, align: int) -> int:
    return -place % align + place


class Struct(Type):
    """Named fields in the order of their declaration; ``memory`` gives the order in memory if different."""

    def __init__(self, name: str, fields: dict[str, Type], memory: Sequence[str] = ()) -> None:
        self.name, self.fields = name, fields
        self.align = max((kind.align for kind in fields.values()), default=1)
        self.offsets: dict[str, int] = {}
        place = 0
        for field in memory or fields:
            self.offsets[field] = _up(place, fields[field].align)
            place = self.offsets[field] + fields[field].size
        self.size = _up(place, self.align)

    def _values(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ConfigError(f"{self.name} has the fields {', '.join(self.fields)}; {value!r} was given")
        for field in value:
            if field not in self.fields:
                raise ConfigError(f"{self.name} has no field {field!r}; it has {', '.join(self.fields)}")
        for field, kind in self.fields.items():
            if field not in value and not isinstance(kind, Option):
                raise ConfigError(f"{self.name} lacks the field {field!r}")
        return {field: value.get(field) for field in self.fields}

    def _each(self, value: Any, pack: bool) -> dict[str, bytes]:
        parts = {}
        for field, item in self._values(value).items():
            try:
                parts[field] = self.fields[field].pack(item) if pack else self.fields[field].write(item)
            except ConfigError as error:
                raise ConfigError(f"{field}: {error}") from error
        return parts

    def write(self, value: Any) -> bytes:
        return b"".join(self._each(value, pack=False).values())

    def read(self, reader: Reader) -> Any:
        return {field: kind.read(reader) for field, kind in self.fields.items()}

    def pack(self, value: Any) -> bytes:
        data = bytearray(self.size)
        for field, part in self._each(value, pack=True).items():
            data[self.offsets[field] : self.offsets[field] + len(part)] = part
        return bytes(data)

    def unpack(self, data: bytes) -> Any:
        return {field: kind.unpack(data[self.offsets[field] :]) for field, kind in self.fields.items()}

    def idl(self) -> Any:
        return {"defined": self.name}


class Enum(Type):
    """One of several variants: a u8 in borsh; in memory a u32, and a union at the variants' alignment."""

    def __init__(self, name: str, variants: dict[str, Type | None]) -> None:
        self.name, self.variants = name, variants
        bodies = [body for body in variants.values() if body is not None]
        self.align = max([4, *(body.align for body in bodies)])
        self.body = _up(4, max((body.align for body in bodies), default=1))
        self.size = _up(self.body + max((body.size for body in bodies), default=0), self.align)
        if not bodies:
            self.size = 4

    def _choice(self, value: Any) -> tuple[int, Type | None, Any]:
        single = isinstance(value, dict) and len(value) == 1
        name, content = next(iter(value.items())) if single else (value, None)
        body = self.variants.get(name) if isinstance(name, str) else None
        if name not in list(self.variants) or (body is None) == single:
            raise ConfigError(f"{self.name} is one of {', '.join(self.variants)}; {value!r} was given")
        return list(self.variants).index(name), body, content

    def _variant(self, tag: int) -> tuple[str, Type | None]:
        if tag >= len(self.variants):
            raise WireError(f"{self.name} has no variant {tag}")
        return list(self.variants.items())[tag]

    def write(self, value: Any) -> bytes:
        tag, body, content = self._choice(value)
        return bytes([tag]) + (b"" if body is None else body.write(content))

    def read(self, reader: Reader) -> Any:
        name, body = self._variant(reader.take(1)[0])
        return name if body is None else {name: body.read(reader)}

    def pack(self, value: Any) -> bytes:
        tag, body, content = self._choice(value)
        data = struct.pack("<I", tag).ljust(self.body, b"\0")
        return (data + (b"" if body is None else body.pack(content))).ljust(self.size, b"\0")

    def unpack(self, data: bytes) -> Any:
        name, body = self._variant(int.from_bytes(data[:4], "little"))
        return name if body is None else {name: body.unpack(data[self.body :])}

    def idl(self) -> Any:
        return {"defined": self.name}
