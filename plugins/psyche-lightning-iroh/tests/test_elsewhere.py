from __future__ import annotations

import os
import subprocess
import sys


def test_everything_in_a_namespace_of_its_own() -> None:
    inner = ["-m", "pytest", "-q", "-p", "no:cacheprovider", os.path.dirname(__file__)]
    done = subprocess.run(
        ["unshare", "-rn", sys.executable, *inner],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
