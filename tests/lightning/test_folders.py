"""Nodes that start in one folder log into folders of their own."""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger

from psyche_lightning.lightning.internals import claim_version

Make = Callable[..., Any]


def test_loggers_that_look_at_the_same_time_take_different_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loggers, together = [CSVLogger(tmp_path) for _ in range(4)], threading.Barrier(4)
    look = CSVLogger._get_next_version

    def look_together(logger: CSVLogger) -> int:
        seen = look(logger)
        together.wait(30)
        return seen

    monkeypatch.setattr(CSVLogger, "_get_next_version", look_together)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(claim_version, loggers))
    assert sorted(logger.version for logger in loggers) == [0, 1, 2, 3]
    assert all(Path(logger.log_dir).is_dir() for logger in loggers)


def test_a_version_of_the_users_stays(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, version="mine")
    claim_version(logger)
    assert (logger.version, list(tmp_path.iterdir())) == ("mine", [])


def test_trainers_that_were_made_together_log_each_into_its_own_folder(
    classifier: Make, loader: Make, trainer: Make, tmp_path: Path
) -> None:
    fits = [trainer(max_steps=steps, logger=CSVLogger(tmp_path), log_every_n_steps=1) for steps in (3, 4)]
    for fit in fits:
        fit.fit(classifier(), loader())
    folders = [Path(fit.logger.log_dir) for fit in fits]
    assert [folder.name for folder in folders] == ["version_0", "version_1"]
    for folder, steps in zip(folders, (3, 4), strict=True):
        with open(folder / "metrics.csv") as file:
            assert len([row for row in csv.DictReader(file) if row["loss_step"]]) == steps
