"""``psyche data``: what it writes is what the provider reads, what it shows is true, what it serves can be fetched."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from psyche_lightning.cli import main
from psyche_lightning.data.tokens import TokenData

Make = Callable[..., Any]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "z.txt").write_text("last but one\n")
    (folder / "b" / "a.md").write_text("second é")
    (folder / "a.jsonl").write_text('{"text": "first", "n": 1}\n\n{"text": "then this"}\n')
    (folder / "picture.png").write_text("not a text")
    (folder / ".hidden" / "x.txt").write_text("hidden")
    return folder


def tokenize(*arguments: object) -> int:
    return main(["data", "tokenize", *map(str, arguments)])


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["data", "inspect", *map(str, arguments), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_text_becomes_token_files(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert tokenize(texts, "--out", out) == 0
    assert "4 texts in 1 file of 2-byte tokens, 256 token ids" in capsys.readouterr().out
    stream = b"first\0then this\0second \xc3\xa9\0last but one\n\0"
    data = TokenData(0, 5, path=str(out), shuffle=False)
    found = b"".join(bytes(sample["input_ids"].tolist()) for sample in data.samples(0, len(data)))
    assert found == stream[: len(stream) // 5 * 5]
    facts = inspect(capsys, out, "--seq-len", 5, "--verify")
    assert (facts["tokens"], facts["largest_id"], facts["token_size"]) == (len(stream), 0xC3, 2)
    assert (facts["samples"], facts["vocab_size"], facts["files"]) == (len(stream) // 5, 256, 1)
    assert facts["first"] == ["first", "\0then"]
    assert facts["fingerprint"] == data.fingerprint


def test_with_a_tokenizer_everything_is_in_the_folder(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=["?", "<end>"])
    tokenizer.train_from_iterator(["first then this second é last but one"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="<end>").save_pretrained(
        tmp_path / "t"
    )
    out = tmp_path / "out"
    assert tokenize(texts, "--out", out, "--tokenizer", tmp_path / "t", "--token-size", 4, "--file-tokens", 5) == 0
    (tmp_path / "t").rename(tmp_path / "elsewhere")
    facts = inspect(capsys, out, "--seq-len", 4)
    assert facts["vocab_size"] == 10
    assert facts["token_size"] == 4
    assert facts["files"] == 3
    data = TokenData(0, 4, path=str(out), shuffle=False)
    assert data.tokenizer.decode(data.samples(0, 1)[0]["input_ids"]) == "first <end> then this"


def test_a_recipe_s_data_is_shown_by_its_provider(texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [f"data.config.path={texts}", "data.seq_len=8", "data.config.validation_samples=1"]
    facts = inspect(capsys, "demo", *given, "--samples", 1)
    assert (facts["provider"], facts["seq_len"], facts["validation_samples"]) == ("text", 8, 1)
    assert len(facts["first"]) == 1
    assert main(["data", "inspect", "demo", *given]) == 0
    assert "fingerprint" in capsys.readouterr().out


def test_files_of_others_are_looked_at_without_a_vocabulary(
    tmp_path: Path, tokens_at: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens_at(tmp_path / "a.bin", 50, first=100)
    facts = inspect(capsys, tmp_path / "a.bin", "--seq-len", 10)
    assert (facts["largest_id"], facts["vocab_size"], facts["samples"]) == (149, 150, 5)
    assert facts["first"][0] == " ".join(map(str, range(100, 110)))


def test_verify_finds_a_changed_byte(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    tokenize(texts, "--out", out)
    file = out / "tokens-00000.bin"
    file.write_bytes(b"X" + file.read_bytes()[1:])
    assert main(["data", "inspect", str(out), "--seq-len", "5"]) == 0
    assert main(["data", "inspect", str(out), "--seq-len", "5", "--verify"]) == 1
    assert "tokens-00000.bin in" in capsys.readouterr().err
    (out / "dataset.json").unlink()
    assert main(["data", "inspect", str(out), "--seq-len", "5", "--verify"]) == 1
    assert "has no dataset.json to compare with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "The text 'nowhere' does not exist"),
        (["{texts}", "--glob", "*.rst"], "none of its 4 files matches *.rst"),
        (
            ["{texts}", "--column", "body"],
            "Line 1 of {texts}/a.jsonl has no text under 'body': it has the keys text, n",
        ),
        (["{texts}", "--tokenizer", "{texts}"], "cannot be loaded"),
        (["{texts}", "--out", "{texts}"], "is not empty"),
        (["{texts}", "--out", "{texts}/z.txt"], "cannot be created"),
        (["{texts}", "--token-size", "1"], "token_size is 1, expected 2 or 4 bytes"),
    ],
)
def test_mistakes_are_explained(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    given = [argument.replace("{texts}", str(texts)) for argument in arguments]
    out = [] if "--out" in given else ["--out", tmp_path / "out"]
    assert tokenize(*given, *out) == 1
    assert message.replace("{texts}", str(texts)) in capsys.readouterr().err.replace("\n", " ")


def test_lines_without_text_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line, message in (("{", "Line 2 of .* is not JSON"), ("[1]", "Line 2 of .* it is not an object")):
        (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line)
        assert tokenize(tmp_path / "a.jsonl", "--out", tmp_path / f"out{len(line)}") == 1
        assert re.search(message, capsys.readouterr().err.replace("\n", " "))


def test_a_folder_is_served_until_it_is_told_to_stop(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tokenize(texts, "--out", out) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "psyche_lightning", "data", "serve", str(out), "--port", "0"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        deadline, lines = time.monotonic() + 60, ""
        while "/dataset.json" not in lines:
            assert time.monotonic() < deadline
            lines += process.stdout.readline()
        found = re.search(r"url: (http://\S+/dataset.json)", lines)
        assert found is not None
        remote = TokenData(0, 5, url=found[1], shuffle=False)
        assert remote.fingerprint == TokenData(0, 5, path=str(out), shuffle=False).fingerprint
        assert bytes(remote.samples(0, 1)[0]["input_ids"].tolist()) == b"first"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.bin", np.arange(500, dtype="<u2").tobytes(), "binary: it has zero bytes"),
        ("a.parquet", b"PAR1" + bytes(range(1, 200)), "a parquet file"),
        ("a.txt", bytes(range(128, 256)) * 20, "binary: much of it is not UTF-8"),
        ("a.txt", "text".encode("utf-16"), "text in UTF-16"),
        ("a.txt.gz", gzip.compress(bytes(range(256))), "binary: it has zero bytes"),
        ("a.zst", b"\x28\xb5\x2f\xfdabc", "zstd data"),
    ],
)
def test_binary_files_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes, what: str
) -> None:
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / name).write_bytes(data)
    assert tokenize(tmp_path / "fine.txt", tmp_path / name, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err.replace("\n", " ")
    assert f"is not text, but {what}" in error
    assert not (tmp_path / "out").exists()


def test_compressed_texts_are_read(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tokenize(texts, "--out", tmp_path / "plain") == 0
    for name in ("a.jsonl", "z.txt"):
        (texts / f"{name}.gz").write_bytes(gzip.compress((texts / name).read_bytes()))
        (texts / name).unlink()
    assert tokenize(texts, "--out", tmp_path / "packed") == 0
    assert "4 texts in 1 file" in capsys.readouterr().out
    assert (tmp_path / "packed/tokens-00000.bin").read_bytes() == (tmp_path / "plain/tokens-00000.bin").read_bytes()
    (texts / "a.jsonl.gz").write_bytes((texts / "a.jsonl.gz").read_bytes()[:-9])
    assert tokenize(texts, "--out", tmp_path / "broken") == 1
    assert "a.jsonl.gz' is damaged" in capsys.readouterr().err.replace("\n", "")


def test_texts_that_are_not_utf_8_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_bytes("caf\xe9 and more words".encode("latin-1"))
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "and": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    out = tmp_path / "out"
    assert tokenize(tmp_path / "a.txt", "--out", out, "--tokenizer", tmp_path / "tokenizer.json") == 0
    assert "1 text not in UTF-8: their other bytes became U+FFFD" in capsys.readouterr().err


def test_one_split_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("trained")
    (tmp_path / "texts" / "test.txt").write_text("tested")
    assert tokenize(tmp_path / "texts", "--out", tmp_path / "out", "--split", "train") == 0
    assert TokenData(0, 7, path=str(tmp_path / "out")).samples(0, 1)[0]["input_ids"].tolist() == list(b"trained")
