from __future__ import annotations

from typing import Any

import pytest

from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import load_plugins
from psyche_lightning.transports.environment import with_environment

GIVEN = {
    "PSYCHE_HOST": "0.0.0.0",
    "PSYCHE_PORT": "4000",
    "PSYCHE_ADVERTISE": "home.example",
    "PSYCHE_UPLOAD": "2.5e6",
    "PSYCHE_DOWNLOAD": "",
}


def test_missing_options_come_from_the_environment() -> None:
    assert with_environment({}, GIVEN) == {
        "host": "0.0.0.0",
        "port": 4000,
        "advertise": "home.example",
        "upload": 2.5e6,
    }
    assert with_environment({"host": "10.0.0.7", "port": None, "upload": 1}, GIVEN) == {
        "host": "10.0.0.7",
        "port": 4000,
        "advertise": "home.example",
        "upload": 1,
    }
    assert with_environment({"host": "10.0.0.7"}, {}) == {"host": "10.0.0.7"}


def test_an_invalid_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="PSYCHE_PORT is 'http'; expected a number"):
        with_environment({}, {"PSYCHE_PORT": "http"})
    with pytest.raises(ConfigError, match=r"upload is 0\.0; expected bytes a second"):
        load_plugins().transports()["tcp"](with_environment({}, {"PSYCHE_UPLOAD": "0"}))


def test_the_tcp_transport_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    built: Any = load_plugins().transports()["tcp"]({"advertise": "10.0.0.7"})
    assert (built._host, built._port, built._advertise) == ("0.0.0.0", 4000, "10.0.0.7")
