"""``psyche run ledger``: audits the nodes' ledgers, and shows who trained which data ids."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psyche_lightning.errors import PsycheError
from psyche_lightning.json_text import json_text

if TYPE_CHECKING:
    from psyche_lightning.node.audit import Audit

ROWS = 20


def ledger(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER...", help="Folders of nodes, a folder with such folders, or ledger files."),
    ],
    run_id: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="RUN",
            help="The run, if the folders have several; NAME#INCARNATION if several had one name.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Fail unless each data id was trained exactly once or is open.")
    ] = False,
    rows: Annotated[int, typer.Option(min=0, help="Number of newest rows to show; 0 for all.")] = ROWS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show for each data id who trained it, in which round and with which commitment, or that it was not trained.

    This needs only the nodes' folders; several folders complete each other. It recomputes all assignments and checks
    the signatures of all results.

    Examples:
        psyche run ledger psyche-demo/nodes/* --check
    """
    from psyche_lightning.node.audit import audit_files
    from psyche_lightning.node.ledger import find_ledgers

    ledgers = find_ledgers(folders)
    found = audit_files(ledgers, lambda row: run_id is None or _names(run_id, row), 0 if as_json else rows)
    if as_json:
        print(json_text(_plain(found), 1))
    else:
        _show(found, rows, len(ledgers))
    if check and (found.problems or not found.rounds):
        raise PsycheError(f"the ledger is not complete: {'; '.join(found.problems) or 'it has no rounds'}")


def _names(run: str, row: dict[str, Any]) -> bool:
    """Whether a row is of that run: one of its name, or the one of that name and incarnation."""
    scope = row.get("run")
    return isinstance(scope, str) and run in (scope, scope.partition("#")[0])


def _plain(found: Audit) -> dict[str, Any]:
    from psyche_lightning.protocol.open_ids import closed

    return {
        "run": found.run,
        "complete": bool(found.rounds) and not found.problems,
        "problems": found.problems,
        "rounds": found.rounds,
        "last_step": found.last_step,
        "rounds_undone": found.undone,
        "ids_trained": found.ids,
        "other_learning_rates": {trainer.hex(): rounds for trainer, rounds in sorted(found.deviating.items())},
        "not_trained": [list(interval) for interval in closed(found.untrained)],
        "trained": [
            {
                "first": line.start,
                "last": line.stop - 1,
                "trainer": line.trainer.hex(),
                "step": line.step,
                "epoch": line.epoch,
                "height": line.height,
                "commitment": line.commitment.hex(),
                "again": line.again,
            }
            for line in found.lines
        ],
    }


def _show(found: Audit, rows: int, ledgers: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from psyche_lightning.cli.console import stdout
    from psyche_lightning.errors import counted
    from psyche_lightning.protocol.open_ids import shown
    from psyche_lightning.wire.identity import short

    console = stdout()
    console.print(
        Text.assemble(
            (found.run, "bold"),
            f": {counted(found.rounds, 'round')} up to step {found.last_step}, from {counted(ledgers, 'ledger')}; "
            f"{counted(found.ids, 'data id')} trained once, {found.ids_again} of them in a later round than their own",
        )
    )
    if found.undone:
        console.print(
            f"{counted(found.undone, 'round')} of epochs whose end was not agreed; their ids were trained again"
        )
    table = Table("data ids", "trainer", "step", "epoch", "round", "commitment", "")
    newest = found.lines[-rows:] if rows else found.lines
    for line in newest:
        ids = shown([(line.start, line.stop)])
        place = (str(line.step), str(line.epoch), str(line.height))
        table.add_row(ids, short(line.trainer), *place, line.commitment.hex()[:16], "again" if line.again else "")
    if newest:
        console.print(table)
    if len(newest) < found.trained:
        console.print(f"and {found.trained - len(newest)} more before; --rows 0 shows all")
    for interval in found.untrained:
        console.print(f"not trained: {shown([interval])} (the run ended before they were trained again)")
    for trainer, rounds in sorted(found.deviating.items()):
        console.print(f"{short(trainer)} had another learning rate than the agreed one in {counted(rounds, 'round')}")
    for problem in found.problems:
        console.print(Text.assemble(("problem:", "bold red"), f" {problem}"))
