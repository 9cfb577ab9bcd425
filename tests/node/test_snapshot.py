from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche_lightning.errors import WireError
from psyche_lightning.node.snapshot import (
    PIECE_SIZE,
    Index,
    TensorEntry,
    cut,
    decode_index,
    encode_index,
    entry_of,
    first_difference,
)
from psyche_lightning.wire.canonical import pack, sha256, unpack

WEIGHT = entry_of("weight", "float32", (2, 3), bytes(24), None)
BIAS = entry_of("bias", "bfloat16", (3,), b"abcdef", None)


def test_an_index_is_sorted_and_decodes_to_its_tensors() -> None:
    assert decode_index(encode_index([WEIGHT, BIAS])).tensors == (BIAS, WEIGHT)
    assert encode_index([WEIGHT, BIAS]) == encode_index([BIAS, WEIGHT])


def test_pieces_cover_a_tensor_and_their_hashes_address_them() -> None:
    data = bytes(range(256)) * (PIECE_SIZE // 256) + b"rest"
    stored = {}

    def put(blob: bytes) -> bytes:
        stored[sha256(blob)] = blob
        return sha256(blob)

    entry = entry_of("w", "uint8", (len(data),), data, put)
    assert [len(piece) for piece in cut(data)] == [PIECE_SIZE, 4]
    assert b"".join(stored[piece] for piece in entry.pieces) == data


@pytest.mark.parametrize(
    "row",
    [
        ["w", "float32", [2, 3], 25, [b"x" * 32]],  # a size that shape and dtype do not give
        ["w", "float99", [2, 3], 24, [b"x" * 32]],
        ["w", "float32", [2, 3], 24, []],  # too few pieces
        ["w", "float32", [2, 3], 24, [b"x" * 31]],
        ["w", "float32", [1 << 50], 1 << 52, [b"x" * 32]],
        ["w", "float32", [True, 6], 24, [b"x" * 32]],
        [1, "float32", [6], 24, [b"x" * 32]],
        "w",
    ],
)
def test_a_row_that_does_not_fit_together_is_refused(row: object) -> None:
    with pytest.raises(WireError):
        decode_index(pack([2, [], row]))


def test_names_in_another_order_or_twice_are_refused() -> None:
    def row(entry: TensorEntry) -> list[object]:
        return [entry.name, entry.dtype, list(entry.shape), entry.size, list(entry.pieces)]

    for entries in ([WEIGHT, BIAS], [BIAS, BIAS]):
        with pytest.raises(WireError, match="order"):
            decode_index(pack([2, [], *map(row, entries)]))
    with pytest.raises(WireError, match="version"):
        decode_index(pack([1, [], row(BIAS)]))


def test_open_ids_are_part_of_the_digest_and_come_with_the_index() -> None:
    open_ids = ((7, 100, 102), (8, 90, 91))
    index = decode_index(encode_index([WEIGHT], open_ids))
    assert index.open_ids == open_ids
    assert unpack(encode_index([WEIGHT], open_ids), max_size=1000)[1] == [[7, 100, 101], [8, 90, 90]]
    assert encode_index([WEIGHT], open_ids) != encode_index([WEIGHT])


@pytest.mark.parametrize("rows", [[[7, 5, 4]], [[8, 1, 1], [7, 2, 2]], [[7, 1]], [[7, True, 1]], [[-1, 1, 1]], 5])
def test_malformed_open_ids_are_refused(rows: object) -> None:
    with pytest.raises(WireError, match="open ids"):
        decode_index(pack([2, rows]))


@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    try:
        index = decode_index(noise)
    except WireError:
        return
    assert encode_index(index.tensors, index.open_ids) == noise


def test_the_first_difference_is_named() -> None:
    other = entry_of("weight", "float32", (2, 3), b"\x01" + bytes(23), None)
    assert first_difference(Index((BIAS, WEIGHT)), Index((BIAS, other))) == "weight"
    assert first_difference(Index((BIAS, WEIGHT)), Index((WEIGHT,))) == "bias"
    assert first_difference(Index((BIAS,)), Index((BIAS,))) == ""
