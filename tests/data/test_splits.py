"""Parts of data sets: the same rows that ``load_dataset`` finds, for files, folders and slices."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from psyche_lightning.data.documents import DocumentData
from psyche_lightning.data.splits import DataSet
from psyche_lightning.errors import ConfigError

ROWS = 20


def rows(split: str) -> list[str]:
    return [f"<{split}> row {number}" for number in range(ROWS)]


def write(path: Path, split: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in rows(split))
    if path.suffix == ".parquet":
        datasets.Dataset.from_dict({"text": rows(split)}).to_parquet(str(path))
    elif path.name.endswith(".txt.gz"):
        path.write_bytes(gzip.compress("".join(text + "\n" for text in rows(split)).encode()))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix in (".csv", ".tsv"):
        path.write_text("".join(text + "\n" for text in ["text", *rows(split)]))
    else:
        path.write_text(lines)


def found(place: Path | list[str], **options: Any) -> bytes:
    given = place if isinstance(place, list) else str(place)
    source = DataSet(given, **{name: options.pop(name) for name in DataSet.options() if name in options})
    data = DocumentData(1, source, **{"seq_len": 2, "shuffle": False, **options})
    return b"".join(bytes(sample["input_ids"].tolist()) for sample in data.samples(0, len(data)))


def packed(texts: list[str]) -> bytes:
    stream = b"".join(text.encode() + b"\0" for text in texts)
    return stream[: len(stream) // 2 * 2]


def expected(place: Path, split: str, **options: Any) -> bytes:
    cache = str(place.parent / "cache")
    return packed(list(datasets.load_dataset(str(place), split=split, cache_dir=cache, **options)["text"]))


TREES = {
    "names": ["train.jsonl", "validation.jsonl", "test.jsonl"],
    "other words": ["my-training.jsonl.gz", "my-dev.jsonl.gz", "my-eval.jsonl.gz", "constraint.jsonl.gz"],
    # as push_to_hub writes them
    "shards": [f"data/{name}-of-00002.parquet" for name in ("train-00000", "train-00001", "test-00000")],
    "folders": ["train/a.csv", "val/a.csv", "test/a.csv"],
    "deep folders": ["x/train/a.tsv", "x/valid/b.tsv"],
    "lines": ["train.txt.gz", "test.txt.gz"],
    "no split": ["b.jsonl", "a.jsonl", "deeper/c.jsonl", ".hidden/d.jsonl"],
}  # fmt: skip


@pytest.mark.parametrize("tree", TREES)
def test_splits_are_those_of_load_dataset(tmp_path: Path, tree: str) -> None:
    place = tmp_path / "data"
    for name in TREES[tree]:
        write(place / name, name)
    splits = datasets.get_dataset_split_names(str(place))
    for split in splits:
        assert found(place, split=split) == expected(place, split)
    with pytest.raises(ConfigError, match=rf"split 'nonsense' of .* does not exist .* Splits: {', '.join(splits)};"):
        found(place, split="nonsense")


@pytest.mark.parametrize("split", ["train[:90%]", "train[-3:]", "train[5:9]+test", "test[50%:]+train[:1]", "all"])
def test_slices_are_those_of_load_dataset(tmp_path: Path, split: str) -> None:
    place = tmp_path / "data"
    for name in ("train", "test"):
        write(place / f"{name}.jsonl", name)
    wanted = expected(place, split)
    assert found(place, split=split) == wanted
    datasets.load_dataset(str(place), cache_dir=str(tmp_path / "cache")).save_to_disk(str(tmp_path / "saved"))
    assert found(tmp_path / "saved", split=split) == wanted
    with pytest.raises(ConfigError, match="has no rows"):
        found(place, split="train[3:3]")


def test_the_card_of_a_folder_has_configurations(tmp_path: Path) -> None:
    place = tmp_path / "data"
    for name in ("a/one.jsonl", "a/two.jsonl", "b/one.jsonl"):
        write(place / name, name)
    (place / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files:\n  - {split: train, path: a/one.jsonl}\n"
        "  - {split: extra, path: a/two.jsonl}\n- config_name: b\n  data_files: b/*.jsonl\n---\n"
    )
    assert found(place, name="a", split="extra") == expected(place, "extra", name="a") == packed(rows("a/two.jsonl"))
    assert found(place, name="b") == packed(rows("b/one.jsonl"))
    with pytest.raises(ConfigError, match=r"cannot be opened: .*Config name is missing"):
        found(place)


def test_files_that_the_path_names_are_train(tmp_path: Path) -> None:
    for name in ("validation.jsonl", "x[1].jsonl", "shard-2.jsonl.gz", "shard-1.jsonl.gz"):
        write(tmp_path / name, name)
    assert found(tmp_path / "validation.jsonl") == packed(rows("validation.jsonl"))
    assert found(tmp_path / "x[1].jsonl") == packed(rows("x[1].jsonl"))
    shards = packed(rows("shard-1.jsonl.gz") + rows("shard-2.jsonl.gz"))
    assert found(tmp_path / "shard-*.jsonl.gz") == shards
    both = [str(tmp_path / "validation.jsonl"), str(tmp_path / "shard-*")]
    assert found(both) == packed(rows("validation.jsonl") + rows("shard-1.jsonl.gz") + rows("shard-2.jsonl.gz"))
    with pytest.raises(ConfigError, match=r"split 'validation' of .* does not exist"):
        found(tmp_path / "validation.jsonl", split="validation")
    with pytest.raises(ConfigError, match="choose within a folder"):
        found(tmp_path / "validation.jsonl", name="x")


def test_files_of_splits_can_be_named(tmp_path: Path) -> None:
    for name in ("one.jsonl", "two.jsonl"):
        write(tmp_path / name, name)
    given = {"train": "one.jsonl", "later": ["two.jsonl"]}
    assert found(tmp_path, data_files=given) == packed(rows("one.jsonl"))
    assert found(tmp_path, data_files=given, split="later") == packed(rows("two.jsonl"))


def test_files_outside_the_splits_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train.jsonl", "test.jsonl", "more.jsonl"):
        write(tmp_path / name, name)
    with caplog.at_level(logging.WARNING):
        found(tmp_path)
    assert "the splits train, test do not contain 1 of the data files, such as more.jsonl" in caplog.text


def test_a_saved_split_keeps_its_name(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": rows("test")}, split=datasets.Split.TEST)
    made.save_to_disk(str(tmp_path / "saved"))
    assert found(tmp_path / "saved", split="test") == packed(rows("test"))
    with pytest.raises(ConfigError, match=r"split 'train' of .* does not exist .* Splits: test;"):
        found(tmp_path / "saved")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_row_group_is_named_and_left_out(
    tmp_path: Path, damage: Callable[[Path, int], None], caplog: pytest.LogCaptureFixture, streaming: bool
) -> None:
    place = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"text": rows("train")}).to_parquet(str(place), batch_size=5)
    damage(place, 1)
    options = {"streaming": True, "max_samples": 90} if streaming else {}
    sound = packed(rows("train")[:5] + rows("train")[10:])
    for path in (tmp_path, place):
        assert found(path, **options) == sound[: 180 if streaming else None]
    assert f"row group 1 of {place} is damaged (" in caplog.text
    assert "left out for good: 5 rows" in caplog.text
