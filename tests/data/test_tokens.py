"""Token files on disk: formats, counts, order, and what is refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from psyche_lightning.data.description import TokenWriter
from psyche_lightning.data.named import splits_of
from psyche_lightning.data.tokenizer import Encoder
from psyche_lightning.data.tokens import TokenData
from psyche_lightning.errors import ConfigError, DataError

Make = Callable[..., Any]


def opened(path: Path | str, **options: Any) -> TokenData:
    return TokenData(1, **{"seq_len": 4, "path": str(path), "vocab_size": 1000, "shuffle": False, **options})


def ids(data: TokenData, start: int = 0, stop: int | None = None) -> list[list[int]]:
    samples = data.samples(start, len(data) if stop is None else stop)
    return [sample["input_ids"].tolist() for sample in samples]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("tokens", "sequences"), [(4, 1), (7, 1), (8, 2), (9, 2), (3, 0)])
def test_no_sequence_is_lost(tmp_path: Path, tokens_at: Make, size: int, tokens: int, sequences: int) -> None:
    """An exact multiple keeps its last sequence, and a file that is shorter than one has none (as Psyche)."""
    tokens_at(tmp_path / "a.bin", tokens, size=size)
    tokens_at(tmp_path / "b.bin", 4, first=500, size=size)
    data = opened(tmp_path, token_size=size)
    assert len(data) == sequences + 1
    expected = [list(range(4 * i, 4 * i + 4)) for i in range(sequences)]
    assert ids(data) == [*expected, [500, 501, 502, 503]]


def test_files_come_in_the_order_of_their_names(tmp_path: Path, tokens_at: Make) -> None:
    for number, name in enumerate(["c.npy", "B.bin", "a.ds", "a.bin", "ignored.txt"]):
        tokens_at(tmp_path / name, 4, first=10 * number)
    assert [row[0] for row in ids(opened(tmp_path / "a.ds"))] == [20]
    assert [row[0] for row in ids(opened(tmp_path))] == [10, 30, 20, 0]
    data = TokenData(1, 4, path=[str(tmp_path / "c.npy"), str(tmp_path)], vocab_size=99, shuffle=False)
    assert [row[0] for row in ids(data)] == [0, 10, 30, 20], "each file once"


@pytest.mark.parametrize(("dtype", "size"), [("<u2", 2), ("<u4", 4), ("<i4", 4)])
def test_a_numpy_header_is_not_read_as_tokens(tmp_path: Path, dtype: str, size: int) -> None:
    np.save(tmp_path / "a.npy", np.arange(9, dtype=dtype))
    data = opened(tmp_path)
    assert ids(data) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    (tmp_path / "b.npy").write_bytes(np.arange(4, dtype=f"<u{size}").tobytes())
    if size == 2:  # raw, as Psyche writes them
        assert ids(opened(tmp_path)) == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]
    else:
        assert ids(opened(tmp_path)) == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]], "4 bytes, like its neighbour"
        (tmp_path / "c.bin").write_bytes(np.arange(40, dtype="<u2").tobytes())
        with pytest.raises(ConfigError, match=r"different sizes, 2 and 4 bytes .*c.bin 2, .*a.npy 4"):
            opened(tmp_path)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(8, dtype="<i8"), "type <i8 and shape"),
        (np.arange(8, dtype=">u2"), "type >u2"),
        (np.zeros((2, 4), "<u2"), r"shape \(2, 4\)"),
        (np.array([{"a": 1}]), r"type \|O"),
    ],
)
def test_other_arrays_are_refused_and_nothing_is_unpickled(tmp_path: Path, array: Any, message: str) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path)


def test_a_truncated_array_and_a_broken_header(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(100, dtype="<u2"))
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-2])
    with pytest.raises(ConfigError, match="announces 100 tokens of 2 bytes"):
        opened(tmp_path)
    (tmp_path / "a.npy").write_bytes(whole[:40])
    with pytest.raises(ConfigError, match="not in numpy's format"):
        opened(tmp_path)


def test_psyche_s_shuffle_runs_over_all_files(tmp_path: Path, tokens_at: Make) -> None:
    tokens_at(tmp_path / "a.bin", 4 * 12)
    tokens_at(tmp_path / "b.bin", 4 * 8 + 2, first=48)
    data = opened(tmp_path, shuffle=list(range(1, 33)))
    expected = [18, 1, 17, 6, 15, 9, 8, 14, 16, 12, 19, 5, 0, 2, 4, 7, 11, 10, 3, 13]
    assert [row[0] // 4 for row in ids(data)] == expected


def test_the_run_s_seed_shuffles(tmp_path: Path, tokens_at: Make) -> None:
    tokens_at(tmp_path / "a.bin", 400)
    orders = [ids(TokenData(seed, 4, path=str(tmp_path), vocab_size=1000)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == ids(opened(tmp_path))


def test_validation_is_spread_and_never_trained(tmp_path: Path, tokens_at: Make) -> None:
    tokens_at(tmp_path / "a.bin", 400)
    data = opened(tmp_path, validation_samples=4)
    held_out = [sample["input_ids"][0].item() // 4 for sample in data.validation()]
    assert held_out == [12, 37, 62, 87]
    assert [row[0] // 4 for row in ids(data)] == [number for number in range(100) if number not in held_out]


def test_the_fingerprint_tells_other_data(tmp_path: Path, tokens_at: Make) -> None:
    tokens_at(tmp_path / "a.bin", 40)
    one = opened(tmp_path).fingerprint
    assert one.startswith("1 files, 80 bytes, ")
    assert opened(tmp_path / "a.bin", shuffle=True).fingerprint == one
    tokens_at(tmp_path / "a.bin", 40, first=1)
    assert opened(tmp_path).fingerprint != one
    tokens_at(tmp_path / "a.bin", 42)
    assert opened(tmp_path).fingerprint != one


def test_a_file_that_changes_is_named(tmp_path: Path, tokens_at: Make) -> None:
    tokens_at(tmp_path / "a.bin", 40)
    data = opened(tmp_path)
    tokens_at(tmp_path / "a.bin", 20)
    with pytest.raises(DataError, match=r"a.bin has changed: at the start it had 80 bytes, now .* 40 bytes") as caught:
        data.samples(2, 5)
    assert caught.value.lasting
    assert caught.value.ids == (2, 3, 4)
    tokens_at(tmp_path / "a.bin", 40, first=3)
    os.utime(tmp_path / "a.bin", ns=(0, 0))
    with pytest.raises(DataError, match="has changed: at the start"):
        data.samples(0, 1)


def test_a_file_that_is_away_for_a_while(tmp_path: Path, tokens_at: Make) -> None:
    tokens_at(tmp_path / "a.bin", 40)
    data = opened(tmp_path)
    (tmp_path / "a.bin").rename(tmp_path / "away")
    with pytest.raises(DataError, match=r"samples 2-4 of .* are not available: .*No such file") as caught:
        data.samples(2, 5)
    assert not caught.value.lasting
    (tmp_path / "away").rename(tmp_path / "a.bin")
    assert len(data.samples(2, 5)) == 3


def test_ids_beyond_the_vocabulary(tmp_path: Path, tokens_at: Make) -> None:
    tokens_at(tmp_path / "a.bin", 40)
    data = opened(tmp_path, vocab_size=35)
    assert len(data.samples(0, 8)) == 8
    with pytest.raises(DataError, match=r"samples 8-9 of .* token ids up to 39, but the vocabulary has 35") as caught:
        data.samples(6, 10)
    assert caught.value.ids == (8, 9)
    assert caught.value.lasting


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "no/such/place"}, r"'no/such/place' does not exist \(looked for /"),
        ({"path": None}, "needs either path .* got neither"),
        ({"url": "http://127.0.0.1:1/x.bin"}, "got both"),
        ({"vocab_size": None}, "do not say how many token ids there are: set data.config.vocab_size"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": 100, "tokenizer": "bytes"}, "tokenizer has 256 ids, but vocab_size is 100"),
        ({"tokenizer": "nowhere"}, "tokenizer 'nowhere' does not exist"),
        ({"token_size": 3}, "token_size is 3, expected 1, 2, 4, 8 bytes"),
        ({"token_size": 4}, "not a whole number of tokens of 4 bytes"),
        ({"validation_samples": 10}, "10 samples of seq_len=4, of which 10 are for validation"),
        ({"seq_len": 100}, "makes 0 samples of seq_len=100"),
        ({"shuffle": "maybe"}, "shuffle is 'maybe'"),
        ({"fetch": 3}, "fetch is 3, expected keys and values"),
        ({"fetch": {"retry_second": 3}}, "fetch has no key 'retry_second'. Did you mean 'retry_seconds'"),
        ({"fetch": {"cache_mb": 0}}, "fetch.cache_mb is 0"),
        ({"fetch": {"retry_seconds": "long"}}, "fetch.retry_seconds is 'long'"),
    ],
)
def test_wrong_options_are_refused(tmp_path: Path, tokens_at: Make, options: dict[str, Any], message: str) -> None:
    tokens_at(tmp_path / "a.bin", 41)
    with pytest.raises(ConfigError, match=message):
        TokenData(1, **{"seq_len": 4, "path": str(tmp_path), "vocab_size": 1000, **options})


def test_places_without_tokens(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no token files in the folder"):
        opened(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="makes 0 samples"):
        opened(tmp_path)


def described(folder: Path, count: int = 40, **options: Any) -> Path:
    writer = TokenWriter(folder, Encoder("bytes"), **options)
    writer.write(np.arange(count) % 256)
    writer.close()
    return folder


def test_a_folder_with_a_description_needs_nothing_else(tmp_path: Path) -> None:
    folder = described(tmp_path / "out", file_tokens=16)
    assert sorted(file.name for file in folder.iterdir()) == [
        "dataset.json", "tokens-00000.bin", "tokens-00001.bin", "tokens-00002.bin"
    ]  # fmt: skip
    data = TokenData(0, 4, path=str(folder), shuffle=False)
    assert (data.vocab_size, len(data), len(data.tokenizer)) == (256, 10, 256)
    assert [row[0] for row in ids(data)] == list(range(0, 40, 4))
    with pytest.raises(ConfigError, match=r"token_size is 4, but dataset.json of the data says 2"):
        TokenData(0, 4, path=str(folder), token_size=4)


def test_a_copy_that_is_not_complete(tmp_path: Path) -> None:
    folder = described(tmp_path / "out", file_tokens=16)
    (folder / "tokens-00001.bin").write_bytes(b"12")
    with pytest.raises(ConfigError, match=r"tokens-00001.bin has 2 bytes, but .* says that it has 32"):
        opened(folder)
    (folder / "tokens-00001.bin").unlink()
    with pytest.raises(ConfigError, match=r"tokens-00001.bin is missing"):
        opened(folder)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "null", '{"format": "other"}', "[" * 10_000,
        '{"format": "psyche tokens 1", "token_size": 3, "vocab_size": 2, "tokenizer": "bytes", "files": []}',
        '{"format": "psyche tokens 1", "token_size": 2, "vocab_size": 2, "tokenizer": "../x", "files": []}',
        '{"format": "psyche tokens 1", "token_size": 2, "vocab_size": 2, "tokenizer": "bytes", "files": []}',
        '{"format": "psyche tokens 1", "token_size": 2, "vocab_size": 2, "tokenizer": "bytes", "more": 1, "files": []}',
        '{"format": "psyche tokens 1", "token_size": 2, "vocab_size": 2, "tokenizer": "bytes", '
        '"files": [{"name": "../a.bin", "tokens": 1, "sha256": ""}]}',
        '{"format": "psyche tokens 1", "token_size": 2, "vocab_size": 2, "tokenizer": "bytes", '
        '"files": [{"name": "a.bin", "tokens": -1, "sha256": ""}]}',
    ],
)  # fmt: skip
def test_other_descriptions_are_refused(tmp_path: Path, tokens_at: Make, text: str) -> None:
    tokens_at(tmp_path / "a.bin", 8)
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ConfigError, match="does not describe token files"):
        opened(tmp_path)


def test_a_writer_refuses_what_would_be_wrong(tmp_path: Path) -> None:
    described(tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty"):
        TokenWriter(tmp_path / "out", Encoder("bytes"))
    with pytest.raises(ConfigError, match="token_size is 3"):
        TokenWriter(tmp_path / "new", Encoder("bytes"), token_size=3)
    with pytest.raises(ConfigError, match="no text to tokenize"):
        TokenWriter(tmp_path / "new", Encoder("bytes")).close()


def write_index(path: Path, tokens: np.ndarray[Any, Any], kind: int, documents: int = 2) -> None:
    """A file of Megatron's and the index beside it."""
    path.write_bytes(tokens.tobytes())
    lengths = np.array([len(part) for part in np.array_split(tokens, documents)], "<i4")
    pointers = np.cumsum([0, *lengths[:-1]]).astype("<i8") * tokens.itemsize
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, kind, documents, documents + 1)
    index = head + lengths.tobytes() + pointers.tobytes() + np.arange(documents + 1, dtype="<i8").tobytes()
    path.with_suffix(".idx").write_bytes(index)


