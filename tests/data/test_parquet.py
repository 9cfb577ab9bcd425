"""Prepared rows: labels, positions, memory, and rows that are not what they should be."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from psyche_lightning.data.parquet import PreparedData
from psyche_lightning.errors import ConfigError, DataError

Damage = Callable[[Path, int], None]

ROWS = [[10 * row + place for place in range(6)] for row in range(9)]


def write(path: Path, group: int = 4, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=group)
    return path


def opened(place: Path, **options: Any) -> PreparedData:
    return PreparedData(1, **{"seq_len": 6, "path": str(place), "vocab_size": 100, **options})


def column(data: PreparedData, name: str) -> list[list[int]]:
    return [sample[name].tolist() for sample in data.samples(0, len(data))]


def test_rows_are_samples_in_their_order(tmp_path: Path) -> None:
    write(tmp_path / "b.parquet", inputs=ROWS[5:])
    write(tmp_path / "a.parquet", inputs=ROWS[:5])
    (tmp_path / "notes.txt").write_text("not a row")
    data = opened(tmp_path)
    assert column(data, "input_ids") == column(data, "labels") == ROWS
    assert set(data.samples(0, 1)[0]) == {"input_ids", "labels"}
    held = opened(tmp_path, validation_samples=2)
    assert column(held, "input_ids") == ROWS[:7]
    assert [sample["input_ids"].tolist() for sample in held.validation()] == ROWS[7:]


def test_labels_and_positions(tmp_path: Path) -> None:
    labels = [[-100, *row[1:]] for row in ROWS]
    positions = [[0, 1, 2, 0, 1, 2]] * 9
    data = opened(write(tmp_path / "a.parquet", inputs=ROWS, labels=labels, position_ids=positions))
    assert column(data, "labels") == [[-100, *row[1:3], -100, *row[4:]] for row in ROWS], "no text predicts the next"
    assert column(data, "position_ids") == positions


def test_positions_follow_from_the_lengths_of_packed_texts(tmp_path: Path) -> None:
    lengths = [[6], [2, 4], [1, 1, 1, 1, 1, 1], [3, 2, 1], [5, 1], [6], [6], [6], [1, 5]]
    data = opened(write(tmp_path / "a.parquet", inputs=ROWS, sequence_lengths=lengths))
    expected = [[place for length in row for place in range(length)] for row in lengths]
    assert column(data, "position_ids") == expected
    assert column(data, "labels")[:2] == [ROWS[0], [*ROWS[1][:2], -100, *ROWS[1][3:]]]
    given = [[5, 4, 3, 2, 1, 0]] * 9
    both = opened(write(tmp_path / "b.parquet", inputs=ROWS, sequence_lengths=lengths, position_ids=given))
    assert column(both, "position_ids") == given


@pytest.mark.parametrize("kind", [pyarrow.list_(pyarrow.int32()), pyarrow.large_list(pyarrow.uint16()),
                                  pyarrow.list_(pyarrow.int64(), 6)])  # fmt: skip
def test_every_kind_of_list_of_integers(tmp_path: Path, kind: Any) -> None:
    data = opened(write(tmp_path / "a.parquet", inputs=pyarrow.array(ROWS, kind)))
    assert column(data, "input_ids") == ROWS


def test_padding_is_not_trained(tmp_path: Path) -> None:
    mask = [[1] * (6 - row % 3) + [0] * (row % 3) for row in range(9)]
    data = opened(write(tmp_path / "a.parquet", input_ids=ROWS, attention_mask=mask))
    expected = [row[: sum(ones)] + [-100] * (6 - sum(ones)) for row, ones in zip(ROWS, mask, strict=True)]
    assert column(data, "labels") == expected
    assert column(data, "input_ids") == ROWS
    assert set(data.samples(0, 1)[0]) == {"input_ids", "labels"}
    left = opened(write(tmp_path / "a.parquet", inputs=ROWS, attention_mask=[ones[::-1] for ones in mask]))
    with pytest.raises(DataError, match="attention_mask is not ones and then zeros; pad rows at their end"):
        left.samples(0, 9)


def test_row_groups_are_kept_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.zeros((4000, 100), np.int32).tolist()
    path = write(tmp_path / "a.parquet", group=400, inputs=rows)
    data = opened(path, seq_len=100, fetch={"cache_mb": 1})
    read: list[int] = []
    load = data._load
    monkeypatch.setattr(data, "_load", lambda group: read.append(group.number) or load(group))
    data.samples(0, 4000)
    assert read == list(range(10))
    assert len(data._kept) <= 2
    data.samples(3990, 4000)
    assert len(read) == 10
    with pytest.raises(ConfigError, match=r"Row group 0 of .* smaller row_group_size"):
        opened(write(tmp_path / "b.parquet", group=4000, inputs=rows), seq_len=100, fetch={"cache_mb": 1})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"inputs": [*ROWS[:8], [1, 2]]}, r"row group 2 of .*: a row of 'inputs' has 2 entries, not seq_len=6"),
        ({"inputs": [*ROWS[:8], None]}, "'inputs' has missing values"),
        ({"inputs": [*ROWS[:8], [1, 2, 3, None, 5, 6]]}, "'inputs' has missing values"),
        ({"inputs": [*ROWS[:8], [1, 2, 3, 100, 5, 6]]}, "input_ids has the value 100, but the vocabulary has 100"),
        ({"inputs": [*ROWS[:8], [1, 2, 3, -1, 5, 6]]}, "input_ids has the value -1"),
        ({"inputs": ROWS, "labels": [*ROWS[:8], [-100, -1, 0, 0, 0, 0]]}, "labels has the value -1"),
        ({"inputs": ROWS, "position_ids": [*ROWS[:1] * 8, [6] * 6]}, "position_ids has the value 6, but positions"),
        ({"inputs": ROWS, "sequence_lengths": [[6]] * 8 + [[5]]}, "a row's sequence_lengths do not add up"),
        ({"inputs": ROWS, "sequence_lengths": [[6]] * 8 + [[7, -1]]}, "a row's sequence_lengths do not add up"),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, columns: Any, message: str) -> None:
    data = opened(write(tmp_path / "a.parquet", **columns))
    assert len(data.samples(0, 8)) == 8
    with pytest.raises(DataError, match=message) as caught:
        data.samples(6, 9)
    assert caught.value.lasting
    assert caught.value.ids == (8,)


@pytest.mark.parametrize("inputs", [[1.5] * 9, list(range(9)), [["a"] * 6] * 9])
def test_columns_of_another_type(tmp_path: Path, inputs: Any) -> None:
    with pytest.raises(DataError, match="expected lists of integers"):
        opened(write(tmp_path / "a.parquet", inputs=inputs)).samples(0, 1)


def test_a_file_that_breaks_during_a_run(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", inputs=ROWS)
    data = opened(path, validation_samples=1)
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=r"samples 2-6 of .* cannot be read") as caught:
        data.samples(2, 7)
    assert caught.value.ids == (2, 3, 4, 5, 6)
    assert not caught.value.lasting
    path.write_bytes(whole)
    assert len(data.samples(2, 7)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "nowhere"}, "'nowhere' is neither a parquet file nor a folder with parquet files"),
        ({"vocab_size": None}, "set data.config.vocab_size"),
        ({"validation_samples": 9}, "9 rows, of which 9 are for validation"),
        ({"shuffle": "x"}, "shuffle is 'x'"),
        ({"tokenizer": "bytes"}, "tokenizer has 256 ids, but vocab_size is 100"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    write(tmp_path / "a.parquet", inputs=ROWS)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path, **options)


def test_files_that_are_not_such_tables(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(ConfigError, match="is not a readable parquet file"):
        opened(tmp_path)
    write(tmp_path / "a.parquet", tokens=ROWS)
    with pytest.raises(ConfigError, match=r"has no column 'inputs' \(or 'input_ids'\) .*; columns: tokens"):
        opened(tmp_path)
    write(tmp_path / "a.parquet", inputs=ROWS)
    write(tmp_path / "b.parquet", inputs=ROWS, labels=ROWS)
    with pytest.raises(ConfigError, match="but earlier files have"):
        opened(tmp_path)


def test_the_fingerprint_tells_other_rows(tmp_path: Path) -> None:
    one = opened(write(tmp_path / "a.parquet", inputs=ROWS)).fingerprint
    assert opened(tmp_path / "a.parquet").fingerprint == one
    assert opened(write(tmp_path / "a.parquet", inputs=ROWS[::-1])).fingerprint != one


@pytest.mark.parametrize("compression", ["snappy", "none", "zstd"])
def test_a_damaged_row_group_is_named_and_left_out_for_good(
    tmp_path: Path, damage: Damage, caplog: pytest.LogCaptureFixture, compression: str
) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"inputs": ROWS}), path, row_group_size=4, compression=compression)
    damage(path, 1)
    nodes = [opened(path) for _ in range(2)]
    expected = [*ROWS[:4], *[ROWS[8]] * 4, ROWS[8]]
    assert column(nodes[0], "input_ids") == column(nodes[1], "input_ids") == expected
    assert column(nodes[0], "input_ids") == expected
    assert [record.getMessage()[:35] for record in caplog.records] == [f"row group 1 of {path}"[:35]] * 2
    assert "is damaged (" in caplog.text
    assert pickle.loads(pickle.dumps(nodes[0])).samples(5, 6)[0]["input_ids"].tolist() == ROWS[8]


def test_checksums_show_changed_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pyarrow.table({"inputs": ROWS}), path, row_group_size=4, compression="none", use_dictionary=False,
        write_page_checksum=True,
    )  # fmt: skip
    whole, tokens = path.read_bytes(), [np.array(ROWS[place], "<i8").tobytes() for place in (5, 6)]
    assert whole.count(tokens[0]) == 1
    path.write_bytes(whole.replace(*tokens))
    assert column(opened(path), "input_ids")[4:8] == [ROWS[8]] * 4
    assert f"row group 1 of {path} is damaged" in caplog.text


def test_numbers_that_no_tokenizer_has_are_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.parquet", inputs=[*ROWS[:4], [1, 2, 3, 1 << 40, 5, 6], *ROWS[5:]])
    assert column(opened(path), "input_ids") == [*ROWS[:4], *[ROWS[8]] * 5]
    assert "has values that no tokenizer has, such as 1099511627776" in caplog.text


def test_a_damaged_row_group_of_the_validation_rows_is_left_out(tmp_path: Path, damage: Damage) -> None:
    damage(write(tmp_path / "a.parquet", inputs=ROWS), 2)
    data = opened(tmp_path / "a.parquet", validation_samples=3)
    assert [sample["input_ids"].tolist() for sample in data.validation()] == ROWS[6:8]
    assert column(data, "input_ids") == ROWS[:6]
    damage(tmp_path / "a.parquet", 1)
    data = opened(tmp_path / "a.parquet", validation_samples=3)
    assert column(data, "input_ids") == [*ROWS[:4], *ROWS[:2]], "rows for validation replace nothing"
    damage(tmp_path / "a.parquet", 0)
    with pytest.raises(DataError, match="all row groups are damaged") as caught:
        opened(tmp_path / "a.parquet").samples(0, 1)
    assert caught.value.lasting


def test_a_file_that_changed_is_not_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", inputs=ROWS)
    data = opened(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="has changed since the start") as caught:
        data.samples(0, 1)
    assert caught.value.lasting


def test_folders_as_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00001-of-00002.parquet", inputs=ROWS[4:6])
    write(tmp_path / "data" / "train-00000-of-00002.parquet", inputs=ROWS[:4])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", inputs=ROWS[6:])
    assert column(opened(tmp_path), "input_ids") == ROWS[:6]
    assert column(opened(tmp_path, split="test"), "input_ids") == ROWS[6:]
    with pytest.raises(ConfigError, match=r"split 'validation' of .* does not exist. Splits: test, train,"):
        opened(tmp_path, split="validation")
