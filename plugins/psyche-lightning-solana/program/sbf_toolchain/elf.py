"""Relocatable ELF objects for eBPF, as ``clang -target bpfel`` writes them: a bounded reader.

Layouts: System V ABI, "ELF-64 Object File Format"; relocation types of eBPF: the kernel's ``llvm_reloc.rst``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

EM_BPF = 247
ET_REL, ET_DYN = 1, 3
SHT_PROGBITS, SHT_SYMTAB, SHT_STRTAB, SHT_RELA, SHT_NOBITS, SHT_DYNAMIC, SHT_REL, SHT_DYNSYM = 1, 2, 3, 4, 8, 6, 9, 11
SHF_WRITE, SHF_ALLOC, SHF_EXECINSTR = 1, 2, 4
STB_LOCAL, STB_GLOBAL, STB_WEAK = 0, 1, 2
STT_FUNC = 2
SHN_LORESERVE, SHN_COMMON = 0xFF00, 0xFFF2  # from the first on: not a section

MAX_BYTES, MAX_ALIGN = 10 << 20, 4096  # an account's size; what a page would need

FILE_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SECTION_HEADER = struct.Struct("<IIQQQQIIQQ")
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
SYMBOL = struct.Struct("<IBBHQQ")
REL = struct.Struct("<QQ")
DYN = struct.Struct("<QQ")

IDENT = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64 bits, little-endian, version 1


class ToolchainError(Exception):
    """A program cannot be made; the text says why, and what to do."""


class LinkError(ToolchainError):
    """Objects do not make a program."""


@dataclass(frozen=True)
class Relocation:
    """A place in a section that depends on a symbol.

    Attributes:
        offset: where in the section, in bytes.
        kind: the ELF relocation type.
        symbol: index into the object's symbols.
    """

    offset: int
    kind: int
    symbol: int


@dataclass(frozen=True)
class Symbol:
    """A name for a place in a section.

    Attributes:
        name: as in the source; empty for a section's own symbol.
        value: offset in its section, in bytes.
        size: in bytes.
        binding: ``STB_LOCAL``, ``STB_GLOBAL`` or ``STB_WEAK``.
        function: whether it names code.
        section: index of its section, 0 when another object defines it.
    """

    name: str
    value: int
    size: int
    binding: int
    function: bool
    section: int


@dataclass
class Section:
    """A part of an object that is loaded, or not, as one piece."""

    name: str
    kind: int
    flags: int
    align: int
    data: bytearray
    relocations: list[Relocation] = field(default_factory=list)

    @property
    def loaded(self) -> bool:
        """Whether a program may have it in memory."""
        return bool(self.flags & SHF_ALLOC and self.data)

    @property
    def code(self) -> bool:
        """Whether it holds instructions."""
        return bool(self.flags & SHF_EXECINSTR)


@dataclass
class ObjectFile:
    """One relocatable object."""

    name: str
    sections: list[Section]
    symbols: list[Symbol]

    def place(self, section: int, offset: int) -> str:
        """``"function+0x10 (file.o)"``, for messages."""
        functions = [s for s in self.symbols if s.section == section and s.name and s.value <= offset]
        nearest = max(functions, key=lambda symbol: (symbol.value, symbol.function), default=None)
        if nearest is None:
            return f"{self.sections[section].name}+{offset:#x} ({self.name})"
        return f"{nearest.name}+{offset - nearest.value:#x} ({self.name})"


def read_object(name: str, data: bytes) -> ObjectFile:
    """Parse an object file.

    Args:
        name: what messages call it.
        data: the whole file.

    Raises:
        LinkError: it is not a well-formed relocatable eBPF object.
    """
    try:
        return _read(name, data)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise LinkError(f"{name} is damaged: a table or a text in it reaches beyond its end ({error}).") from None


def _read(name: str, data: bytes) -> ObjectFile:
    if len(data) < FILE_HEADER.size or data[:6] != IDENT[:6]:
        raise LinkError(f"{name} is not a 64-bit little-endian ELF file; compile it with clang -target bpfel -c.")
    header = FILE_HEADER.unpack_from(data)
    kind, machine, table, count, names_index = header[1], header[2], header[6], header[12], header[13]
    if (kind, machine) != (ET_REL, EM_BPF):
        raise LinkError(
            f"{name} is not a relocatable eBPF object (type {kind}, machine {machine}; expected {ET_REL}, {EM_BPF}); "
            "compile it with clang -target bpfel -c."
        )
    headers = list(SECTION_HEADER.iter_unpack(_slice(data, table, SECTION_HEADER.size * count)))
    contents = [b"" if h[1] == SHT_NOBITS else _slice(data, h[4], h[5]) for h in headers]
    sections = []
    for h, content in zip(headers, contents, strict=True):
        if (h[1] == SHT_NOBITS and h[5] > MAX_BYTES) or h[8] > MAX_ALIGN:
            raise LinkError(f"{name} has a section of {h[5]} bytes, aligned to {h[8]}: more than a program can be.")
        filled = bytearray(h[5]) if h[1] == SHT_NOBITS else bytearray(content)
        sections.append(Section(_text(contents[names_index], h[0]), h[1], h[2], max(1, h[8]), filled))
    symbols: list[Symbol] = []
    for h, content in zip(headers, contents, strict=True):
        if h[1] == SHT_SYMTAB:
            symbols = [_symbol(fields, contents[h[6]]) for fields in SYMBOL.iter_unpack(content)]
    for symbol in symbols:
        if count <= symbol.section < SHN_LORESERVE:
            raise IndexError("section index of a symbol")
    for h, content in zip(headers, contents, strict=True):
        if h[1] == SHT_RELA and sections[h[7]].flags & SHF_ALLOC:
            raise LinkError(f"{name} has relocations with addends (RELA), which clang does not write for eBPF.")
        if h[1] == SHT_REL:
            found = [Relocation(offset, info & 0xFFFFFFFF, info >> 32) for offset, info in REL.iter_unpack(content)]
            if any(r.symbol >= len(symbols) or r.offset + 8 > len(sections[h[7]].data) for r in found):
                raise IndexError("relocation")
            sections[h[7]].relocations += found
    return ObjectFile(name, sections, symbols)


def _symbol(fields: tuple[int, int, int, int, int, int], names: bytes) -> Symbol:
    name, info, _, section, value, size = fields
    return Symbol(_text(names, name), value, size, info >> 4, info & 15 == STT_FUNC, section)


def _slice(data: bytes, offset: int, size: int) -> bytes:
    if offset + size > len(data):
        raise IndexError("section")
    return data[offset : offset + size]


def _text(table: bytes, offset: int) -> str:
    end = table.find(b"\0", offset)
    if end < 0:
        raise IndexError("name")
    return table[offset:end].decode("ascii")
