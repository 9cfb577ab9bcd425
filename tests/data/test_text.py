"""The data provider's contract, its bytes and its errors."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from psyche_lightning.builtin.data import text as build
from psyche_lightning.data.corpus import read_corpus
from psyche_lightning.data.text import TextData
from psyche_lightning.data.tokenizer import byte_tokenizer
from psyche_lightning.errors import ConfigError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six files in three folders; no two blocks of 16 bytes are equal."""
    root = tmp_path / "corpus"
    for name in ("b.txt", "a/z.py", "a/b.md", "a.txt", "c/d/e.txt", "Z.txt"):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f"{name} line {line}: {line * line}\n" for line in range(60)), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BPE tokenizer with an end-of-text token, as save_pretrained leaves it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a line of text, and another line of text\n"] * 5, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


def open_bytes(path: Path | str, **options: Any) -> TextData:
    return TextData(path=str(path), **{"seq_len": 16, "seed": 5, **options})


def blocks(samples: list[dict[str, torch.Tensor]]) -> list[bytes]:
    return [bytes(sample["input_ids"].tolist()) for sample in samples]


def test_files_in_sorted_order_make_the_blocks(corpus: Path) -> None:
    data = open_bytes(corpus, validation_samples=0)
    order = ["Z.txt", "a.txt", "a/b.md", "a/z.py", "b.txt", "c/d/e.txt"]
    stream = b"".join((corpus / name).read_bytes() + b"\0" for name in order)
    expected = [stream[start : start + 16] for start in range(0, len(stream) - 15, 16)]
    assert data.files == 6
    assert len(data) == len(expected)
    found = blocks(data.samples(0, len(data)))
    assert found != expected
    assert sorted(found) == sorted(expected)
    assert data.fingerprint == hashlib.sha256(stream).hexdigest()


def test_samples_have_the_contract_s_form(corpus: Path) -> None:
    data = open_bytes(corpus)
    for sample in data.samples(0, 4) + data.validation():
        assert set(sample) == {"input_ids", "labels"}
        for tensor in sample.values():
            assert tensor.dtype == torch.int64
            assert tensor.shape == (16,)
        assert torch.equal(sample["input_ids"], sample["labels"])
        assert sample["input_ids"].data_ptr() != sample["labels"].data_ptr()
    assert (data.vocab_size, data.seq_len) == (256, 16)


def test_intervals_are_closed_wrap_and_do_not_depend_on_earlier_calls(corpus: Path) -> None:
    data, other = open_bytes(corpus), open_bytes(corpus)
    n = len(data)
    whole = blocks(data.samples(0, n))
    assert len(whole) == n
    second = blocks(data.samples(n, 2 * n))
    assert sorted(second) == sorted(whole) != second
    assert blocks(other.samples(n - 2, n + 2)) == [*whole[-2:], *second[:2]]
    assert blocks(other.samples(3 * n + 4, 3 * n + 5)) == blocks(data.samples(3 * n, 4 * n))[4:5]
    assert [block for i in reversed(range(n)) for block in blocks(other.samples(i, i + 1))] == whole[::-1]
    assert blocks(other.samples(0, 2 * n)) == whole + second


def test_a_change_to_a_sample_changes_nothing_else(corpus: Path) -> None:
    data = open_bytes(corpus)
    before = blocks(data.samples(2, 3))
    data.samples(2, 3)[0]["input_ids"].zero_()
    assert blocks(data.samples(2, 3)) == before


def test_the_order_is_the_documented_one(tmp_path: Path) -> None:
    file = tmp_path / "letters.txt"
    file.write_bytes(b"".join(bytes([letter]) * 4 for letter in range(65, 75)))
    data = TextData(1, 4, path=str(file), validation_samples=0)
    # Philox 4x64 with key 1: written down once, so that a change of any part of the chain shows.
    assert b"".join(block[:1] for block in blocks(data.samples(0, 10))) == b"DFCJHAIGBE"
    assert b"".join(block[:1] for block in blocks(data.samples(8, 22))) == b"BE" + b"JACDGFBEHI" + b"HF"
    once = TextData(1, 4, path=str(file), validation_samples=0, shuffle="once")
    assert b"".join(block[:1] for block in blocks(once.samples(8, 22))) == b"BEDFCJHAIGBEDF"
    plain = TextData(1, 4, path=str(file), validation_samples=0, shuffle=False)
    assert b"".join(block[:1] for block in blocks(plain.samples(8, 22))) == b"IJABCDEFGHIJAB"


