"""Tests that compile are skipped where Debian's compiler is missing."""

import functools
import os
import shutil
import subprocess

import pytest
from sbf_toolchain.build import BuildError, find_clang


def pytest_configure(config):
    config.addinivalue_line("markers", "clang(native=False): needs clang-19; native: also make and the sanitizers")


def pytest_runtest_setup(item):
    for marker in item.iter_markers("clang"):
        reason = missing(**marker.kwargs)
        if reason:
            pytest.skip(reason)


@functools.cache
def missing(native=False):
    """Why nothing can be compiled; None when it can."""
    try:
        clang = find_clang()
    except BuildError as error:
        return str(error)
    if not native:
        return None
    if shutil.which("make") is None:
        return "make is not installed (apt-get install make)"
    sanitizers = [clang, "-fsanitize=address,undefined", "-x", "c", "-", "-o", os.devnull]
    done = subprocess.run(sanitizers, input=b"int main(void) { return 0; }", capture_output=True)
    return "the sanitizers of clang-19 are not installed (libclang-rt-19-dev)" if done.returncode else None
