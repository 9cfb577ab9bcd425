"""The bars of ``psyche train``, as a terminal shows them."""

from __future__ import annotations

import io

from rich.console import Console

from psyche_lightning.node.download import Transfer
from psyche_lightning.train.bars import Bars


def seen(bars: Bars) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)
    console.print(bars.render())
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_parameters_from_peers_have_a_bar_while_they_come() -> None:
    under_way: list[Transfer | None] = [None]
    bars = Bars(Console(file=io.StringIO()), "mine", 120, lambda: under_way[0])
    bars.advance(40, "loss 2.718")
    assert "40/120 loss 2.718" in seen(bars)
    assert "parameters" not in seen(bars)

    transfer = Transfer(bytes([0xAB] * 32), 400_000_000, 100_000_000)
    under_way[0] = transfer
    assert "parameters abababababab" in seen(bars)
    assert "100.0/400.0 MB" in seen(bars)
    transfer.sources |= {b"a", b"b"}
    transfer.partial[b"piece"] = 50_000_000
    assert "abababababab from 2 peers" in seen(bars)
    assert "150.0/400.0 MB" in seen(bars)

    under_way[0] = Transfer(bytes([0xCD] * 32), 8_000_000)  # of the next epoch
    assert "cdcdcdcdcdcd" in seen(bars)
    assert "abababababab" not in seen(bars)
    under_way[0] = None
    assert "parameters" not in seen(bars)


def test_nothing_is_drawn_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO())
    bars = Bars(console, "mine", 3, lambda: None)
    bars.start()
    bars.advance(1, "")
    bars.stop()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""
