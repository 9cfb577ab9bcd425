"""Real objects by clang, linked by us, verified by the real loader and run by the real virtual machine."""

from __future__ import annotations

import base64
import contextlib
import random
import struct
import subprocess
from pathlib import Path

import pytest
from sbf_toolchain import elf
from sbf_toolchain.build import FLAGS, find_clang
from sbf_toolchain.linker import LinkError, link
from solana_support.vm import Vm, must
from solders.instruction import Instruction

TYPES = """
typedef unsigned char u8; typedef unsigned long long u64;
extern u64 sol_log_(const char *, u64);
extern u64 sol_set_return_data(const u8 *, u64);
"""


pytestmark = pytest.mark.clang


class Compiler:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clang = find_clang()

    def __call__(self, name: str, source: str, *flags: str) -> tuple[str, bytes]:
        file = self.folder / name
        file.write_text(TYPES + source)
        target = file.with_suffix(".o")
        subprocess.run([self.clang, *FLAGS, "-Wno-error", *flags, "-c", str(file), "-o", str(target)], check=True)
        return name, target.read_bytes()


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    return Compiler(tmp_path)


OTHER = "u64 other(const char *text, u64 n) { return n + (u8)text[0]; }"
ENTRY = "u64 entrypoint(const u8 *input) { %s }"


def returned(image: bytes, data: bytes = b"", *, features: bool = False) -> bytes:
    """What the program returns for this instruction data, after a real deployment."""
    vm = Vm(features=features)
    program = vm.deploy(image)
    outcome = must(vm.send([Instruction(program, data, [])]))
    [line] = [line for line in outcome.logs if line.startswith("Program return: ")]
    return base64.b64decode(line.split()[-1])


TABLES = [
    (
        "main.c",
        """
        typedef u64 (*operation)(u64, u64);
        extern const operation operations[3];
        extern const char *const names[3];
        extern u64 measure(const char *);
        u64 entrypoint(const u8 *input) {
          const u8 *data = input + 16;
          u64 chosen = data[0] % 3;
          u64 results[2] = {operations[chosen](data[1], data[2]), measure(names[chosen])};
          sol_set_return_data((const u8 *)results, sizeof results);
          return 0;
        }
        """,
    ),
    (
        "tables.c",
        """
        typedef u64 (*operation)(u64, u64);
        static __attribute__((noinline)) u64 add(u64 a, u64 b) { return a + b; }
        static __attribute__((noinline)) u64 multiply(u64 a, u64 b) { return a * b; }
        u64 power(u64 a, u64 b) { u64 r = 1; while (b--) r = multiply(r, a); return r; }
        extern const operation operations[3];
        const operation operations[3] = {add, multiply, power};
        extern const char *const names[3];
        const char *const names[3] = {"add", "multiply", "power of"};
        """,
    ),
    ("text.c", "u64 measure(const char *text) { u64 n = 0; while (text[n]) n++; return n; }"),
]


@pytest.mark.parametrize("features", [False, True])
def test_calls_tables_of_functions_and_of_texts_across_objects(compiler: Compiler, features: bool) -> None:
    program = link([compiler(name, source) for name, source in TABLES])
    assert program.syscalls == ("sol_set_return_data",)
    for chosen, expected in [(0, (9, 3)), (1, (14, 8)), (2, (128, 8))]:
        data = bytes([chosen, 2, 7])
        assert struct.unpack("<2Q", returned(program.image, data, features=features).ljust(16, b"\0")) == expected


def test_the_order_of_objects_decides_the_bytes_and_nothing_else(compiler: Compiler) -> None:
    objects = [compiler(name, source) for name, source in TABLES]
    assert link(objects) == link(objects)
    renamed = [(f"elsewhere/{name}", data) for name, data in objects]
    assert link(renamed) == link(objects)
    assert link(objects[::-1]).image != link(objects).image


def test_what_the_entry_does_not_reach_is_left_out(compiler: Compiler) -> None:
    main = compiler("main.c", ENTRY % 'return sol_log_("x", 1);')
    unused = compiler("unused.c", "extern u64 nowhere(void); u64 unused(void); u64 unused(void) { return nowhere(); }")
    assert link([main, unused]).image == link([main]).image


def test_a_strong_definition_replaces_a_weak_one(compiler: Compiler) -> None:
    main = compiler(
        "main.c",
        "__attribute__((weak)) u64 value(void) { return 1; }"
        + ENTRY % "u64 v = value(); sol_set_return_data((const u8 *)&v, 8); return (u64)input & 0;",
    )
    strong = compiler("strong.c", "u64 value(void); u64 value(void) { return 2; }")
    for objects, expected in [([main], 1), ([main, strong], 2), ([strong, main], 2)]:
        assert returned(link(objects).image) == struct.pack("<Q", expected)


def refused(*objects: tuple[str, bytes]) -> str:
    with pytest.raises(LinkError) as caught:
        link(objects)
    return str(caught.value)


