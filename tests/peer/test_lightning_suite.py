"""The comparison with Lightning's own tests, without these."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from peer.lightning_suite import HERE, Outcome, Reason, judge, main, reasons, selection

PASSED = Outcome("passed", "")
REFUSED = Reason("refused", "one data set", "exactly one", ("a.py::test_loaders",))


def failed(error: str) -> Outcome:
    return Outcome("failed", error)


def test_a_difference_in_the_list_is_known() -> None:
    ours = {"a.py::test_loaders[2]": failed("ConfigError: exactly one"), "a.py::test_other": PASSED}
    assert judge(ours, {"a.py::test_loaders[2]": PASSED}, [REFUSED]) == []


def test_what_fails_with_both_strategies_is_no_difference() -> None:
    ours = {"a.py::test_other": failed("no network")}
    assert judge(ours, {"a.py::test_other": failed("no network")}, [REFUSED]) == []


@pytest.mark.parametrize(
    ("ours", "says"),
    [
        ({"a.py::test_other": failed("boom\nmore")}, ["not in the list: a.py::test_other: boom"]),
        (
            {"a.py::test_loaders": failed("boom"), "a.py::test_loaders[2]": failed("exactly one")},
            ["not for its reason (one data set): a.py::test_loaders: boom"],
        ),
        (
            {"a.py::test_loaders": PASSED},
            ["no longer differs, remove it from the list (one data set): a.py::test_loaders"],
        ),
    ],
)
def test_every_other_difference_is_wrong(ours: dict[str, Outcome], says: list[str]) -> None:
    assert judge(ours, dict.fromkeys(ours, PASSED), [REFUSED]) == says


def test_the_list_holds_refusals_and_facts_of_selected_tests() -> None:
    known, chosen = reasons(), selection()
    assert {reason.kind for reason in known} == {"refused", "fact"}
    for reason in known:
        re.compile(reason.shows)
        assert reason.why.endswith(".")
        assert reason.tests == tuple(sorted(set(reason.tests)))
        assert all(any(test.startswith(one) for one in chosen) for test in reason.tests)


def test_a_checkout_of_another_version_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "version.info").write_text("2.5.0\n")
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "a checkout of Lightning 2.5.0" in capsys.readouterr().err
    assert (HERE / "forced.py").exists()
