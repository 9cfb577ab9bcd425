"""Links eBPF objects made by a stock clang into a Solana program (SBF version 0).

Solana's own compiler is a fork of LLVM; everything that its linker adds to what ``clang -target bpfel`` writes is here:

- one shared object in which file offset and address are the same, with ``.text``, ``.rodata`` and the dynamic tables;
- calls between functions are relative, calls of undefined functions are dynamic relocations that the loader turns into
  syscalls (it hashes the symbol's name);
- addresses of data are dynamic relocations too, since the loader moves the image to 0x1_0000_0000;
- ``callx`` names its register in the immediate, where newer eBPF names it in the destination.

What no linked program may hold is refused here, in words, instead of by the chain: writable data, frames beyond 4 KiB,
instructions that the virtual machine lacks, functions that nobody defines.

Sources: ``solana-sbpf`` (``elf.rs``, ``verifier.rs``, ``ebpf.rs``) and the relocation types of the kernel's
``llvm_reloc.rst``. Sections that the entry point does not reach are left out, so programs may share sources.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sbf_toolchain import elf
from sbf_toolchain.elf import LinkError, ObjectFile, Section, Symbol

FRAME_BYTES = 4096
INSTRUCTION = 8

# Relocation types of eBPF, and the one that only the output has.
R_BPF_64_64, R_BPF_64_ABS64, R_BPF_64_RELATIVE, R_BPF_64_32 = 1, 2, 8, 10

# Functions of the virtual machine that programs may call.
# fmt: off
SYSCALLS = frozenset(
    [
        "abort", "sol_panic_", "sol_log_", "sol_log_64_", "sol_log_pubkey", "sol_log_compute_units_", "sol_log_data",
        "sol_memcpy_", "sol_memmove_", "sol_memcmp_", "sol_memset_", "sol_sha256", "sol_keccak256", "sol_blake3",
        "sol_secp256k1_recover", "sol_curve_validate_point", "sol_create_program_address",
        "sol_try_find_program_address", "sol_invoke_signed_c", "sol_set_return_data", "sol_get_return_data",
        "sol_get_clock_sysvar", "sol_get_rent_sysvar", "sol_get_epoch_schedule_sysvar", "sol_get_stack_height",
        "sol_get_processed_sibling_instruction", "sol_remaining_compute_units",
    ]
)
# fmt: on

_LDDW, _CALL, _CALLX = 0x18, 0x85, 0x8D
_MOV64_REGISTER, _ADD64_IMMEDIATE = 0xBF, 0x07
_FRAME_REGISTER = 10
_LOADS = frozenset((0x61, 0x69, 0x71, 0x79))
_STORES = frozenset((0x62, 0x6A, 0x72, 0x7A, 0x63, 0x6B, 0x73, 0x7B))
_ALU = frozenset(
    operation << 4 | source << 3 | width for operation in range(13) for source in (0, 1) for width in (4, 7)
)
_JUMPS = frozenset(operation << 4 | source << 3 | 5 for operation in range(1, 14) for source in (0, 1))
_OPCODES = (
    (_ALU - {0x8C, 0x8F})  # negation has no register form
    | (_JUMPS - {0x0D, 0x95 | 8})
    | _LOADS
    | _STORES
    | {0x05, _LDDW, 0xD4, 0xDC, _CALL, _CALLX, 0x95}
)


@dataclass(frozen=True)
class Program:
    """A linked program.

    Attributes:
        image: the shared object, as it is deployed.
        text_bytes: size of its instructions.
        syscalls: the functions of the virtual machine that it calls, in the order of first use.
        relocations: how many places the loader adapts.
    """

    image: bytes
    text_bytes: int
    syscalls: tuple[str, ...]
    relocations: int


@dataclass(frozen=True)
class _Place:
    """A section of an object: what is kept or dropped as one."""

    object: int
    section: int


def link(objects: Sequence[tuple[str, bytes]], entry: str = "entrypoint") -> Program:
    """Link objects into one program; the same objects in the same order give the same bytes.

    Args:
        objects: name (for messages) and bytes of each relocatable object.
        entry: the global function at which the program starts.

    Raises:
        LinkError: an object is malformed, a symbol is missing or defined twice, a relocation or an instruction is not
            supported, a function's frame exceeds 4 KiB, or there is writable data.
    """
    return _Linker([elf.read_object(name, data) for name, data in objects], entry).link()


class _Linker:
    def __init__(self, objects: list[ObjectFile], entry: str) -> None:
        self.objects = objects
        self.entry = entry
        self.addresses: dict[_Place, int] = {}
        self.syscalls: list[str] = []
        self.dynamic: list[tuple[int, int, int]] = []  # address, index of the dynamic symbol, type

    def link(self) -> Program:
        self._refuse_writable_data()
        self.globals = self._global_symbols()
        if self.entry not in self.globals:
            raise LinkError(f"No object defines the entry point {self.entry!r}: {self._names()}.")
        live = self._reachable()
        code = [place for place in live if self._section(place).code]
        data = [place for place in live if not self._section(place).code]
        for place in code:
            self._check_instructions(place)
        text_start = elf.FILE_HEADER.size + 2 * elf.PROGRAM_HEADER.size
        text_end = self._lay_out(code, text_start, INSTRUCTION)
        rodata_start = _aligned(text_end, 16)
        rodata_end = self._lay_out(data, rodata_start, 1)
        image = bytearray(rodata_end)
        for place in live:
            try:
                content = self._relocated(place)
            except struct.error:
                name = self.objects[place.object].name
                raise LinkError(f"{name} is damaged: a relocation does not fit its place.") from None
            image[self.addresses[place] : self.addresses[place] + len(content)] = content
        entry_place, entry_symbol = self.globals[self.entry]
        _finish(
            image,
            text=(text_start, text_end - text_start),
            rodata=(rodata_start, rodata_end - rodata_start),
            entry=(self.entry, self.addresses[entry_place] + entry_symbol.value, entry_symbol.size),
            syscalls=self.syscalls,
            relocations=sorted(self.dynamic),
        )
        return Program(bytes(image), text_end - text_start, tuple(self.syscalls), len(self.dynamic))

    def _section(self, place: _Place) -> Section:
        return self.objects[place.object].sections[place.section]

    def _names(self) -> str:
        return ", ".join(each.name for each in self.objects) or "there are none"

    def _refuse_writable_data(self) -> None:
        for each in self.objects:
            common = [symbol.name for symbol in each.symbols if symbol.section == elf.SHN_COMMON]
            for index, section in enumerate(each.sections):
                if section.loaded and section.flags & elf.SHF_WRITE and not section.name.startswith(".data.rel.ro"):
                    common += [s.name for s in each.symbols if s.section == index and s.name] or [section.name]
            if common:
                raise LinkError(
                    f"{each.name} has writable data: {', '.join(sorted(common))}. A Solana program has no mutable "
                    "globals; make them const, or keep them in an account or on the stack."
                )

    def _global_symbols(self) -> dict[str, tuple[_Place, Symbol]]:
        found: dict[str, tuple[_Place, Symbol]] = {}
        for index, each in enumerate(self.objects):
            for symbol in each.symbols:
                if symbol.binding == elf.STB_LOCAL or not 0 < symbol.section < elf.SHN_LORESERVE:
                    continue
                if symbol.name in found and symbol.binding == elf.STB_GLOBAL:
                    other, earlier = found[symbol.name]
                    if earlier.binding == elf.STB_GLOBAL:
                        names = f"{self.objects[other.object].name} and {each.name}"
                        raise LinkError(f"{symbol.name!r} is defined twice, in {names}; make one of them static.")
                if symbol.name not in found or symbol.binding == elf.STB_GLOBAL:
                    found[symbol.name] = (_Place(index, symbol.section), symbol)
        return found

    def _target(self, place: _Place, index: int) -> tuple[_Place, Symbol] | str:
        """Where the symbol of a relocation is defined, or the name of a syscall."""
        owner = self.objects[place.object]
        symbol = owner.symbols[index]
        if symbol.binding == elf.STB_LOCAL and 0 < symbol.section < elf.SHN_LORESERVE:
            return _Place(place.object, symbol.section), symbol
        if symbol.name in self.globals:
            return self.globals[symbol.name]
        if symbol.name in SYSCALLS:
            return symbol.name
        user = next(r.offset for r in self._section(place).relocations if r.symbol == index)
        close = difflib.get_close_matches(symbol.name, [*self.globals, *SYSCALLS], n=1)
        nearest = f" Did you mean {close[0]!r}?" if close else ""
        raise LinkError(
            f"{symbol.name!r} is used in {owner.place(place.section, user)}, but no object defines it and Solana's "
            f"virtual machine has no such function.{nearest} "
            f"Linked: {self._names()}."
        )

    def _reachable(self) -> list[_Place]:
        """The sections that the entry point needs, in the objects' order."""
        waiting = [self.globals[self.entry][0]]
        live = set(waiting)
        while waiting:
            place = waiting.pop()
            for relocation in self._section(place).relocations:
                target = self._target(place, relocation.symbol)
                if not isinstance(target, str) and target[0] not in live:
                    live.add(target[0])
                    waiting.append(target[0])
        for place in live:
            if not self._section(place).flags & elf.SHF_ALLOC:
                name = self.objects[place.object].name
                raise LinkError(f"{name}: a relocation points into {self._section(place).name}, which is not loaded.")
        return sorted(live, key=lambda place: (place.object, place.section))

    def _lay_out(self, places: list[_Place], address: int, align: int) -> int:
        """Give each section its address; returns the end of the last."""
        for place in places:
            section = self._section(place)
            # Code and pointers are read in words of eight bytes.
            address = _aligned(address, max(align, section.align, 8 if section.relocations else 1))
            self.addresses[place] = address
            address += len(section.data)
        return address

    def _check_instructions(self, place: _Place) -> None:
        owner, data = self.objects[place.object], self._section(place).data
        if len(data) % INSTRUCTION:
            raise LinkError(f"{owner.name}: the code of {self._section(place).name} is not made of whole instructions.")
        frame_copy = -1  # the register to which the previous instruction copied the frame's end
        for at in _instructions(data):
            opcode, registers, offset, immediate = struct.unpack_from("<BBhi", data, at)
            target, source = registers & 15, registers >> 4
            # Newer eBPF gives arithmetic with an offset another meaning; a half lddw is none at all.
            changed = (opcode in _ALU and offset) or (opcode == _LDDW and at + 2 * INSTRUCTION > len(data))
            if opcode not in _OPCODES or changed:
                raise LinkError(
                    f"{owner.place(place.section, at)}: Solana's virtual machine (SBF version 0) has no instruction "
                    f"{opcode:#04x} with offset {offset}; compile with -mcpu=v2 and without atomics."
                )
            depth = 0
            if (opcode in _LOADS and source == _FRAME_REGISTER) or (opcode in _STORES and target == _FRAME_REGISTER):
                depth = -offset
            elif opcode == _ADD64_IMMEDIATE and target == frame_copy:
                depth = -immediate
            if depth > FRAME_BYTES:
                raise LinkError(
                    f"{owner.place(place.section, at)} uses {depth} bytes of stack; a frame has {FRAME_BYTES}. Move "
                    "large variables to an account or the heap, or split the function (noinline)."
                )
            frame_copy = target if opcode == _MOV64_REGISTER and source == _FRAME_REGISTER else -1

    def _relocated(self, place: _Place) -> bytearray:
        """The section's bytes with its relocations applied; what the loader must do is added to ``dynamic``."""
        owner, section = self.objects[place.object], self._section(place)
        data = bytearray(section.data)
        if section.code:
            for at in _instructions(data):
                if data[at] == _CALLX and data[at + 1]:
                    struct.pack_into("<Bxxi", data, at + 1, 0, data[at + 1] & 15)
        for relocation in section.relocations:
            at, address = relocation.offset, self.addresses[place] + relocation.offset
            target = self._target(place, relocation.symbol)
            where = owner.place(place.section, at)
            if relocation.kind == R_BPF_64_32 and section.code and data[at] == _CALL:
                struct.pack_into("<i", data, at + 4, self._call(target, data, at, address, where))
                continue
            if isinstance(target, str):
                raise LinkError(f"{where}: {target!r} is a syscall, which can be called but has no address.")
            base = self.addresses[target[0]] + target[1].value
            if relocation.kind == R_BPF_64_64 and section.code and data[at] == _LDDW:
                low, high = struct.unpack_from("<4xI4xI", data, at)
                struct.pack_into("<I", data, at + 4, base + (high << 32 | low))
                struct.pack_into("<I", data, at + 12, 0)
                data[at + 1] &= 15  # the source register marks a map's address in the kernel's dialect
            elif relocation.kind == R_BPF_64_ABS64 and not section.code:
                (addend,) = struct.unpack_from("<Q", data, at)
                struct.pack_into("<II", data, at, 0, base + addend)  # the loader reads it from the upper half
            else:
                raise LinkError(f"{where}: relocations of type {relocation.kind} are not supported here.")
            self.dynamic.append((address, 0, R_BPF_64_RELATIVE))
        return data

    def _call(self, target: tuple[_Place, Symbol] | str, data: bytearray, at: int, address: int, where: str) -> int:
        """The immediate of a call: the distance in instructions, or -1 for what the loader resolves."""
        if isinstance(target, str):
            if target not in self.syscalls:
                self.syscalls.append(target)
            self.dynamic.append((address, 2 + self.syscalls.index(target), R_BPF_64_32))
            return -1
        addend: int = struct.unpack_from("<i", data, at + 4)[0]  # from the section's start; -1 is none
        function = self.addresses[target[0]] + target[1].value + INSTRUCTION * (addend + 1)
        if not self._section(target[0]).code or function % INSTRUCTION:
            raise LinkError(f"{where} calls something that is not code.")
        return (function - address) // INSTRUCTION - 1


