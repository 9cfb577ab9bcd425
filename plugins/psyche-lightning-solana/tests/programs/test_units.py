from __future__ import annotations

from pathlib import Path

import pytest
from psyche_lightning_solana.interface import COORDINATOR
from solana_support.units import MAX_UNITS, Row, measure, with_table
from solana_support.vm import MAX_TRANSACTION_BYTES

PAGE = Path(__file__).parents[4] / "docs" / "solana-programs.md"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return measure()


def test_every_instruction_of_a_run_of_256_clients_fits_into_one_transaction(rows: list[Row]) -> None:
    assert {row.instruction for row in rows} == set(COORDINATOR.instructions)
    for row in rows:
        assert row.units <= MAX_UNITS, row
        assert row.size <= MAX_TRANSACTION_BYTES, row


def test_the_table_of_units_is_what_the_programs_use(rows: list[Row]) -> None:
    page = PAGE.read_text()
    assert page == with_table(page, rows), (
        f"the programs use other compute units than {PAGE.name} says; write them anew with "
        f"`python -m solana_support.units {PAGE}`"
    )