def test_unknown_functions_are_named_with_their_user_and_a_guess(compiler: Compiler) -> None:
    text = refused(
        compiler(
            "main.c", "extern u64 sol_memcopy_(u8 *, const u8 *, u64);" + ENTRY % "return sol_memcopy_(0, input, 1);"
        )
    )
    assert "'sol_memcopy_' is used in entrypoint+0x" in text
    assert "main.c" in text
    assert "Did you mean 'sol_memcpy_'?" in text


def test_undefined_data_is_refused(compiler: Compiler) -> None:
    assert "'table' is used in entrypoint" in refused(
        compiler("main.c", "extern const u64 table[4];" + ENTRY % "return table[input[0] & 3];")
    )


def test_the_address_of_a_syscall_is_refused(compiler: Compiler) -> None:
    source = "typedef u64 (*f)(const char *, u64); u64 other(const char *, u64);"
    source += "extern const f fs[2]; const f fs[2] = {sol_log_, other};"
    text = refused(compiler("main.c", source + OTHER + ENTRY % 'return fs[input[0] & 1]("x", 1);'))
    assert "'sol_log_' is a syscall" in text


@pytest.mark.parametrize(
    "declaration",
    ["u64 counter = 3;", "u64 counter;", "static u64 counter[4];", "u64 counter __attribute__((common));"],
)
def test_writable_data_is_refused_by_name(compiler: Compiler, declaration: str) -> None:
    use = "*(volatile u64 *)&counter += input[0]; return 0;"
    text = refused(compiler("main.c", declaration + ENTRY % use, "-fcommon"))
    assert "main.c has writable data: counter." in text


def test_two_definitions_are_refused(compiler: Compiler) -> None:
    main = compiler("main.c", ENTRY % "return input[0];")
    text = refused(main, ("other.c", main[1]))
    assert "'entrypoint' is defined twice, in main.c and other.c" in text


def test_a_missing_entry_is_named(compiler: Compiler) -> None:
    text = refused(compiler("main.c", "u64 start(void); u64 start(void) { return 0; }"))
    assert "entry point 'entrypoint': main.c" in text


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        ("volatile u8 a[4000]; a[input[0]] = 1; return a[3];", True),
        ("volatile u64 a[600]; a[1] = input[0]; return sol_log_((const char *)a, 3);", False),
        ("u8 a[5000]; return sol_log_((const char *)a, input[0]);", False),
    ],
)
def test_a_frame_has_4096_bytes(compiler: Compiler, body: str, fits: bool) -> None:
    name, data = compiler("main.c", ENTRY % body, "-Wno-uninitialized", "-mllvm", "-bpf-stack-size=100000")
    if fits:
        link([(name, data)])
    else:
        text = refused((name, data))
        assert "entrypoint+0x" in text
        assert "of stack; a frame has 4096" in text


@pytest.mark.parametrize(
    ("flags", "body"),
    [
        (("-mcpu=v3",), "return *(const int *)input > 3 ? 5 : *(const int *)(input + 8);"),
        (("-mcpu=v4",), "return (u64)(*(const long *)input / -7);"),
        (("-mcpu=v3",), "return __sync_fetch_and_add((u64 *)input, 1);"),
    ],
)
def test_instructions_of_newer_machines_are_refused(compiler: Compiler, flags: tuple[str, ...], body: str) -> None:
    text = refused(compiler("main.c", ENTRY % body, *flags))
    assert "entrypoint+0x" in text
    assert "SBF version 0) has no instruction 0x" in text


def test_relocations_that_we_do_not_know_are_refused(compiler: Compiler) -> None:
    name, data = compiler("main.c", ENTRY % 'return sol_log_("text", 4);')
    header = elf.FILE_HEADER.unpack_from(data)
    changed = bytearray(data)
    for index in range(header[12]):
        section = elf.SECTION_HEADER.unpack_from(data, header[6] + elf.SECTION_HEADER.size * index)
        if section[1] == elf.SHT_REL:
            struct.pack_into("<I", changed, section[4] + 8, 3)
    assert "relocations of type 3 are not supported" in refused((name, bytes(changed)))


def test_other_files_are_refused(compiler: Compiler) -> None:
    name, data = compiler("main.c", ENTRY % "return input[0];")
    assert "empty is not a 64-bit little-endian ELF file" in refused(("empty", b""))
    assert "is not a relocatable eBPF object (type 1, machine 62" in refused(
        (name, data[:18] + struct.pack("<H", 62) + data[20:])
    )
    assert "is not a relocatable eBPF object (type 3" in refused((name, link([(name, data)]).image))


def test_damaged_objects_are_errors_in_words(compiler: Compiler) -> None:
    name, data = compiler("main.c", ENTRY % 'return sol_log_("text", input[3] + 4);')
    for length in range(0, len(data), 7):
        assert name in refused((name, data[:length]))
    chance = random.Random(4)
    for _ in range(3000):
        changed = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(data))] = chance.choice([0, 1, 0x7F, 0xFF, chance.randrange(256)])
        with contextlib.suppress(LinkError):
            link([(name, bytes(changed))])
