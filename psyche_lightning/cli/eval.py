"""``psyche eval``: the tasks of lm-eval, the harness that most published figures come from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psyche_lightning.errors import ConfigError, needing

if TYPE_CHECKING:
    from rich.table import Table


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A folder in Hugging Face format, of checkpoints, or of an adapter; or an address.",
        ),
    ],
    tasks: Annotated[
        str, typer.Option(metavar="TASK,...", help="Tasks or groups of lm-eval, such as hellaswag,arc_easy.")
    ],
    tasks_from: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with tasks of your own, in lm-eval's form.")
    ] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question; the task's own by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions of each task, to try it.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions at once.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Ask with the tokenizer's chat template.")] = False,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; a GPU if there is one by default.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all figures to this file.")] = None,
) -> None:
    """Evaluate a checkpoint, by default the newest, on tasks of lm-eval.

    Examples:
        psyche eval /models/mine --tasks arc_easy,hellaswag --limit 100
    """
    with needing("lm-eval", "eval", "psyche eval"):
        import lm_eval
    import torch
    from transformers import AutoTokenizer

    from psyche_lightning.bench.report import write_json
    from psyche_lightning.cli.console import say, stdout
    from psyche_lightning.cli.saved import find
    from psyche_lightning.train.tasks import harness_of, known_tasks

    checkpoint, base = find(model)
    wanted = [name.strip() for name in tasks.split(",") if name.strip()]
    known = known_tasks(wanted or [""], tasks_from, "--tasks-from")
    adapter = None if base == checkpoint else str(checkpoint)
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        harness = harness_of(
            str(base), AutoTokenizer.from_pretrained(checkpoint), peft=adapter, device=where, batch_size=batch_size
        )
        found: Any = lm_eval.simple_evaluate(
            harness,
            tasks=wanted,
            num_fewshot=fewshot,
            limit=limit,
            task_manager=known,
            apply_chat_template=chat,
            log_samples=False,
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConfigError(f"lm-eval cannot evaluate {str(checkpoint)!r}: {error}") from error
    stdout().print(_table(found))
    if limit is not None:
        say(f"only {limit} questions of each task were asked: these are no results of the tasks")
    if json is not None:
        kept = ("results", "groups", "n-shot", "n-samples", "versions")
        write_json(json, {"checkpoint": str(checkpoint), **{name: found[name] for name in kept if name in found}})


def _table(found: Any) -> Table:
    from rich.table import Table

    table = Table("task", "examples", "questions", "metric", "value", "standard error")
    for name, figures in found["results"].items():
        asked = found["n-samples"].get(name, {}).get("effective")
        shots = found["n-shot"].get(name)
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            spread = f"{error:.4f}" if isinstance(error, float) else ""
            table.add_row(
                figures.get("alias", name),
                "" if shots is None else str(shots),
                "" if asked is None else f"{asked:,}",
                label,
                f"{value:.4f}",
                spread,
            )
    return table