def _instructions(data: bytes | bytearray) -> Iterator[int]:
    """Offsets of the instructions; ``lddw`` is twice as long as the others."""
    at = 0
    while at < len(data):
        yield at
        at += 2 * INSTRUCTION if data[at] == _LDDW else INSTRUCTION


def _finish(
    image: bytearray,
    *,
    text: tuple[int, int],
    rodata: tuple[int, int],
    entry: tuple[str, int, int],
    syscalls: list[str],
    relocations: list[tuple[int, int, int]],
) -> None:
    """Append the dynamic tables and section headers to the loaded bytes, and write the file's header."""
    names = bytearray(b"\0")
    symbols = bytearray(elf.SYMBOL.size)
    for name, section, value, size in [(entry[0], 1, *entry[1:]), *((name, 0, 0, 0) for name in syscalls)]:
        symbols += elf.SYMBOL.pack(
            len(names), elf.STB_GLOBAL << 4 | (elf.STT_FUNC if section else 0), 0, section, value, size
        )
        names += name.encode() + b"\0"
    table = b"".join(elf.REL.pack(address, symbol << 32 | kind) for address, symbol, kind in relocations)

    dynamic_start = _aligned(len(image), 8)
    dynamic_bytes = 8 * elf.DYN.size
    symbols_start = dynamic_start + dynamic_bytes
    names_start = symbols_start + len(symbols)
    table_start = _aligned(names_start + len(names), 8)
    entries = [
        (17, table_start),  # DT_REL
        (18, len(table)),  # DT_RELSZ
        (19, elf.REL.size),  # DT_RELENT
        (6, symbols_start),  # DT_SYMTAB
        (11, elf.SYMBOL.size),  # DT_SYMENT
        (5, names_start),  # DT_STRTAB
        (10, len(names)),  # DT_STRSZ
        (0, 0),  # DT_NULL
    ]
    _append(image, dynamic_start, b"".join(elf.DYN.pack(*each) for each in entries))
    _append(image, symbols_start, symbols)
    _append(image, names_start, names)
    _append(image, table_start, table)
    loaded = len(image)

    # Name, type, flags, address (= offset), size, link, info, alignment, entry size.
    sections = [
        (".text", elf.SHT_PROGBITS, elf.SHF_ALLOC | elf.SHF_EXECINSTR, *text, 0, 0, 8, 0),
        (".rodata", elf.SHT_PROGBITS, elf.SHF_ALLOC, *rodata, 0, 0, 16, 0),
        (".dynamic", elf.SHT_DYNAMIC, elf.SHF_ALLOC, dynamic_start, dynamic_bytes, 5, 0, 8, elf.DYN.size),
        (".dynsym", elf.SHT_DYNSYM, elf.SHF_ALLOC, symbols_start, len(symbols), 5, 1, 8, elf.SYMBOL.size),
        (".dynstr", elf.SHT_STRTAB, elf.SHF_ALLOC, names_start, len(names), 0, 0, 1, 0),
        (".rel.dyn", elf.SHT_REL, elf.SHF_ALLOC, table_start, len(table), 4, 0, 8, elf.REL.size),
    ]
    section_names = bytearray(b"\0")
    headers = bytearray(elf.SECTION_HEADER.size)
    for name, kind, flags, address, *rest in [*sections, (".shstrtab", elf.SHT_STRTAB, 0, 0, 0, 0, 0, 1, 0)]:
        label, offset = len(section_names), address
        section_names += name.encode() + b"\0"
        if name == ".shstrtab":
            offset, rest[0] = loaded, len(section_names)
        headers += elf.SECTION_HEADER.pack(label, kind, flags, address, offset, *rest)
    image += section_names
    _append(image, _aligned(len(image), 8), headers)

    header = elf.FILE_HEADER.pack(
        elf.IDENT,
        elf.ET_DYN,
        elf.EM_BPF,
        1,
        entry[1],
        elf.FILE_HEADER.size,
        len(image) - len(headers),
        0,  # flags: SBF version 0
        elf.FILE_HEADER.size,
        elf.PROGRAM_HEADER.size,
        2,
        elf.SECTION_HEADER.size,
        len(headers) // elf.SECTION_HEADER.size,
        len(sections) + 1,
    )
    start, bytes_ = text[0], loaded - text[0]
    header += elf.PROGRAM_HEADER.pack(1, 5, start, start, start, bytes_, bytes_, 8)  # PT_LOAD, read and execute
    header += elf.PROGRAM_HEADER.pack(2, 4, *[dynamic_start] * 3, *[dynamic_bytes] * 2, 8)  # PT_DYNAMIC
    image[: len(header)] = header


def _append(image: bytearray, offset: int, content: bytes | bytearray) -> None:
    image += bytes(offset - len(image)) + content


def _aligned(address: int, align: int) -> int:
    return -(-address // align) * align
