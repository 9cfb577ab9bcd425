from __future__ import annotations

import math
from typing import Any

import pytest

from psyche_lightning.errors import CoordinatorError, ManifestMismatchError
from psyche_lightning.protocol.manifest import ABSENT, MAX_MANIFEST_SIZE, differences, merge


def test_the_first_node_fixes_everything() -> None:
    offered = {"model": {"layers": (1, 2)}}
    assert merge(None, offered) == {"model": {"layers": [1, 2]}}


def test_nothing_is_added_to_a_sealed_manifest() -> None:
    held = {"model": {"width": 8}}
    assert merge(held, {"model": {"width": 8}}, sealed=True) is held
    assert merge(held, {}, sealed=True) is held
    for section in ({"step": 50}, ABSENT, None):
        with pytest.raises(ManifestMismatchError) as caught:
            merge(held, {"model": {"width": 8}, "start": section}, sealed=True)
        assert caught.value.differences == [("start", ABSENT, section)]
    with pytest.raises(ManifestMismatchError):
        merge({}, {"data": {}}, sealed=True)


def test_all_sections_together_are_bounded() -> None:
    held = {"a": "y" * (MAX_MANIFEST_SIZE - 100)}
    assert merge(held, {"b": "y" * 50}).keys() == {"a", "b"}
    with pytest.raises(CoordinatorError, match="all sections together") as caught:
        merge(held, {"b": "y" * 150})
    assert caught.value.code == "InvalidManifest"


def test_the_first_node_must_agree_and_may_add() -> None:
    held = {"model": {"width": 8}}
    assert merge(held, {"model": {"width": 8}}) is held
    assert merge(held, {}) is held
    assert merge(held, {"data": {"path": "x"}}) == {"model": {"width": 8}, "data": {"path": "x"}}
    assert held == {"model": {"width": 8}}


def test_differences_are_listed_field_by_field() -> None:
    held = {"model": {"width": 8, "names": ["a", "b"], "old": 1}, "wire": 1, "lr": 1}
    offered = {"model": {"width": 16, "names": ["a", "c"], "new": None}, "wire": 1, "lr": 1.0}
    with pytest.raises(ManifestMismatchError) as caught:
        merge(held, offered)
    assert caught.value.differences == [
        ("model.width", 8, 16),
        ("model.names.1", "b", "c"),
        ("model.old", 1, ABSENT),
        ("model.new", ABSENT, None),
        ("lr", 1, 1.0),
    ]
    assert "model.width: the run has 8, this node has 16" in str(caught.value)
    assert "model.old: the run has 1, this node has (absent)" in str(caught.value)
    assert caught.value.code == "ManifestMismatch"


def test_many_and_long_differences_are_shortened() -> None:
    held, offered = ({"model": {str(i): f"{name}" * 500 for i in range(30)}} for name in "ab")
    with pytest.raises(ManifestMismatchError, match="and 20 more") as caught:
        merge(held, offered)
    assert len(caught.value.differences) == 30
    assert len(str(caught.value)) < 4000


def test_lists_of_other_lengths_differ_as_a_whole() -> None:
    assert differences([1], [1, 2], "a") == [("a", [1], [1, 2])]


@pytest.mark.parametrize(
    "offered",
    [[], {"x": math.nan}, {"x": b"bytes"}, {"x": "y" * MAX_MANIFEST_SIZE}],
    ids=["list", "nan", "bytes", "large"],
)
def test_what_is_not_json_or_too_large_is_refused(offered: Any) -> None:
    with pytest.raises(CoordinatorError) as caught:
        merge(None, offered)
    assert caught.value.code == "InvalidManifest"
