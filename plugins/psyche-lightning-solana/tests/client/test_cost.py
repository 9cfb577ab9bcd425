import json

import pytest
from psyche_lightning_solana.client.fees import MAX_COMPUTE_UNITS, SIGNATURE_FEE, UNITS, units
from psyche_lightning_solana.client.translate import of_recipe
from psyche_lightning_solana.cost import Bill, measure

from psyche_lightning.cli import main
from psyche_lightning.recipe import load_recipe


@pytest.fixture(scope="module", name="recipe")
def recipe_fixture():
    return of_recipe(load_recipe("demo"))


def test_a_run_of_three_is_counted_transaction_by_transaction(recipe):
    cost = measure(recipe, 3, price=1_000_000)
    names = [row.instruction for row in cost.rows]
    assert cost.witnesses == 3
    assert cost.round.transactions == 2  # a quorum of the reports ends the round; the third is refused, and free
    assert [names.count(name) for name in ("join_run", "warmup_witness", "set_address", "tick")] == [3, 3, 3, 1]
    assert cost.epoch.transactions == 7
    assert cost.creating.fees == SIGNATURE_FEE * (len(names) - 3 - 7 - 6 + 1)  # the account signs for itself
    assert cost.creating.storage > 0.9e9
    assert cost.round.fees == 2 * SIGNATURE_FEE
    assert cost.round.priority == 2 * UNITS["witness"]
    assert cost.round.storage == 0
    whole, node = cost.run(steps=10, epochs=2), cost.node(steps=10, epochs=2)
    assert whole.transactions == cost.creating.transactions + 3 + 2 * 7 + 14 * 2
    assert node.fees * 3 + cost.creating.fees == pytest.approx(whole.fees)
    assert max(row.units for row in cost.rows) < MAX_COMPUTE_UNITS
    assert all(0 < row.units <= row.limit for row in cost.rows)


def test_limits():
    assert units("set_address+join_run") == UNITS["set_address"] + UNITS["join_run"]
    assert units("what is this") == MAX_COMPUTE_UNITS
    assert units("treasurer:update") > units("update")
    assert Bill(1, 2, 3, 4, 5) + Bill(1, 1, 1, 1, 1) == Bill(2, 3, 4, 5, 6)


def test_the_command(capsys):
    assert main(["solana", "cost", "demo", "--nodes", "2", "--json", "total_steps=20"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["nodes"], found["steps"]) == (2, 20)
    assert found["run"]["transactions"] > found["node"]["transactions"]
    assert found["instructions"]["witness"]["units_most"] > 10_000
    assert main(["solana", "cost", "demo", "--nodes", "1"]) == 0
    assert "each node, the whole run" in capsys.readouterr().out
    assert main(["solana", "cost", "demo", "--nodes", "257"]) == 1


@pytest.mark.slow
def test_the_largest_run_is_within_the_limits(recipe):
    cost = measure(recipe, 256)
    assert cost.witnesses == 32
    assert cost.round.transactions == 21
    assert all(row.units <= row.limit / 1.5 for row in cost.rows), sorted(cost.rows, key=lambda row: -row.units)[:3]
