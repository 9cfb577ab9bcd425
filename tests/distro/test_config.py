import subprocess
import sys

import pytest

from psyche_lightning.distro import DistroConfig
from psyche_lightning.errors import ConfigError


@pytest.mark.parametrize(
    "values",
    [
        {"chunk": 4},
        {"chunk": 63},
        {"chunk": 128},
        {"chunk": 64.0},
        {"k": 0},
        {"k": 129},
        {"k": True},
        {"k": 2.0},
        {"chunk": 8, "k": 17},
        {"decay": -0.1},
        {"decay": 1.1},
        {"decay": float("nan")},
        {"removal": 2},
        {"removal": None},
        {"lookahead": 1},
    ],
)
def test_values_out_of_range_are_named(values):
    with pytest.raises(ConfigError, match=rf"distro\.{list(values)[-1]} is .*; .*choose"):
        DistroConfig(**values)


def test_the_ends_of_the_ranges_are_allowed():
    assert DistroConfig(chunk=8, k=16, decay=0, removal=1).area == 64
    assert DistroConfig(chunk=64, k=128, decay=1, removal=0.0).area == 4096


def test_the_configuration_needs_no_torch():
    script = (
        "import sys; from psyche_lightning.distro import DistroConfig; DistroConfig(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