def test_the_seed_decides_the_order_but_not_the_split(corpus: Path) -> None:
    one, two = open_bytes(corpus), open_bytes(corpus, seed=6)
    assert blocks(one.samples(0, 10)) != blocks(two.samples(0, 10))
    assert blocks(one.validation()) == blocks(two.validation())
    assert one.fingerprint == two.fingerprint
    assert len(open_bytes(corpus, seed=-1)) == len(open_bytes(corpus, seed=2**200)) == len(one)


def test_other_processes_and_hash_seeds_agree(corpus: Path) -> None:
    script = (
        "import sys; from psyche_lightning.data.text import TextData; d = TextData(5, 16, path=sys.argv[1])\n"
        "print(d.fingerprint, [x['input_ids'].tolist() for x in d.samples(0, 21)])"
    )
    data = open_bytes(corpus)
    expected = f"{data.fingerprint} {[x['input_ids'].tolist() for x in data.samples(0, 21)]}"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    command = [sys.executable, "-c", script, str(corpus)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == expected


def test_fingerprints_differ_when_the_text_does(corpus: Path) -> None:
    before = open_bytes(corpus).fingerprint
    (corpus / "b.txt").write_text((corpus / "b.txt").read_text().replace("line 7:", "line 8:"))
    assert open_bytes(corpus).fingerprint != before


@settings(max_examples=60)
@given(length=st.integers(40, 4000), held_out=st.integers(0, 12), seed=st.integers(0, 2**64))
def test_training_and_validation_partition_the_blocks(
    tmp_path_factory: pytest.TempPathFactory, length: int, held_out: int, seed: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "numbers.txt"
    file.write_text("".join(f"{number:04d}" for number in range(length // 4 + 1)))
    total = (4 * (length // 4 + 1) + 1) // 8
    if total <= held_out:
        with pytest.raises(ConfigError, match="too little data"):
            TextData(seed, 8, path=str(file), validation_samples=held_out)
        return
    data = TextData(seed, 8, path=str(file), validation_samples=held_out)
    training, validation = blocks(data.samples(0, len(data))), blocks(data.validation())
    assert len(validation) == held_out
    assert validation == sorted(validation)
    assert len(set(training) | set(validation)) == len(training) + held_out == total
    if held_out:  # spread: no stretch of the corpus is without one
        places = [int(block[:4]) // 2 for block in validation]
        gaps = [b - a for a, b in zip([-1, *places], [*places, total], strict=False)]
        assert max(gaps) <= total // held_out + 1


def test_validation_fraction(corpus: Path) -> None:
    total = len(open_bytes(corpus, validation_fraction=0))
    tenth = open_bytes(corpus, validation_fraction=0.1)
    assert len(tenth.validation()) == round(total / 10)
    assert len(tenth) + len(tenth.validation()) == total
    assert len(open_bytes(corpus, validation_fraction=1e-9).validation()) == 1


def test_globs(corpus: Path) -> None:
    def files(glob: Any) -> int:
        return open_bytes(corpus, glob=glob, validation_samples=0).files

    assert files("*.txt") == 4
    assert files(["*.py", "*.md"]) == 2
    assert files("a/*") == 2
    assert files("c/*.txt") == 1


def test_hidden_and_binary_files_are_left_out(corpus: Path) -> None:
    plain = open_bytes(corpus)
    for name in (".git/config.txt", "a/.hidden.py", "a/__pycache__/x.py"):
        (corpus / name).parent.mkdir(exist_ok=True)
        (corpus / name).write_text("not part of the corpus")
    (corpus / "picture.txt").write_bytes(b"GIF89a\0\1\2")
    data = open_bytes(corpus)
    assert data.fingerprint == plain.fingerprint
    assert data.skipped == [str(corpus / "picture.txt")]
    assert not plain.skipped


def test_lists_of_paths_keep_their_order_and_count_files_once(corpus: Path) -> None:
    paths = [str(corpus / "c"), str(corpus / "a" / "z.py"), str(corpus / "a")]
    data = TextData(0, 16, path=paths, validation_samples=0)
    stream = b"".join((corpus / name).read_bytes() + b"\0" for name in ("c/d/e.txt", "a/z.py", "a/b.md"))
    assert data.fingerprint == hashlib.sha256(stream).hexdigest()


def test_max_bytes(corpus: Path) -> None:
    first = (corpus / "Z.txt").read_bytes()
    second = (corpus / "a.txt").read_bytes()
    data = open_bytes(corpus, max_bytes=len(first) + 100)
    assert data.fingerprint == hashlib.sha256(first + b"\0" + second[:100] + b"\0").hexdigest()
    assert open_bytes(corpus, max_bytes=len(first)).fingerprint == hashlib.sha256(first + b"\0").hexdigest()


def test_the_standard_library() -> None:
    data = TextData(0, 256, path="stdlib", max_bytes=2_000_000, validation_samples=8)
    assert data.files > 20
    assert len(data) > 7000
    text = "".join(data.tokenizer.decode(sample["input_ids"].tolist()) for sample in data.samples(0, 51))
    assert "self" in text
    everything = b"\n".join(read_corpus(["stdlib"], []).texts)
    assert b"def namedtuple(" in everything
    assert b"class TestCase" in everything  # unittest is library, not test
    assert b"import test.support" not in everything


@settings(max_examples=200)
@given(st.text(max_size=200))
def test_byte_tokenizer_ids_are_utf8_and_round_trip(text: str) -> None:
    tokenizer = _tokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


_TOKENIZERS: list[Any] = []


def _tokenizer() -> Any:
    if not _TOKENIZERS:
        _TOKENIZERS.append(byte_tokenizer())
    return _TOKENIZERS[0]


def test_byte_tokenizer_saves_loads_and_decodes_anything(tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "def f(x):\n\treturn 'é 😀 \x00 Ā  '  \r\n"
    assert loaded(text)["input_ids"] == list(text.encode())
    assert loaded.decode(list(text.encode())) == text
    assert len(loaded) == 256
    assert len({loaded.convert_ids_to_tokens(byte) for byte in range(256)}) == 256
    assert loaded.decode([0xFF, 0x41]) == "\ufffdA"


def test_encode_and_decode(corpus: Path) -> None:
    data = open_bytes(corpus)
    assert data.tokenizer.encode("né") == [0x6E, 0xC3, 0xA9]
    assert data.tokenizer.decode([0x6E, 0xC3, 0xA9]) == "né"


def test_a_tokenizer_from_disk(corpus: Path, word_tokenizer: Path) -> None:
    data = open_bytes(corpus, tokenizer=str(word_tokenizer), validation_samples=0, glob="a/*")
    loaded = AutoTokenizer.from_pretrained(word_tokenizer, local_files_only=True)
    stream: list[int] = []
    for name in ("a/b.md", "a/z.py"):
        stream += [*loaded.encode((corpus / name).read_text()), loaded.eos_token_id]
    expected = sorted(stream[start : start + 16] for start in range(0, len(stream) - 15, 16))
    assert sorted(sample["input_ids"].tolist() for sample in data.samples(0, len(data))) == expected
    assert data.vocab_size == len(loaded) > 256
    assert data.tokenizer.decode(data.tokenizer.encode("another line")) == "another line"
    file = open_bytes(corpus, tokenizer=str(word_tokenizer / "tokenizer.json"), validation_samples=0, glob="a/*")
    assert file.vocab_size == data.vocab_size


def test_long_texts_are_tokenized_in_pieces_without_loss(
    corpus: Path, word_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_bytes(corpus, tokenizer=str(word_tokenizer))
    monkeypatch.setattr("psyche_lightning.data.tokenizer._PIECE_CHARACTERS", 50)
    assert open_bytes(corpus, tokenizer=str(word_tokenizer)).fingerprint == whole.fingerprint


def test_bytes_that_are_not_utf8(tmp_path: Path, word_tokenizer: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 40)
    assert 0xE9 in open_bytes(tmp_path).samples(0, 1)[0]["input_ids"]
    data = open_bytes(tmp_path, tokenizer=str(word_tokenizer))
    assert "\ufffd" in data.tokenizer.decode(data.samples(0, 1)[0]["input_ids"].tolist())


@pytest.mark.parametrize("slow", [False, True])
def test_progress_appears_only_when_it_takes_long(
    slow: bool, corpus: Path, word_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psyche_lightning.data.tokenizer._QUIET_SECONDS", -1.0 if slow else 1e9)
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    open_bytes(corpus, tokenizer=str(word_tokenizer))
    captured = capsys.readouterr()
    assert not captured.out
    assert ("Tokenizing" in captured.err) == slow


def test_no_progress_in_a_log(
    corpus: Path, word_tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("psyche_lightning.data.tokenizer._QUIET_SECONDS", -1.0)
    open_bytes(corpus, tokenizer=str(word_tokenizer))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paht": "x"}, "no option 'paht'. Did you mean 'path'"),
        ({"path": None}, "path is None, expected a string or a list"),
        ({"path": []}, "expected a string or a list"),
        ({"path": "no/such/place"}, "'no/such/place' does not exist .looked for /"),
        ({"seq_len": 1}, "seq_len is 1, expected a whole number, 2 or more"),
        ({"seq_len": "16"}, "seq_len is '16'"),
        ({"glob": ""}, "glob is '', expected"),
        ({"glob": "*.rst"}, r"none of its 6 files matches \*.rst"),
        ({"tokenizer": 3}, "tokenizer is 3, expected 'bytes' or the path"),
        ({"tokenizer": "gpt2"}, "tokenizer 'gpt2' does not exist .*not looked up"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0, expected a fraction"),
        ({"validation_fraction": "0.1"}, "validation_fraction is '0.1'"),
        ({"validation_samples": -1}, "validation_samples is -1"),
        ({"validation_samples": 5, "validation_fraction": 0.1}, "Both validation_fraction and validation_samples"),
        ({"validation_samples": 10**6}, "too little data"),
        ({"max_bytes": 0}, "max_bytes is 0, expected a whole number, 1 or more"),
        ({"seq_len": 10**6}, "makes 0 samples of seq_len=1000000"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str, corpus: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build({"path": str(corpus), "seq_len": 16, **options}, seed=0)


@pytest.mark.parametrize("missing", ["path", "seq_len"])
def test_required_options(missing: str, corpus: Path) -> None:
    config = {"path": str(corpus), "seq_len": 16}
    del config[missing]
    with pytest.raises(ConfigError, match=f"an option that is not set: .*'{missing}'"):
        build(config, seed=0)


def test_places_without_text_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ConfigError, match=r"no text in the folder .*: none of its 0 files"):
        open_bytes(empty)
    (empty / "a.txt").touch()
    (empty / "b.txt").write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="1 empty and 1 binary files"):
        open_bytes(empty)
    with pytest.raises(ConfigError, match=r"b.txt' is not text, but binary: it has zero bytes"):
        open_bytes(empty / "b.txt")
    (empty / "a.txt").write_text("short")
    with pytest.raises(ConfigError, match="makes 0 samples of seq_len=16"):
        open_bytes(empty)


def test_an_unreadable_file_is_named(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("psyche_lightning.data.plain.open_text", refuse)
    with pytest.raises(ConfigError, match=r"Z.txt' cannot be read: Permission denied"):
        open_bytes(corpus)


def test_a_broken_tokenizer_is_refused(corpus: Path, tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    for place in (broken, tmp_path):
        with pytest.raises(ConfigError, match="cannot be loaded"):
            open_bytes(corpus, tokenizer=str(place))


def test_compressed_files_are_read_as_what_they_contain(tmp_path: Path) -> None:
    import bz2
    import gzip
    import lzma

    text = "".join(f"line {number}\n" for number in range(60)).encode()
    for name, pack in (("a.txt.gz", gzip.compress), ("b.md.bz2", bz2.compress), ("c.py.xz", lzma.compress)):
        (tmp_path / name).write_bytes(pack(text))
    (tmp_path / "d.bin.gz").write_bytes(gzip.compress(text))
    (tmp_path / "e.txt").write_bytes(gzip.compress(text))  # whatever its name is
    data = open_bytes(tmp_path)
    (tmp_path / "plain").mkdir()
    for name in "abce":
        (tmp_path / "plain" / f"{name}.txt").write_bytes(text)
    assert data.files == 4
    assert data.fingerprint == open_bytes(tmp_path / "plain").fingerprint
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text)[:-20])
    with pytest.raises(ConfigError, match=r"a.txt.gz' is damaged, it cannot be decompressed"):
        open_bytes(tmp_path / "a.txt.gz")


def test_files_of_one_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train.txt", "valid.txt", "test.txt"):
        (tmp_path / name).write_text(f"<{name}> " * 20)
    for split, name in (("train", "train.txt"), ("validation", "valid.txt")):
        data = open_bytes(tmp_path, split=split, validation_samples=0, shuffle=False)
        text = "".join(data.tokenizer.decode(one["input_ids"]) for one in data.samples(0, len(data)))
        assert text == (f"<{name}> " * 20 + "\0")[: len(text)]
    assert not caplog.records
    assert open_bytes(tmp_path).files == 3
    assert "tell the splits train, validation, test, and all of them are taken" in caplog.text
    with pytest.raises(ConfigError, match=r"split 'extra' of .* does not exist. Splits: train, validation, test,"):
        open_bytes(tmp_path, split="extra")
