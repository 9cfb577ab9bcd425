"""Texts of Hugging Face data sets: packing, order, streams that break, and what is refused."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from psyche_lightning.builtin.data import datasets as build
from psyche_lightning.data.documents import DocumentData
from psyche_lightning.data.packed import Unavailable
from psyche_lightning.data.splits import DataSet
from psyche_lightning.data.spool import Spool
from psyche_lightning.data.tokenizer import Encoder
from psyche_lightning.errors import ConfigError, DataError

Make = Callable[..., Any]


def packed(texts: list[str], seq_len: int) -> list[bytes]:
    stream = b"".join(text.encode() + b"\0" for text in texts)
    return [stream[start : start + seq_len] for start in range(0, len(stream) - seq_len + 1, seq_len)]


def blocks(data: Any) -> list[bytes]:
    return [bytes(sample["input_ids"].tolist()) for sample in data.samples(0, len(data))]


def opened(place: Path, **options: Any) -> DocumentData:
    given = {"path": str(place), **options}
    data = DataSet(**{name: given.pop(name) for name in DataSet.options() if name in given})
    return DocumentData(1, data, **{"seq_len": 16, "shuffle": False, **given})


def test_texts_are_packed_in_their_order(tmp_path: Path, texts_at: Make) -> None:
    first, second = texts_at(tmp_path / "a.jsonl", 40), texts_at(tmp_path / "b.jsonl", 7)
    data = opened(tmp_path)
    assert blocks(data) == packed(first + second, 16)
    assert sorted(blocks(opened(tmp_path, shuffle=True))) == sorted(blocks(data))
    assert blocks(opened(tmp_path, max_samples=5)) == packed(first, 16)[:5]
    assert (data.vocab_size, len(data.tokenizer)) == (256, 256)


@pytest.mark.parametrize("kind", ["parquet", "csv", "disk", "splits"])
def test_other_formats(tmp_path: Path, kind: str) -> None:
    texts = [f'row {number}, "quoted"' for number in range(30)]
    made = datasets.Dataset.from_dict({"text": texts, "n": list(range(30))})
    place = tmp_path / f"data.{kind}"
    match kind:
        case "parquet":
            made.to_parquet(str(place))
        case "csv":
            made.to_csv(str(place))
        case "disk":
            made.save_to_disk(str(place))
        case _:
            datasets.DatasetDict({"train": made, "test": made.select(range(3))}).save_to_disk(str(place))
            assert blocks(opened(place, split="test")) == packed(texts[:3], 16)
    assert blocks(opened(place)) == packed(texts, 16)


def test_the_fingerprint_tells_other_texts(tmp_path: Path, texts_at: Make) -> None:
    texts_at(tmp_path / "a.jsonl", 40)
    one = opened(tmp_path).fingerprint
    assert opened(tmp_path).fingerprint == one
    text = (tmp_path / "a.jsonl").read_text().replace("text 30:", "text 31:")
    (tmp_path / "a.jsonl").write_text(text)
    assert opened(tmp_path).fingerprint != one


def test_nothing_is_left_on_the_disk(tmp_path: Path, texts_at: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    texts_at(tmp_path / "a.jsonl", 40)
    assert len(opened(tmp_path / "a.jsonl").samples(0, 6)) == 6
    assert not list((tmp_path / "tmp").iterdir()), "not even while it is in use"


def test_a_stream_is_read_as_far_as_it_is_asked_for() -> None:
    taken = itertools.count()
    read = [0]

    def documents(first: int) -> Iterator[bytes]:
        for number in itertools.count(first):
            read[0] = next(taken) + 1
            yield b"%07d" % number

    spool = Spool(documents, Encoder("bytes"), 16, most=1000, lazily=True)
    assert spool.count == 1000
    assert read[0] == 2
    (block,) = spool.read([3])
    assert bytes(block.tolist()) == b"0000006\x000000007\x00"
    assert read[0] == 8
    spool.read([1])
    assert read[0] == 8
    spool.prefetch([9])
    assert spool._worker is not None
    spool._worker.join(20)
    assert read[0] == 20


class Flaky:
    """Texts from somewhere that fails every few of them."""

    def __init__(self, count: int, every: int) -> None:
        self.calls: list[int] = []
        self.broken = False
        self._count = count
        self._every = every

    def __call__(self, first: int) -> Iterator[bytes]:
        self.calls.append(first)
        for number in range(first, self._count):
            if self.broken or (number and number % self._every == 0 and number != first):
                raise OSError("the network is away")
            yield b"%07d" % number


def test_a_stream_that_breaks_is_taken_up_where_it_broke() -> None:
    texts = Flaky(100, every=40)
    spool = Spool(texts, Encoder("bytes"), 16, most=40, lazily=True, retry_seconds=30)
    found = b"".join(bytes(block.tolist()) for block in spool.read(range(40)))
    assert found == b"".join(b"%07d\0" % number for number in range(80))
    assert texts.calls == [0, 40]


def test_a_stream_that_stays_away_names_its_blocks_and_comes_back() -> None:
    texts = Flaky(100, every=1000)
    spool = Spool(texts, Encoder("bytes"), 16, most=40, lazily=True)
    spool.read([2])
    texts.broken = True
    with pytest.raises(
        Unavailable, match=r"documents after number 6 cannot be read .OSError: the network is away"
    ) as caught:
        spool.read([1, 2, 5])
    assert set(caught.value.numbers) & {1, 2, 5} == {5}
    assert len(spool.read([1, 2])) == 2
    texts.broken = False
    assert bytes(spool.read([5])[0].tolist()) == b"0000010\x000000011\x00"


def test_a_stream_that_ends_too_early() -> None:
    spool = Spool(Flaky(10, every=1000), Encoder("bytes"), 16, most=40, lazily=True)
    assert len(spool.read([4])) == 1
    with pytest.raises(ConfigError, match="ended after 5 samples of seq_len=16, fewer than max_samples=40"):
        spool.read([5])


def test_a_data_set_that_breaks_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 3 + "{not json\n")
    with pytest.raises(DataError, match=r"documents of .* cannot be read"):
        opened(tmp_path)


def test_no_space_for_the_tokens(tmp_path: Path, texts_at: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

    texts_at(tmp_path / "a.jsonl", 3)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(DataError, match=r"no space for the tokens in .*: No space left on device. Set TMPDIR"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "no/such"}, r"'no/such' does not exist \(looked for /"),
        ({"path": None}, "got neither"),
        ({"dataset": "someone/something"}, "got both"),
        ({"text": "body"}, r"has no column 'body'. Columns: text, number. Set data.config.text"),
        ({"text": "number"}, "Row 0 of .* has '1' in the column 'number', expected a text"),
        ({"streaming": True}, "set max_samples"),
        ({"streaming": True, "max_samples": 9, "shuffle": True}, "remove shuffle"),
        ({"streaming": True, "max_samples": 9, "validation_samples": 1}, "remove shuffle and validation_samples"),
        ({"max_samples": 0}, "max_samples is 0"),
        ({"tokenizer": 5}, "tokenizer is 5"),
        ({"validation_samples": 999}, "too little data"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, texts_at: Make, options: dict[str, Any], message: str) -> None:
    texts_at(tmp_path / "a.jsonl", 20)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, **options)


def test_paths_without_a_data_set_are_refused(tmp_path: Path, texts_at: Make) -> None:
    with pytest.raises(ConfigError, match="has no data files, expected files with one of the suffixes"):
        opened(tmp_path)
    texts_at(tmp_path / "a.jsonl", 2)
    (tmp_path / "b.csv").write_text("text\nx\n")
    with pytest.raises(ConfigError, match=r"has files of .csv, .jsonl, expected files of one kind"):
        opened(tmp_path, path=[str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")])


def test_a_data_set_of_the_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"data set 'someone/nothing' .* cannot be opened: .* Check the names"):
        DocumentData(1, DataSet(dataset="someone/nothing"), 16)


@pytest.mark.parametrize("column", ["text", "prompt"])
def test_a_data_set_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    made = datasets.Dataset.from_dict({column: ["a text of its own"] * 9, "completion": ["another"] * 9})
    made.to_csv(str(tmp_path / "a.csv"))
    opened: list[Any] = []
    load = datasets.load_dataset

    def counting(*args: Any, **options: Any) -> Any:
        opened.append(args)
        return load(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", counting)
    assert len(build({"path": str(tmp_path / "a.csv"), "seq_len": 24}, seed=0)) > 1
    assert len(opened) == 1


def test_an_unknown_option_is_explained_with_all_that_there_are(tmp_path: Path) -> None:
    for wrong, near in (("pth", "path"), ("tokeniser", "tokenizer"), ("splits", "split")):
        with pytest.raises(ConfigError, match=f"no option '{wrong}'. Did you mean '{near}'. Options: path, .*seq_len"):
            build({wrong: "a", "seq_len": 8}, seed=0)


def test_a_forked_worker_has_a_file_of_its_own() -> None:
    spool = Spool(Flaky(100, every=1000), Encoder("bytes"), 16, most=40, lazily=True)
    expected = spool.read([0, 5])
    size = os.fstat(spool._file.fileno()).st_size
    pid = os.fork()
    if not pid:
        fine = all(map(np.array_equal, spool.read([0, 5]), expected)) and spool.read([30])
        os._exit(0 if fine else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.fstat(spool._file.fileno()).st_size == size


def test_tokenized_rows_are_packed_as_they_are(tmp_path: Path, texts_at: Make) -> None:
    rows = [[row, 300, *range(row)] for row in range(30)]
    datasets.Dataset.from_dict({"input_ids": rows}).to_parquet(str(tmp_path / "train.parquet"))
    stream = [value for row in rows for value in row]
    data = opened(tmp_path, vocab_size=301)
    assert [value for sample in data.samples(0, len(data)) for value in sample["input_ids"].tolist()] == stream[
        : len(stream) // 16 * 16
    ]
    assert (data.vocab_size, data.tokenizer) == (301, None)
    with pytest.raises(ConfigError, match=r"set data.config.vocab_size, or data.config.tokenizer"):
        opened(tmp_path)
    with pytest.raises(ConfigError, match=r"Row 0 .* token id 300, but the vocabulary has 256"):
        opened(tmp_path, vocab_size=256, text="input_ids")
    texts_at(tmp_path / "texts.jsonl", 9)
    with pytest.raises(ConfigError, match="vocab_size is for data sets of token ids"):
        opened(tmp_path / "texts.jsonl", vocab_size=256)


def test_padding_is_left_out(tmp_path: Path) -> None:
    rows, mask = [[0, 0, 5, 6, 7, 8], [9, 1, 2, 3, 4, 5]], [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    labels = [[-100, -100, 5, 6, 7, 8], rows[1]]
    made = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": mask, "labels": labels})
    made.to_parquet(str(tmp_path / "a.parquet"))
    data = opened(tmp_path / "a.parquet", vocab_size=10, seq_len=5)
    assert [sample["input_ids"].tolist() for sample in data.samples(0, 2)] == [[5, 6, 7, 8, 9], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize(("column", "nothing"), [("text", ""), ("text", None), ("input_ids", []), ("input_ids", None)])
def test_rows_with_nothing_in_them_are_left_out_and_said(
    tmp_path: Path, column: str, nothing: Any, caplog: pytest.LogCaptureFixture
) -> None:
    something = "a text of its own" if column == "text" else list(b"a text of its own\0")
    made = datasets.Dataset.from_dict({column: [nothing, something, nothing, something, something]})
    made.to_parquet(str(tmp_path / "a.parquet"))
    options = {} if column == "text" else {"vocab_size": 256}
    data = opened(tmp_path / "a.parquet", seq_len=18, **options)
    assert blocks(data) == [b"a text of its own\0"] * 3
    assert f"2 rows of {tmp_path / 'a.parquet'}: nothing is in the column '{column}'" in caplog.text


def test_a_file_without_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ConfigError, match="cannot be opened: it has no rows"):
        opened(tmp_path / "a.jsonl")


def test_labels_of_tokenized_rows_decide_what_is_trained(tmp_path: Path) -> None:
    rows = [[5, 6, 7, 0], [8, 9, 3, 0, 1, 1], [4, 4, 4], [], None]
    labels = [[-100, 6, 7, 0], [-100, -100, 3, 0, -100, -100], [-100] * 3, [], None]
    mask = [[1] * 4, [1] * 4 + [0] * 2, [1] * 3, [], None]
    made = datasets.Dataset.from_dict({"input_ids": rows, "labels": labels, "attention_mask": mask})
    made.to_parquet(str(tmp_path / "a.parquet"))
    given = {"path": str(tmp_path / "a.parquet"), "tokenizer": "bytes", "seq_len": 8, "shuffle": False}
    data = build(given, seed=0)
    (sample,) = data.samples(0, len(data))
    assert sample["input_ids"].tolist() == [5, 6, 7, 0, 8, 9, 3, 0]
    assert sample["labels"].tolist() == [-100, 6, 7, 0, -100, -100, 3, 0]
    assert sample["position_ids"].tolist() == [0, 1, 2, 3] * 2
    apart = build({**given, "packed": False}, seed=0)
    assert [one["labels"].tolist()[:4] for one in apart.samples(0, 2)] == [labels[0], labels[1][:4]]
    with pytest.raises(ConfigError, match=r"set data.config.tokenizer to the tokenizer that made them"):
        build({"path": given["path"], "seq_len": 8}, seed=0)
    shifted = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[6, 7, -100]]})
    shifted.to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(ConfigError, match=r"Row 0 of .* neither its token ids nor -100. Do not shift labels"):
        build(given, seed=0)
