"""The programs that are kept are what their sources make, on every machine."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
from sbf_toolchain import build as builder
from sbf_toolchain.__main__ import main
from sbf_toolchain.build import (
    CLANG_VERSION,
    PARTS,
    SOURCES,
    BuildError,
    compile_program,
    find_clang,
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three programs of a few lines."""
    folder = tmp_path_factory.mktemp("sources")
    for number, name in enumerate(sorted(PARTS)):
        (folder / name).mkdir()
        (folder / name / "main.c").write_text(f"int entrypoint(void); int entrypoint(void) {{ return {number}; }}")
    return folder


@pytest.mark.clang
def test_the_kept_programs_are_what_the_sources_make() -> None:
    builder.check(builder.build())


@pytest.mark.clang
def test_neither_the_folder_nor_the_environment_is_in_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = compile_program("authorizer").image
    moved = tmp_path / "another place" / "p"
    shutil.copytree(SOURCES, moved)
    (tmp_path / "stdint.h").write_text("#error")
    for variable, value in [
        ("CPATH", str(tmp_path)),
        ("SOURCE_DATE_EPOCH", "1"),
        ("LANG", "de_DE"),
        ("TZ", "Asia/Tokyo"),
    ]:
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    assert compile_program("authorizer", moved).image == here


@pytest.mark.clang
def test_the_command_builds_and_checks(sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "programs"
    build = ["--sources", str(sources), "--output", str(kept)]
    assert main([*build, "--check"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert f"{kept / 'authorizer.so'}: kept missing, built" in error
    assert not kept.exists()

    assert main(build) == 0
    assert sorted(file.name for file in kept.iterdir()) == ["SHA256SUMS", *(f"{name}.so" for name in sorted(PARTS))]
    assert main([*build, "--check"]) == 0
    assert f"The same as {kept}." in " ".join(capsys.readouterr().out.split())

    changed = bytearray((kept / "treasurer.so").read_bytes())
    changed[-1] ^= 1
    (kept / "treasurer.so").write_bytes(changed)
    (kept / "coordinator.so").unlink()
    assert main([*build, "--check"]) == 1
    error = capsys.readouterr().err
    assert "treasurer.so: kept " in error
    assert "coordinator.so: kept missing" in error
    assert "authorizer.so" not in error
    assert "python -m sbf_toolchain" in error


@pytest.mark.clang
def test_the_list_of_digests_is_checked_too(sources: Path, tmp_path: Path) -> None:
    images = builder.build(sources)
    builder.write(images, tmp_path)
    (tmp_path / "SHA256SUMS").write_text("")
    with pytest.raises(BuildError, match="SHA256SUMS does not list these programs"):
        builder.check(images, tmp_path)


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match=r"'clang-19' is not installed.*apt-get install clang-19"):
        find_clang()


@pytest.mark.parametrize("said", ["Debian clang version 18.1.8 (1)", "clang version 19.1.6", "gcc 12", ""])
def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str) -> None:
    compiler = tmp_path / "clang-19"
    compiler.write_text(f"#!/bin/sh\necho '{said}'\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(BuildError, match=rf"built with {CLANG_VERSION}, since other versions write other bytes"):
        find_clang()


@pytest.mark.clang
def test_what_clang_refuses_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "authorizer"
    folder.mkdir()
    (folder / "main.c").write_text("int entrypoint(void) { return missing; }")
    with pytest.raises(BuildError, match=r"(?s)clang refuses .*main\.c:\n.*use of undeclared identifier 'missing'"):
        compile_program("authorizer", tmp_path)
    (folder / "main.c").write_text("#include <stdio.h>\nint entrypoint(void) { return 0; }")
    with pytest.raises(BuildError, match=r"'stdio\.h' file not found"):
        compile_program("authorizer", tmp_path)
    (folder / "main.c").write_text("extern const char *const when; const char *const when = __TIME__;")
    with pytest.raises(BuildError, match="date-time"):
        compile_program("authorizer", tmp_path)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"no sources of the program 'coordinator' in .*--sources"):
        compile_program("coordinator", tmp_path)