@pytest.mark.parametrize(("dtype", "kind"), [("<u1", 1), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)])
def test_megatron_s_index_says_how_wide_a_token_is(tmp_path: Path, dtype: str, kind: int) -> None:
    write_index(tmp_path / "text_document.bin", np.arange(10, dtype=dtype), kind)
    assert ids(opened(tmp_path)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_an_index_of_something_else_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "a.bin"
    write_index(place, np.arange(10, dtype="<i4"), 4)
    with pytest.raises(ConfigError, match=r"token_size is 2, but .*a.bin has tokens of 4 bytes, by its header"):
        opened(place, token_size=2)
    place.write_bytes(place.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"a.bin has 36 bytes, but a.idx announces 10 tokens of 4 bytes"):
        opened(place)
    write_index(place, np.arange(10, dtype="<f4"), 7)
    with pytest.raises(ConfigError, match="type of tokens 7, expected version 1 and a type of integers"):
        opened(place)
    (tmp_path / "a.idx").write_bytes(b"something else")
    with pytest.raises(ConfigError, match=r"a.idx is not an index of Megatron's"):
        opened(place)


@pytest.mark.parametrize(("magic", "dtype"), [(20240520, "<u2"), (20240801, "<u4")])
def test_the_header_of_256_integers_is_not_read_as_tokens(tmp_path: Path, magic: int, dtype: str) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, 11
    whole = header.tobytes() + np.arange(11, dtype=dtype).tobytes()
    (tmp_path / "fineweb_train_000001.bin").write_bytes(whole)
    assert ids(opened(tmp_path)) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    (tmp_path / "fineweb_train_000001.bin").write_bytes(whole[:-1])
    with pytest.raises(ConfigError, match="header of 256 integers announces 11 tokens"):
        opened(tmp_path)


@pytest.mark.parametrize("vocab", [50_257, 128_256])
@pytest.mark.parametrize("dtype", ["<u2", "<u4", "<i8"])
def test_the_width_of_raw_tokens_is_seen(tmp_path: Path, dtype: str, vocab: int) -> None:
    tokens = np.random.default_rng(0).integers(0, min(vocab, 1 << 16 if dtype == "<u2" else vocab), 4000).astype(dtype)
    (tmp_path / "train.bin").write_bytes(tokens.tobytes())
    assert ids(opened(tmp_path, vocab_size=vocab), 0, 5) == tokens[:20].reshape(5, 4).tolist()
    if dtype != "<u2":
        with pytest.raises(ConfigError, match=rf"token_size is 2, but .* {tokens.itemsize} bytes, by its contents"):
            opened(tmp_path, vocab_size=vocab, token_size=2)


def test_a_width_in_doubt_must_be_given(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(400))
    with pytest.raises(ConfigError, match=r"a.bin does not show how many bytes a token has: .* Set token_size"):
        opened(tmp_path)
    assert len(opened(tmp_path, token_size=4)) == 25


def test_wide_tokens_beyond_the_vocabulary_are_not_taken_for_narrow_ones(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(np.random.default_rng(0).integers(0, 128_000, 400).astype("<u4").tobytes())
    with pytest.raises(DataError, match="but the vocabulary has 70000"):
        opened(tmp_path, vocab_size=70_000).samples(0, 50)


def test_validation_files_of_a_folder_are_not_trained(
    tmp_path: Path, tokens_at: Make, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(["web_train_000.bin", "web_train_001.bin", "web_val_000.bin", "notes.bin"]):
        tokens_at(tmp_path / name, 4, first=10 * number)
    assert [row[0] for row in ids(opened(tmp_path))] == [0, 10]
    assert "the splits train, validation do not contain 1 of the files, such as notes.bin" in caplog.text
    assert [row[0] for row in ids(opened(tmp_path, split="validation"))] == [20]
    assert [row[0] for row in ids(opened(tmp_path, split="all"))] == [30, 0, 10, 20]
    with pytest.raises(ConfigError, match=r"split 'test' of .* does not exist. Splits: train, validation, by"):
        opened(tmp_path, split="test")


@pytest.mark.parametrize(
    "names",
    [
        ["train.bin", "val.bin"],
        ["a_train_1.bin", "training.bin", "constraint.bin", "dev-2.bin", "x eval.bin"],
        ["tokens-00000.bin", "tokens-00001.bin"],
        ["contest.bin", "value.bin", "trainer.bin"],
        ["train2.bin", "test.2.bin", "validation1-2.bin"],
        ["a/train/x.bin", "a/test-2/y.bin", "my_dev/z.bin", "train.bin", "other/w.bin"],
        ["deep/er/train.bin", "deep/er/test.bin", "contest/valuer.bin"],
    ],
)
def test_names_mean_what_they_mean_for_load_dataset(tmp_path: Path, names: list[str]) -> None:
    from datasets.data_files import get_data_patterns, resolve_pattern

    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    patterns = get_data_patterns(str(tmp_path))
    expected = {
        split: {
            Path(file).relative_to(tmp_path).as_posix()
            for one in those
            for file in _resolved(resolve_pattern, one, tmp_path)
        }
        for split, those in patterns.items()
    }
    assert {split: set(those) for split, those in splits_of(sorted(names)).items()} == expected


def _resolved(resolve: Any, pattern: str, folder: Path) -> list[str]:
    try:
        found: list[str] = resolve(pattern, base_path=str(folder))
    except FileNotFoundError:
        return []
    return found
