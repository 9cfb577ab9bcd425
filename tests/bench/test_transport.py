import json
import socket

import pytest

from psyche_lightning.bench.transport import measure
from psyche_lightning.cli import main
from psyche_lightning.errors import PsycheError


def test_the_transports_are_measured_beside_plain_sockets(tmp_path, capsys):
    file = tmp_path / "j"
    command = ["bench", "transport", "--transport", "tcp", "--megabytes", "2", "--repeats", "2", "--json", str(file)]
    assert main(command) == 0
    plain, tcp = json.loads(file.read_text())["transports"]
    assert (plain["name"], tcp["name"]) == ("plain sockets", "tcp")
    for one in (plain, tcp):
        assert one["best"] >= one["median"] > 0
    assert tcp["median"] < plain["best"]
    assert tcp["round_trip"] > 0
    assert 1 < tcp["overhead"] < 1.05
    assert "/ plain" in capsys.readouterr().out


def test_a_limit_shows(tmp_path):
    assert measure("tcp", {"upload": 4_000_000}, 1_000_000, 1).best < 4_400_000


def test_an_unknown_transport_is_reported_before_anything_is_measured(capsys):
    assert main(["bench", "transport", "--transport", "pigeon"]) == 1
    assert "pigeon" in capsys.readouterr().err


def test_a_process_that_fails_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(PsycheError, match="other process of the measurement ended"):
        measure("tcp", {"port": port}, 10, 1)  # both want it
