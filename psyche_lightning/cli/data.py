"""``psyche data``: makes token files, inspects data, and serves a folder of token files to other nodes."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psyche_lightning.json_text import json_text

if TYPE_CHECKING:
    from psyche_lightning.hookspecs import DataProvider

data = typer.Typer(no_args_is_help=True, help="Make token files from text, inspect data, serve token files.")

DEFAULT_GLOBS = ["*.txt", "*.md", "*.jsonl"]
_SHOWN = 300


@data.command()
def tokenize(
    paths: Annotated[
        list[Path],
        typer.Argument(help="Text files, also compressed, or folders of them; each line of a .jsonl file is a text."),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the token files.")],
    tokenizer: Annotated[
        str, typer.Option(help="'bytes', a tokenizer on disk, or a name on the Hugging Face Hub.")
    ] = "bytes",
    bos: Annotated[
        bool, typer.Option("--bos", help="Begin each text with the tokenizer's beginning-of-text id.")
    ] = False,
    glob: Annotated[
        list[str] | None, typer.Option(help="Pattern for files in folders; repeatable. By default text files.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="The split of files in folders, by their names, such as train; by default all.")
    ] = "all",
    column: Annotated[str, typer.Option(help="The key of the text in lines of .jsonl files.")] = "text",
    token_size: Annotated[int | None, typer.Option(help="Bytes of a token, 2 or 4; by default as few as fit.")] = None,
    file_tokens: Annotated[int, typer.Option(min=1, help="Tokens after which a new file begins.")] = 1 << 29,
) -> None:
    """Write token files in Psyche's format from text, with their description and tokenizer.

    Each file, or each line of a .jsonl file, is a text; the tokenizer's end-of-text id follows each text.

    Examples:
        psyche data tokenize corpus/ --out tokens --tokenizer /models/llama
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from psyche_lightning.data.description import TokenWriter
    from psyche_lightning.data.plain import COMPRESSED
    from psyche_lightning.data.texts import check_texts, find_texts, read_texts
    from psyche_lightning.data.tokenizer import Encoder
    from psyche_lightning.errors import counted
    from psyche_lightning.logs import redirections

    files = find_texts(paths, glob or DEFAULT_GLOBS, split)
    check_texts(files)
    encoder = Encoder(tokenizer, download=True, bos=bos)
    writer = TokenWriter(out, encoder, token_size=token_size, file_tokens=file_tokens)
    console = Console(stderr=True)
    with Progress(
        TextColumn("tokenizing"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        **redirections(),
    ) as progress:
        packed = any(file.suffix in COMPRESSED for file in files)
        task = progress.add_task("", total=None if packed else sum(file.stat().st_size for file in files))
        texts = 0
        for file in files:
            for text in read_texts(file, column):
                writer.write(encoder.encode(text))
                texts += 1
                progress.advance(task, len(text))
    found = writer.close()
    print(
        f"{found.tokens:,} tokens of {texts:,} texts in {counted(len(found.files), 'file')} of "
        f"{found.token_size}-byte tokens, {found.vocab_size:,} token ids, in {out}/"
    )
    if encoder.replaced:
        print(f"{counted(encoder.replaced, 'text')} not in UTF-8: their other bytes became U+FFFD", file=sys.stderr)
    print(f"in a recipe: data.name=tokens data.config={{path: {out}}}")


@data.command()
def inspect(
    what: Annotated[str, typer.Argument(help="A folder or file of tokens, or a recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values that replace the recipe's.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of samples to show.")] = 2,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens of a sample, for token files.")] = 256,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read token files and compare them with dataset.json.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a data provider's number of samples, its fingerprint, and its first samples.

    Examples:
        psyche data inspect tokens --samples 3
        psyche data inspect demo
    """
    from rich.table import Table

    from psyche_lightning.cli.console import stdout

    provider, facts = (
        _open_files(Path(what), seq_len, verify) if _is_data(what) else _open_recipe(what, overrides or [])
    )
    first = [_shown(provider, sample) for sample in provider.samples(0, samples)] if samples else []
    if as_json:
        print(json_text({**facts, "first": first}, 2))
        return
    table = Table("what", "value")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if type(value) is int else str(value))
    console = stdout()
    console.print(table)
    for number, text in enumerate(first):
        console.print(f"sample {number}: {text[:_SHOWN]!r}", highlight=False, soft_wrap=True)


@data.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="Folder to serve, read-only.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8090,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name under which it is reached, as for `psyche coordinator`."),
    ] = None,
) -> None:
    """Serve a folder of token files to nodes without a copy.

    Examples:
        psyche data serve tokens --port 8090
    """
    from psyche_lightning.data.serve import FileServer

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with FileServer(folder, host, port, allow_host or []) as server:
        print(f"{folder} on {server.url}  (Ctrl-C stops it)", flush=True)
        if (folder / "dataset.json").is_file():
            print(f"in a recipe: data.name=tokens data.config={{url: {server.url}/dataset.json}}", flush=True)
        stop.wait()


def _is_data(what: str) -> bool:
    """Whether this is a path of token files, not a recipe."""
    from psyche_lightning.data.files import SUFFIXES

    return Path(what).is_dir() or Path(what).suffix in SUFFIXES


def _open_files(path: Path, seq_len: int, verify: bool) -> tuple[DataProvider, dict[str, Any]]:
    from psyche_lightning.data.description import changed_files, largest_id, read_description
    from psyche_lightning.data.files import LocalFiles, TokenBlocks, find_files
    from psyche_lightning.data.tokens import TokenData
    from psyche_lightning.errors import ConfigError

    description = read_description(path) if path.is_dir() else None
    paths = find_files([str(path)])
    files = LocalFiles(paths)
    blocks = TokenBlocks(files, seq_len, description.token_size if description else None)
    facts: dict[str, Any] = {
        "files": len(paths),
        "bytes": sum(info.size for info in files.infos),
        "token_size": blocks.token_size,
        "tokens": blocks.tokens,
        "largest_id": max(
            largest_id(file, blocks.token_size, start) for file, start in zip(paths, blocks.starts, strict=True)
        ),
    }
    if verify:
        if description is None:
            raise ConfigError(f"{path} has no dataset.json to compare with; `psyche data tokenize` writes one.")
        if wrong := changed_files(path, description):
            raise ConfigError(f"{', '.join(wrong)} in {path} do not match dataset.json; copy them again.")
        facts["verified"] = "every byte matches dataset.json"
    vocabulary = None if description else facts["largest_id"] + 1
    size = None if description else blocks.token_size
    provider = TokenData(0, seq_len, path=str(path), vocab_size=vocabulary, token_size=size, split="all", shuffle=False)
    return provider, {**facts, **_facts(provider)}


def _open_recipe(what: str, overrides: list[str]) -> tuple[DataProvider, dict[str, Any]]:
    from psyche_lightning.plugins import load_plugins
    from psyche_lightning.recipe import load_recipe
    from psyche_lightning.train.validation import separate_set

    recipe = load_recipe(what, overrides)
    factory = load_plugins().data_providers()[recipe.data.name]
    provider: DataProvider = factory(recipe.data.options, seed=recipe.run.seed)
    facts = {"provider": recipe.data.name, **_facts(provider)}
    if (separate := separate_set(recipe, provider)) is not None:
        facts["validation_samples"] = len(separate)
    return provider, facts


def _facts(provider: DataProvider) -> dict[str, Any]:
    return {
        "vocab_size": provider.vocab_size,
        "seq_len": provider.seq_len,
        "samples": len(provider),
        "validation_samples": len(provider.validation()),
        "fingerprint": getattr(provider, "fingerprint", "none"),
    }


def _shown(provider: DataProvider, sample: Any) -> str:
    """A sample for people, as text if there is a tokenizer."""
    ids = sample["input_ids"].tolist()
    tokenizer: Any = provider.tokenizer
    return " ".join(map(str, ids)) if tokenizer is None else str(tokenizer.decode(ids))
